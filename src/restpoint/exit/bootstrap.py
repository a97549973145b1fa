"""Intervals by resampling sequences: their tokens depend on each other, so a sequence is what is drawn."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

FEWEST = 3
"""Sequences below which resampling says nothing."""
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: of all sequences.
        low: lower end of the interval; None below three sequences.
        high: upper end, likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None


def resampled_shares(sequences: int, seed: int = 0, count: int = RESAMPLES) -> Float64[Tensor, "sequences resamples"]:
    """How much of each bootstrap sample each sequence makes up: sequences drawn with replacement, as many as there are.

    ``values @ resampled_shares(n)`` are the means of every resample. The same number of sequences and seed give the
    same samples, so that what is compared on them is compared in pairs.

    Args:
        sequences: how many.
        seed: of the drawing.
        count: resamples.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(sequences, (sequences, count), generator=generator)
    shares = torch.zeros(sequences, count, dtype=torch.float64)
    return shares.scatter_add_(0, picked, torch.full(picked.shape, 1 / sequences, dtype=torch.float64))


def percentile_intervals(resampled: Float64[Tensor, "*points resamples"]) -> Float64[Tensor, "2 *points"]:
    """The 2.5th and 97.5th percentile of what resamples gave."""
    return torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=-1)


def estimates(
    values: Float64[Tensor, " points"], resampled: Float64[Tensor, "points resamples"], sequences: int
) -> list[Estimate]:
    """Each value with the interval of its resamples, where there are sequences enough for one."""
    if sequences < FEWEST:
        return [Estimate(value) for value in values.tolist()]
    low, high = percentile_intervals(resampled).tolist()
    return [Estimate(*each) for each in zip(values.tolist(), low, high, strict=True)]
