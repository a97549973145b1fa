"""How well the states of one layer follow linearly from those of another."""

from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure, Trajectory

_WIDEST = 6144
"""Of all layers' states side by side: their Gram matrix then takes 300 MB."""


class Pairs(Measure):
    """The share of variance of h_j that the best affine map of h_i explains, for every pair of layers.

    R²(i, j) = tr(C_ji C_ii⁻¹ C_ij) / tr C_jj, from streamed Gram matrices of all states side by side, adjusted for the
    number of inputs: 1 - (1 - R²) (n - 1) / (n - d - 1), so that few tokens do not flatter it. Where that Gram
    matrix would be too large, states are first projected on random orthogonal directions (result ``directions``), and
    R² is that of the projections.

    Args:
        every: one text of so many is looked at.
        seed: of the random directions.

    Paper:
        Razzhigaev et al. 2024, "Your transformer is secretly linear"; Yom Din et al. 2023, "Jump to conclusions:
        short-cutting transformers with linear transformations".
    """

    name: ClassVar[str] = "pairs"
    papers: ClassVar[tuple[str, ...]] = (
        "Razzhigaev et al. 2024, Your transformer is secretly linear",
        "Yom Din, Karidi, Choshen, Geva 2023, Jump to conclusions: short-cutting transformers with linear maps",
    )

    def __init__(self, every: int = 8, seed: int = 0):
        super().__init__()
        self.every = every
        self.seed = seed

    def add(self, trajectory: Trajectory) -> None:
        """See :meth:`Measure.add`."""
        if trajectory.index % self.every:
            return
        states = self._projected(trajectory.states)
        depth, tokens, width = states.shape
        beside = states.transpose(0, 1).reshape(tokens, depth * width)
        self._add("tokens", torch.tensor(tokens))
        self._add("first", beside.double().sum(0).view(depth, width))
        self._add("second", beside.T @ beside)

    def _projected(self, states: Float[Tensor, "depth tokens hidden"]) -> Float[Tensor, "depth tokens width"]:
        hidden = states.shape[2]
        width = max(1, min(hidden, _WIDEST // len(states)))
        if width == hidden:
            return states
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.linalg.qr(torch.randn(hidden, width, generator=generator)).Q
        return states @ directions.to(states)

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """See :meth:`Measure.results`; where tokens are too few for an affine map, R² is left out."""
        if "tokens" not in self.sums:
            return {}
        tokens = float(self.sums["tokens"])
        depth, width = self.sums["first"].shape
        found = {"tokens": self.sums["tokens"].double(), "directions": torch.tensor(float(width)).double()}
        if tokens < 2 * width + 2:
            return found
        mean = self.sums["first"] / tokens
        covariance = (self.sums["second"] / tokens).view(depth, width, depth, width)
        r2 = torch.zeros(depth, depth, dtype=torch.float64)
        for i in range(depth):
            across = covariance[i] - mean[i][:, None, None] * mean[None]  # width, depth, width
            own = across[:, i]
            if not bool(own.diagonal().any()):  # a state that is the same for all tokens explains nothing
                continue
            factor = _factor(own)
            explained = torch.linalg.solve_triangular(factor, across.reshape(width, -1), upper=False)
            r2[i] = explained.view(width, depth, width).square().sum((0, 2))
        variances = torch.stack([covariance[j, :, j].diagonal().sum() - mean[j].square().sum() for j in range(depth)])
        r2 = 1 - (1 - r2 / variances.masked_fill(variances == 0, torch.nan)) * (tokens - 1) / (tokens - width - 1)
        return found | {"r2": r2}


def _factor(covariance: Float64[Tensor, "width width"]) -> Float64[Tensor, "width width"]:
    """The lower Cholesky factor, with a ridge of 1e-9 of the mean variance or the least power of ten that does.

    More is needed where states lie in fewer directions than they have entries, as the first states of a loop do, which
    depend on the position alone: products in float32 then leave eigenvalues a little below 0.
    """
    for power in range(-9, 0):
        ridge = 10.0**power * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge)
        if not int(failed):
            return factor
    raise RestpointError("states: their covariance has negative eigenvalues; read the text with a float32 model")
