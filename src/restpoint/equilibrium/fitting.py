"""Closed-form fits of predictors on a stream of states: no gradient, memory independent of the corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.gram import GramAccumulator, require_finite
from restpoint.equilibrium.predictors import AffinePredictor, MongePredictor, RestPointRecurrence
from restpoint.equilibrium.ridge import solve_ridge_path
from restpoint.errors import RestpointError
from restpoint.transport.gaussian import Gaussian, monge_map

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


Fitted = TypeVar("Fitted")


@dataclass(frozen=True, eq=False)
class FitResult(Generic[Fitted]):
    """A fitted predictor and how it was chosen."""

    predictor: Fitted
    """In float32, or float64 if the chunks were."""
    strengths: tuple[float, ...]
    """The candidates: ridge strengths, or the one regularisation of the Monge map."""
    chosen: tuple[float, ...]
    """The strength of each map."""
    scores: Float64[Tensor, "maps strengths"]
    """Mean held-out score of every candidate; the chosen one's is slightly optimistic, being chosen on it."""
    rows: tuple[int, ...]
    """Rows that each map was fitted on."""
    held_out_rows: tuple[int, ...]
    """Rows that each map was scored on."""


def negative_squared_error(
    predicted: Float[Tensor, "rows rest"], true: Float[Tensor, "rows rest"]
) -> Float[Tensor, " rows"]:
    """-|predicted - true|^2, in squared units of the rest state: the default score."""
    return -(predicted - true).square().sum(-1)


def fit_affine(
    stream: Stream,
    held_out: Stream,
    state_layers: tuple[int, ...],
    settings: FitSettings | None = None,
    *,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[AffinePredictor]:
    """Fit rest(t) ~ A [states(t)] + c by ridge regression: one pass over either stream.

    Args:
        stream: starts a pass over the chunks to fit on.
        held_out: starts a pass over other chunks, on which the strength is chosen.
        state_layers: the layers to read, ascending; usually one.
        settings: defaults of `FitSettings` if None; ``features`` and ``steps`` are not used.
        score: what to maximise on held-out rows, for example acceptance computed with the model's head.
        progress: called after each block of rows.

    Raises:
        RestpointError: a stream has no row or rows that are not finite, a layer is missing from a chunk, or a
            score is not finite.
    """
    settings = settings or FitSettings()

    def pairs(of: Stream) -> Iterator[_Pair]:
        for chunk in of():
            yield _states(chunk, state_layers).flatten(0, 1), _floating(chunk.rest).flatten(0, 1)

    fit = _fit_map(lambda: pairs(stream), lambda: pairs(held_out), None, settings, score, progress)
    return _result(AffinePredictor(state_layers, fit.affine), settings.strengths, [fit])


def fit_monge(
    stream: Stream,
    held_out: Stream,
    exit_layer: int,
    settings: FitSettings | None = None,
    *,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[MongePredictor]:
    """Fit rest(t) ~ T(h_E(t)), T the Monge map between the Gaussians of h_E and of rest.

    Arguments and errors as `fit_affine`, except that one layer is read, which must be as wide as the rest
    state, and that nothing is chosen: the held-out stream only gives the score. Memory also holds the rest
    state's own second moments.
    """
    settings = settings or FitSettings()

    def pairs(of: Stream) -> Iterator[_Pair]:
        for chunk in of():
            yield _states(chunk, (exit_layer,)).flatten(0, 1), _floating(chunk.rest).flatten(0, 1)

    gram = _accumulate(pairs(stream), None, settings, 0, progress, with_yy=True)
    moments = gram.moments()
    if moments.covariance_yy is None:
        raise RuntimeError("the accumulator was built with_yy and lost it")
    transport = monge_map(
        Gaussian(moments.mean_x, moments.covariance_xx),
        Gaussian(moments.mean_y, moments.covariance_yy),
        regularisation=settings.monge_regularisation,
    )
    candidate = AffineMap(transport.matrix, transport.offset)
    fit = _choose((candidate,), pairs(held_out), None, settings, 0, score, progress)
    fit = replace(fit, rows=moments.count)
    return _result(MongePredictor((exit_layer,), fit.affine), (settings.monge_regularisation,), [fit])


def fit_recurrence(
    stream: Stream,
    held_out: Stream,
    state_layers: tuple[int, ...],
    settings: FitSettings | None = None,
    *,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[RestPointRecurrence]:
    """Fit the rest-point recurrence, map by map.

    Map 0 is fitted on ([states(t), rest(t-1)] -> rest(t)), map j > 0 on ([states(t), map j-1's prediction at
    t-1] -> rest(t)): what it will read when it drafts. So map j sees the positions from j + 1 on, and each
    map costs one pass over either stream (and, with features, a look at the first 16384 rows to standardise
    them). A pass evaluates the maps before it again, which is small beside its products; nothing is stored.

    Args:
        stream: starts a pass over the chunks to fit on.
        held_out: starts a pass over other chunks, on which the strengths are chosen.
        state_layers: the layers to read, ascending; (0,) runs no layer.
        settings: defaults of `FitSettings` if None.
        score: what to maximise on held-out rows, for example acceptance computed with the model's head.
        progress: called after each block of rows.

    Raises:
        RestpointError: a stream has no sequence longer than ``steps`` or rows that are not finite, a layer is
            missing from a chunk, or a score is not finite.
    """
    settings = settings or FitSettings()
    maps: list[AffineMap] = []
    features: RandomFeatures | None = None

    def pairs(of: Stream) -> Iterator[_Pair]:
        for chunk in of():
            yield _recurrent_pairs(chunk, state_layers, maps, features, settings.chunk_rows)

    if settings.features:
        features = _draw_features(pairs(stream), settings)
    fits: list[_MapFit] = []
    for step in range(settings.steps):
        fit = _fit_map(lambda: pairs(stream), lambda: pairs(held_out), features, settings, score, progress, step)
        fits.append(fit)
        maps.append(fit.affine)
    return _result(RestPointRecurrence(state_layers, tuple(maps), features), settings.strengths, fits)


_Pair = tuple[Float[Tensor, "rows inputs"], Float[Tensor, "rows rest"]]


@dataclass(frozen=True, eq=False)
class _MapFit:
    """One chosen map, the index of its strength, and the scores of all."""

    affine: AffineMap
    best: int
    scores: Float64[Tensor, " strengths"]
    rows: int
    held_out_rows: int


def _fit_map(
    pairs: Callable[[], Iterator[_Pair]],
    held_out: Callable[[], Iterator[_Pair]],
    features: RandomFeatures | None,
    settings: FitSettings,
    score: Score,
    progress: Callable[[FitProgress], None] | None,
    step: int = 0,
) -> _MapFit:
    """One ridge fit: accumulate, solve for every strength, keep the best on held-out rows."""
    gram = _accumulate(pairs(), features, settings, step, progress)
    candidates = solve_ridge_path(gram, settings.strengths, standardise=settings.standardise)
    return replace(_choose(candidates, held_out(), features, settings, step, score, progress), rows=gram.count)


def _accumulate(
    pairs: Iterator[_Pair],
    features: RandomFeatures | None,
    settings: FitSettings,
    step: int,
    progress: Callable[[FitProgress], None] | None,
    *,
    with_yy: bool = False,
) -> GramAccumulator:
    """The second moments of ([x, features(x)], y) over one pass."""
    gram: GramAccumulator | None = None
    for x, y in _blocks(pairs, settings.chunk_rows):
        inputs = _lift(x, features)
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


def _choose(
    candidates: tuple[AffineMap, ...],
    held_out: Iterator[_Pair],
    features: RandomFeatures | None,
    settings: FitSettings,
    step: int,
    score: Score,
    progress: Callable[[FitProgress], None] | None,
) -> _MapFit:
    """Score every candidate over one pass of held-out rows and keep the best."""
    totals = torch.zeros(len(candidates), dtype=torch.float64)
    rows, ready = 0, None
    for x, y in _blocks(held_out, settings.chunk_rows):
        if ready is None:
            ready = tuple(candidate.to(x.device, x.dtype) for candidate in candidates)
        inputs = _lift(x, features)
        values = torch.stack([score(candidate(inputs), y) for candidate in ready])
        if values.shape != (len(ready), x.shape[0]):
            raise RestpointError(f"score gave {tuple(values.shape[1:])}; return one number for each of {len(x)} rows")
        totals += values.sum(1, dtype=torch.float64).cpu()
        rows += x.shape[0]
        if progress is not None:
            progress(FitProgress("score", step, rows))
    if ready is None:
        raise RestpointError(f"held_out gave no row for map {step}; pass sequences longer than {step + 1} tokens")
    scores = totals / rows
    if not bool(scores.isfinite().all()):
        raise RestpointError(
            f"the held-out scores of map {step} are not finite: {scores.tolist()}; check held_out and score"
        )
    best = int(scores.argmax())
    return _MapFit(ready[best], best, scores, 0, rows)


def _recurrent_pairs(
    chunk: Chunk,
    state_layers: tuple[int, ...],
    maps: list[AffineMap],
    features: RandomFeatures | None,
    rows: int,
) -> _Pair:
    """The inputs and targets of map len(maps), by running the maps before it along the sequence."""
    states, rest = _states(chunk, state_layers), _floating(chunk.rest)
    known = rest  # after j maps: their prediction of rest from position j on
    for step, affine in enumerate(maps, start=1):
        x = torch.cat((states[:, step:], known[:, :-1]), -1)
        blocks = [affine(_lift(block, features)) for block in x.flatten(0, 1).split(rows)]
        known = torch.cat(blocks).unflatten(0, x.shape[:2])
    first = len(maps) + 1
    x = torch.cat((states[:, first:], known[:, :-1]), -1)
    return x.flatten(0, 1), rest[:, first:].flatten(0, 1)


def _draw_features(pairs: Iterator[_Pair], settings: FitSettings) -> RandomFeatures:
    """Random features standardised on the first rows of the stream."""
    for x, y in _blocks(pairs, _STANDARDISATION_ROWS):
        require_finite(x, y)
        wide = x.double()
        drawn = RandomFeatures.draw(wide.mean(0), wide.std(0, correction=0), settings.features, seed=settings.seed)
        return drawn.to(x.device, x.dtype)
    raise RestpointError("the stream gave no row; pass longer sequences")


def _lift(x: Float[Tensor, "rows inputs"], features: RandomFeatures | None) -> Float[Tensor, "rows lifted"]:
    return x if features is None else torch.cat((x, features(x)), -1)


def _states(chunk: Chunk, state_layers: tuple[int, ...]) -> Float[Tensor, "batch seq inputs"]:
    """The named layers' states side by side."""
    layers = tuple(range(chunk.states.shape[2])) if chunk.layers is None else chunk.layers
    missing = [layer for layer in state_layers if layer not in layers]
    if missing:
        raise RestpointError(
            f"state_layers asks for layer {missing[0]}, but the chunks hold layers {layers}; record it too"
        )
    return _floating(chunk.states[:, :, [layers.index(layer) for layer in state_layers]]).flatten(-2)


def _floating(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least: half precision cannot hold a fit."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(pairs: Iterator[_Pair], rows: int) -> Iterator[_Pair]:
    """The same rows in blocks of ``rows`` to twice that: a small one costs as much to fold in."""
    held: list[_Pair] = []
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


def _result(predictor: Fitted, strengths: tuple[float, ...], fits: list[_MapFit]) -> FitResult[Fitted]:
    return FitResult(
        predictor,
        strengths,
        tuple(strengths[fit.best] for fit in fits),
        torch.stack([fit.scores for fit in fits]),
        tuple(fit.rows for fit in fits),
        tuple(fit.held_out_rows for fit in fits),
    )
