"""Thresholds of exit criteria that cover the whole range of step counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from restpoint.equilibrium.exits import Below, ExitCriterion, Iterate, Memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(ExitCriterion):
    """Never stops, and keeps what another criterion measures at each step; inf where it has nothing yet."""

    criterion: Below
    seen: list[Tensor] = field(default_factory=list)

    def holds(self, memory: Memory, iterate: Iterate) -> Bool[Tensor, " rows"]:
        value = self.criterion.measure(memory, iterate)
        nothing = torch.full(memory.runs.shape, torch.inf, device=memory.runs.device)
        self.seen.append(nothing if value is None else value.float())
        return torch.zeros_like(memory.runs, dtype=torch.bool)

    def lowest(self) -> Float[Tensor, "steps rows"]:
        """After each step, the least threshold above which a token would have stopped by then."""
        lasting = torch.stack(self.seen)
        for back in range(1, self.criterion.hits):
            held = torch.cat([torch.full_like(lasting[:back], torch.inf), torch.stack(self.seen)[:-back]])
            lasting = torch.maximum(lasting, held)
        return lasting.cummin(0).values


def spread(lowest: Float[Tensor, "steps rows"], means: Sequence[float]) -> list[float]:
    """Thresholds at which the mean number of steps would be so many, if no exit changed what later tokens see.

    A token goes on after step k as long as ``lowest`` there is not below the threshold, so the mean number of steps is
    1 + (r - 1) P(lowest >= threshold) over all tokens and steps: thresholds are quantiles of ``lowest``.
    """
    ordered = lowest.flatten().double().sort().values
    ordered = ordered[ordered.isfinite()]
    found = []
    for mean in means:
        below = min(max(round(lowest.numel() * (1 - (mean - 1) / len(lowest))), 0), len(ordered))
        # Halfway between two values: at either, rounding would decide.
        low = ordered[below - 1] if below else torch.zeros_like(ordered[0])
        high = ordered[below] if below < len(ordered) else 2 * ordered[-1] + 1e-9
        found.append(float((low + high) / 2))
    return found


def fewest_steps(lowest: Float[Tensor, "steps rows"]) -> float:
    """The mean number of steps below which no threshold comes."""
    return 1 + float(lowest.isinf().float().sum(0).mean())
