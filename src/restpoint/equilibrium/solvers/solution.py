"""What a solver returns: the best point of every row, how good it is, and what ran."""

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Status(IntEnum):
    """How a row ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2

    @property
    def message(self) -> str:
        """What it means, and what to change."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "converged: the relative residual is within tolerance",
    Status.MAX_STEPS: "max_steps: still above tolerance; raise max_steps or tolerance, or use Anderson or Broyden "
    "where Picard is slow",
    Status.DIVERGED: "diverged: the residual grew or was not finite wherever it went; lower damping, use Anderson or "
    "Broyden, start nearer, or look at spectral_radius: the map may not be contractive",
}


@dataclass(frozen=True)
class Check:
    """What the driver saw when it looked: the rows iterated in that step, and how many of them go on."""

    step: int
    """Evaluations of f so far."""
    rows: int
    """Rows that were iterated."""
    live: int
    """Those that go on."""
    median: float
    """Of the rows' relative residuals at the point just evaluated; inf counts for what is not finite."""
    largest: float


@dataclass(frozen=True, eq=False)
class Solution:
    """The best point of every row and how it was found.

    Attributes:
        value: z, in start's shape and dtype. A converged row's is the point that met the tolerance; another row's is
            the one with the smallest |f(z) - z| of all that were evaluated; all are finite.
        residual: |f(z) - z| / |f(z)| at that point; inf where f(start) was not finite.
        steps: evaluations in which the row was live.
        status: a `Status` for each row.
        evaluations: calls of f.
        row_evaluations: rows over all calls of f: the cost.
        trace: one entry for each time that the driver looked.
    """

    value: Float[Tensor, "*rows dim"]
    residual: Float[Tensor, "*rows"]
    steps: Int[Tensor, "*rows"]
    status: Int[Tensor, "*rows"]
    evaluations: int
    row_evaluations: int
    trace: tuple[Check, ...]

    @property
    def converged(self) -> Bool[Tensor, "*rows"]:
        """Which rows met the tolerance."""
        return self.status == int(Status.CONVERGED)

    @property
    def message(self) -> str:
        """How many rows ended how, and what to do about those that failed."""
        counts = Counter(self.status.flatten().tolist())
        return "\n".join(f"{counts[status]} rows {status.message}" for status in Status if counts[status])
