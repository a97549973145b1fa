"""What the driver asks of a method: hyperparameters in a frozen dataclass, history in a state of its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(eq=False)
class State:
    """The history of a method. The first axis of every tensor in it is the rows that are still iterated."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all rows but these."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                setattr(self, entry.name, value.index_select(0, rows))


StateOf = TypeVar("StateOf", bound=State)


@dataclass(frozen=True, kw_only=True)
class Method(ABC, Generic[StateOf]):
    """How the next point follows from those before. A subclass is a frozen dataclass of its hyperparameters.

    Raises:
        RestpointError: ``damping`` is not in (0, 1], or ``safeguard`` not above 1.
    """

    damping: float = 1.0
    """Share of the step f(z) - z that is taken, in (0, 1]; below 1 where the map overshoots."""
    safeguard: float = 1e3
    """A row whose |f(z) - z| exceeds this times its smallest so far returns to its best point; above 1, inf never."""

    def __post_init__(self) -> None:
        require("damping", self.damping, 0 < self.damping <= 1, "in (0, 1], such as 1.0, or 0.5 where it overshoots")
        require("safeguard", self.safeguard, self.safeguard > 1, "above 1, such as 100.0; inf switches it off")

    @abstractmethod
    def init(self, value: Float[Tensor, "rows dim"]) -> StateOf:
        """An empty history for these rows."""

    @abstractmethod
    def step(
        self,
        state: StateOf,
        value: Float[Tensor, "rows dim"],
        difference: Float[Tensor, "rows dim"],
        forget: Bool[Tensor, " rows"],
    ) -> Float[Tensor, "rows dim"]:
        """The next point of every row; the state takes in this one.

        Args:
            state: the history; changed in place.
            value: z.
            difference: f(z) - z, finite.
            forget: rows that jumped to another point: what the state knows of them no longer holds.
        """


def require(name: str, value: object, holds: bool, allowed: str) -> None:
    """Refuse a hyperparameter that is out of range."""
    if not holds:
        raise RestpointError(f"{name} is {value}; it must be {allowed}")


@dataclass(eq=False)
class Secants(State):
    """A ring of past steps, shared in time by all rows; each row says which of its own still hold.

    A row that forgets masks its entries rather than clearing them, which would write the whole ring at every step.
    """

    value: Float[Tensor, "rows dim"]
    """The point before."""
    difference: Float[Tensor, "rows dim"]
    """f(z) - z there."""
    holds: Bool[Tensor, "rows window"]
    count: int = field(default=0, kw_only=True)
    """Points taken in."""

    def advance(
        self, value: Float[Tensor, "rows dim"], difference: Float[Tensor, "rows dim"], forget: Bool[Tensor, " rows"]
    ) -> tuple[int, Float[Tensor, "rows dim"], Float[Tensor, "rows dim"]] | None:
        """Take in a point: the ring's slot for it, the move and the change since the one before; None at first.

        The slot does not hold yet, and rows that forget have nothing that does.
        """
        window = self.holds.shape[1]
        slot, first = (self.count - 1) % window, self.count == 0
        move, change = value - self.value, difference - self.difference
        self.value, self.difference, self.count = value, difference, self.count + 1
        if first:
            return None
        self.holds = self.holds & ~forget.unsqueeze(-1)
        self.holds[:, slot] = False
        return slot, move, change


def no_secants(value: Float[Tensor, "rows dim"], window: int) -> Bool[Tensor, "rows window"]:
    """Nothing holds yet."""
    return torch.zeros(value.shape[0], window, dtype=torch.bool, device=value.device)
