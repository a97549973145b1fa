"""Sampled text follows the model's own law, whatever drafts and however it is verified: G-tests through the whole loop.

The exact enumeration of every verifier is in test_verifiers.py; here drafters, fusion, cache and loop take part.
"""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor, LogitsProcessorList

from decoding import fused, model_and_target, tokens_of
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, Scored
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.decode.verifiers.registry import VERIFIERS

SETTINGS = SamplingSettings(temperature=1.2, top_k=3)
TEXT = [4, 2, 8, 6, 4, 2, 6, 8, 4, 2]
"""A prompt that repeats itself, so that tables and copies have something to say."""
SAMPLES = 1500
LEVEL = 0.001
"""With 81 texts of four tokens these notice, with probability 0.9, a total variation of 0.13; the level is low since
there are twenty tests."""


class Few(LogitsProcessor):
    """Allows five tokens, so that drafter and model agree often enough to be worth a test."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        kept = torch.full_like(scores, float("-inf"))
        kept[:, 0:10:2] = scores[:, 0:10:2]
        return kept  # type: ignore[return-value]


class NeverTwice(Few):
    """Forbids the last token of each path as well: right only if it is given every path's own prefix."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return super().__call__(input_ids, scores).scatter(1, input_ids[:, -1:], float("-inf"))  # type: ignore[return-value]


def g_test(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the G-test, cells expected below 5 pooled."""
    total = sum(counts.values())
    statistic, cells, rare_seen, rare_expected = 0.0, 0, 0, 0.0
    assert set(counts) <= {block for block, share in law.items() if share > 0}
    for block, share in law.items():
        if total * share < 5:
            rare_seen, rare_expected = rare_seen + counts[block], rare_expected + total * share
            continue
        cells += 1
        if counts[block]:
            statistic += 2 * counts[block] * math.log(counts[block] / (total * share))
    if rare_expected > 0:
        cells += 1
        statistic += 2 * rare_seen * math.log(rare_seen / rare_expected) if rare_seen else 0.0
    return float(chi2.sf(statistic, cells - 1))


def test_the_g_test_has_the_power_that_is_stated() -> None:
    """A law that is wrong by a total variation of 0.13, towards or away from single texts, is noticed 9 times in 10."""
    generator = torch.Generator().manual_seed(5)
    law = torch.distributions.Dirichlet(torch.ones(81)).sample()
    right, noticed = 0, 0
    for _ in range(100):
        shift = torch.randn(81, generator=generator) * law
        shift -= law * shift.sum()
        wrong = (law + shift * 0.26 / shift.abs().sum()).clamp_min(0)
        for of in (law, wrong):
            drawn = torch.multinomial(of, SAMPLES, replacement=True, generator=generator).tolist()
            counts = Counter((cell,) for cell in drawn)
            p_value = g_test(counts, {(cell,): float(share) for cell, share in enumerate(law)})
            right += of is law and p_value > LEVEL
            noticed += of is wrong and p_value <= LEVEL
    assert right >= 98
    assert noticed >= 90


@torch.no_grad()
def exact_law(model, prompt: list[int], sampler: Sampler, length: int) -> dict[tuple[int, ...], float]:
    """Joint law of the next tokens from the model's own uncached logits."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for block, share in law.items():
            text = [*prompt, *block]
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1:]
            probabilities = sampler.law(logits, lambda text=text: [text])[0]
            for token in probabilities.nonzero()[:, 0].tolist():
                longer[(*block, token)] = share * float(probabilities[token])
        law = longer
    return law


class Rewound(LayeredTarget):
    """Reads its prompt once: a later text with the same prompt begins from the cache as it was then."""

    def prefill(self, prompts: list[list[int]]) -> list[Scored]:
        if self.cache.lengths[0] == 0:
            self.scored = super().prefill(prompts)
        self.cache.lengths = [len(prompts[0])]
        return self.scored


def sampled_law(
    names: tuple[str, ...],
    verifier: Verifier,
    settings: TreeSettings,
    sampling: SamplingSettings = SETTINGS,
    processor: LogitsProcessor | None = None,
) -> tuple[float, float, float, float]:
    """p-value, and per text: nodes drafted, nodes drawn at random, nodes that stood."""
    model, target = model_and_target("llama")
    target = Rewound(target.layered)
    sampler = Sampler(sampling, LogitsProcessorList([processor or Few()]))
    law = exact_law(model, TEXT, sampler, 4)
    speculator = fused(target, sampler, names, settings, verifier)
    drawn = drawn_nodes(speculator)
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for _ in range(SAMPLES):
        rounds = list(decode(target, TEXT, sampler, Stopping(max_tokens=4), speculator, verifier))
        counts[tuple(tokens_of(rounds))] += 1
        drafted += sum(turn.drafted for turn in rounds)
        accepted += sum(turn.accepted for turn in rounds)
    return g_test(counts, law), drafted / SAMPLES, len(drawn) / SAMPLES, accepted / SAMPLES


def drawn_nodes(speculator: Fusion) -> list[int]:
    """A list that collects the drawn nodes of every draft, as it is verified."""
    found: list[int] = []
    observe = speculator.observe

    def watched(path, verified):
        for group in verified.draft.drawn.values():
            found.extend(group.nodes)
        observe(path, verified)

    speculator.observe = watched  # type: ignore[method-assign]
    return found


slow = pytest.mark.slow
TREE = TreeSettings(fixed=9, levels=2, width=2, children=1, draws=1)
TWICE = TreeSettings(fixed=12, levels=2, width=2, children=1, draws=2)


@pytest.mark.parametrize(
    ("names", "way", "settings"),
    [
        pytest.param(("exit 0", "lookup", "recycling"), "token-wise", TREE, id="exit-0-token-wise"),
        pytest.param(("exit 1", "ngrams"), "token-wise", TREE, id="exit-1-token-wise", marks=slow),
        pytest.param(("exit 0", "recycling"), "block", TREE, id="exit-0-block", marks=slow),
        pytest.param(("exit 1", "lookup"), "block", TREE, id="exit-1-block", marks=slow),
        pytest.param(("exit 0", "lookup"), "traversal", TWICE, id="exit-0-traversal", marks=slow),
        pytest.param(("exit 1", "recycling"), "traversal", TREE, id="exit-1-traversal", marks=slow),
        pytest.param(("exit 0", "lookup", "recycling"), "recursive", TWICE, id="exit-0-recursive", marks=slow),
        pytest.param(("exit 1", "lookahead"), "recursive", TWICE, id="exit-1-recursive", marks=slow),
        pytest.param(("exit 0", "ngrams"), "recursive-iid", TWICE, id="exit-0-recursive-iid", marks=slow),
        pytest.param(("exit 0", "lookup"), "optimal", TWICE, id="exit-0-optimal", marks=slow),
        pytest.param(("exit 1", "recycling"), "optimal", TWICE, id="exit-1-optimal", marks=slow),
        pytest.param(("exit 0", "recycling"), "optimal-iid", TWICE, id="exit-0-optimal-iid", marks=slow),
        pytest.param(("exit 0", "lookup"), "k-seq", TWICE, id="exit-0-k-seq", marks=slow),
        pytest.param(("lookup", "recycling", "ngrams", "lookahead"), "token-wise", TREE, id="instant", marks=slow),
    ],
)
def test_sampled_texts_follow_the_models_law(names: tuple[str, ...], way: str, settings: TreeSettings) -> None:
    """Four tokens, of which up to three come from one draft."""
    p_value, drafted, drawn, accepted = sampled_law(names, VERIFIERS[way], settings)
    assert drafted > 1.5
    assert accepted > 0.3
    assert drawn > 0.5 or "exit" not in names[0]
    assert p_value > LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("way", ["token-wise", "traversal", "recursive"])
def test_chosen_sizes_keep_the_law(way: str) -> None:
    """Where the controller decides how much is drafted, drawn and verified, by what it has seen."""
    p_value, drafted, drawn, accepted = sampled_law(
        ("exit 0", "lookup", "recycling"), VERIFIERS[way], TreeSettings(children=1, draws=2)
    )
    assert drafted > 0.5
    assert drawn > 0.2
    assert accepted > 0.2
    assert p_value > LEVEL


@pytest.mark.slow
@pytest.mark.parametrize(("way", "settings"), [("token-wise", TREE), ("recursive", TWICE)], ids=["one", "two"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_processors_with_their_own_prefix_keep_the_law(way: str, settings: TreeSettings, penalty: float) -> None:
    """A processor that forbids a path's last token, and a penalty on what the path holds, on trees."""
    sampling = SamplingSettings(temperature=1.2, top_k=3, repetition_penalty=penalty)
    p_value, drafted, drawn, accepted = sampled_law(
        ("exit 0", "lookup", "recycling"), VERIFIERS[way], settings, sampling, NeverTwice()
    )
    assert drafted > 1.5
    assert drawn > 1
    assert accepted > 0.3
    assert p_value > LEVEL


@pytest.mark.slow
def test_sampled_blocks_of_the_bundled_model(reference) -> None:
    """Three tokens, n = 10,000, with the bundled profile and all that drafts by default."""
    from restpoint import bundled
    from restpoint.generate import Decoder
    from restpoint.profile import Profile

    decoder = Decoder(reference, Profile.load(bundled.PROFILE_PATH), tree=TreeSettings(children=2))
    settings = SamplingSettings(temperature=1.0, top_k=4)
    prompt = decoder.encode("def main(")
    sampler = Sampler(settings)
    law = exact_law(reference.model, prompt, sampler, 3)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    target = Rewound(decoder.layered)
    assert decoder.drafting is not None
    speculator = decoder.drafting.speculators(target, [sampler], 4)[0]
    assert speculator is not None
    drawn = drawn_nodes(speculator)
    for _ in range(10_000):
        rounds = list(decode(target, prompt, sampler, Stopping(max_tokens=3), speculator))
        counts[tuple(tokens_of(rounds))] += 1
        accepted += sum(turn.accepted for turn in rounds)
    assert accepted > 1000
    assert len(drawn) > 5000
    assert g_test(counts, law) > LEVEL
