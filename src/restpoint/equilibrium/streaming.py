"""What all closed-form fits stream: chunks of states, blocks of rows, second moments."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.gram import GramAccumulator, require_finite
from restpoint.errors import RestpointError

_STANDARDISATION_ROWS = 16384
"""Rows from which the random features take the mean and deviation of their inputs."""


@dataclass(frozen=True)
class FitSettings:
    """How to fit. Every number is relative to the data, so the defaults serve any model."""

    strengths: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Ridge strengths to choose from, per map, by the score on held-out text."""
    standardise: bool = True
    """Penalise as if inputs had unit variance, so that massive activations do not set the penalty for all."""
    features: int = 4096
    """Random features of the recurrence; 0 for the linear one."""
    seed: int = 0
    """Seed of the random features."""
    steps: int = 4
    """Maps of the recurrence, one per drafted position; later positions use the last."""
    chunk_rows: int = 4096
    """Rows per product: memory is this times the inputs and features, four bytes each."""
    product_precision: Literal["auto", "float32", "float64"] = "auto"
    """Precision of the products within a chunk; auto is float32 with random features, float64 without."""
    monge_regularisation: float = 1e-6
    """Floor of the source's variances in the Monge map, as a fraction of their mean."""

    def __post_init__(self) -> None:
        if not self.strengths:
            raise RestpointError("strengths is empty; give at least one, such as 1e-3")
        for name in ("steps", "chunk_rows"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.features < 0:
            raise RestpointError(f"features is {self.features}; give 0 for a linear map or a positive number")
        if self.product_precision not in ("auto", "float32", "float64"):
            raise RestpointError(f"product_precision is {self.product_precision!r}; use auto, float32 or float64")

    def product_dtype(self, features: int) -> torch.dtype:
        """The dtype of products for a system with that many random features."""
        if self.product_precision == "auto":
            return torch.float32 if features else torch.float64
        return torch.float32 if self.product_precision == "float32" else torch.float64


@dataclass(frozen=True, eq=False)
class Chunk:
    """States of whole sequences; neighbouring positions of a sequence are neighbours on the ``seq`` axis.

    Leave out what no drafter will meet: slice off padding, and the first position if it is an attention sink.

    Raises:
        RestpointError: ``layers`` does not name every entry of the layer axis.
    """

    states: Float[Tensor, "batch seq layers hidden"]
    rest: Float[Tensor, "batch seq rest"]
    layers: tuple[int, ...] | None = None
    """Which layer each entry of the ``layers`` axis is; 0, 1, 2, ... if None."""

    def __post_init__(self) -> None:
        if self.layers is not None and len(self.layers) != self.states.shape[2]:
            raise RestpointError(
                f"layers is {self.layers} but states holds {self.states.shape[2]} layers; name each one"
            )


Stream = Callable[[], Iterator[Chunk]]
"""Starts another pass over the same chunks. Every pass must yield the same data."""

Score = Callable[[Tensor, Tensor], Tensor]
"""(predicted rest, true rest), both rows x rest -> one number per row, higher is better."""


@dataclass(frozen=True)
class FitProgress:
    """Where a fit is, after each block of rows."""

    stage: Literal["fit", "score"]
    step: int
    """Which map, from 0."""
    rows: int
    """Rows of this stage so far."""


Pair = tuple[Float[Tensor, "rows inputs"], Float[Tensor, "rows rest"]]


def negative_squared_error(
    predicted: Float[Tensor, "rows rest"], true: Float[Tensor, "rows rest"]
) -> Float[Tensor, " rows"]:
    """-|predicted - true|^2, in squared units of the rest state: the default score."""
    return -(predicted - true).square().sum(-1)


def accumulate(
    pairs: Iterator[Pair],
    features: RandomFeatures | None,
    settings: FitSettings,
    step: int,
    progress: Callable[[FitProgress], None] | None,
    *,
    with_yy: bool = False,
) -> GramAccumulator:
    """The second moments of ([x, features(x)], y) over one pass."""
    gram: GramAccumulator | None = None
    for x, y in blocks(pairs, settings.chunk_rows):
        inputs = lift(x, features)
        if gram is None:
            dtype = settings.product_dtype(0 if features is None else features.bias.shape[0])
            gram = GramAccumulator(
                inputs.shape[1], y.shape[1], with_yy=with_yy, product_dtype=dtype, device=inputs.device
            )
        gram.update(inputs, y)
        if progress is not None:
            progress(FitProgress("fit", step, gram.count))
    if gram is None:
        raise RestpointError(f"the stream gave no row for map {step}; pass sequences longer than {step + 1} tokens")
    return gram


def mean_scores(
    ready: Callable[[Tensor], Sequence[Callable[[Tensor], Tensor]]],
    held_out: Iterator[Pair],
    step: int,
    score: Score,
    progress: Callable[[FitProgress], None] | None,
) -> tuple[Float64[Tensor, " candidates"], int]:
    """The mean score of each candidate over one pass of held-out blocks, and how many rows these had.

    ``ready`` is called once, with the first block, and gives the candidates on its device and in its dtype.
    """
    candidates: Sequence[Callable[[Tensor], Tensor]] = ()
    totals = torch.zeros(0, dtype=torch.float64)
    rows = 0
    for x, y in held_out:
        if not rows:
            candidates = ready(x)
            totals = torch.zeros(len(candidates), dtype=torch.float64)
        values = torch.stack([score(candidate(x), y) for candidate in candidates])
        if values.shape != (len(candidates), x.shape[0]):
            raise RestpointError(f"score gave {tuple(values.shape[1:])}; return one number for each of {len(x)} rows")
        totals += values.sum(1, dtype=torch.float64).cpu()
        rows += x.shape[0]
        if progress is not None:
            progress(FitProgress("score", step, rows))
    if not rows:
        raise RestpointError(f"held_out gave no row for map {step}; pass sequences longer than {step + 1} tokens")
    scores = totals / rows
    if not bool(scores.isfinite().all()):
        raise RestpointError(
            f"the held-out scores of map {step} are not finite: {scores.tolist()}; check held_out and score"
        )
    return scores, rows


def draw_features(pairs: Iterator[Pair], settings: FitSettings) -> RandomFeatures:
    """Random features standardised on the first rows of the stream."""
    for x, y in blocks(pairs, _STANDARDISATION_ROWS):
        require_finite(x, y)
        wide = x.double()
        drawn = RandomFeatures.draw(wide.mean(0), wide.std(0, correction=0), settings.features, seed=settings.seed)
        return drawn.to(x.device, x.dtype)
    raise RestpointError("the stream gave no row; pass longer sequences")


def lift(x: Float[Tensor, "rows inputs"], features: RandomFeatures | None) -> Float[Tensor, "rows lifted"]:
    """[x, features(x)]; x itself without features."""
    return x if features is None else torch.cat((x, features(x)), -1)


def states_of(chunk: Chunk, state_layers: tuple[int, ...]) -> Float[Tensor, "batch seq inputs"]:
    """The named layers' states side by side."""
    layers = tuple(range(chunk.states.shape[2])) if chunk.layers is None else chunk.layers
    missing = [layer for layer in state_layers if layer not in layers]
    if missing:
        raise RestpointError(
            f"state_layers asks for layer {missing[0]}, but the chunks hold layers {layers}; record it too"
        )
    return floating(chunk.states[:, :, [layers.index(layer) for layer in state_layers]]).flatten(-2)


def floating(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least: half precision cannot hold a fit."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def blocks(pairs: Iterator[Pair], rows: int) -> Iterator[Pair]:
    """The same rows in blocks of ``rows`` to twice that: a small one costs as much to fold in."""
    held: list[Pair] = []
    count = 0
    for x, y in pairs:
        for part in zip(x.split(rows), y.split(rows), strict=True):
            held.append(part)
            count += part[0].shape[0]
            if count >= rows:
                yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
                held, count = [], 0
    if count:
        yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
