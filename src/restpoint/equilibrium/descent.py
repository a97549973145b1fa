"""Gradient descent on the divergence between a predictor's laws and the model's own, from a closed-form fit on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.predictors import Predictor
from restpoint.equilibrium.streaming import Pair
from restpoint.errors import RestpointError

Head = Callable[[Tensor], Tensor]
"""Rest states (rows x rest) -> logits (rows x vocabulary): the frozen final norm and unembedding; gradients flow."""

Refined = TypeVar("Refined", bound=Predictor)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class RefineSettings:
    """How to refine. The learning rate has no unit, so the defaults serve any model."""

    steps: int = 500
    """Gradient steps at most."""
    learning_rate: float = 1e-3
    """Of AdamW at the first step, falling linearly to 0, for inputs and outputs scaled to unit variance."""
    weight_decay: float = 0.0
    """AdamW's; it pulls back to the map one starts from, not to 0."""
    rows: int = 512
    """Predictions in a gradient step; memory is twice this times the vocabulary, four bytes each."""
    every: int = 50
    """Steps between two looks at the held-out divergence."""
    patience: int = 4
    """Looks in a row without a new best after which to stop."""
    seed: int = 0
    """Of the order in which rows are taken."""
    buffer_rows: int = 16384
    """Rows that are shuffled together; the first such buffer also gives the scales."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "every", "patience", "buffer_rows"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise RestpointError(f"learning_rate is {self.learning_rate}; it must be positive, such as 1e-3")
        if not 0 <= self.weight_decay < float("inf"):
            raise RestpointError(f"weight_decay is {self.weight_decay}; it must be finite and not negative")


@dataclass(frozen=True)
class RefineProgress:
    """Where a refinement is, after each look at the held-out divergence."""

    step: int
    steps: int
    held_out: float
    """Mean KL of the held-out rows, in nats."""


@dataclass(frozen=True, eq=False)
class RefineResult(Generic[Refined]):
    """A refined predictor and how it was come by."""

    predictor: Refined
    """The best one seen; the one that was given, where no step was better."""
    step: int
    """Gradient steps that it took; 0 for the one that was given."""
    trace: tuple[RefineProgress, ...]
    """Every look, the first before any step. The best one is slightly optimistic, being chosen on these rows."""
    held_out_rows: int
    """Rows of each look."""

    @property
    def before(self) -> float:
        """Held-out KL of the predictor that was given, in nats."""
        return self.trace[0].held_out

    @property
    def after(self) -> float:
        """Held-out KL of the refined one, in nats; never above `before`."""
        return min(look.held_out for look in self.trace)


@dataclass(frozen=True, eq=False)
class Scales:
    """Mean and inverse deviation of the inputs, and deviation of the outputs."""

    mean: Float[Tensor, " inputs"]
    inverse: Float[Tensor, " inputs"]
    deviation: Float[Tensor, " outputs"]

    @classmethod
    def of(cls, pair: Pair | None) -> "Scales":
        """Those of some rows.

        Raises:
            RestpointError: there is none.
        """
        if pair is None:
            raise RestpointError("the stream gave no row; pass longer sequences")
        x, y = pair
        deviation = x.std(0, correction=0)
        varies = deviation > 1e-6 * deviation.max()
        return cls(x.mean(0), torch.where(varies, deviation.reciprocal(), 0), y.std(0, correction=0))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.mean.dtype

    def apply(self, given: AffineMap, matrix: Tensor, offset: Tensor) -> AffineMap:
        """The map given(x) + deviation ((x - mean) inverse @ matrix + offset)."""
        scaled = self.inverse.unsqueeze(1) * matrix * self.deviation
        return AffineMap(
            given.matrix.to(self.dtype) + scaled,
            given.offset.to(self.dtype) + self.deviation * offset - self.mean @ scaled,
        )


def descend(
    given: Refined,
    changes: Sequence[Tensor],
    changed: Callable[[Sequence[Tensor]], Refined],
    batches: Iterator[Batch],
    held_out: Callable[[], Iterator[Batch]],
    divergences: Callable[[Refined, Batch], Tensor],
    settings: RefineSettings,
    progress: Callable[[RefineProgress], None] | None,
) -> RefineResult[Refined]:
    """AdamW on changes of a predictor; looks at held-out rows decide when to stop and which one is returned.

    Args:
        given: where to start.
        changes: what is learnt, all 0.
        changed: the predictor with such changes; gradients flow.
        batches: to learn from, without end.
        held_out: starts a pass over other batches.
        divergences: of each prediction for a batch, in nats.
        settings: of the descent.
        progress: called after each look, the first of which comes before any step.

    Raises:
        RestpointError: the held-out pass has no row, or the divergence is not finite.
    """
    rows = 0

    def look(predictor: Refined, step: int) -> RefineProgress:
        nonlocal rows
        total, rows = 0.0, 0
        with torch.no_grad():
            for batch in held_out():
                found = divergences(predictor, batch)
                total += float(found.sum(dtype=torch.float64))
                rows += found.numel()
        if not rows:
            raise RestpointError("held_out gave no row; pass longer sequences")
        seen = RefineProgress(step, settings.steps, total / rows)
        if not seen.held_out < float("inf"):
            raise RestpointError(
                f"the held-out divergence after {step} steps is {seen.held_out}; check held_out, or lower learning_rate"
            )
        if progress is not None:
            progress(seen)
        return seen

    learnt = [change.requires_grad_() for change in changes]
    optimiser = torch.optim.AdamW(learnt, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_step, trace = given, 0, [look(given, 0)]
    fresh = 0
    for step, batch in enumerate(batches, start=1):
        with torch.enable_grad():
            loss = divergences(changed(learnt), batch).mean()
            for change, gradient in zip(learnt, torch.autograd.grad(loss, learnt), strict=True):
                change.grad = gradient
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
        optimiser.step()
        if step % settings.every and step < settings.steps:
            continue
        current = changed([change.detach() for change in learnt])
        trace.append(look(current, step))
        fresh += 1
        if trace[-1].held_out < min(earlier.held_out for earlier in trace[:-1]):
            best, best_step, fresh = current, step, 0
        if step == settings.steps or fresh == settings.patience:
            break
    return RefineResult(best, best_step, tuple(trace), rows)


def divergence(head: Head, predicted: Tensor, true: Tensor) -> Float[Tensor, " rows"]:
    """KL of the model's law from the predicted one, in nats."""
    with torch.no_grad():
        law = functional.log_softmax(head(true), -1)
    return functional.kl_div(functional.log_softmax(head(predicted), -1), law, reduction="none", log_target=True).sum(
        -1
    )


def shuffled(count: int, rows: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The numbers below ``count`` in parts of ``rows``, in any order; a shorter rest is left out of several parts."""
    parts = torch.randperm(count, generator=generator).split(rows)
    return parts if len(parts) == 1 or len(parts[-1]) == rows else parts[:-1]
