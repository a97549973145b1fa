"""Entropic optimal transport in the log domain, for a batch of problems at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError

BLOCK = 10  # iterations between two looks at the marginals, each of which waits for the device
_CACHE = 2**19  # bytes of kernels worked on at a time by a processor
_DRIFT = 50.0  # a scaling beyond e^50 goes back into the potentials: float64 ends at e^709


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """The outcome of `sinkhorn`, one entry per problem.

    The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / regularisation).

    Attributes:
        value: <P, C>, the cost of the plan itself.
        entropic_value: <f, a> + <g, b> + regularisation (1 - sum P), the value of the dual problem, so never above
            the optimum and equal to it, <P, C> + regularisation KL(P | a b), at convergence.
        potential_a: f.
        potential_b: g.
        marginal_error: sum_j |sum_i P_ij - b_j|; the sums over j are a_i up to rounding.
        iterations: updates of both potentials.
        converged: whether the marginal error is within the tolerance.
    """

    value: Float64[Tensor, "*batch"]
    entropic_value: Float64[Tensor, "*batch"]
    potential_a: Float64[Tensor, "*batch rows"]
    potential_b: Float64[Tensor, "*batch columns"]
    marginal_error: Float64[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]


@torch.no_grad()
def sinkhorn(
    cost: Float[Tensor, "*batch rows columns"],
    regularisation: float | Float[Tensor, "*#batch"],
    a: Float[Tensor, "*#batch weights_a"] | None = None,
    b: Float[Tensor, "*#batch weights_b"] | None = None,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> SinkhornResult:
    """Min over plans P with marginals a, b of <P, C> + regularisation KL(P | a b), by alternating dual ascent.

    g_j = -r log sum_i a_i exp((f_i - C_ij) / r), then f_i likewise, until the marginals agree. The number of iterations
    grows as the regularisation falls: below about 10^-3 of the typical cost solve the problem exactly instead. Between
    two looks at the marginals the iterations are matrix products with exp((f + g - C) / r), which is of order 1; a
    problem whose potentials move too far for that redoes those iterations by log-sum-exp. A problem that has converged
    leaves the batch and changes no more.

    Args:
        cost: C, finite; of any sign.
        regularisation: r > 0 in units of the cost, one or one for each problem.
        a: weights of the rows, which sum to 1; even if left out. A weight of zero is allowed.
        b: weights of the columns, likewise.
        max_iterations: a problem that has not converged by then is returned as it is.
        tolerance: the largest marginal error, as a share of the whole mass 1.

    Returns:
        Values, potentials and what was reached, in float64.

    Raises:
        RestpointError: the cost is empty or not finite, the regularisation or the tolerance is not positive, there is
            no iteration, or weights are negative or do not sum to one.

    Paper:
        Cuturi 2013, "Sinkhorn distances"; Schmitzer 2019, "Stabilized sparse scaling algorithms for entropy
        regularized transport problems".
    """
    batch, (rows, columns) = cost.shape[:-2], cost.shape[-2:]
    strength = torch.as_tensor(regularisation, dtype=torch.float64, device=cost.device)
    check_problem(cost, strength, max_iterations, tolerance)
    strength = strength.expand(batch).reshape(-1)
    units = cost.double().reshape(-1, rows, columns) / strength[:, None, None]
    weights_a = checked_weights("a", a, cost, rows)
    weights_b = checked_weights("b", b, cost, columns)
    log_a, log_b = weights_a.log(), weights_b.log()

    count = units.shape[0]
    f, g = _log_updates(units, log_a, log_b, torch.zeros_like(log_a), 1)
    error = torch.full_like(strength, torch.inf)
    iterations = torch.zeros(count, dtype=torch.int64, device=cost.device)
    active = torch.arange(count, device=cost.device)
    work = _Scaling.start(units, weights_a, weights_b, f, g)
    done = 1
    while len(active) and done < max_iterations:
        length = min(BLOCK, max_iterations - done)
        found, drifted = work.run(length)
        done += length
        settled, moved = torch.stack([found <= tolerance, drifted]).tolist()
        if any(moved):
            index = torch.tensor([i for i, flag in enumerate(moved) if flag], device=cost.device)
            which = active[index]
            own = (units[which], log_a[which], log_b[which])
            new_f, new_g = _log_updates(*own, f[which] + work.last_u[index].log(), length)
            f[which], g[which] = new_f, new_g
            work.restart(index, own[0], new_f, new_g)
            found[index] = work.error()[index]
            settled = (found <= tolerance).tolist()
        error[active], iterations[active] = found, done
        leaves = [bool(flag) or done >= max_iterations for flag in settled]
        if any(leaves):
            leaving = [i for i, flag in enumerate(leaves) if flag]
            staying = [i for i, flag in enumerate(leaves) if not flag]
            gone = active[leaving]
            f[gone] += work.u[leaving].log()
            g[gone] += work.v[leaving].log()
            active = active[staying]
            work = work.only(staying)
    if max_iterations == 1:
        error, iterations = work.error(), iterations + 1

    plan = _kernel(units, f, g)
    value = strength * (plan.mul_(units) @ weights_b.unsqueeze(-1)).squeeze(-1).mul_(weights_a).sum(-1)
    entropic = strength * ((f * weights_a).sum(-1) + (g * weights_b).sum(-1))
    return SinkhornResult(
        value=value.reshape(batch),
        entropic_value=entropic.reshape(batch),
        potential_a=(strength[:, None] * f).reshape(*batch, rows),
        potential_b=(strength[:, None] * g).reshape(*batch, columns),
        marginal_error=error.reshape(batch),
        iterations=iterations.reshape(batch),
        converged=(error <= tolerance).reshape(batch),
    )


@dataclass(eq=False)
class _Scaling:
    """Iterations as products with a kernel exp(f + g - C), of order 1; u and v are what the potentials gained since."""

    kernel: Tensor
    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor
    last_u: Tensor

    @classmethod
    def start(cls, units: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> "_Scaling":
        u, v = torch.ones_like(f), torch.ones_like(g)
        return cls(_kernel(units, f, g), a, b, u, v, u)

    def run(self, length: int) -> tuple[Tensor, Tensor]:
        """Iterate; the marginal errors after it, and which problems moved too far to be trusted."""
        self.last_u = self.u
        size = len(self.kernel)
        if self.kernel.device.type == "cpu":
            # A few problems at a time: their kernels stay in the processor's cache from one iteration to the next.
            size = max(1, _CACHE // (8 * self.kernel[0].numel()))
        us, vs, errors = [], [], []
        for start in range(0, len(self.kernel), size):
            part = slice(start, start + size)
            u, v, error = _iterate(self.kernel[part], self.a[part], self.b[part], self.u[part], length)
            us.append(u)
            vs.append(v)
            errors.append(error)
        self.u, self.v = torch.cat(us), torch.cat(vs)
        logs = torch.maximum(self.u.log().abs().amax(-1), self.v.log().abs().amax(-1))
        return torch.cat(errors), ~(logs < _DRIFT)

    def error(self) -> Tensor:
        return _error(self.kernel, self.a, self.b, self.u, self.v)

    def restart(self, index: Tensor, units: Tensor, f: Tensor, g: Tensor) -> None:
        """Put potentials back into the kernel."""
        self.kernel[index] = _kernel(units, f, g)
        self.u[index], self.v[index] = 1.0, 1.0

    def only(self, staying: list[int]) -> "_Scaling":
        parts = (self.kernel, self.a, self.b, self.u, self.v, self.last_u)
        return _Scaling(*(each[staying] for each in parts))


def _kernel(units: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (f[:, :, None] + g[:, None, :]).sub_(units).exp_()


def _iterate(kernel: Tensor, a: Tensor, b: Tensor, u: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    back, a_row, b_row = kernel.mT, a.unsqueeze(1), b.unsqueeze(1)
    left = (u * a).unsqueeze(1)
    for _ in range(length - 1):
        left = a_row / torch.bmm(b_row / torch.bmm(left, kernel), back)
    v = torch.bmm(left, kernel).reciprocal_().squeeze(1)  # a weight of 0 leaves the scaling itself finite
    u = _times(v * b, back).reciprocal_()
    return u, v, _error(kernel, a, b, u, v)


def _error(kernel: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (b * (v * _times(u * a, kernel) - 1).abs()).sum(-1)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    # As a row times a matrix: several times faster in a batch on the CPU than a matrix times a column.
    return torch.bmm(rows.unsqueeze(1), matrix).squeeze(1)


def _log_updates(units: Tensor, log_a: Tensor, log_b: Tensor, f: Tensor, length: int) -> tuple[Tensor, Tensor]:
    g = f.new_empty(0)
    for _ in range(length):
        g = -((f + log_a).unsqueeze(-1) - units).logsumexp(-2)
        f = -((g + log_b).unsqueeze(-2) - units).logsumexp(-1)
    return f, g


def checked_weights(name: str, weights: Tensor | None, cost: Tensor, count: int) -> Tensor:
    """The weights of every problem in one row, even where none are given; refused by name unless they sum to one."""
    batch = cost.shape[:-2]
    if weights is None:
        weights = torch.full((count,), 1 / count, dtype=torch.float64, device=cost.device)
    if weights.shape[-1] != count:
        raise RestpointError(f"{name}: there are {weights.shape[-1]} weights for {count} points; give one for each")
    weights = weights.double()
    if not bool((weights >= 0).all()):
        raise RestpointError(f"{name}: a weight is negative or NaN; give a distribution")
    total = weights.sum(-1, keepdim=True)
    if not bool(((total - 1).abs() <= 1e-5).all()):
        raise RestpointError(f"{name}: weights sum to {float(total.flatten()[0]):.6g}, not 1; divide by their sum")
    return (weights / total).expand(*batch, count).reshape(-1, count)


def check_problem(cost: Tensor, strength: Tensor, max_iterations: int, tolerance: float) -> None:
    """Refuse by name what has no solution."""
    if 0 in cost.shape[-2:]:
        raise RestpointError(f"cost: it is {tuple(cost.shape)} and has nothing to carry; give at least one entry")
    if cost.numel() and not bool(torch.stack(torch.aminmax(cost)).isfinite().all()):
        raise RestpointError("cost: an entry is NaN or infinite; give finite costs")
    if not bool(((strength > 0) & strength.isfinite()).all()):
        raise RestpointError("regularisation: it must be positive and finite; for exact transport solve the linear one")
    if max_iterations < 1:
        raise RestpointError(f"max_iterations is {max_iterations}; allow at least one")
    if not tolerance > 0:
        raise RestpointError(f"tolerance is {tolerance}; give a positive share of the mass such as 1e-6")
