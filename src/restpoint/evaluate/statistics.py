"""Paired ratios with intervals: how much faster one method is than another on the same prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_FEWEST = 3
_RESAMPLES = 9999


@dataclass(frozen=True)
class Ratio:
    """A ratio of rates with its 95% interval.

    Attributes:
        value: geometric mean over prompts.
        low: lower end of the interval; None below three prompts, where resampling says nothing.
        high: upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None


def paired_ratio(rates: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], seed: int = 0) -> Ratio:
    """Ratio of two rates that were measured in pairs, ``exp(mean_p mean_r log(rate_pr / baseline_pr))``.

    Every ratio is of two runs on the same prompt in the same repetition, so that what slows both (a longer prompt, a
    busy machine) cancels. The interval is a percentile bootstrap over prompts, the unit that is exchangeable; the
    repetitions of one prompt are not independent and are averaged first.

    Args:
        rates: tokens per second of each repetition, by prompt.
        baseline: the same of the baseline, for the same prompts and repetitions.
        seed: seed of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: the two do not pair up, or are empty.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    if not rates or rates.keys() != baseline.keys():
        raise ValueError("rates and baseline must be of the same prompts, at least one")
    logs = [
        float(np.mean([math.log(one / other) for one, other in zip(rates[prompt], baseline[prompt], strict=True)]))
        for prompt in rates
    ]
    value = math.exp(float(np.mean(logs)))
    if len(logs) < _FEWEST:
        return Ratio(value, None, None)
    low, high = bootstrap_mean(logs, seed)
    return Ratio(value, math.exp(low), math.exp(high))


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean, with a fixed seed."""
    sample = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, len(sample), (_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[picked].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
