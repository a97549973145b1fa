"""The fastest threshold whose risk is bounded: by testing, with high probability, or in expectation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
from jaxtyping import Real

from restpoint.errors import RestpointError
from restpoint.exit.names import named
from restpoint.exit.p_values import P_VALUES, check_losses, check_probability

_MOST_SEQUENCES = 100_000
_HALVINGS = 30
_SEED = 0


class Status(StrEnum):
    """Whether a threshold was found."""

    CONTROLLED = "controlled"
    NONE_QUALIFIES = "none qualifies"

    @property
    def remedy(self) -> str:
        """What to do about it; empty where nothing is to be done."""
        if self is Status.CONTROLLED:
            return ""
        return (
            "not even the safest threshold was shown to keep the risk below epsilon: calibrate on more sequences "
            "(needed_sequences says how many), add safer thresholds or a later earliest layer, or raise "
            "epsilon or delta"
        )


@dataclass(frozen=True)
class RiskControl:
    """What is promised of an early exit: P(risk <= epsilon) >= 1 - delta over the draw of the calibration sequences.

    Attributes:
        epsilon: the largest risk that is tolerated: the expected loss of one sequence, a share in (0, 1).
        delta: how often a calibration may break that promise, in (0, 1).
        method: the p-value: betting (any loss, the strongest), hoeffding-bentkus (any loss, by the mean alone), or
            binomial (losses of 0 and 1, exact).

    Raises:
        RestpointError: epsilon or delta is outside (0, 1), or the method is unknown.
    """

    epsilon: float = 0.05
    delta: float = 0.1
    method: str = "betting"

    def __post_init__(self) -> None:
        """Refuse what cannot be promised."""
        check_probability("epsilon", self.epsilon)
        check_probability("delta", self.delta)
        named("method", self.method, P_VALUES)


@dataclass(frozen=True)
class Selection:
    """What testing the thresholds from safe to fast came to.

    Attributes:
        status: whether one qualifies.
        index: the chosen threshold, the fastest for which the promise holds; None where none qualifies.
        p_values: of the thresholds that were tested; the last one is above delta unless all qualify.
        mean_loss: of the chosen threshold, or of the safest where none qualifies.
        upper_bound: `upper_bound` of the same threshold; never above epsilon where one was chosen.
        needed_sequences: where none qualifies, about how many sequences would let the safest threshold qualify if its
            losses stayed as they are; None where one was chosen, or where a hundred thousand would not do, as for
            a mean loss of epsilon or more.
        control: what was asked for.
    """

    status: Status
    index: int | None
    p_values: tuple[float, ...]
    mean_loss: float
    upper_bound: float
    needed_sequences: int | None
    control: RiskControl


def select(losses: Real[np.ndarray, "sequences thresholds"], control: RiskControl) -> Selection:
    """The last j for which p_1 .. p_j are all <= delta: P(risk(threshold_j) <= epsilon) >= 1 - delta.

    Learn-then-test with fixed-sequence testing: the hypotheses "risk > epsilon" are tested from the safest threshold
    on, each at the full level delta, until one stands. That is valid for any dependence between thresholds, as the
    first true hypothesis is rejected with probability delta at most, and asks for no monotone risk. The thresholds and
    their order must not have been tuned on the sequences that calibrate them. The sequences are shuffled first, always
    alike, so the result is the same every time.

    Args:
        losses: in [0, 1]; one row for each calibration sequence, independent of one another and drawn as those to come;
            one column for each threshold, from safe to fast.
        control: the promise.

    Raises:
        RestpointError: a loss is outside [0, 1] or NaN (named by row and column), there is no threshold, or there are
            fewer sequences than `minimum_sequences`.

    Paper:
        Angelopoulos, Bates, Candes, Jordan, Lei 2021, "Learn then test: calibrating predictive algorithms to achieve
        risk control".
    """
    losses = _check_matrix(losses)
    count, _ = losses.shape
    if count < (least := minimum_sequences(control)):
        raise RestpointError(
            f"losses: {count} calibration sequences cannot show a risk below epsilon={control.epsilon} at "
            f"delta={control.delta} by {control.method}, even without a single loss; pass {least} at least, or raise "
            "epsilon or delta"
        )
    test = P_VALUES[control.method]
    # Betting goes through the sequences in order: kinds of text that follow one another must not decide.
    losses = losses[np.random.default_rng(_SEED).permutation(count)]
    p_values = test.of(losses, control.epsilon, control.delta)
    stands = p_values > control.delta
    rejected = int(stands.argmax()) if stands.any() else len(stands)
    shown = max(rejected - 1, 0)
    bound = upper_bound(losses[:, shown], control)
    return Selection(
        status=Status.CONTROLLED if rejected else Status.NONE_QUALIFIES,
        index=shown if rejected else None,
        p_values=tuple(p_values[: rejected + 1].tolist()),
        mean_loss=float(losses[:, shown].mean()),
        # The bisection ends a billionth above epsilon at worst, where the test itself has been passed.
        upper_bound=min(bound, control.epsilon) if rejected else bound,
        needed_sequences=None if rejected else _needed(losses[:, 0], control),
        control=control,
    )


def upper_bound(losses: Real[np.ndarray, " sequences"], control: RiskControl) -> float:
    """The least e for which "risk > e" is rejected at level delta: P(risk <= bound) >= 1 - delta for one threshold.

    It holds for a threshold fixed beforehand. For the one that `select` picks by the same losses, epsilon is what is
    promised, and this says by how much the test was passed.

    Args:
        losses: in [0, 1], of one threshold.
        control: delta and method are used, epsilon is not.

    Raises:
        RestpointError: a loss is outside [0, 1] or NaN, or there is no sequence.
    """
    losses = check_losses(losses)
    test = P_VALUES[control.method]
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if test.of(losses, middle, control.delta) <= control.delta:
            high = middle
        else:
            low = middle
    return high


@cache
def minimum_sequences(control: RiskControl) -> int:
    """The least n with which losses of zero everywhere would pass; log delta / log(1 - epsilon), or more by betting.

    Raises:
        RestpointError: it is above a hundred thousand.
    """
    least = _least(lambda count: _projected(np.zeros(1), control, count) <= control.delta, 1)
    if least is None:
        raise RestpointError(
            f"epsilon={control.epsilon} with delta={control.delta} asks for more than {_MOST_SEQUENCES} calibration "
            "sequences; raise epsilon or delta"
        )
    return least


def _needed(losses: np.ndarray, control: RiskControl) -> int | None:
    if losses.mean() >= control.epsilon:
        return None
    return _least(lambda count: _projected(losses, control, count) <= control.delta, len(losses) + 1)


def _projected(losses: np.ndarray, control: RiskControl, count: int) -> float:
    return P_VALUES[control.method].projected(losses, control.epsilon, control.delta, count)


def _least(passes: Callable[[int], bool], start: int) -> int | None:
    """The number at which passing begins, by doubling and bisection; None where a hundred thousand do not pass."""
    low, high = start - 1, start
    while not passes(high):
        if high >= _MOST_SEQUENCES:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    return high


# --- in expectation ---


@dataclass(frozen=True)
class ConformalSelection:
    """The fastest threshold whose risk is at most epsilon on average over calibrations.

    Attributes:
        status: whether one qualifies.
        index: the chosen threshold; None where none qualifies.
        mean_loss: of the chosen threshold, or of the safest where none qualifies, after losses were made monotone.
        bound: n/(n+1) mean_loss + 1/(n+1), which is at most epsilon where one was chosen.
        needed_sequences: where none qualifies, how many would let the safest threshold qualify at this mean loss; None
            where one was chosen, or where no number would do since the mean loss is epsilon or more.
        epsilon: what was asked for.
    """

    status: Status
    index: int | None
    mean_loss: float
    bound: float
    needed_sequences: int | None
    epsilon: float


def conformal_select(losses: Real[np.ndarray, "sequences thresholds"], epsilon: float) -> ConformalSelection:
    """The last threshold with n/(n+1) mean + 1/(n+1) <= epsilon: E[loss of the next sequence] <= epsilon.

    Conformal risk control. The losses of every sequence are first made monotone by a running maximum from safe to
    fast, which can only raise them. The promise is weaker than that of `select`: it is kept on average over
    calibrations, one of which may break it, and in return more sequences' worth of speed is left.

    Args:
        losses: in [0, 1]; one row for each calibration sequence, exchangeable with those to come; one column for each
            threshold, from safe to fast.
        epsilon: the largest expected loss that is tolerated, in (0, 1).

    Raises:
        RestpointError: a loss is outside [0, 1] or NaN (named by row and column), there is no threshold, epsilon is
            outside (0, 1), or there are so few sequences that losses of zero would not do.

    Paper:
        Angelopoulos, Bates, Fisch, Lei, Schuster 2024, "Conformal risk control", theorem 1.
    """
    losses = np.maximum.accumulate(_check_matrix(losses), axis=1)
    check_probability("epsilon", epsilon)
    count, _ = losses.shape
    if 1 / (count + 1) > epsilon:
        raise RestpointError(
            f"losses: {count} calibration sequences cannot show an expected loss below epsilon={epsilon}, even without "
            f"a single loss; pass {_needed_in_expectation(0.0, epsilon)} at least, or raise epsilon"
        )
    means = losses.mean(0)
    bounds = (count * means + 1) / (count + 1)
    chosen = int((bounds <= epsilon).sum())
    shown = max(chosen - 1, 0)
    return ConformalSelection(
        status=Status.CONTROLLED if chosen else Status.NONE_QUALIFIES,
        index=shown if chosen else None,
        mean_loss=float(means[shown]),
        bound=float(bounds[shown]),
        needed_sequences=None if chosen else _needed_in_expectation(float(means[0]), epsilon),
        epsilon=epsilon,
    )


def _needed_in_expectation(mean: float, epsilon: float) -> int | None:
    """The least n with (n mean + 1) / (n + 1) <= epsilon."""
    if mean >= epsilon:
        return None
    count = max(1, math.floor((1 - epsilon) / (epsilon - mean)) - 1)  # rounding may be off by one either way
    while (count * mean + 1) / (count + 1) > epsilon:
        count += 1
    return count


def _check_matrix(losses: np.ndarray) -> np.ndarray:
    losses = check_losses(losses)
    if losses.shape[1] == 0:
        raise RestpointError("losses: there is no threshold in them; pass one column for each, from safe to fast")
    return losses
