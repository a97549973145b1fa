import ast
import re
from collections import Counter

import pytest

from restpoint import bundled
from restpoint.errors import RestpointError

TOKENS = {"code": 75_464, "maths": 75_191, "prose": 75_252, "plays": 75_056}


def shingles(text, width=50):
    plain = re.sub(r"\s+", " ", text).strip().lower()
    return {plain[i : i + width] for i in range(len(plain) - width + 1)}


def count(reference, texts):
    return [len(ids) for ids in reference.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_fitting_text_has_the_tokens_that_its_readme_states(reference, domain):
    tokens = count(reference, bundled.fit_texts(domain))
    readme = (bundled.TEXT_PATH / "README.md").read_text(encoding="utf-8")
    assert sum(tokens) == TOKENS[domain]
    assert max(tokens) < reference.context_length
    assert f"| `{domain}` | {len(tokens)} | {TOKENS[domain]:,} |" in readme


def test_any_prefix_of_the_fitting_text_is_balanced(reference):
    domain_of = {text: domain for domain in bundled.DOMAINS for text in bundled.fit_texts(domain)}
    texts = list(bundled.fit_texts())
    given = Counter()
    for text, tokens in zip(texts, count(reference, texts), strict=True):
        given[domain_of[text]] += tokens
        if sum(given.values()) > 10_000:
            assert max(given[d] for d in bundled.DOMAINS) - min(given[d] for d in bundled.DOMAINS) < 1024
    assert set(given) == set(bundled.DOMAINS)


def test_no_prompt_shares_fifty_characters_with_the_fitting_text():
    fit = set().union(*(shingles(text) for text in bundled.fit_texts()))
    assert not [prompt.id for prompt in bundled.prompts() if shingles(prompt.text) & fit]


def test_the_overlap_check_sees_an_overlap():
    document = next(bundled.fit_texts("plays"))
    assert shingles("Quoth he:  " + document[100:180].replace(" ", "\n")) & shingles(document)


def test_prompts_are_fifty_different_ones_of_each_domain(reference):
    prompts = bundled.prompts()
    assert [prompt.domain for prompt in prompts] == list(bundled.DOMAINS) * 50
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 200
    assert bundled.prompts("maths") == [prompt for prompt in prompts if prompt.domain == "maths"]
    for prompt, tokens in zip(prompts, count(reference, (p.text for p in prompts)), strict=True):
        low, high = {"code": (20, 400), "maths": (20, 250)}.get(prompt.domain, (60, 100))
        assert low <= tokens <= high, prompt.id


def test_prompts_have_their_domains_forms():
    for prompt in bundled.prompts("maths"):
        assert prompt.text.startswith("Question: ")
        assert prompt.text.endswith("\nAnswer:")
    for prompt in bundled.prompts("code"):
        ast.parse(prompt.text + "    pass\n")
    assert all(re.match(r"Question: .*\nAnswer: ", text, re.DOTALL) for text in bundled.fit_texts("maths"))


@pytest.mark.parametrize("read", [bundled.prompts, bundled.fit_texts])
def test_an_unknown_domain_is_refused_at_once(read):
    with pytest.raises(RestpointError, match=r"domain='math' .* code, maths, prose, plays"):
        read("math")
