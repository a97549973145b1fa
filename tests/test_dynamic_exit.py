"""The predictor and length of every round: exact whatever is chosen, chosen by what would have been drafted."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from families import VOCABULARY, build
from restpoint.decode.control import Control
from restpoint.decode.costs import Costs
from restpoint.decode.draft import ROOT, Draft, TokenPath, Verified
from restpoint.decode.drafters import exit as exit_module
from restpoint.decode.drafters.dynamic_exit import DynamicExitDrafter
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.drafting.names import DYNAMIC_EXIT
from restpoint.drafting.speculators import Drafting
from restpoint.equilibrium import AffineMap, IdentityPredictor, RestPointRecurrence
from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.model.check import check
from restpoint.model.layered import LayeredModel
from restpoint.profile import Profile

PROMPT = [5, 17, 33, 60, 8]
GREEDY = SamplingSettings()


@pytest.fixture(autouse=True)
def _drafts_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no rounding tells one draft from the same one made in a batch, on any machine."""
    monkeypatch.setattr(exit_module, "draft_dtype", lambda layered: layered.dtype)


def predictors(layered: LayeredModel) -> list[Predictor]:
    """A good recurrence, and random ones: what they draft must never change a token."""
    torch.manual_seed(3)
    width = layered.hidden_size

    def wild(layers: tuple[int, ...]) -> RestPointRecurrence:
        inputs = (len(layers) + 1) * width
        maps = tuple(AffineMap(torch.randn(inputs, width) / width**0.5, torch.zeros(width)) for _ in range(2))
        return RestPointRecurrence(layers, maps)

    return [wild((0,)), IdentityPredictor((1,)), IdentityPredictor((3,)), wild((0, 2)), wild((1, 3))]


def costs_of(candidates: Sequence[Predictor], dear: float = 0.0) -> Costs:
    """Passes that barely grow with their tokens; drafts cost their layers, and ``dear``."""
    draft = {one.name: (dear + one.exit_layer / 8 + 0.01,) * 2 for one in candidates}
    return Costs("here", "float32", tuple(1 + 0.01 * count for count in range(33)), draft)


def speculator(
    target: LayeredTarget,
    candidates: Sequence[Predictor],
    sampler: Sampler,
    costs: Costs | None = None,
    settings: TreeSettings | None = None,
) -> tuple[DynamicExitDrafter, Fusion]:
    costs = costs or costs_of(candidates)
    drafter = DynamicExitDrafter(target, candidates, lambda: costs, torch.arange(0, VOCABULARY, 2))
    target.watcher = drafter.on_kept
    return drafter, Fusion([], drafter, sampler, Control.alone(costs), settings=settings)


def tokens_of(rounds: Sequence[Round]) -> list[int]:
    return [token for turn in rounds for token in turn.tokens]


def force(drafter: DynamicExitDrafter, monkeypatch: pytest.MonkeyPatch, choices: Sequence[tuple[int, int]]) -> None:
    """Have it choose these in turn, over and over."""
    turn = iter(range(10**6))
    monkeypatch.setattr(type(drafter.record), "choose", lambda *_: choices[next(turn) % len(choices)])
    monkeypatch.setattr(type(drafter.threshold), "stops", lambda *_: False)


@pytest.mark.parametrize(
    ("family", "levels", "branching"),
    [("llama", None, True), ("llama", 3, True), ("llama", 3, False), ("mistral", 3, True), ("gpt2", 3, False)],
)
def test_greedy_is_token_identical(
    family: str, levels: int | None, branching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sampler = LayeredTarget(LayeredModel(build(family))), Sampler(GREEDY)
    expected = tokens_of(list(decode(target, PROMPT, sampler, Stopping(max_tokens=30))))
    settings = TreeSettings(levels=levels, branching=branching)
    drafter, fusion = speculator(target, predictors(target.layered), sampler, settings=settings)
    force(drafter, monkeypatch, [(2, 3), (0, 2), (4, 3), (1, 0), (3, 2), (1, 4)])
    used: set[str] = set()
    rounds: list[Round] = []
    for turn in decode(target, PROMPT, sampler, Stopping(max_tokens=30), fusion):
        rounds.append(turn)
        used.add(drafter.in_use.name)
    assert tokens_of(rounds) == expected
    assert len(used) >= 4
    assert sum(turn.drafted for turn in rounds) > 0


def test_the_watcher_sees_every_level_of_every_kept_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the drafts went, the states are those of a pass over the whole text."""
    layered = plant(LayeredModel(build("llama")), (2, 3))
    model, target, sampler = layered.model, LayeredTarget(layered), Sampler(GREEDY)
    drafter, fusion = speculator(target, predictors(layered), sampler, settings=TreeSettings(levels=3, fixed=20))
    force(drafter, monkeypatch, [(2, 3), (4, 3), (1, 2), (0, 1)])
    gathered: dict[int, list[torch.Tensor]] = {level: [] for level in drafter._levels}
    by_draft: set[str] = set()

    def watch(kept: Kept) -> None:
        given, every = len(kept.states[0]), len(kept.states[-1])
        assert (kept.last is None) == (given == 0)
        by_draft.add("none" if given == every else "all" if given == 0 else "some")
        for level, states in gathered.items():
            states.append(drafter._whole(level, kept))
        drafter.on_kept(kept)

    target.watcher = watch
    text = PROMPT + tokens_of(list(decode(target, PROMPT, sampler, Stopping(max_tokens=25), fusion)))
    full = model(torch.tensor([text]), output_hidden_states=True).hidden_states
    for level, states in gathered.items():
        seen = torch.cat(states)
        torch.testing.assert_close(seen, full[level][0, len(PROMPT) : len(PROMPT) + len(seen)], rtol=1e-3, atol=1e-4)
    assert by_draft == {"none", "some", "all"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shadow_hits_are_those_of_real_drafts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = plant(LayeredModel(build(family)), (2, 3))
    target, sampler = LayeredTarget(layered), Sampler(GREEDY)
    candidates = predictors(layered)
    drafter, fusion = speculator(target, candidates, sampler, settings=TreeSettings(levels=3))
    force(drafter, monkeypatch, [(2, 3), (0, 3), (4, 1), (1, 3), (3, 0)])
    seen: list[tuple[list[int], list[int], dict[int, list[bool]]]] = []
    learn, observe = drafter.learn, type(drafter.record).observe

    def note(path: TokenPath, verified: Verified) -> None:
        seen.append((list(path.tokens), verified.new_tokens, {}))
        learn(path, verified)

    monkeypatch.setattr(drafter, "learn", note)
    monkeypatch.setattr(
        type(drafter.record), "observe", lambda record, hits: (seen[-1][2].update(hits), observe(record, hits))
    )
    list(decode(target, PROMPT, sampler, Stopping(max_tokens=24), fusion))
    assert max(len(came) for _, came, _ in seen) > 1
    total = Counter[bool]()
    for text, came, hits in seen:
        fresh = LayeredTarget(layered)
        scored = fresh.prefill([text[:-1]])[0]
        for number, predictor in enumerate(candidates):
            alone = ExitDrafter(fresh, predictor, torch.arange(0, VOCABULARY, 2))
            drafted = [alone.start(TokenPath(text, scored.rest))]
            for place, token in enumerate(came[:-1]):
                drafted.append(alone.extend([place - 1 if place else ROOT], [token]))
            expected = [int(law.argmax()) == token for law, token in zip(drafted, came, strict=True)]
            assert hits[number] == expected
            total.update(expected)
    assert min(total[True], total[False]) > 5


def plant(layered: LayeredModel, layers: Sequence[int]) -> LayeredModel:
    """Make layers do nothing."""
    for layer in layers:
        for name, weight in layered.stack.layers[layer].named_parameters():
            if any(last in name for last in ("o_proj", "down_proj", "c_proj")):
                torch.nn.init.zeros_(weight)
    return layered


def all_tokens(
    target: LayeredTarget, candidates: Sequence[Predictor], costs: Costs
) -> tuple[DynamicExitDrafter, Fusion]:
    drafter = DynamicExitDrafter(target, candidates, lambda: costs)
    target.watcher = drafter.on_kept
    return drafter, Fusion([], drafter, Sampler(GREEDY), Control.alone(costs))


def test_it_settles_on_the_layer_after_which_nothing_happens() -> None:
    target = LayeredTarget(plant(LayeredModel(build("llama")), (1, 2, 3)))
    candidates = [IdentityPredictor((layer,)) for layer in (0, 1, 2, 3)]
    drafter, fusion = all_tokens(target, candidates, costs_of(candidates))
    rounds = list(decode(target, PROMPT, Sampler(GREEDY), Stopping(max_tokens=60), fusion))
    assert drafter.in_use.predictor.exit_layer == 1
    assert drafter.length == 8
    assert [drafter.record.acceptance(number) > 0.9 for number in range(4)] == [False, True, True, True]
    assert sum(turn.accepted for turn in rounds) > 20


def test_it_drafts_nothing_where_drafts_cost_more_than_they_bring() -> None:
    target = LayeredTarget(LayeredModel(build("llama")))
    candidates = predictors(target.layered)
    drafter, fusion = all_tokens(target, candidates, costs_of(candidates, dear=0.9))
    before = target.layered.work.layer_calls
    rounds = list(decode(target, PROMPT, Sampler(GREEDY), Stopping(max_tokens=12), fusion))
    assert drafter.length == 0
    assert len(rounds) == 12
    assert target.layered.work.layer_calls - before == 12 * 4
    assert drafter.record.weights[0] > 8  # what it would have drafted is watched all the same


def test_it_stops_after_an_unsure_law_and_the_threshold_moves() -> None:
    target = LayeredTarget(LayeredModel(build("llama")))
    candidates = predictors(target.layered)
    drafter, _ = all_tokens(target, candidates, costs_of(candidates))
    scored = target.prefill([PROMPT])[0]
    path = TokenPath([*PROMPT, 9], scored.rest)
    drafter.begin(PROMPT)
    drafter._chosen = 2, 3
    sure = torch.softmax(drafter.start(path), -1).max().item()
    for threshold, goes_on in ((sure - 0.01, True), (sure + 0.01, False)):
        drafter.threshold.stood = drafter.threshold.fell = threshold
        assert drafter.goes_on(1) is goes_on
        assert not drafter.goes_on(3)
    drafter.extend([ROOT, ROOT], [11, 12])
    laws = list(drafter._laws)
    drafter.threshold.stood, drafter.threshold.fell = 0.9, 0.3
    best = laws[2][1]
    draft = Draft((12, 11), (ROOT, ROOT))
    drafter.learn(path, Verified(draft, torch.zeros(3, VOCABULARY), [0], best))
    hits = [laws[0][1] == 12, True]
    stood, fell = 0.9, 0.3
    for (confidence, _), hit in zip((laws[0], laws[2]), hits, strict=True):
        stood, fell = (0.95 * stood + 0.05 * confidence, fell) if hit else (stood, 0.95 * fell + 0.05 * confidence)
    assert (drafter.threshold.stood, drafter.threshold.fell) == (pytest.approx(stood), pytest.approx(fell))


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_sampled_blocks_follow_the_models_law(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """G-test of three-token blocks, rounds taking turns between layers and lengths."""
    model = build("llama")
    target = LayeredTarget(LayeredModel(model))
    sampler = Sampler(SamplingSettings(temperature=1.2, top_k=2))
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for block, share in law.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*PROMPT, *block]]), use_cache=False).logits[0, -1:]
            for token, chance in enumerate(sampler.law(logits, list)[0].tolist()):
                if chance > 0:
                    longer[(*block, token)] = share * chance
        law = longer
    candidates, counts, drafted = predictors(target.layered), Counter[tuple[int, ...]](), 0
    drafter, fusion = speculator(target, candidates, sampler, settings=TreeSettings(levels=2, nodes=6))
    force(drafter, monkeypatch, [(2, 2), (0, 1), (4, 2), (1, 2), (3, 1)])
    for _ in range(count):
        rounds = list(decode(target, PROMPT, sampler, Stopping(max_tokens=3), fusion))
        counts[tuple(tokens_of(rounds))] += 1
        drafted += sum(turn.drafted for turn in rounds)
    assert drafted >= count
    assert g_test(counts, law) > 0.01


def g_test(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the G-test, cells expected below 5 pooled."""
    total = sum(counts.values())
    assert set(counts) <= set(law)
    cells = [(counts[block], total * share) for block, share in law.items() if total * share >= 5]
    rare = [(counts[block], total * share) for block, share in law.items() if total * share < 5]
    if rare:
        cells.append((sum(seen for seen, _ in rare), sum(expected for _, expected in rare)))
    statistic = 2 * sum(seen * math.log(seen / expected) for seen, expected in cells if seen)
    return float(chi2.sf(statistic, len(cells) - 1))


def test_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layered = LayeredModel(build("llama"))
    candidates = {one.name: one for one in predictors(layered)}
    costs = replace(costs_of(list(candidates.values())), device="elsewhere")
    profile = Profile("", "", next(iter(candidates)), candidates, {}, costs, None)
    can = check(layered)
    monkeypatch.setattr("restpoint.drafting.costs.measure_passes", lambda *_, rows: costs.verify)
    measured: list[str] = []

    def measure(_target: LayeredTarget, drafters: Sequence[ExitDrafter]) -> tuple[float, float]:
        (drafter,) = drafters
        measured.append(drafter.name)
        return costs.draft[drafter.name]

    monkeypatch.setattr("restpoint.drafting.costs.measure_drafts", measure)
    drafting = Drafting(layered, can, profile, [DYNAMIC_EXIT])
    sampler, target = Sampler(GREEDY), LayeredTarget(layered)
    expected = tokens_of(list(decode(LayeredTarget(layered), PROMPT, sampler, Stopping(max_tokens=20))))
    for _ in range(2):
        (fusion,) = drafting.speculators(target, [sampler])
        assert tokens_of(list(decode(target, PROMPT, sampler, Stopping(max_tokens=20), fusion))) == expected
    assert measured == list(candidates)
    assert drafting.speculators(target, [sampler] * 2) == [None, None]
    assert "does not draft for a batch" in drafting.notes[0]
    with pytest.raises(RestpointError, match="profile has 1"):
        Drafting(layered, can, replace(profile, predictors=dict(list(candidates.items())[:1])), [DYNAMIC_EXIT])
    with pytest.raises(RestpointError, match="cannot resume"):
        Drafting(layered, replace(can, resume=replace(can.resume, supported=False)), profile, [DYNAMIC_EXIT])
    with pytest.raises(RestpointError, match="needs a profile"):
        Drafting(layered, can, None, [DYNAMIC_EXIT])


def test_too_few_or_equally_named_predictors_are_refused() -> None:
    target = LayeredTarget(LayeredModel(build("llama")))
    for wrong in ([IdentityPredictor((1,))], [IdentityPredictor((1,))] * 2):
        with pytest.raises(RestpointError, match="predictors"):
            DynamicExitDrafter(target, wrong, lambda: costs_of([]))
    for number in ("longest", "named"):
        with pytest.raises(RestpointError, match=f"{number}=0"):
            DynamicExitDrafter(target, predictors(target.layered), lambda: costs_of([]), **{number: 0})
