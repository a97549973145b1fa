"""Greedy text is plain decoding's, token by token: every drafter, shape of draft and verifier, on many prompts."""

import itertools

import pytest
import torch

from decoding import EXITS, INSTANT, costs, fused, model_and_target, tokens_of
from families import VOCABULARY
from restpoint import bundled
from restpoint.decode.drafters.datastore import Datastore, tokenizer_hash
from restpoint.decode.drafters.draft_model import draft_by_model
from restpoint.decode.drafters.skip_choice import SkipChoice
from restpoint.decode.drafters.skips import SkipSet
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.registry import VERIFIERS
from restpoint.drafting.brought import Maker, retrieve_from, skip_layers
from restpoint.generate import Decoder
from restpoint.model.load import Loaded, load
from restpoint.profile import Profile

pytestmark = pytest.mark.slow

PROMPTS = 100
SHAPES = {
    "wide": TreeSettings(fixed=12, levels=2, width=3, children=3),
    "chain": TreeSettings(fixed=6, branching=False),
}
BROUGHT = [("retrieval",), ("draft-model",), ("skip",), ("skip online",)]
TOGETHER = ("lookup", "recycling", "ngrams", "lookahead")
NAMED = [(name,) for name in (*INSTANT, "heads", "predictor", "recurrence@4", "ridge@4", "lens@4", "dynamic-exit")]


@pytest.fixture(scope="module")
def expected(reference: Loaded) -> dict[str, list[int]]:
    """The first prompts of every kind of text, and what plain decoding continues them with."""
    plain = Decoder(reference)
    texts = [prompt.text for prompt in bundled.prompts()[:PROMPTS]]
    return {text: plain.generate(text, max_tokens=16, ignore_end=True).tokens for text in texts}


@pytest.fixture(scope="module")
def brought(reference: Loaded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Maker]:
    """Drafters that a profile does not hold."""
    tokenizer = reference.tokenizer
    documents = [tokenizer(text).input_ids for text in itertools.islice(bundled.fit_texts(), 200)]
    store = Datastore.build(documents, tmp_path_factory.mktemp("store") / "texts", tokenizer_hash(tokenizer))
    skip = SkipSet.spread(16, 6)
    return {
        "retrieval": retrieve_from(store),
        "draft-model": draft_by_model(load(), reference),
        "skip": skip_layers(skip),
        "skip online": skip_layers(skip, SkipChoice(6, 32)),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", [*NAMED, *BROUGHT, TOGETHER, (*TOGETHER, "heads", "predictor")], ids=" ".join)
def test_bundled_model(
    reference: Loaded,
    expected: dict[str, list[int]],
    brought: dict[str, Maker],
    names: tuple[str, ...],
    shape: str,
) -> None:
    """Each by itself and all together; the verifiers take turns, though greedy decoding should not notice."""
    own = {name: brought[name] for name in names if name in brought}
    named = () if own else names
    ways = itertools.cycle(VERIFIERS)
    decoders = {
        way: Decoder(
            reference, Profile.load(bundled.PROFILE_PATH), named, brought=own, verifier=way, tree=SHAPES[shape]
        )
        for way in VERIFIERS
    }
    accepted = 0
    for text, tokens in expected.items():
        found = decoders[next(ways)].generate(text, max_tokens=16, ignore_end=True)
        assert found.tokens == tokens, text
        accepted += found.statistics.accepted
    assert len(expected) == PROMPTS
    assert accepted > PROMPTS


@pytest.mark.parametrize("way", VERIFIERS)
@pytest.mark.parametrize("name", [*INSTANT, *EXITS])
def test_tiny_model(name: str, way: str) -> None:
    """Every drafter with every verifier, as trees and as chains: drafts that are mostly wrong."""
    _, target = model_and_target("llama")
    generator = torch.Generator().manual_seed(1)
    accepted = 0
    for _ in range(PROMPTS):
        prompt = torch.randint(0, VOCABULARY, (6,), generator=generator).tolist()
        plain = tokens_of(decode(target, prompt, Sampler(SamplingSettings()), Stopping(16)))
        for shape in ("wide", "chain"):
            sampler = Sampler(SamplingSettings())
            speculator = fused(target, sampler, (name,), SHAPES[shape], VERIFIERS[way], costs())
            rounds = list(decode(target, prompt, sampler, Stopping(16), speculator, VERIFIERS[way]))
            assert tokens_of(rounds) == plain
            accepted += sum(turn.accepted for turn in rounds)
    assert accepted > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_drafts_over_twenty_thousand_tokens(dtype: str) -> None:
    """With and without drafts the same compiled kernels run, so the text is the same to the last token."""
    loaded = load(dtype=dtype)
    fast = Decoder(loaded, Profile.load(bundled.PROFILE_PATH), compile=True)
    plain = Decoder(loaded, compile=fast.compiled or True)
    tokens = accepted = 0
    for prompt in bundled.prompts():
        ours = fast.generate(prompt.text, max_tokens=101, ignore_end=True)
        assert ours.tokens == plain.generate(prompt.text, max_tokens=101, ignore_end=True).tokens, prompt.text
        tokens += len(ours.tokens)
        accepted += ours.statistics.accepted
    assert tokens >= 20_000
    assert accepted > tokens / 4
