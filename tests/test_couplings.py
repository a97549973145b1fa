import itertools
import math

import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.stats import chisquare

from restpoint.errors import RestpointError
from restpoint.transport.couplings import KSeq, MaximalCoupling, RecursiveRejection, SiblingCoupling, rows
from restpoint.transport.optimal import OptimalTransport, all_within, greedy_and_one
from restpoint.transport.siblings import draw_siblings, without
from restpoint.transport.variation import residual

INDEPENDENT, WITHOUT = "independent", "without replacement"
COUPLINGS = [
    MaximalCoupling(),
    KSeq(),
    RecursiveRejection(INDEPENDENT),
    RecursiveRejection(WITHOUT),
    OptimalTransport(INDEPENDENT),
    OptimalTransport(WITHOUT),
    OptimalTransport(INDEPENDENT, support=2),
    OptimalTransport(WITHOUT, support=3),
]


def label(value) -> str:
    return (
        f"{value.name}-{value.drawn}-{getattr(value, 'support', '')}"
        if isinstance(value, SiblingCoupling)
        else repr(value)
    )


def dirichlet(alpha: float, vocab: int, count: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.full((vocab,), alpha, dtype=torch.float64)).sample((count,))


def draft_law(q: torch.Tensor, count: int, drawn: str) -> dict[tuple[int, ...], float]:
    """Every tuple of drafts in the order drawn, with its probability, straight from the definition."""
    laws: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer: dict[tuple[int, ...], float] = {}
        for drafts, probability in laws.items():
            rest = q.tolist()
            if drawn == WITHOUT:
                rest = [0.0 if token in drafts else weight for token, weight in enumerate(rest)]
            total = sum(rest)
            if total == 0:
                longer[drafts] = probability
            for token, weight in enumerate(rest):
                if weight > 0:
                    longer[*drafts, token] = probability * weight / total
        laws = longer
    return laws


def marginal(coupling: SiblingCoupling, p: torch.Tensor, q: torch.Tensor, count: int) -> tuple[float, float]:
    """Total variation between p and the law of Y, and P(Y in drafts), by enumeration."""
    law, accepted = torch.zeros_like(p), 0.0
    for drafts, probability in draft_law(q, count, coupling.drawn).items():
        kernel = coupling.kernel(p, q, drafts)
        assert bool((kernel >= 0).all())
        assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-12)
        law += probability * kernel
        accepted += probability * float(kernel[list(set(drafts))].sum())
    return float((law - p).abs().sum() / 2), accepted


def pairs(vocab: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    one, other = dirichlet(0.3, vocab, 2, seed=vocab)
    flat, flatter = dirichlet(2.0, vocab, 2, seed=vocab + 100)
    half = torch.arange(vocab) < vocab // 2
    sparse = torch.where(half, flat, 0.0) / flat[half].sum()
    rest = torch.where(half, 0.0, flat) / flat[~half].sum()
    point = torch.eye(vocab, dtype=torch.float64)[1]
    return [
        (one, other),
        (flat, flatter),
        (flat, flat),  # p = q
        (sparse, rest),  # disjoint supports
        (flat, sparse),  # q has fewer tokens than drafts
        (sparse, flat),
        (point, flat),
        (flat, point),
        (one, 0.999999 * point + 1e-6 * flat),
    ]


def optimum(p: torch.Tensor, laws: dict[tuple[int, ...], float]) -> float:
    """The largest P(Y in drafts), as the linear program over all tuples of drafts."""
    edges = [(row, token) for row, drafts in enumerate(laws) for token in set(drafts)]
    row, token = (list(side) for side in zip(*edges, strict=True))
    column = list(range(len(edges)))
    matrix = csr_array(
        ([1.0] * 2 * len(edges), (row + [len(laws) + t for t in token], column * 2)),
        shape=(len(laws) + len(p), len(edges)),
    )
    bounds = [*laws.values(), *p.tolist()]
    return -linprog([-1.0] * len(edges), A_ub=matrix, b_ub=bounds, method="highs").fun


# --- the law of Y ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "vocab", "count"),
    [
        pytest.param(coupling, vocab, count, id=f"{label(coupling)}-{vocab}-{count}")
        for coupling in COUPLINGS
        for vocab, count in [(7, 1), (5, 2), (7, 2), (4, 3)]
        if count == 1 or coupling.drawn != "one"  # which takes one draft only
    ],
)
def test_averaged_over_drafts_the_law_of_the_result_is_the_target(coupling, vocab, count):
    for p, q in pairs(vocab)[:: 1 if vocab**count < 40 else 3]:
        distance, accepted = marginal(coupling, p, q, count)
        assert distance < 1e-9
        if getattr(coupling, "support", vocab) >= vocab:
            assert accepted == pytest.approx(coupling.acceptance(p, q, count), abs=2e-7)
        else:
            assert accepted <= coupling.acceptance(p, q, count) + 1e-9


def test_a_wrong_residual_is_noticed():
    class Wrong(RecursiveRejection):
        def kernel(self, p, q, drafts):
            kernel = super().kernel(p, q, drafts)
            found = torch.zeros_like(kernel)
            found[list(drafts)] = kernel[list(drafts)]
            return found + (1 - found.sum()) * p  # instead of what the drafts left of p

    p, q = pairs(5)[0]
    assert marginal(RecursiveRejection(WITHOUT), p, q, 2)[0] < 1e-12
    assert marginal(Wrong(WITHOUT), p, q, 2)[0] > 1e-2


def test_drafts_drawn_in_another_way_are_noticed():
    p, q = dirichlet(1.0, 5, 2, seed=1)
    law = torch.zeros_like(p)
    for drafts, probability in draft_law(q, 2, WITHOUT).items():
        law += probability * RecursiveRejection(INDEPENDENT).kernel(p, q, drafts)
    assert float((law - p).abs().sum()) > 1e-2


@pytest.mark.parametrize("coupling", COUPLINGS, ids=label)
def test_single_precision_and_hard_cases_give_a_law(coupling):
    count = 1 if coupling.drawn == "one" else 3
    torch.manual_seed(3)
    logits = torch.randn(2, 50) * 4
    p, q = logits.softmax(-1)
    near = (logits[0] + 1e-6).softmax(-1)
    cases = [(p, q), (p, p), (p, near), (torch.eye(50)[0], torch.eye(50)[1]), (torch.eye(50)[0], torch.eye(50)[0])]
    for target, drafted in cases:
        for seed in range(5):
            uniforms = torch.rand(count, generator=torch.Generator().manual_seed(seed))
            drafts = draw_siblings(drafted, count, coupling.drawn, uniforms)
            law = coupling.kernel(target, drafted, drafts)
            assert law.dtype == torch.float64
            assert bool((law >= 0).all())
            assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
            assert bool((law[target == 0] < 1e-12).all())


@pytest.mark.parametrize("coupling", COUPLINGS, ids=label)
def test_a_draft_that_q_denies_gives_no_nan(coupling):
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    for token in range(3):
        assert bool(torch.isfinite(coupling.kernel(p, q, [token])).all())


# --- how often Y is a draft -----------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [INDEPENDENT, WITHOUT])
@pytest.mark.parametrize(("vocab", "count"), [(5, 2), (6, 3), (7, 2)])
def test_the_dual_the_linear_program_and_the_coupling_agree(drawn, vocab, count):
    for p, q in pairs(vocab):
        laws = draft_law(q, count, drawn)
        dual = OptimalTransport(drawn).acceptance(p, q, count)
        assert dual == pytest.approx(optimum(p, laws), abs=1e-8)
        tokens = range(vocab)
        brute = min(
            float(p[list(chosen)].sum()) + 1 - sum(w for drafts, w in laws.items() if set(drafts) <= set(chosen))
            for size in range(vocab + 1)
            for chosen in itertools.combinations(tokens, size)
        )
        assert dual == pytest.approx(brute, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_the_inequality_behind_the_sorted_sets(count):
    """[F(H+x) - F(H)]/q_x <= [F(H+x+y) - F(H+x)]/q_y for every H, x, y, without replacement."""
    vocab = 6
    for q in dirichlet(0.5, vocab, 6, seed=count):
        laws = draft_law(q, count, WITHOUT)

        def inside(chosen, laws=laws):
            return sum(weight for drafts, weight in laws.items() if chosen.issuperset(drafts))

        for x, y in itertools.permutations(range(vocab), 2):
            others = set(range(vocab)) - {x, y}
            for size in range(len(others) + 1):
                for rest in map(set, itertools.combinations(others, size)):
                    first, second, third = inside(rest), inside(rest | {x}), inside(rest | {x, y})
                    assert (second - first) * q[y] <= (third - second) * q[x] + 1e-12


@pytest.mark.parametrize("drawn", [INDEPENDENT, WITHOUT])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_chance_that_all_drafts_are_in_a_set(drawn, count):
    point = torch.eye(6, dtype=torch.float64)[2]
    laws = [q for alpha in (0.1, 1.0) for q in dirichlet(alpha, 6, 4, seed=count)]
    laws += [1e-9 * laws[4] + (1 - 1e-9) * point, point, without(laws[4], [0, 1, 2])]
    for q in laws:
        drafts = draft_law(q, count, drawn)
        expected = [sum(w for drawn_, w in drafts.items() if max(drawn_) < size) for size in range(7)]
        assert all_within(q, count, drawn).tolist() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("chosen", [[], [0], [1, 4], [0, 2, 3]])
def test_one_drawn_beside_chosen_siblings_is_optimal(chosen):
    for p, q in pairs(6):
        rest = without(q, chosen)
        if float(rest.sum()) == 0:
            continue
        laws = {(*chosen, token): float(rest[token]) for token in range(6) if rest[token] > 0}
        attained = sum(
            weight * float(MaximalCoupling().kernel(p, rest, drafts[-1:])[list(drafts)].sum())
            for drafts, weight in laws.items()
        )
        assert attained == pytest.approx(greedy_and_one(p, q, chosen), abs=1e-12)
        assert attained == pytest.approx(optimum(p, laws), abs=1e-8)


def test_more_support_never_matters_for_the_law_and_brings_acceptance():
    p, q = (
        law.exp() / law.exp().sum() for law in torch.randn(2, 6, generator=torch.Generator().manual_seed(5)).double()
    )
    for drawn in (INDEPENDENT, WITHOUT):
        results = [marginal(OptimalTransport(drawn, support=size), p, q, 2) for size in (1, 3, 6)]
        assert max(distance for distance, _ in results) < 1e-12
        accepted = [found for _, found in results]
        assert accepted[0] < accepted[1] < accepted[2]
        assert accepted[2] == pytest.approx(OptimalTransport(drawn).acceptance(p, q, 2), abs=1e-7)


ROW = {
    "maximal, one": 0.325,
    "recursive, independent": 0.450,
    "k-seq, independent": 0.460,
    "recursive, without replacement": 0.576,
    "optimal, independent": 0.477,
    "optimal, without replacement": 0.617,
}


@pytest.mark.slow
def test_mean_acceptance_of_dirichlet_laws():
    """V = 7, three drafts, 8000 pairs of independent p, q ~ Dirichlet(0.3); standard errors are below 0.003."""
    p, q = dirichlet(0.3, 7, 16000, seed=0).chunk(2)
    found = {}
    for coupling in COUPLINGS[:6]:
        count = 1 if coupling.drawn == "one" else 3
        rows = [coupling.acceptance(a, b, count) for a, b in zip(p, q, strict=True)]
        found[f"{coupling.name}, {coupling.drawn}"] = math.fsum(rows) / len(rows)
    assert found == pytest.approx(ROW, abs=5e-3)


def test_no_coupling_beats_the_optimum():
    for p, q in zip(*dirichlet(0.5, 6, 40, seed=7).chunk(2), strict=True):
        for count in (1, 2, 3):
            found = {(c.name, c.drawn): c.acceptance(p, q, count) for c in COUPLINGS[1:6]}
            iid, rest = found["optimal", INDEPENDENT], found["optimal", WITHOUT]
            assert found["recursive", INDEPENDENT] <= iid + 1e-9
            assert (1 - 1 / math.e) * iid - 1e-6 <= found["k-seq", INDEPENDENT] <= iid + 1e-6
            assert found["recursive", WITHOUT] <= rest + 1e-9


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [INDEPENDENT, WITHOUT])
def test_siblings_have_the_law_that_couplings_expect(drawn):
    q = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    expected = draft_law(q, 2, drawn)
    uniforms = torch.rand(1500, 2, generator=torch.Generator().manual_seed(0))
    seen = dict.fromkeys(expected, 0)
    for pair in uniforms:
        seen[tuple(draw_siblings(q, 2, drawn, pair))] += 1
    assert chisquare(list(seen.values()), [1500 * weight for weight in expected.values()]).pvalue > 1e-3


def test_without_replacement_stops_when_no_token_is_left():
    q = torch.tensor([0.0, 0.7, 0.3])
    assert sorted(draw_siblings(q, 3, WITHOUT, torch.rand(3))) == [1, 2]
    assert draw_siblings(torch.eye(3)[2], 3, WITHOUT, torch.rand(3)) == [2]
    torch.testing.assert_close(residual(q, without(q, [1])), torch.tensor([0.0, 1.0, 0.0]))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, q: KSeq().kernel(p, q, []), "at least one draft"),
        (lambda p, q: KSeq().kernel(p, q, [4]), "vocabulary of 4"),
        (lambda p, q: rows(p, q[:3]), "target's vocabulary"),
        (lambda p, q: KSeq().kernel(p.half(), q, [1]), "cannot hold a distribution"),
        (lambda p, q: MaximalCoupling().kernel(p, q, [1, 2]), "coupling of one"),
        (lambda p, q: MaximalCoupling().acceptance(p, q, 2), "coupling of one"),
        (lambda p, q: RecursiveRejection().kernel(p, q, [1, 1]), "repeat a token"),
        (lambda p, q: OptimalTransport().kernel(p, q, [1, 1]), "repeat a token"),
        (lambda p, q: OptimalTransport(support=0), "support=0"),
        (lambda p, q: OptimalTransport("one"), "MaximalCoupling"),
        (lambda p, q: RecursiveRejection("one"), "MaximalCoupling"),
        (lambda p, q: RecursiveRejection().acceptance(p.repeat(100), q.repeat(100), 3), "too many to enumerate"),
        (lambda p, q: draw_siblings(q, 0, INDEPENDENT, torch.rand(0)), "at least one draft"),
        (lambda p, q: draw_siblings(q, 2, "one", torch.rand(2)), "coupling of one"),
        (lambda p, q: draw_siblings(q, 2, INDEPENDENT, torch.rand(3)), "one for each draw"),
    ],
)
def test_what_cannot_be_coupled_is_refused(call, words):
    with pytest.raises(RestpointError, match=words):
        call(torch.full((4,), 0.25), torch.full((4,), 0.25))
