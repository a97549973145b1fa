"""P-values for "the risk is above epsilon", from losses in [0, 1] of independent sequences.

A p-value p is valid where P(p <= a) <= a for every a whenever E[loss] >= epsilon. The three here differ in what they
ask of the losses and in power. `betting` adapts to the losses' variance and is by far the strongest where most
sequences lose little, as the share of tokens that an early exit changes does; `binomial` is exact where every loss is
0 or 1; `hoeffding_bentkus` looks at the mean alone, whatever the order of the sequences. With 200 sequences, epsilon =
0.05 and delta = 0.1, betting passes losses of the law Beta(0.3, 12), whose mean is 0.024, in nearly all calibrations;
Hoeffding-Bentkus does in one of ten.

All take one column of losses or one column for each threshold, and treat columns at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Real
from scipy.special import bdtr, xlogy

from restpoint.errors import RestpointError

_SHARE = 0.9
"""Of its capital that `betting` stakes at most: with less, it would exploit tiny losses too slowly; with all of it, one
loss of 1 would ruin it."""
_LEVEL = 0.1


def hoeffding_bentkus(
    losses: Real[np.ndarray, "sequences *thresholds"], epsilon: float
) -> Float64[np.ndarray, "*thresholds"]:
    """min(exp(-n h1(min(m, e), e)), e P(Bin(n, e) <= ceil(n m))) with m the mean of n losses and e = epsilon.

    h1(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b)) is the divergence of two coins; the factor in front of Bentkus'
    binomial tail is Euler's number. It depends on the losses' mean alone, so it treats them as coins and has little
    power where they vary less than coins do.

    Args:
        losses: in [0, 1], one row for each sequence.
        epsilon: the risk that the hypothesis exceeds, in (0, 1).

    Returns:
        P-values in [0, 1].

    Raises:
        RestpointError: a loss is outside [0, 1] or NaN, there is no sequence, or epsilon is outside (0, 1).

    Paper:
        Bates, Angelopoulos, Lei, Malik, Jordan 2021, "Distribution-free, risk-controlling prediction sets"; Bentkus
        2004, "On Hoeffding's inequalities"; as Angelopoulos, Bates, Candes, Jordan, Lei 2021, "Learn then test",
        join them.
    """
    losses = check_losses(losses)
    check_probability("epsilon", epsilon)
    return _hoeffding_bentkus(losses.sum(0), len(losses), epsilon)


def _hoeffding_bentkus(total: np.ndarray | float, count: int, epsilon: float) -> np.ndarray:
    mean = np.minimum(total / count, epsilon)
    divergence = xlogy(mean, mean / epsilon) + xlogy(1 - mean, (1 - mean) / (1 - epsilon))
    tail = bdtr(_ceil(total, count), count, epsilon)
    return np.asarray(np.clip(np.minimum(np.exp(-count * divergence), math.e * tail), 0, 1))


def binomial(losses: Real[np.ndarray, "sequences *thresholds"], epsilon: float) -> Float64[np.ndarray, "*thresholds"]:
    """P(Bin(n, epsilon) <= number of losses that are 1): exact, for losses that are 0 or 1 only.

    Args:
        losses: 0 or 1, one row for each sequence.
        epsilon: the risk that the hypothesis exceeds, in (0, 1).

    Returns:
        P-values in [0, 1].

    Raises:
        RestpointError: a loss is neither 0 nor 1, there is no sequence, or epsilon is outside (0, 1).

    Paper:
        Clopper, Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial".
    """
    losses = check_losses(losses)
    check_probability("epsilon", epsilon)
    if (between := (losses > 0) & (losses < 1)).any():
        place = _place(between)
        raise RestpointError(
            f"losses: {place} is {losses[tuple(np.argwhere(between)[0])]:g}; the binomial p-value is for losses of 0 "
            "and 1 only: use method 'betting' or 'hoeffding-bentkus'"
        )
    return np.asarray(bdtr(losses.sum(0), len(losses), epsilon))


def betting(
    losses: Real[np.ndarray, "sequences *thresholds"], epsilon: float, level: float = _LEVEL
) -> Float64[np.ndarray, "*thresholds"]:
    """1 / max over t of K_t, K_t = prod over i <= t of (1 + b_i (epsilon - loss_i)): a bet's capital.

    Whoever bets on smaller losses loses on average where the risk is epsilon or more: as b_i depends on the losses
    before i only, K is a nonnegative supermartingale, and by Ville's inequality it ever reaches 1/a with probability a
    at most. The bet is the predictable plug-in of the paper, tuned to reach 1/level at the last of the n sequences,

        b_i = min(sqrt(2 log(1/level) / (n v_{i-1})), 0.9 / (1 - epsilon)),
        v_i = (1/4 + sum over j <= i of (loss_j - m_j)²) / (i + 1),   m_i = (1/2 + sum over j <= i of loss_j) / (i + 1),

    and b_1 uses v_0 = 1/4. At most 1 / (1 - epsilon) would keep the capital nonnegative; nine tenths of it survive a
    loss of 1. A mean loss of epsilon or more makes the p-value 1, whatever luck came first. The p-value never increases
    with epsilon. It depends on the order of the sequences, which must not be chosen by the losses; where kinds of text
    follow one another, shuffle them first, as `restpoint.exit.risk.select` does.

    Args:
        losses: in [0, 1], one row for each sequence.
        epsilon: the risk that the hypothesis exceeds, in (0, 1).
        level: at which the p-value will be used; it is valid at every level and strongest at this one.

    Returns:
        P-values in (0, 1].

    Raises:
        RestpointError: a loss is outside [0, 1] or NaN, there is no sequence, or epsilon or level is outside (0, 1).

    Paper:
        Waudby-Smith, Ramdas 2024, "Estimating means of bounded random variables by betting", one side of
        the hedged capital process.
    """
    losses = check_losses(losses)
    check_probability("epsilon", epsilon)
    check_probability("level", level)
    count = len(losses)
    seen = np.arange(2, count + 2, dtype=np.float64).reshape(-1, *[1] * (losses.ndim - 1))
    mean = (0.5 + losses.cumsum(0)) / seen
    variance = (0.25 + np.square(losses - mean).cumsum(0)) / seen
    before = np.concatenate([np.full_like(variance[:1], 0.25), variance[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / level) / (count * before)), _SHARE / (1 - epsilon))
    log_capital = np.log1p(bet * (epsilon - losses)).cumsum(0)
    p_values = np.exp(-np.maximum(log_capital.max(0), 0))
    return np.asarray(np.where(losses.mean(0) < epsilon, p_values, 1.0))


# --- by name ---


@dataclass(frozen=True)
class PValue:
    """A way to test whether a risk is above epsilon.

    Attributes:
        name: in settings and on the command line.
        of: p-values of (losses, epsilon, level), one for each column of losses.
        projected: the p-value of (losses, epsilon, level, count): what `of` would give for one column if there were
            count sequences with losses like these.
        papers: that it follows.
    """

    name: str
    of: Callable[[np.ndarray, float, float], np.ndarray]
    projected: Callable[[np.ndarray, float, float, int], float]
    papers: tuple[str, ...]


def _projected_hoeffding_bentkus(losses: np.ndarray, epsilon: float, level: float, count: int) -> float:
    return float(_hoeffding_bentkus(losses.mean() * count, count, epsilon))


def _projected_binomial(losses: np.ndarray, epsilon: float, level: float, count: int) -> float:
    return float(bdtr(_ceil(losses.mean() * count, count), count, epsilon))


def _projected_betting(losses: np.ndarray, epsilon: float, level: float, count: int) -> float:
    return float(betting(np.resize(losses, count), epsilon, level))  # resize repeats the losses


P_VALUES: dict[str, PValue] = {
    known.name: known
    for known in (
        PValue(
            "betting",
            betting,
            _projected_betting,
            ('Waudby-Smith, Ramdas 2024, "Estimating means of bounded random variables by betting"',),
        ),
        PValue(
            "hoeffding-bentkus",
            lambda losses, epsilon, level: hoeffding_bentkus(losses, epsilon),
            _projected_hoeffding_bentkus,
            (
                'Bates, Angelopoulos, Lei, Malik, Jordan 2021, "Distribution-free, risk-controlling prediction sets"',
                'Bentkus 2004, "On Hoeffding\'s inequalities"',
            ),
        ),
        PValue(
            "binomial",
            lambda losses, epsilon, level: binomial(losses, epsilon),
            _projected_binomial,
            (
                'Clopper, Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the '
                'binomial"',
            ),
        ),
    )
}
"""Every p-value, by the name that settings and the command line use."""


# --- checks ---


def check_losses(losses: Real[np.ndarray, "sequences *thresholds"]) -> Float64[np.ndarray, "sequences *thresholds"]:
    """The losses in float64.

    Raises:
        RestpointError: there is no sequence, or a loss is outside [0, 1] or NaN.
    """
    losses = losses.astype(np.float64)
    if len(losses) == 0:
        raise RestpointError("losses: there is no sequence in them; pass one row for each calibration sequence")
    if (wrong := ~((losses >= 0) & (losses <= 1))).any():
        place = _place(wrong)
        raise RestpointError(
            f"losses: {place} is {losses[tuple(np.argwhere(wrong)[0])]:g}; a loss lies between 0 and 1: divide it by "
            "the largest that it can be, or clip it"
        )
    return losses


def check_probability(argument: str, value: float) -> None:
    """Refuse what is not strictly between 0 and 1.

    Raises:
        RestpointError: it is not.
    """
    if not 0 < value < 1:
        raise RestpointError(f"{argument} is {value}; give a probability above 0 and below 1, such as 0.05")


def _place(wrong: np.ndarray) -> str:
    row, *column = np.argwhere(wrong)[0]
    return f"row {row}" + (f", column {column[0]}" if column else "")


def _ceil(total: np.ndarray | float, count: int) -> np.ndarray:
    """The sum rounded up, unless only its own rounding error lifts it above a whole number."""
    return np.asarray(np.ceil(total * (1 - count * np.finfo(np.float64).eps)))
