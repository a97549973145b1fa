"""Histograms that grow by adding, and the quantiles that they hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import boost_histogram as bh
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
"""Shares of the samples, by the names that measures give them."""


@dataclass(frozen=True)
class Scale:
    """Bins between two values, equally wide or equally wide in the logarithm; what lies outside is counted beside.

    Attributes:
        low: lower edge of the first bin.
        high: upper edge of the last.
        bins: their number; a quantile is known to about the width of one.
        logarithmic: equal in the logarithm, for positive quantities of any size.
    """

    low: float
    high: float
    bins: int
    logarithmic: bool = False

    def count(self, values: Float[Tensor, "rows samples"]) -> Int64[Tensor, "rows cells"]:
        """How many samples of each row lie below, in each bin, and above; NaN is left out."""
        rows, samples = values.shape
        transform = bh.axis.transform.log if self.logarithmic else None
        histogram = bh.Histogram(
            bh.axis.Integer(0, rows, underflow=False, overflow=False),
            bh.axis.Regular(self.bins, self.low, self.high, transform=transform),
            storage=bh.storage.Int64(),
        )
        row = torch.arange(rows).repeat_interleave(samples)
        flat = values.detach().double().cpu().flatten()
        known = ~flat.isnan()
        histogram.fill(row[known].numpy(), flat[known].numpy())
        return torch.from_numpy(histogram.view(flow=True).copy())

    def edges(self) -> Float64[Tensor, " edges"]:
        """Of the bins."""
        line = torch.linspace(0.0, 1.0, self.bins + 1, dtype=torch.float64)
        if not self.logarithmic:
            return self.low + (self.high - self.low) * line
        return self.low * (self.high / self.low) ** line

    def quantiles(
        self, counts: Int64[Tensor, "rows cells"], shares: Sequence[float]
    ) -> Float64[Tensor, "rows quantiles"]:
        """The values below which these shares of the samples lie, as if samples were spread evenly in their bin.

        What lies outside the scale counts as its nearer end; a row without samples has NaN.
        """
        total = counts.sum(-1, keepdim=True).double()
        below = torch.cat([torch.zeros_like(total), counts.double().cumsum(-1)], -1)
        edges = torch.cat([torch.tensor([self.low]).double(), self.edges(), torch.tensor([self.high]).double()])
        aims = torch.tensor(list(shares), dtype=torch.float64) * total
        cell = (torch.searchsorted(below, aims.contiguous(), right=True) - 1).clamp(0, counts.shape[-1] - 1)
        inside = (aims - below.gather(-1, cell)) / counts.double().gather(-1, cell).clamp_min(1.0)
        found = edges[cell] + inside.clamp(0, 1) * (edges[cell + 1] - edges[cell])
        return found.masked_fill(total == 0, float("nan"))

    def named_quantiles(self, counts: Int64[Tensor, "rows cells"]) -> dict[str, Float64[Tensor, " rows"]]:
        """The values below which the shares in :data:`QUANTILES` lie, by name."""
        found = self.quantiles(counts, list(QUANTILES.values()))
        return {name: found[:, place] for place, name in enumerate(QUANTILES)}
