"""How often a drafter's tokens stand, by its confidence."""

import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from restpoint.decode.control import Calibration

_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_PRIOR = 2.0


class AcceptanceCounter:
    """Collects (confidence, acceptance) pairs for first and later drafted tokens, and fits a rising curve to them."""

    def __init__(self, edges: tuple[float, ...] = _EDGES) -> None:
        self.edges = edges
        bins = len(edges) + 1
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
            raw = (self.accepted[kind] + _PRIOR * self.mean(kind)) / (self.seen[kind] + _PRIOR)
            fitted = isotonic_regression(raw.numpy(), weights=seen.numpy()).x
            acceptance.append(tuple(float(value) for value in fitted))
            share.append(tuple((seen / seen.sum()).tolist()))
        return Calibration(self.edges, (acceptance[0], acceptance[1]), (share[0], share[1]))
