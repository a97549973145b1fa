"""The loop that every fixed-point method runs in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.solvers.method import Method, State, require
from restpoint.equilibrium.solvers.solution import Check, Solution, Status
from restpoint.errors import RestpointError

Map = Callable[[Float[Tensor, "*rows dim"]], Float[Tensor, "*rows dim"]]
"""f, on all rows at once and in start's shape."""

RowMap = Callable[[Float[Tensor, "live dim"], Int[Tensor, " live"]], Float[Tensor, "live dim"]]
"""f on some of the rows; the second argument says which, as indices into start with its leading axes flattened."""

_FALLBACKS = 8
"""Returns to one best point, each with half the step of the one before, after which a row has diverged."""


def solve(
    f: Map | RowMap,
    start: Float[Tensor, "*rows dim"],
    method: Method | None = None,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 50,
    check_every: int | None = None,
    row_aware: bool = False,
) -> Solution:
    """Find z with f(z) = z, for every row on its own: until |f(z) - z| <= tolerance |f(z)|.

    Each row is iterated until it meets the tolerance and then frozen: its value changes no more. Rows are independent
    wherever f is. If f couples them, as attention couples tokens, a frozen row's residual is that of the moment when
    it froze; flatten what is coupled into one row if it has to hold at the end.

    A row that gets worse than ``method.safeguard`` times its best |f(z) - z|, or that is not finite, returns to its
    best point, forgets its history and takes half the damped step from there, half of that the next time, until that
    point is bettered. Eight such returns to one point are a divergence. (Not the relative residual, which falls while
    a row runs away.)

    Runs without a graph: for gradients, give the solution to `implicit`.

    Args:
        f: the map, of start's shape and dtype; a `RowMap` with ``row_aware``.
        start: first z; leading axes are rows. Zeros will do. In half precision the method still computes in float32.
        method: `Picard`, `Anderson` or `Broyden`; Anderson() if None.
        tolerance: relative residual, without a unit. Rounding sets a floor of about 1e-6 in float32.
        max_steps: evaluations of f at most.
        check_every: evaluations between two looks at the result, each of which waits for the device: between them,
            rows that are done cost what the others do, and after the last one f runs on until the next look. 1 on the
            CPU and 4 elsewhere if None.
        row_aware: f takes (z, rows) and is called with live rows only. Otherwise it is called with all rows, frozen
            ones at the values that they keep.

    Raises:
        RestpointError: an argument is out of range, start is not finite, or f returns another shape.
    """
    method = Anderson() if method is None else method
    require_settings(tolerance, max_steps, check_every)
    if check_every is None:
        check_every = 1 if start.device.type == "cpu" else 4
    if not bool(start.isfinite().all()):
        raise RestpointError("start holds values that are not finite; give zeros or another finite first point")
    with torch.no_grad():
        return _Run(f, start.detach(), method, tolerance, row_aware).to_the_end(max_steps, check_every)


def require_settings(tolerance: float, max_steps: int, check_every: int | None) -> None:
    """Refuse arguments of `solve` that are out of range."""
    require("tolerance", tolerance, 0 < tolerance < math.inf, "positive and finite, such as 1e-4")
    require("max_steps", max_steps, max_steps >= 1, "at least 1, such as 50")
    require("check_every", check_every, check_every is None or check_every >= 1, "at least 1, such as 4, or None")


@dataclass(eq=False)
class _Live(State):
    """What the driver knows of the rows that it iterates."""

    rows: Int[Tensor, " live"]
    value: Float[Tensor, "live dim"]
    best: Float[Tensor, "live dim"]
    difference: Float[Tensor, "live dim"]
    """f(best) - best."""
    size: Float[Tensor, " live"]
    """Its norm, which ranks points."""
    residual: Float[Tensor, " live"]
    """Its norm over that of f(best)."""
    fallbacks: Int[Tensor, " live"]
    """Returns to the best point since it was found."""
    lost: Bool[Tensor, " live"]
    """The method had no finite point to go to, and fell back."""
    steps: Int[Tensor, " live"]
    status: Int[Tensor, " live"]
    """`Status`; MAX_STEPS as long as nothing else is known."""


class _Run:
    """One solve: the rows still iterated, and the results of all."""

    def __init__(self, f: Map | RowMap, start: Tensor, method: Method, tolerance: float, row_aware: bool) -> None:
        self.f, self.method, self.tolerance, self.row_aware = f, method, tolerance, row_aware
        self.shape, self.dtype = start.shape, start.dtype
        # What f is called with where it wants all rows; written to only where rows differ from it.
        self.board = start.reshape(start.shape[:-1].numel(), start.shape[-1]).clone()
        value = self.board.to(torch.promote_types(start.dtype, torch.float32), copy=True)
        count = value.shape[0]
        whole = torch.zeros(count, dtype=torch.int64, device=value.device)
        far = value.new_full((count,), math.inf)
        self.live = _Live(
            rows=torch.arange(count, device=value.device),
            value=value,
            best=value,
            difference=torch.zeros_like(value),
            size=far,
            residual=far,
            fallbacks=whole,
            lost=torch.zeros_like(whole, dtype=torch.bool),
            steps=whole,
            status=torch.full_like(whole, int(Status.MAX_STEPS)),
        )
        self.history = method.init(value)
        self.residual, self.steps, self.status = far.clone(), whole.clone(), self.live.status.clone()
        self.evaluations = self.row_evaluations = 0
        self.trace: list[Check] = []

    def to_the_end(self, max_steps: int, check_every: int) -> Solution:
        """Iterate until no row is live or the steps are used up."""
        for step in range(1, max_steps + 1):
            if not self.live.rows.shape[0]:
                break
            relative = self._step(last=step == max_steps)
            if step % check_every == 0 or step == max_steps:
                self._look(relative)
        self._store(self.live)
        return Solution(
            value=self.board.view(self.shape),
            residual=self.residual.view(self.shape[:-1]),
            steps=self.steps.view(self.shape[:-1]),
            status=self.status.view(self.shape[:-1]),
            evaluations=self.evaluations,
            row_evaluations=self.row_evaluations,
            trace=tuple(self.trace),
        )

    def _step(self, *, last: bool) -> Float[Tensor, " live"]:
        """Evaluate every live row and move it, and say how large its relative residual was."""
        live = self.live
        image = self._evaluate(live)
        difference = image - live.value
        size = difference.norm(dim=-1)
        relative = size / (image.norm(dim=-1) + torch.finfo(size.dtype).tiny)
        going = live.status == int(Status.MAX_STEPS)
        finite = size.isfinite() & relative.isfinite()
        size = torch.where(finite, size, math.inf)
        met = going & finite & (relative <= self.tolerance)
        better = (going & (size < live.size)) | met
        live.fallbacks = live.fallbacks.masked_fill(better, 0)
        live.best = torch.where(better.unsqueeze(-1), live.value, live.best)
        live.difference = torch.where(better.unsqueeze(-1), difference, live.difference)
        astray = going & ~met & (~finite | (size > self.method.safeguard * torch.where(better, size, live.size)))
        live.size = torch.where(better, size, live.size)
        live.residual = torch.where(better, relative, live.residual)
        live.steps = live.steps + going
        live.status = live.status.masked_fill(met, int(Status.CONVERGED))
        # Without a finite image there is no way to step, not even from the best point.
        hopeless = astray & ((live.fallbacks >= _FALLBACKS) | live.size.isinf())
        live.status = live.status.masked_fill(hopeless, int(Status.DIVERGED))
        if not last:
            self._move(live, difference, astray, going & ~met & ~hopeless)
        return torch.where(finite, relative, math.inf)

    def _move(self, live: _Live, difference: Tensor, astray: Tensor, going: Tensor) -> None:
        """Every row that goes on to its next point; the others keep theirs."""
        back = (astray | ~going).unsqueeze(-1)
        here, difference = torch.where(back, live.best, live.value), torch.where(back, live.difference, difference)
        forget = astray | live.lost
        proposal = self.method.step(self.history, here, difference, forget)
        live.lost = ~proposal.norm(dim=-1).isfinite()
        fall = going & (astray | live.lost)
        live.fallbacks = live.fallbacks + fall
        share = self.method.damping * 0.5 ** live.fallbacks.to(difference.dtype)
        cautious = live.best + share.unsqueeze(-1) * live.difference
        proposal = torch.where(fall.unsqueeze(-1), cautious, proposal)
        # In half precision the point that f sees is a rounded one: that one counts.
        rounded = proposal.to(self.dtype).to(proposal.dtype)
        live.value = torch.where(going.unsqueeze(-1), rounded, live.best)

    def _evaluate(self, live: _Live) -> Float[Tensor, "live dim"]:
        value, everywhere = live.value.to(self.dtype), live.rows.shape[0] == self.board.shape[0]
        self.evaluations += 1
        self.row_evaluations += live.rows.shape[0] if self.row_aware else self.board.shape[0]
        if self.row_aware:
            image = cast(RowMap, self.f)(value, live.rows)
            expected = value.shape
        else:
            if not everywhere:
                self.board[live.rows] = value
            image = cast(Map, self.f)((value if everywhere else self.board).view(self.shape))
            expected = self.shape
        if image.shape != expected:
            raise RestpointError(f"f maps {tuple(expected)} to {tuple(image.shape)}; it must keep the shape")
        image = image.to(live.value.dtype)
        if self.row_aware:
            return image
        image = image.reshape(self.board.shape)
        return image if everywhere else image[live.rows]

    def _look(self, relative: Float[Tensor, " live"]) -> None:
        """The one place that waits for the device: record, and drop the rows that are done."""
        going = self.live.status == int(Status.MAX_STEPS)
        median, largest, left = torch.stack((relative.median(), relative.max(), going.sum().to(relative))).tolist()
        rows = relative.shape[0]
        self.trace.append(Check(self.evaluations, rows, int(left), median, largest))
        if int(left) < rows:
            self._store(self.live)
            kept = going.nonzero().squeeze(-1)
            self.live.keep(kept)
            self.history.keep(kept)

    def _store(self, live: _Live) -> None:
        self.board[live.rows] = live.best.to(self.dtype)
        self.residual[live.rows], self.steps[live.rows] = live.residual, live.steps
        self.status[live.rows] = live.status
