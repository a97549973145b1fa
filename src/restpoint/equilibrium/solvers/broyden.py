"""Broyden's good method with limited memory, every row with an inverse Jacobian of its own."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from restpoint.equilibrium.solvers.method import Method, Secants, no_secants, require


@dataclass(eq=False)
class InverseJacobian(Secants):
    """H = -damping I + sum_i u_i v_iᵀ, an estimate of the inverse of g's Jacobian."""

    left: Float[Tensor, "rows window dim"]
    """u_i."""
    right: Float[Tensor, "rows window dim"]
    """v_i."""


@dataclass(frozen=True, kw_only=True)
class Broyden(Method[InverseJacobian]):
    """z <- z - H g, with g = f(z) - z and H -> H + (dz - H dg) (dzᵀ H) / (dzᵀ H dg): the good update.

    H starts as -damping I, which is a damped Picard step. When ``memory`` updates are stored it starts again from the
    last step alone: later updates were made on top of earlier ones, and taking out only the oldest costs several times
    the evaluations. One evaluation a step. An affine map of n coordinates is solved in 2 n steps at most, if memory is
    at least that, whether its fixed point attracts or repels. On the way there the residual may grow by orders of
    magnitude, more so for maps far from normal, so the safeguard is wide.

    Raises:
        RestpointError: a hyperparameter is out of range.

    Paper:
        Broyden 1965, "A class of methods for solving nonlinear simultaneous equations"; Bai, Kolter, Koltun 2019,
        "Deep equilibrium models" (the limited memory).
    """

    safeguard: float = 1e6
    memory: int = 30
    """Updates that are kept, at least 1. Memory is 2 ``memory`` rows of states for each row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("memory", self.memory, self.memory >= 1, "at least 1, such as 30")

    def init(self, value: Float[Tensor, "rows dim"]) -> InverseJacobian:
        rows, dim = value.shape
        return InverseJacobian(
            value=value,
            difference=torch.zeros_like(value),
            holds=no_secants(value, self.memory),
            left=value.new_zeros(rows, self.memory, dim),
            right=value.new_zeros(rows, self.memory, dim),
        )

    def step(
        self,
        state: InverseJacobian,
        value: Float[Tensor, "rows dim"],
        difference: Float[Tensor, "rows dim"],
        forget: Bool[Tensor, " rows"],
    ) -> Float[Tensor, "rows dim"]:
        step = state.advance(value, difference, forget)
        plain = value + self.damping * difference
        if step is None:
            return plain
        slot, move, change = step
        if slot == 0:
            state.holds[:] = False  # full: start again, knowing the last step only
        filled = min(state.count - 1, self.memory)
        lefts, rights, holds = state.left[:, :filled], state.right[:, :filled], state.holds[:, None, :filled]
        carried = ((torch.stack((change, difference), 1) @ rights.mT) * holds) @ lefts  # sum_i u_i (v_i . dg), and of g
        along = (move.unsqueeze(1) @ lefts.mT) * holds
        row = (along @ rights).squeeze(1) - self.damping * move  # dzᵀ H
        # Along a direction that the update cannot see, the division would only amplify rounding: skip it.
        slope = (row * change).sum(-1, keepdim=True)
        seen = slope.abs() > torch.finfo(slope.dtype).eps ** 0.5 * row.norm(dim=-1, keepdim=True) * change.norm(
            dim=-1, keepdim=True
        )
        seen = seen & ~forget.unsqueeze(-1)
        column = (move + self.damping * change - carried[:, 0]) / torch.where(seen, slope, 1)
        state.left[:, slot], state.right[:, slot] = column, row
        state.holds[:, slot] = seen.squeeze(-1)
        latest = column * (row * difference).sum(-1, keepdim=True)
        return plain - carried[:, 1] - torch.where(seen, latest, 0)
