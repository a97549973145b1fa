"""Maps with known fixed points, for tests of solvers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """z -> z Mᵀ + b, a different b for every row, and its fixed points (I - M)^-1 b."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.matrix.T + self.offset

    @property
    def solution(self) -> Tensor:
        return torch.linalg.solve(
            torch.eye(self.matrix.shape[0]).double() - self.matrix.double(), self.offset.T.double()
        ).T

    def error_bound(self, residual: Tensor) -> Tensor:
        """|z - z*| <= |(I - M)^-1| |f(z) - z|, for absolute residuals."""
        return residual / torch.linalg.svdvals(torch.eye(self.matrix.shape[0]).double() - self.matrix.double()).min()


def affine(kind: str, rho: float, *, dim: int = 16, rows: int = 6, seed: int = 0, dtype=torch.float64) -> Affine:
    """An affine map of spectral radius rho: symmetric, general, or far from normal."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    if kind == "symmetric":
        basis = torch.linalg.qr(gaussian).Q
        matrix = basis @ torch.linspace(-rho, rho, dim, dtype=torch.float64).diag() @ basis.T
    elif kind == "general":
        matrix = gaussian * rho / torch.linalg.eigvals(gaussian).abs().max()
    else:
        matrix = 2 * gaussian.triu(1) / dim**0.5 + torch.linspace(-rho, rho, dim, dtype=torch.float64).diag()
    offset = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return Affine(matrix.to(dtype), offset.to(dtype))


def tanh_layer(gain: float, *, dim: int = 24, rows: int = 6, seed: int = 0, dtype=torch.float64) -> Callable:
    """z -> tanh(z Wᵀ + x), W Gaussian of spectral radius about gain."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(dim, dim, generator=generator, dtype=torch.float64) * gain * dim**-0.5).to(dtype)
    inputs = (0.5 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)).to(dtype)
    return lambda z: torch.tanh(z @ weight.T + inputs)
