"""Risk control: p-values against references and by enumeration, coverage over repeated splits, losses, shift."""

import importlib
import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from restpoint.errors import RestpointError
from restpoint.exit.losses import LOSSES, Disagreement, Outcome, PerplexityIncrease, ScoreDrop, checked, loss
from restpoint.exit.p_values import P_VALUES, betting, binomial, hoeffding_bentkus
from restpoint.exit.risk import (
    RiskControl,
    Status,
    conformal_select,
    minimum_sequences,
    select,
    upper_bound,
)
from restpoint.exit.shift import ShiftMonitor

Law = Callable[[np.random.Generator, float, tuple[int, ...]], np.ndarray]

# Laws of one loss with a given mean: skewed, with zeros in most sequences, coins, and nearly constant.
LAWS: dict[str, Law] = {
    "beta": lambda random, mean, size: random.beta(0.3, 0.3 * (1 / mean - 1), size),
    "zeros": lambda random, mean, size: (random.random(size) < 0.4) * random.binomial(48, mean / 0.4, size) / 48,
    "coins": lambda random, mean, size: (random.random(size) < mean).astype(np.float64),
    "even": lambda random, mean, size: random.binomial(48, mean, size) / 48,
}


def at_most(share: float, delta: float, draws: int) -> bool:
    """Whether a share of draws says nothing against a probability of delta or less."""
    return share <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


# --- p-values: references ---


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
def test_hoeffding_bentkus_is_mapies(epsilon: float) -> None:
    pytest.importorskip("mapie")
    methods = importlib.import_module("mapie.risk_control.methods")
    columns = np.arange(64)[:, None] < np.arange(65)[None]  # means k/64, which float64 holds exactly
    expected = methods.compute_hoeffding_bentkus_p_value(columns.mean(0)[:-1], 64, epsilon)[:, 0]
    found = hoeffding_bentkus(columns.astype(np.float64), epsilon)
    np.testing.assert_allclose(found[:-1], np.minimum(expected, 1), rtol=1e-12)
    assert found[-1] == 1  # all losses 1, where MAPIE divides by zero


def exact_tail(successes: int, count: int, epsilon: Fraction) -> Fraction:
    """P(Bin(count, epsilon) <= successes) in whole numbers."""
    return sum(
        (math.comb(count, k) * epsilon**k * (1 - epsilon) ** (count - k) for k in range(successes + 1)), Fraction(0)
    )


def test_hoeffding_bentkus_by_hand() -> None:
    losses = np.array([0.1, 0.0, 0.25, 0.0, 0.05] * 8)
    mean = losses.mean()
    divergence = stats.entropy([mean, 1 - mean], [0.2, 0.8])
    tail = math.e * float(exact_tail(math.ceil(40 * 0.08), 40, Fraction(1, 5)))  # sum 3.2: at most 4 of 40
    assert hoeffding_bentkus(losses, 0.2) == pytest.approx(min(math.exp(-40 * divergence), tail), rel=1e-12)
    quarters = np.array([0.25] * 12 + [0.0] * 18)  # here Bentkus' bound is the smaller one
    tail = math.e * float(exact_tail(3, 30, Fraction(1, 2)))
    assert hoeffding_bentkus(quarters, 0.5) == pytest.approx(tail, rel=1e-12)
    assert tail < math.exp(-30 * stats.entropy([0.1, 0.9], [0.5, 0.5]))


def test_sums_that_rounding_lifts_above_a_whole_number_are_not_rounded_up() -> None:
    losses = np.full(30, 0.1)
    assert losses.cumsum()[-1] > 3  # added one after another, as down a column
    column = np.repeat(losses[:, None], 2, axis=1)
    bentkus = math.e * float(exact_tail(3, 30, Fraction(1, 2)))
    hoeffding = math.exp(-30 * stats.entropy([0.1, 0.9], [0.5, 0.5]))
    assert hoeffding_bentkus(column, 0.5).tolist() == pytest.approx([bentkus, bentkus], rel=1e-9)
    assert bentkus < hoeffding  # so that the sum's being 3 or 4 shows


@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_binomial_is_scipys_exact_test(epsilon: float) -> None:
    columns = (np.arange(50)[:, None] < np.arange(51)[None]).astype(np.float64)
    expected = [float(stats.binomtest(k, 50, epsilon, alternative="less").pvalue) for k in range(51)]
    assert binomial(columns, epsilon).tolist() == pytest.approx(expected, rel=1e-9)
    assert binomial(columns[:, 3], 0.25) == pytest.approx(float(exact_tail(3, 50, Fraction(1, 4))), rel=1e-12)


def betting_by_hand(losses: list[float], epsilon: float, level: float) -> float:
    """The capital process, one sequence after another."""
    capital, highest, seen, squares, count = 1.0, 1.0, 0.5, 0.25, len(losses)
    for i, value in enumerate(losses):
        bet = min(math.sqrt(2 * math.log(1 / level) / (count * squares / (i + 1))), 0.9 / (1 - epsilon))
        capital *= 1 + bet * (epsilon - value)
        assert capital > 0
        highest = max(highest, capital)
        seen += value
        squares += (value - seen / (i + 2)) ** 2
    return 1 / highest if sum(losses) / count < epsilon else 1.0


def test_betting_is_the_capital_process() -> None:
    random = np.random.default_rng(1)
    for name, law in LAWS.items():
        losses = law(random, 0.04, (80, 3))
        losses[5] = 1.0
        for epsilon, level in ((0.1, 0.1), (0.3, 0.01)):
            expected = np.array([betting_by_hand(column.tolist(), epsilon, level) for column in losses.T])
            np.testing.assert_allclose(betting(losses, epsilon, level), expected, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("name", P_VALUES)
def test_columns_at_once_are_columns_one_by_one(name: str) -> None:
    losses = LAWS["coins"](np.random.default_rng(2), 0.1, (60, 7))
    at_once = P_VALUES[name].of(losses, 0.15, 0.1)
    assert at_once.shape == (7,)
    alone = [P_VALUES[name].of(column, 0.15, 0.1) for column in losses.T]
    assert all(one.shape == () for one in alone)
    assert at_once.tolist() == pytest.approx([float(one) for one in alone], rel=1e-12)
    assert len(np.unique(at_once)) > 3


@pytest.mark.parametrize("name", P_VALUES)
def test_p_values_fall_as_epsilon_rises(name: str) -> None:
    epsilons = np.linspace(0.005, 0.995, 199)
    for seed in range(5):
        losses = LAWS["coins"](np.random.default_rng(seed), 0.1, (40, 4))
        values = np.stack([P_VALUES[name].of(losses, float(epsilon), 0.1) for epsilon in epsilons])
        assert (np.diff(values, axis=0) <= 1e-12).all()
        assert (values[0] > 0.5).all()
        assert (values[-1] < 1e-3).all()


# --- p-values: validity and power ---


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.5])
def test_validity_by_enumeration(name: str, epsilon: float) -> None:
    """Over every outcome of six sequences, P(p <= a) <= a at each a that p takes; no sampling error."""
    supports = [((0.0, 1 - epsilon), (1.0, epsilon))]
    if name != "binomial":
        supports += [
            ((0.0, 0.7), (0.5, 0.6 * epsilon), (1.0, 0.3 - 0.6 * epsilon)),
            ((0.0, 0.5), (2 * epsilon, 0.5)),
            ((epsilon / 2, 2 / 3), (2 * epsilon, 1 / 3)),
        ]
    least = 1.0
    for support in supports:
        assert math.isclose(sum(mass for _, mass in support), 1)
        if sum(value * mass for value, mass in support) < epsilon - 1e-12:
            continue  # the hypothesis does not hold for it
        outcomes = list(itertools.product(support, repeat=6))
        losses = np.array([[value for value, _ in outcome] for outcome in outcomes]).T
        masses = np.array([math.prod(mass for _, mass in outcome) for outcome in outcomes])
        values = P_VALUES[name].of(losses, epsilon, 0.1)
        for level in np.unique(values):
            assert masses[values <= level].sum() <= level * (1 + 1e-9)
        least = min(least, float(values.min()))
    assert least < 0.75  # p-values of 1 throughout would pass too


@pytest.mark.parametrize(
    ("name", "law"), [(name, law) for name in P_VALUES for law in LAWS if name != "binomial" or law == "coins"]
)
def test_validity_by_simulation(name: str, law: str) -> None:
    """At a risk of exactly epsilon, the share of p <= delta is at most delta, and it grows large well below."""
    random, draws, epsilon = np.random.default_rng(3), 5000, 0.1
    values = P_VALUES[name].of(LAWS[law](random, epsilon, (150, draws)), epsilon, 0.1)
    for delta in (0.01, 0.05, 0.1, 0.5):
        assert at_most(float((values <= delta).mean()), delta, draws)
    powerful = P_VALUES[name].of(LAWS[law](random, epsilon / 4, (150, draws)), epsilon, 0.1)
    assert (powerful <= 0.1).mean() > 0.9
    if name == "binomial":
        assert (values <= 0.1).mean() > 0.05  # exact up to the steps of the binomial law


def test_betting_detects_skewed_losses_that_the_mean_alone_does_not() -> None:
    losses = np.random.default_rng(4).beta(0.3, 12, (200, 1000))
    assert (betting(losses, 0.05) <= 0.1).mean() > 0.95
    assert (hoeffding_bentkus(losses, 0.05) <= 0.1).mean() < 0.2


# --- select ---


def recorded(seed: int, count: int = 3000, thresholds: int = 12) -> np.ndarray:
    """Losses of sequences at thresholds from safe to fast: one difficulty moves them all, and they may fall again."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(size=(count, 1))
    speed = np.linspace(-4.4, -0.8, thresholds)[None] + 0.1 * np.sin(np.arange(thresholds) * 2.5)[None]
    rate = 1 / (1 + np.exp(-(speed + 0.8 * difficulty)))
    return random.binomial(48, rate) / 48


@pytest.mark.parametrize("trials", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", P_VALUES)
def test_coverage_over_repeated_splits(name: str, trials: int) -> None:
    """Of many calibrations on drawn sequences, a share of delta at most choose a threshold of risk above epsilon."""
    population = recorded(5)
    if name == "binomial":
        population = (population > 0.25).astype(np.float64)
    risks = population.mean(0)
    # The hardest epsilon: a hair below the risk of the first threshold that would break the promise.
    epsilon = float(np.maximum.accumulate(risks)[5] - 1e-6)
    assert risks[5] > epsilon > risks[:5].max()
    control = RiskControl(epsilon, 0.1, name)
    random = np.random.default_rng(6)
    violated, found, useful = 0, 0, 0
    for _ in range(trials):
        chosen = select(population[random.integers(0, len(population), 200)], control).index
        found += chosen is not None
        useful += chosen is not None and chosen >= 3
        violated += chosen is not None and risks[chosen] > epsilon
    assert at_most(violated / trials, control.delta, trials)
    assert found / trials > 0.95
    assert useful / trials > {"betting": 0.4, "hoeffding-bentkus": 0.005, "binomial": 0.4}[name]
    if name == "binomial":
        assert violated / trials > 0.03  # near delta, up to the steps of the binomial law: the test can fail


def test_bound_of_a_fixed_threshold_covers_its_risk() -> None:
    population = recorded(7)[:, 4]
    random, trials = np.random.default_rng(8), 500
    control = RiskControl(0.1, 0.2)
    bounds = [upper_bound(population[random.integers(0, 3000, 200)], control) for _ in range(trials)]
    assert at_most(float(np.mean(np.array(bounds) < population.mean())), 0.2, trials)
    assert np.median(bounds) < 1.6 * population.mean()


def test_testing_stops_at_the_first_threshold_that_fails() -> None:
    random = np.random.default_rng(9)
    losses = np.stack([LAWS["beta"](random, mean, (400,)) for mean in (0.005, 0.01, 0.2, 0.005)], 1)
    found = select(losses, RiskControl(0.05, 0.1))
    assert (found.status, found.index) == (Status.CONTROLLED, 1)
    assert found.status.remedy == ""
    assert len(found.p_values) == 3  # the fourth would pass and is never tested
    assert found.p_values[1] <= 0.1 < found.p_values[2]
    mean = select(losses, RiskControl(0.05, 0.1, "hoeffding-bentkus"))
    np.testing.assert_allclose(mean.p_values, hoeffding_bentkus(losses, 0.05)[: len(mean.p_values)], rtol=1e-12)
    assert found.mean_loss == pytest.approx(losses[:, 1].mean(), rel=1e-12)
    assert found.mean_loss < found.upper_bound <= 0.05
    assert found.needed_sequences is None
    every = select(losses[:, :2], RiskControl(0.05, 0.1))
    assert (every.index, len(every.p_values)) == (1, 2)


def test_the_easy_texts_first_do_not_decide() -> None:
    easy_first = np.repeat([0.0, 0.18], [150, 50])[:, None]  # a mean of 0.045
    assert betting(easy_first, 0.05, 0.1) < 0.01
    found = select(easy_first, RiskControl(0.05, 0.1))
    assert found.index is None
    assert found.upper_bound > 0.05
    assert found == select(easy_first, RiskControl(0.05, 0.1))
    unlucky = np.repeat([0.0, 1.0], [300, 60])
    assert betting(unlucky, 0.1) == 1  # its capital was high before the losses came
    assert upper_bound(unlucky, RiskControl(0.1)) >= 1 / 6


def test_binomial_bound_is_clopper_pearsons() -> None:
    for ones in (0, 3, 20):
        losses = (np.arange(90) < ones).astype(np.float64)
        expected = stats.beta.ppf(0.9, ones + 1, 90 - ones)
        assert upper_bound(losses, RiskControl(0.3, 0.1, "binomial")) == pytest.approx(expected, abs=1e-9)
    assert upper_bound(np.ones(90), RiskControl(0.3, 0.1, "binomial")) == 1


@pytest.mark.parametrize("name", P_VALUES)
def test_bound_inverts_the_p_value(name: str) -> None:
    losses = LAWS["coins"](np.random.default_rng(10), 0.1, (100,))
    bound = upper_bound(losses, RiskControl(0.3, 0.1, name))
    assert P_VALUES[name].of(losses, bound, 0.1) <= 0.1 < P_VALUES[name].of(losses, bound - 1e-9, 0.1)
    assert losses.mean() < bound < 0.3


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.1), (0.05, 0.1), (0.1, 0.01)])
def test_minimum_sequences(name: str, epsilon: float, delta: float) -> None:
    control = RiskControl(epsilon, delta, name)
    least = minimum_sequences(control)
    closed = math.ceil(math.log(delta) / math.log(1 - epsilon))
    assert least == closed if name != "betting" else closed <= least < 1.3 * closed
    assert select(np.zeros((least, 2)), control).index == 1
    with pytest.raises(RestpointError, match=rf"^losses: {least - 1} calibration .*; pass {least} at least"):
        select(np.zeros((least - 1, 2)), control)


@pytest.mark.parametrize("name", P_VALUES)
def test_needed_sequences(name: str) -> None:
    control = RiskControl(0.05, 0.1, name)
    losses = (np.arange(120) % 24 == 23).astype(np.float64)  # a mean of 1/24
    found = select(np.stack([losses, losses], 1), control)
    assert (found.status, found.index, len(found.p_values)) == (Status.NONE_QUALIFIES, None, 1)
    assert "epsilon" in found.status.remedy
    assert found.mean_loss == pytest.approx(1 / 24)
    assert found.upper_bound > 0.05
    needed = found.needed_sequences
    assert needed is not None
    draws = np.random.default_rng(19).choice(losses, (needed, 400))  # at this many, luck decides; far from it, hardly
    passing = float((P_VALUES[name].of(draws, 0.05, 0.1) <= 0.1).mean())
    assert 0.25 < passing < 0.75
    assert (P_VALUES[name].of(draws[: needed // 5], 0.05, 0.1) <= 0.1).mean() < 0.25
    if name != "betting":
        projected = P_VALUES[name].projected
        assert projected(losses, 0.05, 0.1, needed) <= 0.1 < projected(losses, 0.05, 0.1, needed - 1)
    if name == "binomial":  # its steps let fewer pass now and then
        assert 1 <= needed / next(24 * k for k in range(1, 100) if stats.binom.cdf(k, 24 * k, 0.05) <= 0.1) < 1.4


def test_needed_sequences_where_no_number_would_do() -> None:
    assert select(np.full((100, 1), 0.06), RiskControl(0.05)).needed_sequences is None
    coins = (np.arange(100) % 20 == 19).astype(np.float64)[:, None]  # a mean of exactly epsilon
    assert select(coins, RiskControl(0.05)).needed_sequences is None


# --- conformal risk control ---


def test_conformal_select_by_hand() -> None:
    losses = np.zeros((9, 4))
    losses[0] = [0.0, 0.5, 0.1, 0.9]  # the running maximum keeps 0.5
    losses[1] = [0.0, 0.0, 0.4, 0.9]
    found = conformal_select(losses, 0.2)  # bounds (1, 1.5, 1.9, 2.8) / 10
    assert (found.status, found.index) == (Status.CONTROLLED, 2)
    assert found.bound == pytest.approx(0.19)
    assert found.mean_loss == pytest.approx(0.1)
    assert conformal_select(losses, 0.16).index == 1
    with pytest.raises(RestpointError, match=r"^losses: 9 calibration .* pass 10 at least"):
        conformal_select(losses, 0.095)


def test_conformal_needed_sequences() -> None:
    losses = np.resize([0.0, 0.25], (30, 1))
    found = conformal_select(losses, 0.15)
    assert (found.status, found.index, found.mean_loss) == (Status.NONE_QUALIFIES, None, 0.125)
    needed = found.needed_sequences
    assert needed is not None
    assert (needed * 0.125 + 1) / (needed + 1) <= 0.15 < ((needed - 1) * 0.125 + 1) / needed
    assert conformal_select(losses, 0.12).needed_sequences is None
    assert conformal_select(np.zeros((19, 1)), 0.05).index == 0


def test_conformal_selection_keeps_the_expected_loss() -> None:
    """E[risk(chosen)] <= epsilon over calibrations, and not far below: the bound is tight up to 2 / (n + 1)."""
    random, trials, count, epsilon = np.random.default_rng(11), 2000, 60, 0.2
    population = np.sort(random.random((4000, 1)) * np.linspace(0, 1, 301)[None], axis=1)
    population = np.where(population > 0.4, 1.0, 0.5 * population)
    risks = population.mean(0)
    picked = [conformal_select(population[random.integers(0, 4000, count)], epsilon).index for _ in range(trials)]
    kept = np.array([0.0 if index is None else risks[index] for index in picked])
    assert kept.mean() <= epsilon + 3 * kept.std() / math.sqrt(trials)
    assert kept.mean() >= epsilon - 2 / (count + 1) - 3 * kept.std() / math.sqrt(trials)
    assert kept.std() > 0.01


# --- bad input ---


@pytest.mark.parametrize("value", [math.nan, -0.01, 1.2, math.inf])
def test_losses_outside_the_unit_interval_are_named_by_place(value: float) -> None:
    losses = np.zeros((200, 3))
    losses[17, 2] = value
    calls = [lambda: select(losses, RiskControl()), lambda: conformal_select(losses, 0.1)]
    calls += [lambda known=known: known.of(losses, 0.1, 0.1) for known in P_VALUES.values()]
    for call in calls:
        with pytest.raises(RestpointError, match=r"^losses: row 17, column 2 is "):
            call()
    with pytest.raises(RestpointError, match=r"^losses: row 17 is "):
        hoeffding_bentkus(losses[:, 2], 0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_probabilities_are_checked(value: float) -> None:
    losses = np.zeros((100, 2))
    for call in (
        lambda: RiskControl(epsilon=value),
        lambda: conformal_select(losses, value),
        lambda: hoeffding_bentkus(losses, value),
        lambda: binomial(losses, value),
        lambda: betting(losses, value),
    ):
        with pytest.raises(RestpointError, match=r"^epsilon is .* above 0 and below 1"):
            call()
    with pytest.raises(RestpointError, match=r"^delta is "):
        RiskControl(delta=value)
    with pytest.raises(RestpointError, match=r"^level is "):
        betting(losses, 0.1, value)
    with pytest.raises(RestpointError, match=r"^level is "):
        ShiftMonitor.of([0.5] * 200).check(0.5, value)


def test_other_bad_input() -> None:
    with pytest.raises(RestpointError, match=r"^method='beting' is not known \(did you mean 'betting'\?\)"):
        RiskControl(method="beting")
    with pytest.raises(RestpointError, match=r"^losses: row 1, column 0 is 0.5; .*betting"):
        binomial(np.array([[0.0, 1.0], [0.5, 0.0]]), 0.1)
    with pytest.raises(RestpointError, match=r"^losses: row 1 is 0.5; "):
        binomial(np.array([0.0, 0.5]), 0.1)
    with pytest.raises(RestpointError, match=r"^losses: there is no sequence"):
        select(np.zeros((0, 3)), RiskControl())
    for call in (lambda: select(np.zeros((100, 0)), RiskControl()), lambda: conformal_select(np.zeros((100, 0)), 0.1)):
        with pytest.raises(RestpointError, match=r"^losses: there is no threshold"):
            call()
    with pytest.raises(RestpointError, match=r"^epsilon=1e-09 with delta=0.1 asks for more than"):
        minimum_sequences(RiskControl(1e-9, 0.1, "hoeffding-bentkus"))


# --- losses ---


def outcome(**changes: object) -> Outcome:
    fields: dict[str, object] = {
        "tokens": np.array([3, 1, 4, 1]),
        "full_tokens": np.array([3, 1, 5, 1]),
        "log_probability": np.array([-1.0, -2.0, -0.5, -0.1]),
        "full_log_probability": np.array([-0.8, -1.0, -0.7, -0.1]),
    }
    return Outcome(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_losses_by_hand() -> None:
    assert Disagreement()(outcome()) == 0.25
    assert PerplexityIncrease()(outcome()) == pytest.approx(0.25)  # (0.2 + 1.0 - 0.2 + 0) / 4 nats
    assert PerplexityIncrease(cap=0.5)(outcome()) == pytest.approx(0.5)
    assert PerplexityIncrease(cap=0.1)(outcome()) == 1
    better = outcome(log_probability=np.array([-0.1, -0.1, -0.1, -0.1]))
    assert PerplexityIncrease()(better) == 0
    assert ScoreDrop()(outcome(score=0.25, full_score=1.0)) == 0.75
    assert ScoreDrop()(outcome(score=1.0, full_score=0.25)) == 0


def test_perplexity_increase_of_one_sequence_is_the_logarithm_of_its_perplexities() -> None:
    random = np.random.default_rng(12)
    own, full = (-random.exponential(size=50).astype(np.float32) for _ in range(2))
    tokens = np.zeros(50, dtype=np.int64)
    ratio = np.exp(-own.astype(np.float64).mean()) / np.exp(-full.astype(np.float64).mean())
    found = [PerplexityIncrease(cap=2.0)(Outcome(tokens, tokens, *laws)) for laws in ((own, full), (full, own))]
    assert sorted(found) == pytest.approx([0, abs(math.log(ratio)) / 2], rel=1e-6)


def test_losses_by_name() -> None:
    assert loss("disagreement") is LOSSES["disagreement"]
    scored = outcome(score=0.0, full_score=1.0)
    assert {name: checked(known, scored) for name, known in LOSSES.items()} == pytest.approx(
        {"disagreement": 0.25, "perplexity-increase": 0.25, "score-drop": 1.0}
    )
    with pytest.raises(RestpointError, match=r"^loss='disagrement' is not known \(did you mean 'disagreement'\?\)"):
        loss("disagrement")


def test_a_loss_of_the_users_own_is_checked() -> None:
    def edits(outcome: Outcome) -> float:
        return float((outcome.tokens != outcome.full_tokens).sum())

    assert checked(edits, outcome()) == 1
    twice = outcome(tokens=np.array([3, 2, 4, 1]))
    with pytest.raises(RestpointError, match=r"^loss: edits gave 2.0; "):
        checked(edits, twice)
    with pytest.raises(RestpointError, match=r"^loss: <lambda> gave nan; "):
        checked(lambda _outcome: math.nan, twice)


def test_outcomes_without_a_loss_are_refused() -> None:
    empty = {name: np.zeros(0) for name in ("log_probability", "full_log_probability")}
    none = np.zeros(0, dtype=np.int64)
    with pytest.raises(RestpointError, match=r"^tokens: the sequence is empty"):
        outcome(tokens=none, full_tokens=none, **empty)
    for value in (math.nan, -math.inf, 0.3):
        with pytest.raises(RestpointError, match=r"^full_log_probability: a value is above 0 or not finite"):
            outcome(full_log_probability=np.array([-1.0, value, -1.0, -1.0]))
    with pytest.raises(RestpointError, match=r"^cap is 0"):
        PerplexityIncrease(cap=0.0)
    with pytest.raises(RestpointError, match=r"^score: .*both"):
        ScoreDrop()(outcome(score=0.5))
    with pytest.raises(RestpointError, match=r"^full_score is 40.0; "):
        ScoreDrop()(outcome(score=0.5, full_score=40.0))


# --- shift ---


def brute_p_value(calibration: list[float], number: float) -> float:
    below, above = (sum(test) for test in zip(*((c <= number, c >= number) for c in calibration), strict=True))
    return min(1.0, 2 * min((1 + below), (1 + above)) / (len(calibration) + 1))


def test_shift_p_value_by_counting() -> None:
    numbers = [round(float(x), 2) for x in np.random.default_rng(13).beta(5, 2, 150)]  # two digits: many ties
    monitor = ShiftMonitor.of(numbers)
    assert monitor.calibration == tuple(sorted(numbers))
    for number in [0.0, 0.2, *numbers, 0.7251, 0.999, 2.0]:
        assert monitor.p_value(number) == brute_p_value(numbers, number)
    assert monitor.p_value(math.nan) == monitor.p_value(math.inf) == 2 / 151


@pytest.mark.parametrize(("count", "kept"), [(300, 300), (1000, 1000), (1001, 500), (2500, 832), (30_000, 999)])
def test_shift_p_values_are_valid_whatever_is_thinned(count: int, kept: int) -> None:
    """With every number in turn as the new one, the share of p <= a is at most a."""
    numbers = np.random.default_rng(14).beta(5, 2, count + 1).tolist()
    monitor = ShiftMonitor.of(numbers[:-1])
    assert len(monitor.calibration) == kept
    assert list(monitor.calibration) == sorted(monitor.calibration)
    turns = range(0, count + 1, max(1, count // 300))
    every = sorted(numbers[:-1])
    for turn in turns:  # no less than the p-value of all numbers, and hardly more
        exact = brute_p_value(every, numbers[turn]) if count <= 2500 else None
        if exact is not None:
            assert exact - 8e-3 <= monitor.p_value(numbers[turn]) <= exact + 8e-3
    fresh = np.random.default_rng(15).beta(5, 2, 4000)
    values = np.array([monitor.p_value(float(number)) for number in fresh])
    for level in (0.02, 0.1, 0.5):  # given one calibration, its own error adds to that of the draws
        spread = 3 * math.sqrt(level * (1 - level) * (1 / 4000 + 2 / count))
        assert abs((values <= level).mean() - level) <= spread + 2 / kept


def test_thinned_p_values_are_rounded_up_and_never_down() -> None:
    numbers = np.random.default_rng(16).permutation(2502).astype(np.float64).tolist()  # n + 1 = 2503 is prime
    monitor = ShiftMonitor.of(numbers)
    used = numbers[: 3 * 834 - 1]
    assert len(monitor.calibration) == 833
    for number in np.arange(-0.5, 2503, 7.25):
        exact = brute_p_value(used, float(number))
        assert exact <= monitor.p_value(float(number)) <= exact + 2 / 834 + 1e-12


def test_every_exchangeable_turn_counts() -> None:
    """Exact validity: of the n + 1 turns of being the new one, a share of a at most has p <= a; ties included."""
    random = np.random.default_rng(17)
    tied = random.integers(0, 9, 120) / 9
    nearly_tied = 0.5 + 1e-9 * random.random(120)  # all alike once rounded, the new one too
    for numbers in (random.random(120).tolist(), tied.tolist(), nearly_tied.tolist()):
        turns = [ShiftMonitor.of(numbers[:i] + numbers[i + 1 :]).p_value(number) for i, number in enumerate(numbers)]
        for level in np.unique(turns):
            assert np.mean(np.array(turns) <= level) <= level + 1e-12


def test_shift_warns_of_what_is_unusual_only() -> None:
    monitor = ShiftMonitor.of(np.linspace(0.6, 0.9, 301).tolist())
    assert monitor.check(0.75) is None
    assert monitor.check(0.605) is None  # p = 0.04
    low, high = monitor.check(0.3), monitor.check(0.95)
    assert low is not None
    assert high is not None
    assert "0.3 lies far below the usual 0.75" in low
    assert "0.95 lies far above the usual 0.75" in high
    for warning in (low, high):
        assert "p = 0.00662" in warning
        assert "full depth" in warning
    assert monitor.check(0.605, level=0.1) is not None


def test_shift_is_saved_as_json() -> None:
    monitor = ShiftMonitor.of(np.random.default_rng(18).random(5000).tolist())
    text = json.dumps(monitor.to_json())
    assert ShiftMonitor.from_json(json.loads(text)) == monitor
    assert len(text) < 12_000
    for broken in ({}, {"calibration": "0.5"}, {"calibration": [0.5, None]}, {"calibration": [True]}):
        with pytest.raises(RestpointError, match=r"^calibration: "):
            ShiftMonitor.from_json(broken)


def test_shift_refuses_what_it_cannot_judge_by() -> None:
    for numbers in ([], [0.5, math.nan], [0.5] * 1500 + [math.inf]):
        with pytest.raises(RestpointError, match=r"^calibration: "):
            ShiftMonitor.of(numbers)
    with pytest.raises(RestpointError, match=r"^calibration: .*ascending"):
        ShiftMonitor((0.5, 0.4))
    few = ShiftMonitor.of(np.linspace(0, 1, 98).tolist())
    with pytest.raises(RestpointError, match=r"^level: .* against 98 .* 0.0202 at least"):
        few.check(9.0)
    assert few.check(9.0, level=0.03) is not None
