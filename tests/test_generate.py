"""Text in, text out, on the bundled model with its bundled profile."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from restpoint import bundled
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.generate import Decoder
from restpoint.model.load import Loaded
from restpoint.profile import Profile


@pytest.fixture(scope="module")
def plain(reference: Loaded) -> Decoder:
    return Decoder(reference)


@pytest.fixture(scope="module")
def fast(reference: Loaded) -> Decoder:
    return Decoder(reference, Profile.load(bundled.PROFILE_PATH))


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_token_identical_to_plain_and_to_transformers(
    reference: Loaded, plain: Decoder, fast: Decoder, domain: str
) -> None:
    compare(reference, plain, fast, [prompt.text for prompt in bundled.prompts(domain)[:2]], 40)


@pytest.mark.slow
def test_token_identical_on_two_hundred_prompts(reference: Loaded, plain: Decoder, fast: Decoder) -> None:
    compare(reference, plain, fast, [prompt.text for prompt in bundled.prompts()], 128)


def compare(reference: Loaded, plain: Decoder, fast: Decoder, prompts: list[str], length: int) -> None:
    accepted = 0
    for text in prompts:
        ids = torch.tensor([fast.encode(text)])
        expected = reference.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
        )[0, ids.shape[1] :].tolist()
        # min_new_tokens forbids the end token in transformers; the same processor in ours
        from transformers import MinNewTokensLengthLogitsProcessor

        forbid = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(ids.shape[1], length, 0)])
        assert plain.generate(text, max_tokens=length, processors=forbid).tokens == expected
        drafted = fast.generate(text, max_tokens=length, processors=forbid)
        assert drafted.tokens == expected
        accepted += drafted.statistics.accepted
    assert accepted > 0


def test_statistics_add_up(fast: Decoder, reference: Loaded) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [layer.register_forward_hook(count) for layer in reference.model.model.layers]
    try:
        generation = fast.generate("def read(path):\n", max_tokens=50, ignore_end=True)
    finally:
        for hook in hooks:
            hook.remove()
    seen = generation.statistics
    assert seen.new_tokens == len(generation.tokens) == 50
    assert seen.passes * seen.tokens_per_pass == pytest.approx(49)
    assert seen.accepted <= seen.drafted
    assert seen.layers_per_token * 49 == pytest.approx(calls - 16)  # the prompt's pass runs 16 layers
    assert seen.tokens_per_second > 0


def test_streamed_text_is_the_generated_text(fast: Decoder, reference: Loaded) -> None:
    pieces = list(fast.stream("Question: Tom has", max_tokens=40, ignore_end=True))
    generation = fast.generate("Question: Tom has", max_tokens=40, ignore_end=True)
    text = "".join(piece.text for piece in pieces)
    assert text == generation.text
    assert text == reference.tokenizer.decode(generation.tokens, skip_special_tokens=True)


def test_stop_strings_are_cut_exactly(fast: Decoder) -> None:
    whole = fast.generate("def read(path):\n", max_tokens=60, ignore_end=True)
    stop = whole.text[25:29]
    cut = fast.generate("def read(path):\n", max_tokens=60, stop=[stop, "never there"], ignore_end=True)
    assert cut.finished == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop not in "".join(piece.text for piece in fast.stream("def read(path):\n", max_tokens=60, stop=[stop]))


def test_unfinished_characters_wait(plain: Decoder) -> None:
    """Bytes of one character that arrive in several tokens are shown once they are whole."""
    from restpoint.decode.loop import Round
    from restpoint.generation import Words

    ids = plain.loaded.tokenizer("é漢字😀 ok", add_special_tokens=False).input_ids
    text = Words(plain.loaded.tokenizer, ())
    shown = [
        text.add(Round((token,), 0, 0, 0, 0.0, 0.0, "length" if i == len(ids) - 1 else ""))
        for i, token in enumerate(ids)
    ]
    assert "".join(piece.text for piece in shown) == "é漢字😀 ok"
    assert not any("\ufffd" in piece.text for piece in shown)


def test_sampling_is_reproducible_and_seeded(fast: Decoder) -> None:
    settings = SamplingSettings(temperature=0.9, top_p=0.95, seed=7)
    first, second = (fast.generate("The", settings, max_tokens=30) for _ in range(2))
    assert first.tokens == second.tokens
    other = fast.generate("The", SamplingSettings(temperature=0.9, top_p=0.95, seed=8), max_tokens=30)
    assert other.tokens != first.tokens


def test_processors_apply_to_drafts_too(plain: Decoder, fast: Decoder) -> None:
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    settings = SamplingSettings(repetition_penalty=1.3)
    expected = plain.generate("def f(", settings, max_tokens=30, processors=processors)
    drafted = fast.generate("def f(", settings, max_tokens=30, processors=processors, draft_tokens=4)
    assert drafted.tokens == expected.tokens


def test_streams_can_be_read_in_turn(plain: Decoder, fast: Decoder) -> None:
    """Each text has a cache of its own."""
    prompts = ["def read(path):\n", "Question: Tom has"]
    expected = [plain.generate(prompt, max_tokens=20).text for prompt in prompts]
    streams = [fast.stream(prompt, max_tokens=20) for prompt in prompts]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams):
        texts = [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected


def test_context_limit_is_said(reference: Loaded, fast: Decoder) -> None:
    limit = reference.context_length
    assert limit == 1024
    generation = fast.generate([5] * (limit - 6), max_tokens=50, ignore_end=True)
    assert generation.finished == "context"
    assert len(generation.tokens) == 6
    with pytest.raises(RestpointError, match="fill the context of 1024"):
        fast.generate([5] * limit)


def test_bad_requests(fast: Decoder) -> None:
    with pytest.raises(RestpointError, match="prompt: it is empty"):
        fast.generate("")
    with pytest.raises(RestpointError, match="stop string is empty"):
        fast.generate("a", stop=[""])
    with pytest.raises(RestpointError, match="draft_tokens is -1"):
        fast.generate("a", draft_tokens=-1)
    with pytest.raises(RestpointError, match="max_tokens is 0"):
        fast.generate("a", max_tokens=0)


def test_drafters_by_name(reference: Loaded, plain: Decoder) -> None:
    """Instant ones need no profile; what is unknown, or drafts step by step beside another, is refused."""
    profile = Profile.load(bundled.PROFILE_PATH)
    assert plain.drafting is None
    prompt = "def read(path):\n"
    expected = plain.generate(prompt, max_tokens=24, ignore_end=True).tokens
    for names in (("lookup",), ("ngrams", "lookahead"), ("recycling",)):
        decoder = Decoder(reference, drafters=names)
        assert decoder.drafting is not None
        assert decoder.drafting.names == names
        found = decoder.generate(prompt, max_tokens=24, ignore_end=True, draft_tokens=6)
        assert found.tokens == expected
        assert found.statistics.drafted > 0
    with pytest.raises(RestpointError, match=r"'lokup' is unknown; did you mean lookup\?"):
        Decoder(reference, drafters=("lokup",))
    with pytest.raises(RestpointError, match="predictor needs a profile"):
        Decoder(reference, drafters=("predictor",))
    with pytest.raises(RestpointError, match="verifier='blok' is not known"):
        Decoder(reference, verifier="blok")
    two = tuple(profile.predictors)[:2]
    with pytest.raises(RestpointError, match="both draft step by step"):
        Decoder(reference, profile, two).generate("a", max_tokens=4)


def test_drafters_keep_what_they_learnt_only_if_they_share(reference: Loaded) -> None:
    """The second time the same text is written, shared tables know it."""
    prompt = "def read(path):\n"
    for share in (False, True):
        decoder = Decoder(reference, drafters=("ngrams",), share=share)
        first, second = (decoder.generate(prompt, max_tokens=40, ignore_end=True, draft_tokens=6) for _ in range(2))
        assert first.tokens == second.tokens
        gained = second.statistics.accepted - first.statistics.accepted
        assert (gained > 8) if share else gained == 0


@pytest.mark.parametrize("verifier", ["token-wise", "block", "traversal", "recursive", "optimal"])
def test_every_verifier_samples(reference: Loaded, verifier: str) -> None:
    """What the law is, test_law.py says; here, that the whole of it runs and repeats itself."""
    decoder = Decoder(reference, Profile.load(bundled.PROFILE_PATH), verifier=verifier)
    settings = SamplingSettings(temperature=0.7, top_p=0.9, seed=3)
    first, second = (
        decoder.generate("def read(path):\n", settings, max_tokens=24, ignore_end=True, draft_tokens=5)
        for _ in range(2)
    )
    assert first.tokens == second.tokens
    assert first.statistics.accepted > 0


@pytest.mark.parametrize(("name", "told"), [("max_token", "there are max_tokens"), ("temperature", "SamplingSettings")])
def test_an_unknown_option_is_refused(reference: Loaded, name: str, told: str) -> None:
    """A misspelt option would otherwise do nothing."""
    with pytest.raises(RestpointError, match=f"^{name}.*{told}"):
        Decoder(reference).generate("a", **{name: 3})  # type: ignore[arg-type]
