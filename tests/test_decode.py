"""Lossless means lossless: whatever is drafted, the text is what transformers itself would have written."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from decoding import (
    EXITS,
    INSTANT,
    PROMPT,
    Scripted,
    Shrub,
    costs,
    exit_drafter,
    fused,
    model_and_target,
    native,
    sees_trees,
    tokens_of,
)
from families import VOCABULARY, build
from restpoint.decode.draft import Draft, TokenPath
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget
from restpoint.decode.tree import TreeSettings
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

FAMILIES = [
    *("llama", "gpt2", "mistral", "mpt"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("falcon_alibi", "gpt_neo")),
]
TOGETHER = (*INSTANT, "exit 1")
SIZES = [TreeSettings(), TreeSettings(fixed=1), TreeSettings(fixed=6, levels=3, width=2, children=3)]


def greedy(*processors: LogitsProcessor, **settings: float) -> Sampler:
    return Sampler(SamplingSettings(**settings), LogitsProcessorList(processors))


@pytest.mark.parametrize(
    "names", [*((name,) for name in INSTANT), *((name,) for name in EXITS), TOGETHER], ids=" ".join
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_token_identical(family: str, names: tuple[str, ...]) -> None:
    """Chosen sizes, one node, and six nodes, as trees where the family can see them and as chains."""
    model, target = model_and_target(family)
    expected = native(model, PROMPT, 32)
    assert tokens_of(decode(target, PROMPT, greedy(), Stopping(32))) == expected
    branched = False
    for settings in SIZES:
        for branching in (True, False) if sees_trees(family) else (False,):
            settings = TreeSettings(**{**vars(settings), "branching": branching})
            sampler = greedy()
            speculator = fused(target, sampler, names, settings, trees=branching)
            seen = Watched(speculator)
            rounds = list(decode(target, PROMPT, sampler, Stopping(32), seen))
            assert tokens_of(rounds) == expected, settings
            assert sum(turn.accepted for turn in rounds) >= 32 - len(rounds)
            if settings.fixed is not None:
                assert sum(turn.drafted for turn in rounds) > 0
                assert max(turn.drafted for turn in rounds) <= settings.fixed
            assert branching or all(draft.is_chain for draft in seen.drafts)
            branched |= any(not draft.is_chain for draft in seen.drafts)
    copies = {("lookup",), ("lookahead",)}  # they find no second continuation everywhere
    assert branched or not sees_trees(family) or names in copies


class Watched(Scripted):
    """Another speculator, whose drafts are kept."""

    def __init__(self, speculator) -> None:
        super().__init__()
        self.speculator = speculator
        self.drafts: list[Draft] = []

    def begin(self, prompt) -> None:
        self.speculator.begin(prompt)

    def draft(self, path: TokenPath, room: int) -> Draft:
        draft = self.speculator.propose(path, room)
        self.drafts.append(draft)
        depths: list[int] = []
        for parent in draft.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        assert max(depths, default=0) <= room
        return draft

    def observe(self, path, verified) -> None:
        super().observe(path, verified)
        self.speculator.observe(path, verified)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi", "mistral"])
def test_random_trees_change_no_token(family: str) -> None:
    model, target = model_and_target(family)
    expected = native(model, PROMPT, 40)
    stood = 0
    for seed in range(4):
        shrub = Shrub(PROMPT + expected, seed=seed)
        rounds = list(decode(target, PROMPT, greedy(), Stopping(40), shrub))
        assert tokens_of(rounds) == expected
        assert any(not seen.draft.is_chain for seen in shrub.seen)
        stood += sum(turn.accepted for turn in rounds)
        scattered = [seen for seen in shrub.seen if any(node != index for index, node in enumerate(seen.nodes))]
        assert scattered  # a kept path that had to be moved together in the cache
    assert stood > 40


class Oracle(Scripted):
    """Drafts the text itself."""

    def __init__(self, text: list[int], length: int) -> None:
        super().__init__()
        self.text = text
        self.length = length

    def draft(self, path: TokenPath, room: int) -> Draft:
        return Draft.chain(self.text[len(path.tokens) : len(path.tokens) + min(self.length, room)])


def test_a_perfect_drafter_is_always_accepted() -> None:
    """Drafts that are the model's own greedy tokens all stand, and the text comes in the fewest possible passes."""
    model, target = model_and_target("llama")
    text = PROMPT + native(model, PROMPT, 25)
    oracle = Oracle(text, 5)
    rounds = list(decode(target, PROMPT, greedy(), Stopping(25), oracle))
    assert PROMPT + tokens_of(rounds) == text
    assert all(len(seen.nodes) == len(seen.draft.tokens) for seen in oracle.seen)
    assert len(rounds) == 1 + 4  # the prompt's token, then 24 more in blocks of at most 6
    assert [turn.layer_calls for turn in rounds] == [4] * 5


# --- the cache -------------------------------------------------------------------------------------------------------


class Small(LayeredTarget):
    """A target whose cache has room for the prompt and a few tokens more."""

    def prefill(self, prompts):
        wanted = self.layered.cache
        self.layered.cache = lambda batch=1, capacity=0: wanted(batch, len(prompts[0]) + 3)  # type: ignore[method-assign]
        try:
            return super().prefill(prompts)
        finally:
            del self.layered.cache


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("names", [("recycling",), ("exit 0",), ("exit 2",)], ids=" ".join)
def test_a_full_cache_grows_under_a_draft(names: tuple[str, ...], tree: bool) -> None:
    """The cache holds three tokens beside the prompt, a draft more: it grows when first layers have already run."""
    model = build("llama")
    target, sampler = Small(LayeredModel(model)), greedy()
    settings = TreeSettings(fixed=9, levels=4, width=2, children=3, branching=tree)
    speculator = fused(target, sampler, names, settings)
    capacities = []
    rounds = []
    for turn in decode(target, PROMPT, sampler, Stopping(40), speculator):
        capacities.append(target.cache.capacity)
        rounds.append(turn)
    assert capacities[0] == len(PROMPT) + 3
    assert len(set(capacities)) >= 3
    assert max(turn.drafted for turn in rounds) > 3
    assert tokens_of(rounds) == native(model, PROMPT, 40)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_drafts_beyond_the_arguments_prepared_ahead(family: str) -> None:
    """Layer arguments are prepared for 64 positions; drafts may reach further, and end or begin at any of them."""
    model, target = model_and_target(family)
    length = 110
    text = PROMPT + native(model, PROMPT, length)
    for reach in (62, 63, 64, 70):
        rounds = list(decode(target, PROMPT, greedy(), Stopping(length), Oracle(text, reach)))
        assert PROMPT + tokens_of(rounds) == text
        assert len(rounds) == 3
    wide = Shrub(text, largest=90, seed=1)
    rounds = list(decode(target, PROMPT, greedy(), Stopping(length), wide))
    assert PROMPT + tokens_of(rounds) == text
    assert max(turn.drafted for turn in rounds) > 64
    for names in (("exit 0",), ("exit 1",)):
        sampler = greedy()
        settings = TreeSettings(nodes=80, fixed=80, levels=70, width=1, children=1)
        speculator = fused(target, sampler, names, settings, measured=costs(largest=100))
        texts = decode(target, PROMPT, sampler, Stopping(length), speculator)
        rounds = [next(texts) for _ in range(5)]
        seen = PROMPT + tokens_of(rounds)
        assert seen == text[: len(seen)]
        assert min(turn.drafted for turn in rounds[1:]) > 64


# --- processors ------------------------------------------------------------------------------------------------------


class NeverTwice(LogitsProcessor):
    """Forbids the last token of each path: right only if it is given every path's own prefix."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))  # type: ignore[return-value]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_processors_see_their_own_prefix(penalty: float) -> None:
    model, target = model_and_target("llama")
    expected = native(
        model, PROMPT, 30, repetition_penalty=penalty, logits_processor=LogitsProcessorList([NeverTwice()])
    )
    if penalty == 1.0:
        assert expected != native(model, PROMPT, 30)
    stood = 0
    for names in (("recycling",), ("exit 2",), ("exit 0",), TOGETHER):
        for branching in (True, False):
            sampler = greedy(NeverTwice(), repetition_penalty=penalty)
            settings = TreeSettings(fixed=6, levels=2, width=2, children=3, branching=branching)
            rounds = list(decode(target, PROMPT, sampler, Stopping(30), fused(target, sampler, names, settings)))
            assert tokens_of(rounds) == expected
            stood += sum(turn.accepted for turn in rounds)
    shrub = Shrub(PROMPT + expected, seed=2)
    sampler = greedy(NeverTwice(), repetition_penalty=penalty)
    rounds = list(decode(target, PROMPT, sampler, Stopping(30), shrub))
    assert tokens_of(rounds) == expected
    assert stood + sum(turn.accepted for turn in rounds) > 10


class OnlyOdd(LogitsProcessor):
    """Allows odd tokens only, none of which is in the draft vocabulary of these tests."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()  # type: ignore[assignment]
        scores[:, ::2] = float("-inf")
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draws", [1, 2])
def test_nothing_is_drafted_where_processors_leave_nothing_to_draft(temperature: float, draws: int) -> None:
    from restpoint.decode.verifiers.registry import VERIFIERS

    _, target = model_and_target("llama")
    sampler = greedy(OnlyOdd(), temperature=temperature)
    verifier = VERIFIERS["recursive"] if draws > 1 else None
    speculator = fused(target, sampler, ("exit 2",), TreeSettings(fixed=3, levels=2, draws=draws), verifier)
    rounds = list(decode(target, [5, 17, 33], sampler, Stopping(max_tokens=20), speculator, verifier))
    assert all(token % 2 == 1 for token in tokens_of(rounds))
    assert sum(turn.drafted for turn in rounds) == 0


@pytest.mark.parametrize("names", [("exit 1",), ("exit 0",), ("recycling",)], ids=" ".join)
def test_low_precision_decodes(names: tuple[str, ...]) -> None:
    """bfloat16: the same code runs, and output is the target's own up to ties within rounding."""
    layered = LayeredModel(build("llama", "sdpa", torch.bfloat16))
    target, sampler = LayeredTarget(layered), greedy()
    speculator = fused(target, sampler, names, TreeSettings(fixed=4, levels=2, width=2, children=3))
    rounds = list(decode(target, PROMPT, sampler, Stopping(max_tokens=30), speculator))
    assert sum(turn.drafted for turn in rounds) > 0
    tokens = PROMPT + tokens_of(rounds)
    with torch.no_grad():
        logits = layered.model(torch.tensor([tokens]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens[len(PROMPT) :])[:, None])[:, 0]
    rounding = 8 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    assert float((logits.amax(1) - chosen).max()) <= rounding


# --- where a text ends -----------------------------------------------------------------------------------------------


def test_stopping_rules_never_add_a_token() -> None:
    model, target = model_and_target("llama")
    prompt = [5, 17, 33]
    text = native(model, prompt, 30)
    sampler = greedy()
    for speculator in (fused(target, sampler, TOGETHER, TreeSettings(fixed=5)), Oracle(prompt + text, 7)):
        end = text[11]
        rounds = list(decode(target, prompt, sampler, Stopping(30, frozenset([end])), speculator))
        assert tokens_of(rounds) == text[: text.index(end) + 1]
        assert rounds[-1].finished == "end"
        for limit in (1, 2, 7):
            rounds = list(decode(target, prompt, sampler, Stopping(limit), speculator))
            assert tokens_of(rounds) == text[:limit]
            assert rounds[-1].finished == "length"
            assert all(turn.drafted < limit for turn in rounds if isinstance(speculator, Oracle))
        rounds = list(decode(target, prompt, sampler, Stopping(50, context_length=12), speculator))
        assert tokens_of(rounds) == text[:9]
        assert rounds[-1].finished == "context"


def test_an_end_token_inside_an_accepted_block_ends_the_text() -> None:
    """The draft stands as a whole; what comes after the end token is dropped all the same."""
    model, target = model_and_target("llama")
    text = native(model, PROMPT, 12)
    end = next(token for token in text[2:] if token not in text[:2])
    place = text.index(end)
    oracle = Oracle(PROMPT + text, place + 2)
    rounds = list(decode(target, PROMPT, greedy(), Stopping(12, frozenset([end])), oracle))
    assert tokens_of(rounds) == text[: place + 1]
    assert rounds[-1].accepted == place + 2
    assert rounds[-1].finished == "end"


def test_a_model_that_ends_where_its_positions_end() -> None:
    """gpt2 has a table of 128 positions: drafts never reach beyond it."""
    model, target = model_and_target("gpt2")
    text = native(model, PROMPT, 128 - len(PROMPT))
    for names in (("recycling", "exit 0"), ("lookup", "exit 1")):
        sampler = greedy()
        speculator = fused(target, sampler, names, TreeSettings(fixed=12, levels=4))
        rounds = list(decode(target, PROMPT, sampler, Stopping(500, context_length=128), speculator))
        assert tokens_of(rounds) == text
        assert rounds[-1].finished == "context"


def test_a_stopped_text_ends_between_rounds() -> None:
    from restpoint.decode.loop import Text, decode_batch

    model, target = model_and_target("llama")
    text = Text(PROMPT, greedy(), Stopping(30))
    seen = []
    for rounds in decode_batch(target, [text]):
        seen += rounds[0].tokens
        text.stopped = len(seen) == 4
    assert seen == native(model, PROMPT, 4)


# --- what is refused, and what is decoded plainly --------------------------------------------------------------------


def test_families_without_rollback_decode_plainly() -> None:
    model = build("mamba")
    target = NativeTarget(LayeredModel(model))
    prompt = [5, 17, 33]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)[0, 3:]
    for _ in range(2):  # a second text starts afresh
        assert tokens_of(decode(target, prompt, greedy(), Stopping(20))) == expected.tolist()
    with pytest.raises(RestpointError, match="cannot verify drafts"):
        target.score([5], [Draft.chain([1, 2])])
    with pytest.raises(RestpointError, match="one text at a time"):
        target.prefill([prompt, prompt])


def test_rejected_prompts_and_settings() -> None:
    _, target = model_and_target("llama")

    def start(prompt: list[int], stopping: Stopping) -> None:
        next(decode(target, prompt, greedy(), stopping))

    with pytest.raises(RestpointError, match="prompt: it is empty"):
        start([], Stopping())
    with pytest.raises(RestpointError, match="token id 96 is out of range; ids go from 0 to 95"):
        start([3, VOCABULARY], Stopping())
    with pytest.raises(RestpointError, match=r"fill the context of 4"):
        start([1, 2, 3, 4], Stopping(context_length=4))
    with pytest.raises(RestpointError, match="max_tokens is 0"):
        Stopping(0)
    for wrong, said in (
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "min_p": -1.0}, "min_p is -1.0"),
        ({"top_p": 0.9}, "no effect on greedy"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ):
        with pytest.raises(RestpointError, match=said):
            SamplingSettings(**wrong)
    with pytest.raises(RestpointError, match="exit layer 9 is not below"):
        exit_drafter(target, "exit 9")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("names", [(), ("recycling", "exit 1")], ids=["plain", "drafted"])
def test_nan_logits_are_an_error(temperature: float, names: tuple[str, ...]) -> None:
    """At the prompt, or at a later token whose drafts are being verified."""
    model, target = model_and_target("llama")
    sampler = greedy(temperature=temperature)
    rounds = decode(target, [3, 4], sampler, Stopping(12), fused(target, sampler, names) if names else None)
    if names:
        next(rounds)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RestpointError, match="NaN"):
        list(rounds)
