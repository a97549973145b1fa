"""Anderson acceleration, every row with mixing weights of its own."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from restpoint.equilibrium.solvers.method import Method, Secants, no_secants, require


@dataclass(eq=False)
class Mixing(Secants):
    """The ring of steps, and the inner products of the changes among themselves."""

    moves: Float[Tensor, "rows window dim"]
    """dz + damping dg of each step: what taking it back takes off the next point."""
    changes: Float[Tensor, "rows window dim"]
    """dg, with g = f(z) - z."""
    gram: Float[Tensor, "rows window window"]


@dataclass(frozen=True, kw_only=True)
class Anderson(Method[Mixing]):
    """z <- z + b g - (dZ + b dG) w, w = argmin |g - dG w|² + r |D w|²: type II, with g = f(z) - z, b the damping.

    dZ and dG are the last ``window`` differences of z and of g, D the norms of dG's columns, so that r has no unit
    and the weights do not depend on the map's scale. One evaluation a step; near the fixed point of an affine map it
    does what GMRES does within the window. Take it first; `Broyden` where the Jacobian has many eigenvalues near 1
    and memory is no matter.

    The small systems are solved for all rows at once, by their normal equations: r below the rounding of the
    products (a few units in the last place) is raised to it.

    Raises:
        RestpointError: a hyperparameter is out of range.

    Paper:
        Anderson 1965, "Iterative procedures for nonlinear integral equations"; Walker, Ni 2011.
    """

    window: int = 5
    """Past steps that are mixed, at least 1. Memory is 2 window rows of states for each row."""
    regularisation: float = 1e-10
    """Tikhonov r >= 0, relative to the squared norms of dG's columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("window", self.window, self.window >= 1, "at least 1, such as 5")
        require(
            "regularisation",
            self.regularisation,
            0 <= self.regularisation < float("inf"),
            "finite and not negative, such as 1e-10",
        )

    def init(self, value: Float[Tensor, "rows dim"]) -> Mixing:
        rows, dim = value.shape
        return Mixing(
            value=value,
            difference=torch.zeros_like(value),
            holds=no_secants(value, self.window),
            moves=value.new_zeros(rows, self.window, dim),
            changes=value.new_zeros(rows, self.window, dim),
            gram=value.new_zeros(rows, self.window, self.window),
        )

    def step(
        self,
        state: Mixing,
        value: Float[Tensor, "rows dim"],
        difference: Float[Tensor, "rows dim"],
        forget: Bool[Tensor, " rows"],
    ) -> Float[Tensor, "rows dim"]:
        step = state.advance(value, difference, forget)
        plain = value + self.damping * difference
        if step is None:
            return plain
        slot, move, change = step
        state.changes[:, slot] = change
        state.moves[:, slot] = move + self.damping * change
        state.holds[:, slot] = ~forget
        products = torch.stack((change, difference), 1) @ state.changes.mT
        state.gram[:, slot] = state.gram[:, :, slot] = products[:, 0]
        weights = mixing_weights(state.gram, products[:, 1], state.holds, self.regularisation)
        return plain - (weights.unsqueeze(1) @ state.moves).squeeze(1)


def mixing_weights(
    gram: Float[Tensor, "*rows window window"],
    target: Float[Tensor, "*rows window"],
    holds: Bool[Tensor, "*rows window"] | None = None,
    regularisation: float = 0.0,
) -> Float[Tensor, "*rows window"]:
    """Solve w = argmin |g - C w|² + r |D w|² for every row, from gram = Cᵀ C and target = Cᵀ g.

    D are the norms of C's columns; r below the rounding of the products is raised to it. The weight is 0 for columns
    that do not hold or are 0, and for a row whose system cannot be solved.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    usable = squares > 0 if holds is None else holds & (squares > 0)
    scale = torch.where(usable, squares, 1).double().rsqrt() * usable
    system = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    floor = 8 * torch.finfo(gram.dtype).eps
    system.diagonal(dim1=-2, dim2=-1).copy_(1 + max(regularisation, floor) * torch.ones_like(scale))
    factor, failed = torch.linalg.cholesky_ex(system)
    weights = scale * torch.cholesky_solve((scale * target).unsqueeze(-1), factor).squeeze(-1)
    return weights.masked_fill((failed > 0).unsqueeze(-1), 0).to(target.dtype)
