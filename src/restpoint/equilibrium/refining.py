"""The tuned lens proper: a closed-form map carried on by gradient descent on the divergence between the laws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.predictors import AffinePredictor
from restpoint.equilibrium.streaming import Pair, Stream, blocks, floating, lift, states_of
from restpoint.errors import RestpointError

Head = Callable[[Tensor], Tensor]
"""Rest states (rows x rest) -> logits (rows x vocabulary): the frozen final norm and unembedding; gradients flow."""


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
    """Tokens in a gradient step; memory is twice this times the vocabulary, four bytes each."""
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
class RefineResult:
    """A refined map and how it was come by."""

    predictor: AffinePredictor
    """The best one seen; the one that was given, where no step was better."""
    step: int
    """Gradient steps that it took; 0 for the one that was given."""
    trace: tuple[RefineProgress, ...]
    """Every look, the first before any step. The best one is slightly optimistic, being chosen on these rows."""
    held_out_rows: int
    """Rows of each look."""

    @property
    def before(self) -> float:
        """Held-out KL of the map that was given, in nats."""
        return self.trace[0].held_out

    @property
    def after(self) -> float:
        """Held-out KL of the refined one, in nats; never above `before`."""
        return min(look.held_out for look in self.trace)


def refine(
    predictor: AffinePredictor,
    stream: Stream,
    held_out: Stream,
    head: Head,
    settings: RefineSettings | None = None,
    *,
    progress: Callable[[RefineProgress], None] | None = None,
) -> RefineResult:
    """Minimise mean KL(softmax head(rest) | softmax head(A x + c)) over A and c, from a closed-form fit on.

    Ridge regression minimises the squared error of the state; what is drafted from it is a law, and directions of the
    state matter to that by how the head reads them. Take `fit_affine` first and refine it where minutes of gradient
    steps are to be had. Deterministic: rows are taken in an order that the seed fixes.

    The step is AdamW's on D and e, where the map is x -> A x + c + s (D z + e), z the standardised x and s the rest
    state's deviations. Looks at the held-out divergence, the first before any step, decide when to stop and which map
    is returned, so on these rows it is never worse than the one given.

    Args:
        predictor: an affine predictor in the chunks' dtype, with random features or without; these stay.
        stream: starts a pass over the chunks to refine on; passes follow each other until the steps are done.
        held_out: starts a pass over other chunks.
        head: the model's own; its parameters get no gradient.
        settings: defaults of `RefineSettings` if None.
        progress: called after each look.

    Raises:
        RestpointError: a stream has no row, a layer is missing from a chunk, or the divergence is not finite.

    Paper:
        Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
    """
    settings = settings or RefineSettings()
    given = predictor.affine

    def pairs(of: Stream, rows: int) -> Iterator[Pair]:
        unlifted = ((states_of(chunk, predictor.state_layers), floating(chunk.rest)) for chunk in of())
        for x, y in blocks(((x.flatten(0, 1), y.flatten(0, 1)) for x, y in unlifted), rows):
            yield lift(x, predictor.features), y

    def look(affine: AffineMap, step: int) -> RefineProgress:
        nonlocal held_rows
        total, held_rows = 0.0, 0
        with torch.no_grad():
            for x, y in pairs(held_out, settings.rows):
                total += float(_divergence(head, affine(x), y).sum(dtype=torch.float64))
                held_rows += x.shape[0]
        if not held_rows:
            raise RestpointError("held_out gave no row; pass longer sequences")
        found = RefineProgress(step, settings.steps, total / held_rows)
        if not found.held_out < float("inf"):
            raise RestpointError(
                f"the held-out divergence after {step} steps is {found.held_out}; "
                "check held_out, or lower learning_rate"
            )
        if progress is not None:
            progress(found)
        return found

    held_rows = 0
    scales = _Scales.of(next(pairs(stream, settings.buffer_rows), None))
    matrix = torch.zeros_like(given.matrix, dtype=scales.dtype).requires_grad_()
    offset = torch.zeros_like(given.offset, dtype=scales.dtype).requires_grad_()
    optimiser = torch.optim.AdamW([matrix, offset], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_step, trace = given, 0, [look(given, 0)]
    fresh = 0
    for step, (x, y) in enumerate(_batches(lambda: pairs(stream, settings.buffer_rows), settings), start=1):
        with torch.enable_grad():
            loss = _divergence(head, scales.apply(given, matrix, offset)(x), y).mean()
            matrix.grad, offset.grad = torch.autograd.grad(loss, (matrix, offset))
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
        optimiser.step()
        if step % settings.every and step < settings.steps:
            continue
        current = scales.apply(given, matrix.detach(), offset.detach()).to()
        trace.append(look(current, step))
        fresh += 1
        if trace[-1].held_out < min(earlier.held_out for earlier in trace[:-1]):
            best, best_step, fresh = current, step, 0
        if step == settings.steps or fresh == settings.patience:
            break
    return RefineResult(replace(predictor, affine=best), best_step, tuple(trace), held_rows)


@dataclass(frozen=True, eq=False)
class _Scales:
    """Mean and inverse deviation of the inputs, and deviation of the rest state."""

    mean: Float[Tensor, " inputs"]
    inverse: Float[Tensor, " inputs"]
    deviation: Float[Tensor, " rest"]

    @classmethod
    def of(cls, pair: Pair | None) -> "_Scales":
        if pair is None:
            raise RestpointError("the stream gave no row; pass longer sequences")
        x, y = pair
        deviation = x.std(0, correction=0)
        varies = deviation > 1e-6 * deviation.max()
        return cls(x.mean(0), torch.where(varies, deviation.reciprocal(), 0), y.std(0, correction=0))

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    def apply(self, given: AffineMap, matrix: Tensor, offset: Tensor) -> AffineMap:
        """The map given(x) + deviation ((x - mean) inverse @ matrix + offset)."""
        scaled = self.inverse.unsqueeze(1) * matrix * self.deviation
        return AffineMap(
            given.matrix.to(self.dtype) + scaled,
            given.offset.to(self.dtype) + self.deviation * offset - self.mean @ scaled,
        )


def _divergence(head: Head, predicted: Tensor, true: Tensor) -> Float[Tensor, " rows"]:
    """KL of the model's law from the predicted one, in nats."""
    with torch.no_grad():
        law = functional.log_softmax(head(true), -1)
    return functional.kl_div(functional.log_softmax(head(predicted), -1), law, reduction="none", log_target=True).sum(
        -1
    )


def _batches(passes: Callable[[], Iterator[Pair]], settings: RefineSettings) -> Iterator[Pair]:
    """Rows of pass after pass, shuffled within buffers; a remainder shorter than a batch is left out of longer ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        rows = 0
        for x, y in passes():
            rows += len(x)
            order = torch.randperm(len(x), generator=generator).to(x.device)
            parts = order.split(settings.rows)
            for part in parts if len(parts) == 1 or len(parts[-1]) == settings.rows else parts[:-1]:
                yield x[part], y[part]
        if not rows:
            raise RestpointError("the stream gave no row in a later pass; every pass must yield the same chunks")
