"""The tree of all drafters: what is merged, what is learnt, how much is drafted and verified, what always is."""

import copy
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import PROMPT, Named, Stepped, costs, fused, model_and_target, tokens_of
from families import FAMILIES, VOCABULARY
from restpoint.decode.acceptance import Acceptance, AcceptanceCounter, Calibration, Correction, Estimate
from restpoint.decode.control import Control, Pace, Rest, best_count
from restpoint.decode.costs import Costs
from restpoint.decode.draft import ROOT, Candidates, Draft, TokenPath, Verified
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.overhead import measure_overhead
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.decode.trie import Trie
from restpoint.decode.verifiers.registry import VERIFIERS
from restpoint.model.layered import LayeredModel

FLAT = Acceptance(Calibration.guess((), (0.5,)))


def sampler(temperature: float = 0.0, seed: int = 0, **settings: float) -> Sampler:
    return Sampler(SamplingSettings(temperature=temperature, seed=seed, **settings))


# --- the trie --------------------------------------------------------------------------------------------------------


def test_the_same_tokens_after_the_same_tokens_are_one_node() -> None:
    trie = Trie()
    trie.merge(Candidates((3, 4, 5), (ROOT, 0, ROOT), (0.1, 0.2, 0.3)), 0, FLAT)
    trie.merge(Candidates((5, 3, 4, 4), (ROOT, ROOT, 0, 1), (0.4, 0.5, 0.6, 0.7)), 1, FLAT)
    assert (trie.tokens, trie.parents, trie.depths) == ([3, 4, 5, 4], [ROOT, 0, ROOT, 2], [0, 1, 0, 1])
    assert trie.offers == [[(0, 0.1), (1, 0.5)], [(0, 0.2), (1, 0.7)], [(0, 0.3), (1, 0.4)], [(1, 0.6)]]
    assert trie.children == [{3: 0, 5: 2}, {4: 1}, {}, {4: 3}, {}]
    assert trie.chances == [0.75, 0.75, 0.75, 0.5]
    assert trie.reaches == [0.75, 0.5625, 0.75, 0.375]
    assert len(trie) == 4
    assert [trie.depth_after(node) for node in (ROOT, 0, 3)] == [0, 1, 2]
    assert trie.covered(ROOT) == 1.0
    assert trie.covered(0) == 0.75
    assert trie.covered(1) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_random_tries_say_what_a_recomputation_says(seed: int) -> None:
    """A chance is that of any of those who gave it being right, a reach the product along the path, in any order."""
    draw = random.Random(seed)
    trie = Trie()
    chances: dict[tuple[int, ...], float] = {}
    paths: list[tuple[int, ...]] = []
    for _ in range(60):
        parent = draw.randrange(-1, len(trie))
        above = () if parent == ROOT else paths[parent]
        path = (*above, draw.randrange(3))
        chance = draw.choice([draw.random(), draw.random(), 0.0])
        known = len(trie)
        node = trie.add(parent, path[-1], 0, 0.5, chance)
        if path not in chances:
            assert node == known
            paths.append(path)
        assert paths[node] == path
        chances[path] = 1 - (1 - chances.get(path, 0.0)) * (1 - chance)
        for other, own in enumerate(paths):
            reach = 1.0
            for length in range(1, len(own) + 1):
                reach *= chances[own[:length]]
            assert trie.chances[other] == pytest.approx(chances[own], abs=1e-12)
            assert trie.reaches[other] == pytest.approx(reach, abs=1e-12)
            below = [chance for below, chance in chances.items() if below[:-1] == own]
            assert trie.covered(other) == pytest.approx(min(1.0, sum(below)))
    assert len(set(paths)) == len(paths) < 60  # some were named again


# --- what is worth verifying -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_best_count_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    reaches = sorted((draw.random() for _ in range(draw.randrange(12))), reverse=True)
    verify = [1.0]
    for _ in range(draw.randrange(1, 14)):
        verify.append(verify[-1] + draw.choice([0.0, 0.05, 0.3, 1.0]) * draw.random())
    rate, least = draw.uniform(0.2, 3.0), draw.randrange(3)
    found = best_count(reaches, verify, rate, least)
    counts = range(min(len(reaches), len(verify) - 1) + 1)
    gains = {count: sum(reaches[:count]) - rate * verify[count] for count in counts if count >= least}
    if not gains:
        assert found == least
    else:
        assert found >= least
        assert gains[found] == pytest.approx(max(gains.values()))


def test_claims_are_doubted_until_outcomes_say_otherwise() -> None:
    correction = Correction()
    assert correction.of(0, 1, 0.5) == pytest.approx(1 / (1 + math.exp(0.8)))
    draw = random.Random(0)
    told = [draw.uniform(0.05, 0.95) for _ in range(4000)]
    for chance in told:  # in truth, odds are twice what is claimed
        odds = 2 * chance / (1 - chance)
        correction.add(5, 2, chance, draw.random() < odds / (1 + odds))
    gap = [correction.of(5, 2, chance) - 2 * chance / (1 + chance) for chance in told]
    assert max(map(abs, gap)) < 0.12  # steps of 0.1 keep wandering: a standard deviation of about 0.05 at most
    assert correction.of(5, 1, 0.5) == correction.of(2, 2, 0.5) == correction.of(0, 1, 0.5)  # no other has learnt
    assert correction.of(7, 2, 0.5) == correction.of(4, 2, 0.5) > correction.of(8, 2, 0.5)
    assert 0 < correction.of(0, 1, 0.0) < 0.001
    assert 0.99 < correction.of(0, 1, 1.0) < 1


def test_a_node_that_others_name_too_counts_by_what_such_nodes_were_worth() -> None:
    correction = Correction()
    for _ in range(100):
        correction.add(0, 2, 0.5, False)
    trie = Trie(correction)
    trie.merge(Candidates((3, 4), (ROOT, 0), (0.5, 0.5)), 0, FLAT)
    alone = list(trie.reaches)
    trie.merge(Candidates((3,), (ROOT,), (0.5,)), 1, FLAT)
    assert trie.claims[0] == pytest.approx(0.75)
    assert trie.chances[0] == correction.of(0, 2, 0.75) < alone[0]
    assert trie.reaches[1] == pytest.approx(trie.chances[0] * correction.of(1, 1, 0.5))


@pytest.mark.parametrize("seed", range(5))
def test_siblings_exclude_each_other(seed: int) -> None:
    """Exclusive reaches are those of trials in order of chance; siblings together never exceed their parent."""
    draw = random.Random(seed)
    trie = Trie()
    for _ in range(80):
        trie.add(draw.randrange(-1, len(trie)), draw.randrange(6), 0, 0.5, draw.random())
    found = trie.exclusive_reaches()
    for node, parent in enumerate(trie.parents):
        above = 1.0 if parent == ROOT else found[parent]
        siblings = list(trie.children[parent + 1].values())
        likelier = [child for child in siblings if trie.chances[child] > trie.chances[node]]
        assert found[node] == pytest.approx(
            above * trie.chances[node] * math.prod(1 - trie.chances[child] for child in likelier)
        )
        assert sum(found[child] for child in siblings) <= above + 1e-12


def test_the_rate_that_a_text_reaches_is_the_best_one() -> None:
    """With known chances the chosen sizes settle at the number of nodes with the most tokens per second."""
    verify = (1.0, 1.25, 1.3, 1.35, 1.4, 1.6, 1.8, 2.0)
    for accept in (0.3, 0.5, 0.7, 0.9):
        reaches = [accept**depth for depth in range(1, 8)]
        tokens = [1 + sum(reaches[:count]) for count in range(8)]
        rates = [one / seconds for one, seconds in zip(tokens, verify, strict=True)]
        pace = Pace()
        assert pace.rate == 1.0
        for _ in range(300):
            count = best_count(reaches, verify, pace.rate)
            pace.add(tokens[count], verify[count])
        assert rates[count] == pytest.approx(max(rates))
        assert pace.rate == pytest.approx(max(rates), rel=0.02)


def test_rests_grow_while_trials_fail_and_are_short_again_once_one_succeeds() -> None:
    rest, asked = Rest(), []
    for _ in range(400):
        asked.append(not rest.left)
        rest.after(0.9)
    runs = [(own, len(list(group))) for own, group in itertools.groupby(asked)]
    assert runs[:6] == [(True, 8), (False, 16), (True, 4), (False, 32), (True, 4), (False, 64)]
    assert sum(asked) < 0.2 * len(asked)
    while rest.left:
        rest.after(2.0)
    for _ in range(25):
        assert not rest.after(2.0)
        assert not rest.left
    asked = []
    while not rest.left:
        rest.after(0.9)
    while rest.left:
        asked.append(rest.after(0.9))
    assert asked == [False] * 15 + [True]


def test_nobody_is_asked_where_drafting_only_costs(text: list[int]) -> None:
    """Every round with drafters costs half a pass beside: they are tried, and then left alone for longer and longer."""
    prices = costs(0.05, (0.03, 0.03))
    stepped = Stepped(text, wrong=True)
    fusion = Fusion([], stepped, sampler(), Control(lambda _rows: prices, overhead=(0.5, 0.0)))
    fusion.begin(text[:5])
    asked = []
    for place in range(6, 250):
        path = TokenPath(text[:place], None)
        draft = fusion.propose(path, 40)
        asked.append(fusion._round.asked)
        assert asked[-1] or not draft.tokens
        assert fusion.control.time == (pytest.approx(1.0) if not asked[-1] else pytest.approx(1.5, abs=0.6))
        fusion.observe(path, Verified(draft, torch.zeros(len(draft.tokens) + 1, VOCABULARY), [], text[place]))
    assert 0.05 < sum(asked) / len(asked) < 0.12


def test_overhead_grows_with_nodes_and_is_measured_on_a_real_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the drafter moves."""
    _, target = model_and_target("llama")
    now = [0.0]
    for module in ("loop", "overhead"):
        monkeypatch.setattr(f"restpoint.decode.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def speculator(other, nodes):
        class Slow(type(other)):
            def learn(self, path, verified):
                now[0] += 0.004 + 0.001 * len(verified.draft.tokens)

        return Fusion([Slow(VOCABULARY)], None, sampler(), Control.alone(costs()), None, TreeSettings(fixed=nodes))

    fixed, node = measure_overhead(target, sampler(), None, speculator)
    assert fixed == pytest.approx(0.004)
    assert node == pytest.approx(0.001)


@pytest.mark.parametrize("limit", [12, 60])
def test_overhead_stays_within_a_short_context(limit: int) -> None:
    """gpt2 has a table of positions: a round beyond it would fail."""
    config = copy.deepcopy(FAMILIES["gpt2"])
    config.n_positions = limit
    target = LayeredTarget(LayeredModel(AutoModelForCausalLM.from_config(config).eval()))
    seen: list[int] = []
    score = target.score

    def watched(pending, drafts):
        seen.append(target.cache.lengths[0] + 1)
        return score(pending, drafts)

    target.score = watched  # type: ignore[method-assign]

    def speculator(other, nodes):
        return Fusion([other], None, sampler(), Control.alone(costs()), None, TreeSettings(fixed=nodes))

    for value in measure_overhead(target, sampler(), None, speculator):
        assert 0.0 <= value < 1.0
    assert max(seen) <= limit


def test_the_first_node_bears_the_step_of_a_longer_pass() -> None:
    """Passes of two tokens cost 1.2, of three and more hardly anything beyond: only what comes first pays for that."""
    control = Control.alone(Costs("here", "float32", (1.0, 1.2, 1.21, 1.22, 1.23)))
    assert control.time_of_more([], 1) == pytest.approx(0.2)
    assert control.time_of_more([0.1], 2) == pytest.approx(0.21)
    assert control.time_of_more([0.5], 1) == pytest.approx(0.01)
    assert control.time_of_more([0.5] * 4, 9) == 0.0


def test_estimates_learn_and_fade() -> None:
    estimate = Estimate(0.4)
    assert estimate.mean == pytest.approx(0.4)
    seen = []
    for _ in range(400):
        estimate.add(0.0)
        seen.append(estimate.mean)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] < 0.4
    assert seen[-1] < 0.08
    for _ in range(600):
        estimate.fade()
    assert estimate.mean == pytest.approx(0.4, abs=0.01)
    draw = random.Random(1)
    for _ in range(3000):
        estimate.add(float(draw.random() < 0.8))
    assert estimate.mean == pytest.approx(0.74, abs=0.12)  # the prior keeps a seventh of the weight


def test_acceptance_learns_by_depth_and_bin() -> None:
    acceptance = Acceptance(Calibration.guess((0.3, 0.6), (0.1, 0.4, 0.8)))
    assert [acceptance.of(0, confidence) for confidence in (0.0, 0.29, 0.3, 0.6, 1.0)] == pytest.approx(
        [0.1, 0.1, 0.4, 0.8, 0.8]
    )
    for _ in range(300):
        acceptance.add(0, 0.9, False)
        acceptance.add(3, 0.1, True)
    assert acceptance.of(0, 0.7) < 0.15
    assert acceptance.of(1, 0.7) == pytest.approx(0.8)
    assert acceptance.of(1, 0.2) == acceptance.of(7, 0.0) > 0.8
    assert acceptance.of(0, 0.2) == pytest.approx(0.1)
    guess = Calibration.guess((0.3, 0.6), (0.1, 0.4, 0.7))
    assert guess.mean(0) == guess.mean(5) == pytest.approx(0.4)


def test_counted_acceptance_rises_with_confidence() -> None:
    generator = torch.Generator().manual_seed(5)
    confidence = torch.rand(20_000, generator=generator)
    accepted = (torch.rand(20_000, generator=generator) < confidence**2).float()
    counter = AcceptanceCounter()
    counter.add(0, confidence, accepted)
    counter.add(2, confidence, 1 - accepted)
    calibration = counter.calibration()
    for kind in (0, 1):
        assert list(calibration.acceptance[kind]) == sorted(calibration.acceptance[kind])
    assert calibration.mean(0) == pytest.approx(float(accepted.mean()), abs=0.01)
    assert Acceptance(calibration).of(0, 0.85) == pytest.approx(0.85**2, abs=0.03)
    assert calibration.mean(1) == pytest.approx(1 - float(accepted.mean()), abs=0.01)


# --- drafters that are right, and drafters that are wrong -------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> list[int]:
    """A text that scripted drafters know; its first tokens are the prompt."""
    draw = random.Random(2)
    return [draw.randrange(VOCABULARY) for _ in range(300)]


CHEAP, DEAR = (0.05, (0.03, 0.03)), (0.2, (0.2, 0.1))


def rounds_of(text: list[int], instant: list, stepped, settings: TreeSettings | None = None, prices=DEAR):
    """Feed a speculator with the text, round by round, as verification would: yields draft and nodes that stood."""
    speculator = Fusion(instant, stepped, sampler(), Control.alone(costs(*prices)), None, settings)
    speculator.begin(text[:5])
    tokens = text[:6]
    while len(tokens) < len(text) - 1:
        path = TokenPath(list(tokens), None)
        draft = speculator.propose(path, len(text) - len(tokens) - 1)
        nodes, node_at = [], ROOT
        children = draft.children()
        while (child := children[node_at + 1].get(text[len(tokens) + len(nodes)])) is not None:
            nodes.append(child)
            node_at = child
        after = text[len(tokens) + len(nodes)]
        verified = Verified(draft, torch.zeros(len(draft.tokens) + 1, VOCABULARY), nodes, after)
        speculator.observe(path, verified)
        tokens += verified.new_tokens
        yield draft, nodes


def test_drafters_that_are_right_are_used(text: list[int]) -> None:
    for instant, stepped in (([Named(text)], None), ([], Stepped(text)), ([Named(text)], Stepped(text))):
        rounds = list(rounds_of(text, instant, stepped, prices=CHEAP))
        late = rounds[len(rounds) // 2 : -1]
        assert sum(len(nodes) for _, nodes in late) / len(late) > 2.5
        assert all(draft.tokens for draft, _ in late)


def test_drafters_that_are_always_wrong_are_given_up(text: list[int]) -> None:
    """After a while nothing is verified and nothing run any more, but for a try now and then."""
    instant, stepped = Named(text, wrong=True), Stepped(text, wrong=True)
    starts, drafted = [], []
    for draft, _ in rounds_of(text, [instant], stepped):
        starts.append(stepped.starts)
        drafted.append(len(draft.tokens))
    assert sum(drafted[:40]) > 5
    assert sum(count > 0 for count in drafted[100:]) < 0.12 * len(drafted[100:])
    assert starts[-1] < 0.12 * len(starts)


def test_the_wrong_one_of_two_drafters_is_given_up(text: list[int]) -> None:
    good, bad = Named(text), Named(text, confidence=0.9, wrong=True)
    bad.name = "bad"
    rounds = list(rounds_of(text, [bad, good], None))
    late = rounds[len(rounds) // 2 :]
    assert sum(len(nodes) for _, nodes in late) / len(late) > 2.5
    assert sum(len(draft.tokens) - len(nodes) for draft, nodes in late) / len(late) < 1.0


def test_a_stepped_drafter_does_not_repeat_what_others_name(text: list[int]) -> None:
    """Where tables already name every token, its levels add nothing and are left out."""
    alone, beside = Stepped(text), Stepped(text)
    for _ in rounds_of(text, [], alone, prices=CHEAP):
        pass
    count = sum(1 for _ in rounds_of(text, [Named(text, length=8, confidence=0.98)], beside, prices=CHEAP))
    assert alone.levels > 2 * alone.starts
    assert beside.starts < count / 2


@pytest.mark.parametrize("branching", [True, False])
def test_a_fixed_size_is_respected(text: list[int], branching: bool) -> None:
    for fixed in (0, 1, 3, 9, 24, 200):
        settings = TreeSettings(fixed=fixed, levels=2, branching=branching)
        stepped = Stepped(text)
        instant = [Named(text, length=30), Named(text, length=5, wrong=True)]
        seen = [draft for draft, _ in rounds_of(text, instant, stepped, settings)]
        sizes = [len(draft.tokens) for draft in seen[: len(seen) // 2]]
        assert set(sizes) == {min(fixed, 24)}  # the largest that a cost is known for
        assert branching or all(draft.is_chain for draft in seen)
        assert stepped.starts > 0 or fixed == 0


@pytest.mark.parametrize("branching", [True, False])
def test_a_fixed_size_is_drafted_whatever_it_costs(text: list[int], branching: bool) -> None:
    stepped = Stepped(text, trees=branching)
    settings = TreeSettings(fixed=5, branching=branching)
    seen = [draft for draft, _ in rounds_of(text, [], stepped, settings, (1.0, (50.0, 50.0)))]
    assert {len(draft.tokens) for draft in seen[: len(seen) // 2]} == {5}


@pytest.mark.parametrize("names", [("exit 1",), ("recycling", "exit 2"), ("exit 0", "ngrams")], ids=" ".join)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_draft_is_larger_than_asked_for(names: tuple[str, ...], temperature: float) -> None:
    """Whatever first layers have run on, and whatever was drawn, has to be verified: so no more of it is drafted."""
    _, target = model_and_target("llama")
    for settings, limit in (
        (TreeSettings(fixed=5), 5),
        (TreeSettings(fixed=7, draws=3, width=1, children=1), 7),
        (TreeSettings(nodes=6, levels=6), 6),
        (TreeSettings(fixed=500, levels=30, width=1, children=1), 16),
        (TreeSettings(levels=30, width=1, children=1, draws=2), 16),
    ):
        for way in ("token-wise", "recursive"):
            chosen = sampler(temperature)
            speculator = fused(target, chosen, names, settings, VERIFIERS[way], costs(0.001, largest=16))
            rounds = list(decode(target, PROMPT, chosen, Stopping(18), speculator, VERIFIERS[way]))
            assert len(tokens_of(rounds)) == 18
            assert 0 < max(turn.drafted for turn in rounds) <= limit


# --- tokens drawn at random ------------------------------------------------------------------------------------------


@torch.inference_mode()
def drafts_of(first: int, settings: TreeSettings, way: str, measured=None) -> list[tuple[Fusion, Draft]]:
    """Many drafts of one text position, of a drafter that has just begun, each with its own random numbers."""
    _, target = model_and_target("llama")
    model_text = PROMPT * 4
    found = []
    for seed in range(first, first + 40):
        chosen = sampler(1.3, seed, top_k=12)
        target.prefill([model_text[:-1]])
        speculator = fused(target, chosen, ("lookup", "exit 0"), settings, VERIFIERS[way], measured)
        speculator.begin(model_text[:-1])
        rest = torch.linspace(-1, 1, target.layered.hidden_size)[None, None]
        found.append((speculator, speculator.propose(TokenPath(model_text, rest), 20)))
    return found


@pytest.mark.parametrize("way", ["token-wise", "block", "recursive", "recursive-iid"])
@pytest.mark.parametrize(
    "settings", [TreeSettings(), TreeSettings(fixed=8, levels=2, width=2)], ids=["chosen", "fixed"]
)
def test_drawn_nodes_are_always_verified(way: str, settings: TreeSettings) -> None:
    """Whether a drawn node stands in the draft must not depend on what was drawn, nor whether one is drawn at all."""
    settings = TreeSettings(**{**vars(settings), "draws": 2, "children": 2})
    after_root = []
    for speculator, draft in drafts_of(0, settings, way, costs(0.02)):
        drawn = speculator._round.drawn
        assert len(draft.drawn) == len(drawn)
        for parent, group in draft.drawn.items():
            assert all(draft.parents[node] == parent for node in group.nodes)
            assert float(group.law.sum()) == pytest.approx(1.0, abs=1e-5)
            assert all(group.law[draft.tokens[node]] > 0 for node in group.nodes)
        assert way != "block" or draft.is_chain
        if ROOT in draft.drawn:
            group = draft.drawn[ROOT]
            assert len(group.nodes) == (2 if way.startswith("recursive") else 1)
            after_root.append((tuple(draft.tokens[node] for node in group.nodes), group.law))
    assert len(after_root) in (0, 40)
    if after_root:
        assert len({tokens for tokens, _ in after_root}) > 5
        for _, law in after_root:
            torch.testing.assert_close(law, after_root[0][1])
    else:
        assert way == "block"  # a chain whose first token is well named already goes on with that


def test_drawn_tokens_follow_their_law() -> None:
    """What is drawn after the root, over many seeds, against the law that the draft gives for it."""
    settings = TreeSettings(fixed=4, levels=1, children=2)
    found = [one for start in range(0, 400, 40) for one in drafts_of(start, settings, "token-wise")]
    law = found[0][1].drawn[ROOT].law
    assert int((law > 0).sum()) >= 8
    seen = torch.zeros(VOCABULARY)
    for _, draft in found:
        (node,) = draft.drawn[ROOT].nodes
        seen[draft.tokens[node]] += 1
    expected = law * len(found)
    common = expected >= 5
    statistic = float(((seen - expected)[common] ** 2 / expected[common]).sum())
    from scipy.stats import chi2

    assert float(seen[law == 0].sum()) == 0
    assert chi2.sf(statistic, int(common.sum()) - 1) > 0.01


def test_first_layers_that_ran_come_first() -> None:
    """The verification resumes at the exit layer of the nodes that ran there, which stand in the order they ran."""
    _, target = model_and_target("llama")
    chosen = sampler()
    settings = TreeSettings(fixed=12, levels=3, width=2, children=3)
    speculator = fused(target, chosen, ("recycling", "exit 2"), settings)
    for _ in decode(target, PROMPT, chosen, Stopping(20), speculator):
        pass
    with torch.inference_mode():
        scored = target.prefill([PROMPT])
        draft = speculator.propose(TokenPath([*PROMPT, 7], scored[0].rest), 12)
    assert draft.exits is not None
    assert draft.exit_layer == 2
    walk = speculator.stepped.walk
    ran = len(walk.tokens)
    assert ran == 4
    assert draft.exits.shape[1] == 1 + ran
    assert list(draft.tokens[:ran]) == walk.tokens
    assert list(draft.parents[:ran]) == walk.parents
    assert torch.equal(draft.exits, walk.states(2))
