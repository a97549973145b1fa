"""The propositions of docs/theory.md, each against an oracle that does not share its code.

Laws are small, so that most of what is stated can be enumerated; where it is simulated, the seed is fixed and the
smallest violation that would be seen is asserted too.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import linprog
from scipy.special import rel_entr
from scipy.stats import binom, norm

from restpoint.decode.control import Pace, best_count
from restpoint.decode.draft import ROOT, Draft
from restpoint.decode.verifiers.base import Verifier
from restpoint.decode.verifiers.block import Block
from restpoint.decode.verifiers.nodewise import NodeWise
from restpoint.equilibrium import Chunk, FitSettings, fit_recurrence
from restpoint.transport import acceptance, maximal_coupling, total_variation
from restpoint.transport.couplings import KSeq, MaximalCoupling

# --- 1: the maximal coupling ----------------------------------------------------------------------


def dirichlet(alpha: float, vocab: int, count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([alpha] * vocab, count))


def test_the_maximal_coupling_accepts_with_one_minus_tv():
    """In whole numbers: every pair of laws in quarters, every draft, every cell of either uniform number."""
    quarters, cells = 4, math.lcm(1, 2, 3, 4)
    laws = [law for law in itertools.product(range(quarters + 1), repeat=3) if sum(law) == quarters]
    parts = torch.tensor(laws)
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    pairs = torch.cartesian_prod(torch.arange(len(laws)), torch.arange(len(laws)))
    pair, draft, first, second = torch.cartesian_prod(
        torch.arange(len(pairs)), torch.arange(3), torch.arange(cells), torch.arange(cells)
    ).T
    p, q = parts[pairs[pair, 0]], parts[pairs[pair, 1]]
    found = maximal_coupling(draft, p.double() / quarters, q.double() / quarters, middles[first], middles[second])

    weight = q.gather(1, draft[:, None])[:, 0]  # quarters of the chance of this draft
    nothing = torch.zeros(len(pairs), 3, dtype=torch.long)
    output = nothing.index_put((pair, found.token), weight, accumulate=True)
    kept = nothing[:, 0].index_put((pair,), weight * found.accepted, accumulate=True)
    replaced = nothing.index_put((pair, found.token), weight * ~found.accepted, accumulate=True)
    targets, drafts = parts[pairs[:, 0]], parts[pairs[:, 1]]
    excess = (targets - drafts).clamp_min(0)
    assert torch.equal(output, targets * cells**2)
    assert torch.equal(replaced, excess * cells**2)
    assert torch.equal(kept, (quarters - excess.sum(1)) * cells**2)
    tv = total_variation(targets.double() / quarters, drafts.double() / quarters)
    assert torch.equal(tv * quarters, excess.sum(1).double())
    assert int((excess.sum(1) > 0).sum()) == len(laws) * (len(laws) - 1)


def test_no_coupling_of_one_draft_accepts_more():
    """The linear program over all joint laws of X and Y."""
    vocab = 4
    for p, q in zip(dirichlet(0.5, vocab, 12, seed=0), dirichlet(0.5, vocab, 12, seed=1), strict=True):
        cells = np.arange(vocab**2).reshape(vocab, vocab)
        marginals = np.zeros((2 * vocab, vocab**2))
        for token in range(vocab):
            marginals[token, cells[token]] = 1.0
            marginals[vocab + token, cells[:, token]] = 1.0
        best = linprog(-np.eye(vocab).ravel(), A_eq=marginals, b_eq=np.concatenate([q, p]), method="highs")
        assert -best.fun == pytest.approx(float(acceptance(p, q)), abs=1e-9)
        assert float(acceptance(p, q)) == pytest.approx(1 - float(total_variation(p, q)), abs=1e-12)


# --- 2: K-SEQ -------------------------------------------------------------------------------------


def best_independent(p: torch.Tensor, q: torch.Tensor, count: int) -> float:
    """The largest P(Y in drafts), as the linear program over the sets that independent drafts may form."""
    likely: dict[frozenset[int], float] = {}
    for drafts in itertools.product(range(len(q)), repeat=count):
        weight = math.prod(float(q[token]) for token in drafts)
        likely[frozenset(drafts)] = likely.get(frozenset(drafts), 0.0) + weight
    edges = [(row, token) for row, drafts in enumerate(likely) for token in drafts]
    matrix = np.zeros((len(likely) + len(p), len(edges)))
    for column, (row, token) in enumerate(edges):
        matrix[row, column] = matrix[len(likely) + token, column] = 1.0
    bounds = [*likely.values(), *p.tolist()]
    return -linprog([-1.0] * len(edges), A_ub=matrix, b_ub=bounds, method="highs").fun


def kept_by_kseq(p: torch.Tensor, q: torch.Tensor, count: int) -> float:
    """P(Y in drafts), over all drafts and the law of Y given each."""
    kept = 0.0
    for drafts in itertools.product(range(len(q)), repeat=count):
        weight = math.prod(float(q[token]) for token in drafts)
        if weight > 0:
            kept += weight * float(KSeq().kernel(p, q, drafts)[list(set(drafts))].sum())
    return kept


@pytest.mark.parametrize("count", [2, 3])
def test_kseq_attains_its_share_of_the_optimum(count):
    share = 1 - (1 - 1 / count) ** count
    assert share > 1 - 1 / math.e
    half = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    pairs = [(half, torch.full((4,), 0.25, dtype=torch.float64))]
    pairs += zip(dirichlet(0.4, 4, 8, seed=2), dirichlet(0.4, 4, 8, seed=3), strict=True)
    ratios, singles = [], []
    for p, q in pairs:
        optimum, kept = best_independent(p, q, count), kept_by_kseq(p, q, count)
        ceiling = float(torch.minimum(p, count * q).sum())
        assert kept == pytest.approx(KSeq().acceptance(p, q, count), abs=1e-6)
        assert optimum <= ceiling + 1e-9
        assert kept >= share * ceiling - 1e-6
        assert kept <= optimum + 1e-6
        ratios.append(kept / optimum)
        singles.append(float(acceptance(p, q)) / optimum)
    assert min(ratios) >= share
    assert min(ratios) < 0.97  # not optimal
    assert min(singles) < share  # the first draft alone does not get there


# --- 3: block verification ------------------------------------------------------------------------

Law = Callable[[tuple[int, ...]], torch.Tensor]


def language(seed: int, vocab: int = 3) -> Law:
    """A law of the next token for every text."""
    return lambda text: torch.from_numpy(np.random.default_rng([seed, len(text), *text]).dirichlet([0.7] * vocab))


def probability(law: Law, text: Sequence[int], start: int = 0) -> float:
    """Of a text's tokens from ``start`` on, given those before."""
    return math.prod(float(law(tuple(text[:place]))[text[place]]) for place in range(start, len(text)))


def standing(way: Verifier, p: Law, q: Law, length: int) -> dict[tuple[int, ...], float]:
    """P(at least i drafted tokens stand | the first i of the draft), by enumeration of drafts and of outcomes."""
    found: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(3), repeat=length):
        texts = [tokens[:place] for place in range(length + 1)]
        draft = Draft.chain(tokens, torch.stack([q(text) for text in texts[:-1]]))
        for possible in way.outcomes(torch.stack([p(text) for text in texts]), draft):
            for place in range(1, len(possible.outcome.nodes) + 1):
                weight = possible.probability * probability(q, tokens, place)
                found[texts[place]] = found.get(texts[place], 0.0) + weight
    return found


def test_block_verification_dominates_token_wise_verification():
    length, gains = 3, []
    for seed in range(4):
        p, q = language(seed), language(100 + seed)
        block = standing(Block(), p, q, length)
        token_wise = standing(NodeWise("token-wise", MaximalCoupling()), p, q, length)
        mean = {"block": 0.0, "token-wise": 0.0, "bound": 0.0}
        for size in range(1, length + 1):
            for text in itertools.product(range(3), repeat=size):
                worth = product = 1.0
                for place in range(size):
                    ratio = float(p(text[:place])[text[place]] / q(text[:place])[text[place]])
                    worth, product = min(1.0, worth * ratio), product * min(1.0, ratio)
                assert block.get(text, 0.0) == pytest.approx(worth, abs=1e-9)
                assert token_wise.get(text, 0.0) == pytest.approx(product, abs=1e-9)
                assert product <= worth
                drafted = probability(q, text)
                mean["block"] += drafted * block.get(text, 0.0)
                mean["token-wise"] += drafted * token_wise.get(text, 0.0)
                mean["bound"] += min(drafted, probability(p, text))
        assert mean["token-wise"] <= mean["block"] + 1e-12
        assert mean["block"] <= mean["bound"] + 1e-12
        gains.append(mean["block"] - mean["token-wise"])
    assert max(gains) > 1e-2


# --- 4: logits and total variation ----------------------------------------------------------------


def test_oscillation_of_the_logits_bounds_total_variation():
    generator = np.random.default_rng(4)
    tightest = 0.0
    for vocab, scale in itertools.product((2, 3, 6), (0.1, 1.0, 10.0)):
        sets = np.array(list(itertools.product((0.0, 1.0), repeat=vocab)))
        for trial in range(60):
            logits = generator.normal(size=vocab) * scale
            change = generator.normal(size=vocab) * generator.choice([0.1, 1.0, 5.0])
            if trial % 2:  # only two values, with the same oscillation
                change = np.where(change > np.median(change), change.max(), change.min())
            one, other = np.exp(logits), np.exp(logits + change)
            one, other = one / one.sum(), other / other.sum()
            over_sets = float((sets @ (other - one)).max())
            tv = float(total_variation(torch.from_numpy(one), torch.from_numpy(other)))
            assert tv == pytest.approx(over_sets, abs=1e-12)
            bound = math.tanh(float(np.ptp(change)) / 4)
            assert tv <= bound + 1e-12
            assert bound <= math.tanh(float(np.abs(change).max()) / 2) + 1e-12
            tightest = max(tightest, tv / bound)
    assert tightest > 0.9


@pytest.mark.parametrize("oscillation", [0.01, 0.5, 2.0, 8.0])
def test_the_oscillation_bound_is_attained(oscillation):
    logits = torch.tensor([oscillation / 4, -oscillation / 4], dtype=torch.float64)
    tv = float(total_variation(logits.softmax(0), (-logits).softmax(0)))
    assert tv == pytest.approx(math.tanh(oscillation / 4), rel=1e-12)


# --- 5: what is left of the way -------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 0.8, 0.97])
def test_contracting_steps_bound_the_way_that_is_left(rate):
    generator = np.random.default_rng(5)
    size, tightest = 6, 0.0
    for trial in range(8):
        if trial:
            left, _, right = np.linalg.svd(generator.normal(size=(size, size)))
            matrix = rate * left @ np.diag(generator.uniform(0.2, 1.0, size)) @ right
            matrix *= rate / np.linalg.norm(matrix, 2)
        else:
            matrix = rate * np.eye(size)
        offset = generator.normal(size=size)
        fixed = np.linalg.solve(np.eye(size) - matrix, offset)
        states = [generator.normal(size=size)]
        for _ in range(40):
            states.append(matrix @ states[-1] + offset)
        steps = [float(np.linalg.norm(after - before)) for before, after in itertools.pairwise(states)]
        for place in range(1, 15):
            bound = steps[place - 1] * rate / (1 - rate)
            way = float(np.linalg.norm(fixed - states[place]))
            assert way <= bound * (1 + 1e-9)
            to_the_last = float(np.linalg.norm(states[-1] - states[place]))
            assert to_the_last <= bound * (1 - rate ** (40 - place)) * (1 + 1e-9)
            tightest = max(tightest, way / bound)
    assert tightest == pytest.approx(1.0, rel=1e-6)  # all along one line


def test_the_ratio_of_two_steps_bounds_nothing():
    """Steps 1, 1/2, 1/3, ..: each is below the one before, and the ratio seen so far is no bound for those to come."""
    steps = [1 / place for place in range(1, 2000)]
    for place in (2, 10, 50):
        seen = steps[place - 1] / steps[place - 2]
        assert seen < 1
        estimate = steps[place - 1] * seen / (1 - seen)
        assert sum(steps[place:]) > 2 * estimate


# --- 6: how much to draft -------------------------------------------------------------------------


def random_tree(seed: int, count: int) -> tuple[list[int], list[float]]:
    """Parents and reaches; siblings exclude each other."""
    generator = np.random.default_rng(seed)
    parents: list[int] = []
    reaches: list[float] = []
    left = {ROOT: 1.0}
    for node in range(count):
        parent = int(generator.integers(-1, node))
        parents.append(parent)
        reaches.append(left[parent] * float(generator.uniform(0.2, 0.9)))
        left[parent] -= reaches[-1]
        left[node] = reaches[-1]
    return parents, reaches


def test_a_round_emits_one_token_and_the_reach_of_each_node():
    """A tree of chosen tokens: the mean over the verifier's outcomes; each node's reach from the target alone."""
    tokens, parents = (0, 2, 1, 0, 2, 2), (ROOT, ROOT, 0, 0, 1, 3)
    draft = Draft(tokens, parents)
    texts = [tuple(text) for text in draft.prefixes([])]
    for seed in range(5):
        p = language(seed)
        outcomes = NodeWise("token-wise", MaximalCoupling()).outcomes(torch.stack([p(t) for t in texts]), draft)
        emitted = sum(possible.probability * (len(possible.outcome.nodes) + 1) for possible in outcomes)
        assert emitted == pytest.approx(1 + sum(probability(p, text) for text in texts[1:]), abs=1e-12)


@pytest.mark.parametrize("rate", [0.35, 0.8])
def test_a_chain_of_equal_chances_stops_where_reach_falls_to_rate_times_cost(rate):
    """Constant acceptance a: (1 - a^(n+1))/(1 - a) tokens; the best n against a search for the best ratio."""
    fixed, each = 1.0, 0.04
    reaches = [rate**place for place in range(1, 41)]
    seconds = [fixed + each * count for count in range(41)]
    ratios = [(1 - rate ** (count + 1)) / (1 - rate) / seconds[count] for count in range(41)]
    best = int(np.argmax(ratios))
    assert 0 < best < 40
    assert best_count(reaches, seconds, ratios[best]) == best
    assert sum(reach > ratios[best] * each for reach in reaches) == best


@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_nodes_are_the_best_tree_of_their_size(seed):
    """Over all sets of nodes that hold the parent of each of theirs."""
    parents, reaches = random_tree(seed, 10)
    ranked = sorted(range(10), key=lambda node: -reaches[node])
    for size in range(1, 11):
        trees = [
            nodes
            for nodes in map(set, itertools.combinations(range(10), size))
            if all(parents[node] == ROOT or parents[node] in nodes for node in nodes)
        ]
        likeliest = set(ranked[:size])
        assert likeliest in trees
        assert sum(reaches[node] for node in likeliest) == pytest.approx(
            max(sum(reaches[node] for node in nodes) for nodes in trees), abs=1e-12
        )


def situations(seed: int) -> tuple[list[float], list[list[float]], list[float]]:
    """How often each kind of round comes, its reaches in order, and the seconds of n drafted nodes."""
    weights = np.random.default_rng(seed).dirichlet([1.0] * 3).tolist()
    reaches = [sorted(random_tree(10 * seed + kind, 6)[1], reverse=True) for kind in range(3)]
    reaches[0] = [0.2 * reach for reach in reaches[0]]  # some rounds are hardly worth a draft
    growth = np.random.default_rng(seed + 50).uniform(0.0, 0.45, 6)
    return weights, reaches, [1.0, *(1.0 + growth.cumsum()).tolist()]


def long_run(weights: list[float], reaches: list[list[float]], seconds: list[float], counts: Sequence[int]) -> float:
    tokens = sum(w * (1 + sum(row[:count])) for w, row, count in zip(weights, reaches, counts, strict=True))
    return tokens / sum(w * seconds[count] for w, count in zip(weights, counts, strict=True))


def test_gain_against_cost_at_the_long_run_rate_is_the_best_policy():
    """Against every policy, a count for every kind of round; and against the best ratio of each round on its own."""
    myopic_loss = []
    for seed in range(8):
        weights, reaches, seconds = situations(seed)
        best = max(long_run(weights, reaches, seconds, counts) for counts in itertools.product(range(7), repeat=3))
        rate, counts = long_run(weights, reaches, seconds, (0, 0, 0)), [0, 0, 0]
        for _ in range(10):
            counts = [best_count(row, seconds, rate) for row in reaches]
            following = long_run(weights, reaches, seconds, counts)
            assert following >= rate - 1e-12
            rate = following
        assert rate == pytest.approx(best, rel=1e-12)
        gain = sum(
            w * (1 + sum(row[:count]) - best * seconds[count])
            for w, row, count in zip(weights, reaches, counts, strict=True)
        )
        assert gain == pytest.approx(0.0, abs=1e-12)
        myopic = [max(range(7), key=lambda n, row=row: (1 + sum(row[:n])) / seconds[n]) for row in reaches]
        myopic_loss.append(1 - long_run(weights, reaches, seconds, myopic) / best)
    assert min(myopic_loss) >= -1e-12
    assert max(myopic_loss) > 1e-3


def test_the_running_rate_finds_the_best_policy():
    for seed in range(8):
        weights, reaches, seconds = situations(seed)
        best = max(long_run(weights, reaches, seconds, counts) for counts in itertools.product(range(7), repeat=3))
        times = [one / seconds[0] for one in seconds]  # in plain passes, as Pace counts them
        pace, tokens, spent = Pace(), 0.0, 0.0
        for number, kind in enumerate(np.random.default_rng(seed).choice(3, 4000, p=weights)):
            count = best_count(reaches[kind], times, pace.rate)
            emitted = 1.0 + sum(reaches[kind][:count])
            pace.add(emitted, times[count])
            if number >= 1000:
                tokens, spent = tokens + emitted, spent + seconds[count]
        assert tokens / spent == pytest.approx(best, rel=0.01)


# --- 7: bounded error -----------------------------------------------------------------------------


def hoeffding_bentkus(total: np.ndarray, count: int, limit: float) -> np.ndarray:
    """P-value of "the risk is above ``limit``" from the sum of ``count`` losses in [0, 1]."""
    mean = np.minimum(total / count, limit)
    hoeffding = np.exp(-count * (rel_entr(mean, limit) + rel_entr(1 - mean, 1 - limit)))
    bentkus = math.e * binom.cdf(np.ceil(total), count, limit)
    return np.minimum(1.0, np.minimum(hoeffding, bentkus))


def plain_binomial(total: np.ndarray, count: int, limit: float) -> np.ndarray:
    """Right for losses of 0 and 1 only."""
    return binom.cdf(np.ceil(total), count, limit)


def normal_approximation(total: np.ndarray, count: int, limit: float) -> np.ndarray:
    """Right in the limit only."""
    return norm.cdf((total / count - limit) / math.sqrt(limit * (1 - limit) / count))


PValue = Callable[[np.ndarray, int, float], np.ndarray]


def excess(p_value: PValue, loss: Sequence[float], count: int, limit: float) -> float:
    """The largest P(p <= u) - u over all u, where a loss is i/4 with probability ``loss[i]``: exact."""
    law = np.ones(1)
    for _ in range(count):
        law = np.convolve(law, loss)
    found = p_value(np.arange(len(law)) / 4, count, limit)
    levels = np.unique(found)
    return max(float(law[found <= level].sum() - level) for level in levels)


def losses(mean: float) -> list[list[float]]:
    """Laws of a loss in quarters with this mean: 0 and 1; 0 and 1/4; 0 and 1/2; all but constant; spread."""
    found = [[1 - mean, 0, 0, 0, mean]]
    found += [[1 - mean / size, *(float(size == i / 4) * mean / size for i in range(1, 5))] for size in (0.25, 0.5)]
    below = min(int(mean * 4), 3)
    near = [0.0] * 5
    near[below + 1] = mean * 4 - below
    near[below] = 1 - near[below + 1]
    spread = [1 - 2 * mean, 0.5 * mean, 0.5 * mean, 0.5 * mean, 0.5 * mean]
    spread[0] += 1 - sum(spread)
    spread = [weight * mean / sum(i / 4 * w for i, w in enumerate(spread)) for weight in spread]
    spread[0] = 1 - sum(spread[1:])
    return [law for law in [*found, near, spread] if min(law) >= 0]


@pytest.mark.parametrize(("count", "limit"), [(20, 0.1), (60, 0.05), (60, 0.25), (150, 0.1)])
def test_the_hoeffding_bentkus_p_value_is_super_uniform(count, limit):
    for mean in (limit, 1.2 * limit, 2 * limit):
        laws = losses(mean)
        assert len(laws) >= 3
        for law in laws:
            assert sum(i / 4 * weight for i, weight in enumerate(law)) == pytest.approx(mean)
            assert excess(hoeffding_bentkus, law, count, limit) < 1e-9
    at_the_limit = losses(limit)
    assert max(excess(plain_binomial, law, count, limit) for law in at_the_limit) > 1e-2
    assert max(excess(normal_approximation, law, count, limit) for law in at_the_limit) > 1e-2
    # Not so cautious as to be useless: half the limit is told from it, given enough sequences.
    assert hoeffding_bentkus(np.array([limit / 2 * 1000]), 1000, limit)[0] < 1e-2


def test_fixed_sequence_testing_keeps_the_family_wise_error():
    """10,000 calibrations of 12 thresholds on 120 sequences; losses of one sequence are the same for all thresholds.

    The test fails when more calibrations go wrong than 999 in 1000 runs of a rule with an error of exactly delta
    would; a rule with an error of 1.2 delta or more fails it with probability above 0.99.
    """
    delta, limit, count, runs = 0.1, 0.1, 120, 10_000
    allowed = int(binom.ppf(0.999, runs, delta))
    assert binom.sf(allowed, runs, 1.2 * delta) > 0.99
    risks = np.linspace(0.02, 0.18, 12)  # from safe to fast; some are above the limit
    risks[5] = limit + 1e-9  # the first of them, as near as can be
    risks.sort()
    wrong = risks > limit
    first = int(wrong.argmax())
    generator = np.random.default_rng(7)
    shared = generator.random((runs, count, 1)) < risks  # one uniform number for each sequence
    totals = shared.sum(1).astype(float)

    def mistakes(p_value: PValue, totals: np.ndarray, *, ordered: bool, level: float = delta) -> int:
        rejected = p_value(totals, count, limit) <= level
        if ordered:
            rejected = np.logical_and.accumulate(rejected, 1)
        return int((rejected & wrong).any(1).sum())

    assert mistakes(hoeffding_bentkus, totals, ordered=True) <= allowed
    # These losses are 0 or 1, so the plain binomial p-value is right too, and less cautious: the bound is nearly met.
    exact = float(
        binom.pmf(np.arange(count + 1), count, limit)[plain_binomial(np.arange(count + 1), count, limit) <= delta].sum()
    )
    met = mistakes(plain_binomial, totals, ordered=True)
    assert 0.6 * exact * runs < met <= allowed
    # Controls. Tried out of order on sequences of their own, or without a p-value, thresholds break the bound.
    apart = generator.binomial(count, np.full((runs, len(risks)), risks[first])).astype(float)
    assert mistakes(plain_binomial, apart, ordered=False) > allowed
    assert mistakes(lambda total, number, _: total / number, totals, ordered=True, level=limit) > allowed


# --- 8: the recurrence under linear dynamics ------------------------------------------------------

SIZE = 3
LINEAR = FitSettings(strengths=(0.0,), features=0, steps=2)


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Depth A, time B, offset c, and G by which a token follows from the rest state before it."""
    generator = np.random.default_rng(seed)
    a, b, g = (generator.normal(size=(SIZE, SIZE)) * scale for scale in (0.4, 0.4, 0.6))
    return a, b, generator.normal(size=SIZE), g


def dynamics(seed: int, sequences: int, noise: float, own: float, memory: float = 0.0) -> list[Chunk]:
    """r(t) = A s(t) + B r(t-1) + c + noise, s(t) = G r(t-1) + own randomness; with memory, + memory r(t-2)."""
    a, b, c, g = matrices(0)
    generator = np.random.default_rng([80, seed])
    before = rest = np.zeros((sequences, SIZE))
    states, rests = [], []
    for _ in range(50 + 200):
        state = rest @ g.T + own * generator.normal(size=rest.shape)
        after = state @ a.T + rest @ b.T + c + memory * before + noise * generator.normal(size=rest.shape)
        before, rest = rest, after
        states.append(state)
        rests.append(rest)
    kept = [torch.from_numpy(np.stack(series[50:], 1)) for series in (states, rests)]
    return [Chunk(kept[0].unsqueeze(2), kept[1])]


def streams(chunks: list[Chunk]) -> Callable[[], Iterator[Chunk]]:
    return lambda: iter(chunks)


def fitted(chunks: list[Chunk]) -> list[np.ndarray]:
    """A, B and c of each map, side by side."""
    fit = fit_recurrence(streams(chunks), streams(chunks), (0,), LINEAR)
    return [np.concatenate([one.matrix.numpy().T, one.offset.numpy()[:, None]], 1) for one in fit.predictor.maps]


def test_linear_dynamics_without_noise_are_recovered_from_few_tokens():
    a, b, c, _ = matrices(0)
    assert np.abs(np.linalg.eigvals(a @ matrices(0)[3] + b)).max() < 0.95
    exact = np.concatenate([a, b, c[:, None]], 1)
    [chunk] = dynamics(0, 1, noise=0.0, own=1.0)
    short = Chunk(chunk.states[:, :12], chunk.rest[:, :12])  # 11 rows for 7 unknowns of each coordinate
    for found in fitted([short]):
        np.testing.assert_allclose(found, exact, atol=1e-8)


def test_linear_dynamics_with_noise_are_recovered_at_the_root_of_the_rows():
    a, b, c, _ = matrices(0)
    exact = np.concatenate([a, b, c[:, None]], 1)
    errors = {
        sequences: np.mean(
            [np.square(fitted(dynamics(seed, sequences, 0.5, 1.0))[0] - exact).mean() for seed in range(8)]
        )
        for sequences in (4, 64)
    }
    assert errors[64] < 1e-4
    assert errors[4] / errors[64] == pytest.approx(16, rel=0.5)  # squared error falls as 1/rows


def test_later_maps_read_the_noise_before_from_the_token():
    """Against the population: the gain of the best linear guess of noise(t-1) from s(t) = G r(t-1) + own randomness."""
    a, b, c, g = matrices(0)
    noise, own = 0.5, 0.4
    gain = noise**2 * g.T @ np.linalg.inv(noise**2 * g @ g.T + own**2 * np.eye(SIZE))
    later = np.concatenate([a + b @ gain, b - b @ gain @ g, c[:, None]], 1)
    chunks = dynamics(0, 400, noise, own)
    # The series is the stationary one that the population is computed for.
    motion, shocks = a @ g + b, own**2 * a @ a.T + noise**2 * np.eye(SIZE)
    covariance = np.cov(chunks[0].rest.flatten(0, 1).numpy().T)
    np.testing.assert_allclose(covariance, solve_discrete_lyapunov(motion, shocks), rtol=0.1, atol=0.02)

    first, second = fitted(chunks)
    np.testing.assert_allclose(first, np.concatenate([a, b, c[:, None]], 1), atol=0.02)
    np.testing.assert_allclose(second, later, atol=0.02)
    assert np.abs(later - first).max() > 0.1  # so the two maps are told apart

    # Two tokens ahead on other text: what reuse of the first map loses, and the second map's error in closed form.
    [held] = dynamics(1, 400, noise, own)
    states, rest = held.states[:, :, 0].numpy(), held.rest.numpy()

    def step(weights: np.ndarray, state: np.ndarray, before: np.ndarray) -> np.ndarray:
        return np.concatenate([state, before, np.ones_like(state[..., :1])], -1) @ weights.T

    guess = step(first, states[:, 1:-1], rest[:, :-2])
    reused, used = (np.square(step(w, states[:, 2:], guess) - rest[:, 2:]).sum(-1).mean() for w in (first, second))
    left = noise**2 * (np.eye(SIZE) - gain @ g)
    assert used == pytest.approx(np.trace(b @ left @ b.T) + SIZE * noise**2, rel=0.02)
    assert reused == pytest.approx(noise**2 * np.trace(b @ b.T) + SIZE * noise**2, rel=0.02)
    assert used < 0.97 * reused


def test_a_longer_memory_is_not_recovered():
    """Without noise: rest(t-2) matters and is no input, so no amount of text makes the linear recurrence exact."""
    remaining = {}
    for memory in (0.0, 0.2):
        chunks = dynamics(0, 64, noise=0.0, own=1.0, memory=memory)
        fit = fit_recurrence(streams(chunks), streams(chunks), (0,), LINEAR)
        remaining[memory] = -float(fit.scores[0, 0])
    assert remaining[0.0] < 1e-9
    assert remaining[0.2] > 1e-3
