"""When an iterated state has come to rest: criteria that look at two successive iterates, row by row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.equilibrium.solvers.method import State, require

_GEIPING = "Geiping et al. 2025, 'Scaling up test-time compute with latent reasoning: a recurrent depth approach'"
_PAPPONE = "Pappone et al. 2025, 'Two-scale latent dynamics for recurrent-depth transformers'"


@dataclass(frozen=True, eq=False)
class Iterate:
    """Step k of the rows that are still iterated.

    Attributes:
        step: k, from 1 on.
        state: s_k.
        previous: s_{k-1}.
        logits: what the model would predict from s_k. Called only by criteria that need it: it may cost layers.
    """

    step: int
    state: Float[Tensor, "rows hidden"]
    previous: Float[Tensor, "rows hidden"]
    logits: Callable[[], Float[Tensor, "rows vocabulary"]]


@dataclass(eq=False)
class Memory(State):
    """What a criterion keeps of earlier steps; rows that stop are dropped from it with ``keep``."""

    runs: Int[Tensor, " rows"]
    """Steps in a row at which the test held."""
    last: Float[Tensor, "rows kept"] | None = None
    """What the next step is compared with; None before there is any."""


@dataclass(frozen=True, kw_only=True)
class ExitCriterion(ABC):
    """Stops a row at step k when a test of its last iterates has held at ``hits`` successive steps.

    A subclass is a frozen dataclass of its thresholds. Thresholds are compared with ``<``, so one of 0 never stops.

    Raises:
        RestpointError: ``hits`` is below 1.
    """

    papers: ClassVar[tuple[str, ...]] = (_GEIPING,)

    hits: int = 1
    """Successive steps at which the test must hold."""

    def __post_init__(self) -> None:
        require("hits", self.hits, self.hits >= 1, "at least 1: steps in a row at which the test must hold")

    def init(self, state: Float[Tensor, "rows hidden"]) -> Memory:
        """Nothing seen yet, for these rows."""
        return Memory(torch.zeros(state.shape[0], dtype=torch.int64, device=state.device))

    def stop(self, memory: Memory, iterate: Iterate) -> Bool[Tensor, " rows"]:
        """Which rows have come to rest; the memory takes in this step."""
        holds = self.holds(memory, iterate)
        memory.runs = torch.where(holds, memory.runs + 1, 0)
        return memory.runs >= self.hits

    @abstractmethod
    def holds(self, memory: Memory, iterate: Iterate) -> Bool[Tensor, " rows"]:
        """The test at this step, for every row; ``memory.last`` is the criterion's own to use."""


@dataclass(frozen=True, kw_only=True)
class Below(ExitCriterion):
    """A quantity falls below a threshold.

    Raises:
        RestpointError: the threshold is negative or not a number.
    """

    threshold: float
    """The quantity must be smaller; at least 0, and 0 never stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", self.threshold, self.threshold >= 0, "at least 0; 0 never stops")

    def holds(self, memory: Memory, iterate: Iterate) -> Bool[Tensor, " rows"]:
        value = self.measure(memory, iterate)
        if value is None:
            return torch.zeros_like(memory.runs, dtype=torch.bool)
        return value < self.threshold

    @abstractmethod
    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"] | None:
        """The quantity; None where there are not yet enough steps."""


@dataclass(frozen=True, kw_only=True)
class StepNorm(Below):
    """‖s_k - s_{k-1}‖ < threshold, in the units of the state."""

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"]:
        return (iterate.state.float() - iterate.previous.float()).norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class RelativeStep(Below):
    """‖s_k - s_{k-1}‖ / ‖s_k‖ < threshold, without a unit."""

    threshold: float = 0.03

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"]:
        state = iterate.state.float()
        return _ratio((state - iterate.previous.float()).norm(dim=-1), state)


@dataclass(frozen=True, kw_only=True)
class Acceleration(Below):
    """‖(s_k - s_{k-1}) - (s_{k-1} - s_{k-2})‖ < threshold at two successive steps (``hits``).

    A state that drifts at a steady pace is at rest by this test and not by that of the step: iterating it further
    changes little that is read from it. The earliest stop is at step 3.
    """

    papers: ClassVar[tuple[str, ...]] = (_PAPPONE,)

    hits: int = 2
    relative: bool = False
    """Divide by ‖s_k‖, so that the threshold has no unit."""

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"] | None:
        state = iterate.state.float()
        move = state - iterate.previous.float()
        before, memory.last = memory.last, move
        if before is None:
            return None
        size = (move - before).norm(dim=-1)
        return _ratio(size, state) if self.relative else size


@dataclass(frozen=True, kw_only=True)
class Cosine(Below):
    """1 - cos(s_k, s_{k-1}) < threshold."""

    threshold: float = 1e-3

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"]:
        return 1 - torch.nn.functional.cosine_similarity(iterate.state.float(), iterate.previous.float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class EntropyDifference(Below):
    """|H(p_k) - H(p_{k-1})| < threshold, entropies in nats of the laws predicted from two successive states."""

    threshold: float = 1e-3

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"] | None:
        log_law = iterate.logits().float().log_softmax(-1)
        entropy = -(log_law.exp() * log_law.clamp_min(torch.finfo(log_law.dtype).min)).sum(-1, keepdim=True)
        before, memory.last = memory.last, entropy
        return None if before is None else (entropy - before).abs().squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Divergence(Below):
    """KL(p_{k-1} ‖ p_k) < threshold, in nats, of the laws predicted from two successive states."""

    threshold: float = 1e-3

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"] | None:
        log_law = iterate.logits().float().log_softmax(-1)
        before, memory.last = memory.last, log_law
        if before is None:
            return None
        return torch.nn.functional.kl_div(log_law, before, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True, kw_only=True)
class ArgmaxStability(ExitCriterion):
    """The most likely token is that of the step before, ``hits`` times in a row."""

    hits: int = 5

    def holds(self, memory: Memory, iterate: Iterate) -> Bool[Tensor, " rows"]:
        best = iterate.logits().argmax(-1, keepdim=True).double()  # exact for any vocabulary
        before, memory.last = memory.last, best
        if before is None:
            return torch.zeros_like(memory.runs, dtype=torch.bool)
        return (best == before).squeeze(-1)


def _ratio(size: Float[Tensor, " rows"], state: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
    return size / state.norm(dim=-1).clamp_min(torch.finfo(state.dtype).tiny)
