"""How often a drafter's tokens stand, by what it says of them: measured beforehand, corrected as outcomes are seen."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_SMOOTHING = 2.0
_PRIOR_WEIGHT = 12.0
_FORGET = 0.985
_DEPTHS = (1, 2, 4, 8)
_DOUBT = 0.8
_STEP = 0.1
_LEAST = 1e-4


@dataclass(frozen=True)
class Calibration:
    """Acceptance to expect from a drafter's confidence.

    Attributes:
        edges: inner edges of the confidence bins, ascending.
        acceptance: for tokens right after the pending one and for later ones, the acceptance in each bin.
        share: how often each bin occurs, likewise.
    """

    edges: tuple[float, ...]
    acceptance: tuple[tuple[float, ...], tuple[float, ...]]
    share: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def guess(cls, edges: Sequence[float], acceptance: Sequence[float]) -> "Calibration":
        """The same plausible acceptances for all depths, for a drafter that has not been measured."""
        even = tuple(1 / len(acceptance) for _ in acceptance)
        return cls(tuple(edges), (tuple(acceptance), tuple(acceptance)), (even, even))

    def mean(self, depth: int) -> float:
        """Acceptance to expect at a depth (0 follows the pending token) before the confidence is known."""
        kind = min(depth, 1)
        return sum(a * s for a, s in zip(self.acceptance[kind], self.share[kind], strict=True))


@dataclass
class Estimate:
    """A probability learnt from outcomes: a prior worth some of them, then what was seen, old evidence fading."""

    prior: float
    weight: float = _PRIOR_WEIGHT
    stood: float = 0.0
    seen: float = 0.0

    @property
    def mean(self) -> float:
        """The current estimate."""
        return (self.prior * self.weight + self.stood) / (self.weight + self.seen)

    def add(self, stood: float) -> None:
        """Add an outcome: 1, 0, or its probability."""
        self.stood = _FORGET * self.stood + stood
        self.seen = _FORGET * self.seen + 1.0

    def fade(self) -> None:
        """Nothing was seen: return a little towards the prior, so that what was given up is tried again."""
        self.stood *= _FORGET
        self.seen *= _FORGET


@dataclass
class Acceptance:
    """A calibration that learns.

    Attributes:
        calibration: where it starts.
    """

    calibration: Calibration
    _bins: tuple[list[Estimate], list[Estimate]] = field(init=False)

    def __post_init__(self) -> None:
        """Start from the calibration."""
        first, later = ([Estimate(value) for value in bins] for bins in self.calibration.acceptance)
        self._bins = first, later

    def of(self, depth: int, confidence: float) -> float:
        """Probability that a token of this confidence stands where its parent does; depth 0 follows the pending one."""
        return self._bins[depth > 0][bisect_right(self.calibration.edges, confidence)].mean

    def add(self, depth: int, confidence: float, stood: bool) -> None:
        """Learn an outcome."""
        self._bins[depth > 0][bisect_right(self.calibration.edges, confidence)].add(float(stood))


class Correction:
    """Chances of named tokens as outcomes correct them: p = sigma(logit c - b), c what drafters' calibrations say.

    Drafters are calibrated one by one, what several say of a token is put together as if they erred independently, and
    the tree that looks best is one whose chances are overestimated. So b starts above 0, and every outcome y of a token
    moves it by a gradient step of the log loss, b -= 0.1 (y - p). There is one b for each stretch of depths (0, 1,
    2-3, 4-7, 8 and more), of tokens that one drafter named and of those that several did.

    Paper:
        Gupta, Ramdas 2023, "Online Platt scaling with calibeating" (theirs with a slope beside b).
    """

    def __init__(self, doubt: float = _DOUBT):
        self._doubts = [[doubt] * (len(_DEPTHS) + 1) for _ in range(2)]

    def of(self, depth: int, voices: int, chance: float) -> float:
        """Probability that a token which so many drafters named stands where its parent does."""
        chance = min(max(chance, _LEAST), 1.0 - _LEAST)
        odds = math.exp(-self._doubts[voices > 1][bisect_right(_DEPTHS, depth)]) * chance / (1.0 - chance)
        return odds / (1.0 + odds)

    def add(self, depth: int, voices: int, chance: float, stood: bool) -> None:
        """Learn an outcome."""
        self._doubts[voices > 1][bisect_right(_DEPTHS, depth)] -= _STEP * (stood - self.of(depth, voices, chance))


class AcceptanceCounter:
    """Collects (confidence, acceptance) pairs for first and later drafted tokens, and fits a rising curve to them."""

    def __init__(self, edges: Sequence[float] = _EDGES) -> None:
        self.edges = tuple(edges)
        bins = len(self.edges) + 1
        self.accepted = torch.zeros(2, bins, dtype=torch.float64)
        self.seen = torch.zeros(2, bins, dtype=torch.float64)

    def add(self, step: int, confidence: Float[Tensor, " rows"], accepted: Float[Tensor, " rows"]) -> None:
        """Add rows of one drafting step; ``accepted`` may be a probability."""
        index = torch.bucketize(confidence.double().cpu(), torch.tensor(self.edges, dtype=torch.float64), right=True)
        kind = min(step, 1)
        self.accepted[kind].index_add_(0, index, accepted.double().cpu())
        self.seen[kind].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))

    def mean(self, step: int) -> float:
        """Acceptance over all rows of a step."""
        kind = min(step, 1)
        return float(self.accepted[kind].sum() / self.seen[kind].sum().clamp_min(1))

    def calibration(self) -> Calibration:
        """Acceptance per bin by isotonic regression, pulled slightly to the mean where a bin is rare."""
        acceptance, share = [], []
        for kind in (0, 1):
            seen = self.seen[kind] + 1e-9
            raw = (self.accepted[kind] + _SMOOTHING * self.mean(kind)) / (self.seen[kind] + _SMOOTHING)
            fitted = isotonic_regression(raw.numpy(), weights=seen.numpy()).x
            acceptance.append(tuple(float(value) for value in fitted))
            share.append(tuple((seen / seen.sum()).tolist()))
        return Calibration(self.edges, (acceptance[0], acceptance[1]), (share[0], share[1]))
