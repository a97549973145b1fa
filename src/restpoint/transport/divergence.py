"""The Sinkhorn divergence: entropic transport between clouds, less that of each cloud to itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.transport.sinkhorn import BLOCK, SinkhornResult, check_problem, checked_weights, sinkhorn


@dataclass(frozen=True, eq=False)
class SinkhornDivergence:
    """The outcome of `sinkhorn_divergence`, one entry per pair of clouds.

    Attributes:
        value: the divergence, in squared units of the points.
        between: transport between the clouds.
        within_a: transport of the first cloud to itself.
        within_b: transport of the second cloud to itself.
    """

    value: Float64[Tensor, "*batch"]
    between: SinkhornResult
    within_a: SinkhornResult
    within_b: SinkhornResult


def sinkhorn_divergence(
    a: Float[Tensor, "*batch rows_a dim"],
    b: Float[Tensor, "*batch rows_b dim_b"],
    regularisation: float | Float[Tensor, "*#batch"],
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> SinkhornDivergence:
    """S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 of entropic values, under the squared Euclidean cost.

    Taking off each cloud's transport to itself removes the bias of the entropy: S is never negative and zero only for
    equal clouds. It tends to W2^2 as the regularisation falls and to the squared distance of the means as it grows.

    Args:
        a: clouds of points, each of the same weight.
        b: clouds in the same space.
        regularisation: in squared units of the points.
        max_iterations: of each of the three problems.
        tolerance: the largest marginal error.

    Raises:
        RestpointError: the clouds differ in dimension; and as for `sinkhorn`.

    Paper:
        Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn divergences".
    """
    if a.shape[-1] != b.shape[-1]:
        raise RestpointError(
            f"b: its points have {b.shape[-1]} dimensions and those of a {a.shape[-1]}; compare clouds in one space"
        )
    between = sinkhorn(squared_distances(a, b), regularisation, max_iterations=max_iterations, tolerance=tolerance)
    within_a, within_b = (
        sinkhorn_within(squared_distances(x, x), regularisation, max_iterations=max_iterations, tolerance=tolerance)
        for x in (a, b)
    )
    value = between.entropic_value - (within_a.entropic_value + within_b.entropic_value) / 2
    return SinkhornDivergence(value, between, within_a, within_b)


def squared_distances(
    a: Float[Tensor, "*batch rows_a dim"], b: Float[Tensor, "*batch rows_b dim"]
) -> Float64[Tensor, "*batch rows_a rows_b"]:
    """|x - y|^2 for every x of a and y of b, by one matrix product in float64."""
    a, b = a.double(), b.double()
    centre = a.mean(-2, keepdim=True)  # the product loses digits to whatever the clouds share
    a, b = a - centre, b - centre
    inner = (2 * a) @ b.mT
    return inner.neg_().add_(a.square().sum(-1, keepdim=True)).add_(b.square().sum(-1).unsqueeze(-2)).clamp_min_(0)


@torch.no_grad()
def sinkhorn_within(
    cost: Float[Tensor, "*batch points points"],
    regularisation: float | Float[Tensor, "*#batch"],
    a: Float[Tensor, "*#batch weights_a"] | None = None,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> SinkhornResult:
    """`sinkhorn` of a distribution to itself under a symmetric cost, where f = g: f <- (f + T f) / 2.

    A cloud is carried to itself by a plan near the identity, for which alternating updates may need thousands of
    iterations and averaged ones a few dozen. They go by log-sum-exp, and both marginals agree to the tolerance only.

    Raises:
        RestpointError: the cost is not symmetric; and as for `sinkhorn`.

    Paper:
        Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn divergences".
    """
    batch, points = cost.shape[:-2], cost.shape[-1]
    strength = torch.as_tensor(regularisation, dtype=torch.float64, device=cost.device)
    check_problem(cost, strength, max_iterations, tolerance)
    if bool(((cost - cost.mT).abs() > 1e-5 * cost.abs().amax((-2, -1), keepdim=True)).any()):
        raise RestpointError("cost: it is not symmetric, so no transport of a cloud to itself; call sinkhorn")
    strength = strength.expand(batch).reshape(-1)
    units = cost.double().reshape(-1, points, points) / strength[:, None, None]
    weights = checked_weights("a", a, cost, points)
    kernel = weights.log().unsqueeze(-2) - units

    f = torch.zeros_like(weights)
    error = torch.full_like(strength, torch.inf)
    iterations = torch.zeros(len(units), dtype=torch.int64, device=cost.device)
    active = torch.arange(len(units), device=cost.device)
    done = 0
    while len(active):
        own, left = f[active], kernel[active]
        for _ in range(min(BLOCK, max_iterations - done)):
            own = (own - (own.unsqueeze(-2) + left).logsumexp(-1)) / 2
            done += 1
        sums = (own + (own.unsqueeze(-2) + left).logsumexp(-1)).exp()
        found = (weights[active] * (sums - 1).abs()).sum(-1)
        f[active], iterations[active], error[active] = own, done, found
        active = active[found > tolerance] if done < max_iterations else active[:0]

    plan = (f[:, :, None] + f[:, None, :] - units).exp_() * weights[:, :, None] * weights[:, None, :]
    potential = (strength[:, None] * f).reshape(*batch, points)
    entropic = strength * (2 * (f * weights).sum(-1) + 1 - plan.sum((-2, -1)))
    return SinkhornResult(
        value=(strength * (plan * units).sum((-2, -1))).reshape(batch),
        entropic_value=entropic.reshape(batch),
        potential_a=potential,
        potential_b=potential,
        marginal_error=error.reshape(batch),
        iterations=iterations.reshape(batch),
        converged=(error <= tolerance).reshape(batch),
    )
