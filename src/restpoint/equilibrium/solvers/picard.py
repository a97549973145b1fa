"""Damped Picard iteration."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from restpoint.equilibrium.solvers.method import Method, State


@dataclass(frozen=True, kw_only=True)
class Picard(Method[State]):
    """z <- z + damping (f(z) - z): no memory, one evaluation a step.

    Converges at the rate max |1 + damping (lambda - 1)| over the eigenvalues lambda of the map's Jacobian, so to a
    contraction's fixed point always, and with damping below 1 also where an eigenvalue lies left of -1. The safeguard
    is wide, because a contraction that is far from normal first moves away from where it ends.

    Paper:
        Picard 1890; Krasnoselskii 1955 (with damping).
    """

    def init(self, value: Float[Tensor, "rows dim"]) -> State:
        return State()

    def step(
        self,
        state: State,
        value: Float[Tensor, "rows dim"],
        difference: Float[Tensor, "rows dim"],
        forget: Bool[Tensor, " rows"],
    ) -> Float[Tensor, "rows dim"]:
        return value + self.damping * difference
