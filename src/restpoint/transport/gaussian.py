"""Optimal transport between Gaussians: the Bures-Wasserstein distance and the Monge map.

Both depend on the first two moments only, so they stream over a corpus, and both are exact for Gaussian
clouds; for other clouds the distance is a lower bound on W2 (Gelbrich) and the map is the best one among
those that are linear and monotone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Moments N(mean, covariance) in float64; leading axes are a batch of Gaussians."""

    mean: Float64[Tensor, "*batch dim"]
    covariance: Float64[Tensor, "*batch dim dim"]
    """Symmetric, positive semi-definite; the population covariance, divided by the number of rows."""

    @classmethod
    def from_samples(cls, samples: Float[Tensor, "*batch rows dim"]) -> "Gaussian":
        """The moments of a cloud of points."""
        if samples.shape[-2] == 0:
            raise RestpointError("samples holds no row; pass at least one point per cloud")
        samples = samples.double()
        mean = samples.mean(-2)
        centred = samples - mean.unsqueeze(-2)
        return cls(mean, centred.mT @ centred / samples.shape[-2])


@dataclass(frozen=True, eq=False)
class MongeMap:
    """T(x) = x @ matrix + offset, the gradient of a convex function: the matrix is positive semi-definite."""

    matrix: Float64[Tensor, "*batch dim dim"]
    offset: Float64[Tensor, "*batch dim"]

    def __call__(self, x: Float[Tensor, "*batch rows dim"]) -> Float[Tensor, "*batch rows dim"]:
        """Carry points of the source to the target."""
        return x @ self.matrix + self.offset.unsqueeze(-2)


def wasserstein2_squared(a: Gaussian, b: Gaussian) -> Float64[Tensor, "*batch"]:
    """W2(a, b)^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in squared units of the states.

    Works for singular covariances. The cross term is the nuclear norm of S1^1/2 S2^1/2, which keeps the
    digits that a second square root would lose. With fewer points than dimensions
    `wasserstein2_squared_samples` is cheaper.

    Raises:
        RestpointError: the two differ in dimension.

    Paper:
        Dowson, Landau 1982, "The Frechet distance between multivariate normal distributions"; Gelbrich 1990.
    """
    _same_dimension(a.mean, b.mean)
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum(-1)
    spread = _trace(a.covariance) + _trace(b.covariance) - 2 * cross
    return (a.mean - b.mean).square().sum(-1) + spread.clamp_min(0)


def wasserstein2_squared_samples(
    a: Float[Tensor, "*batch rows_a dim"], b: Float[Tensor, "*batch rows_b dim"]
) -> Float64[Tensor, "*batch"]:
    """`wasserstein2_squared` of two clouds' moments, through the rows_a x rows_b Gram matrix.

    tr (S1^1/2 S2 S1^1/2)^1/2 is the nuclear norm of the centred Gram matrix between the clouds, divided by
    sqrt(rows_a rows_b): no dim x dim matrix is formed. Use it when the clouds have fewer points than
    dimensions.
    """
    _same_dimension(a, b)
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(-2), b.mean(-2)
    a, b = a - mean_a.unsqueeze(-2), b - mean_b.unsqueeze(-2)
    rows_a, rows_b = a.shape[-2], b.shape[-2]
    cross = torch.linalg.svdvals(a @ b.mT).sum(-1) / (rows_a * rows_b) ** 0.5
    spread = a.square().sum((-2, -1)) / rows_a + b.square().sum((-2, -1)) / rows_b - 2 * cross
    return (mean_a - mean_b).square().sum(-1) + spread.clamp_min(0)


def monge_map(source: Gaussian, target: Gaussian, *, regularisation: float = 1e-10) -> MongeMap:
    """T(x) = m2 + A (x - m1), A = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2: least squared displacement.

    Use it to compare where a layer's cloud lies with where it ends. As a predictor it keeps the target's
    spread, so its squared error is never below that of ridge regression, which is allowed to shrink.

    Args:
        source: moments (m1, S1).
        target: moments (m2, S2).
        regularisation: eigenvalues of S1 below this fraction of their mean are raised to it (relative, no
            unit). A well-conditioned S1 is thus left exactly as it is; along directions in which the source
            does not vary, the stretch of A is bounded by regularisation^-1/2 times the ratio of the standard
            deviations.

    Returns:
        The affine map, with an exactly symmetric matrix.

    Raises:
        RestpointError: the two differ in dimension, the regularisation is not positive, or the source has no
            variance.

    Paper:
        Peyre, Cuturi 2019, "Computational Optimal Transport", remark 2.31.
    """
    _same_dimension(source.mean, target.mean)
    if not regularisation > 0:
        raise RestpointError(f"regularisation is {regularisation}; give a positive fraction such as 1e-10")
    values, vectors = torch.linalg.eigh(source.covariance)
    average = values.mean(-1, keepdim=True)
    if not bool((average > 0).all()):
        raise RestpointError("source has zero variance in every direction; fit it on more than one distinct row")
    values = torch.maximum(values, regularisation * average)
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse_root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    matrix = inverse_root @ _root(root @ target.covariance @ root) @ inverse_root
    matrix = (matrix + matrix.mT) / 2
    return MongeMap(matrix, target.mean - (source.mean.unsqueeze(-2) @ matrix).squeeze(-2))


def _root(covariance: Float64[Tensor, "*batch dim dim"]) -> Float64[Tensor, "*batch dim dim"]:
    """The positive semi-definite square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def _trace(matrix: Float64[Tensor, "*batch dim dim"]) -> Float64[Tensor, "*batch"]:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _same_dimension(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise RestpointError(
            f"transport needs clouds in one space, got {a.shape[-1]} and {b.shape[-1]} dimensions; "
            "compare states of one size"
        )
