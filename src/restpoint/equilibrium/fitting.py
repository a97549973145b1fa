"""Closed-form fits of predictors on a stream of states: no gradient, memory independent of the corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.predictors import AffinePredictor, MongePredictor, RestPointRecurrence
from restpoint.equilibrium.ridge import solve_ridge_path
from restpoint.equilibrium.streaming import (
    Chunk,
    FitProgress,
    FitSettings,
    Pair,
    Score,
    Stream,
    accumulate,
    blocks,
    draw_features,
    floating,
    lift,
    mean_scores,
    negative_squared_error,
    states_of,
)
from restpoint.transport.gaussian import Gaussian, monge_map

Fitted = TypeVar("Fitted")


@dataclass(frozen=True, eq=False)
class FitResult(Generic[Fitted]):
    """A fitted predictor and how it was chosen."""

    predictor: Fitted
    """In float32, or float64 if the chunks were."""
    strengths: tuple[float, ...]
    """The candidates: strengths of a ridge, regularisations, or dimensions of a subspace."""
    chosen: tuple[float, ...]
    """The strength, or dimension, of each map."""
    scores: Float64[Tensor, "maps strengths"]
    """Mean held-out score of every candidate; the chosen one's is slightly optimistic, being chosen on it."""
    rows: tuple[int, ...]
    """Rows that each map was fitted on."""
    held_out_rows: tuple[int, ...]
    """Rows that each map was scored on."""


def fit_affine(
    stream: Stream,
    held_out: Stream,
    state_layers: tuple[int, ...],
    settings: FitSettings | None = None,
    *,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[AffinePredictor]:
    """Fit rest(t) ~ A [x, features(x)] + c, x = [states(t)], by ridge regression: one pass over either stream.

    With ``settings.features``, one look more at the first 16384 rows to standardise them; with 0, the map is affine.

    Args:
        stream: starts a pass over the chunks to fit on.
        held_out: starts a pass over other chunks, on which the strength is chosen.
        state_layers: the layers to read, ascending; usually one.
        settings: defaults of `FitSettings` if None; ``steps`` is not used.
        score: what to maximise on held-out rows, for example acceptance computed with the model's head.
        progress: called after each block of rows.

    Raises:
        RestpointError: a stream has no row or rows that are not finite, a layer is missing from a chunk, or a
            score is not finite.
    """
    settings = settings or FitSettings()

    def pairs(of: Stream) -> Iterator[Pair]:
        for chunk in of():
            yield states_of(chunk, state_layers).flatten(0, 1), floating(chunk.rest).flatten(0, 1)

    features = draw_features(pairs(stream), settings) if settings.features else None
    fit = _fit_map(lambda: pairs(stream), lambda: pairs(held_out), features, settings, score, progress)
    return _result(AffinePredictor(state_layers, fit.affine, features=features), settings.strengths, [fit])


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

    def pairs(of: Stream) -> Iterator[Pair]:
        for chunk in of():
            yield states_of(chunk, (exit_layer,)).flatten(0, 1), floating(chunk.rest).flatten(0, 1)

    gram = accumulate(pairs(stream), None, settings, 0, progress, with_yy=True)
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

    def pairs(of: Stream) -> Iterator[Pair]:
        for chunk in of():
            yield _recurrent_pairs(chunk, state_layers, maps, features, settings.chunk_rows)

    if settings.features:
        features = draw_features(pairs(stream), settings)
    fits: list[_MapFit] = []
    for step in range(settings.steps):
        fit = _fit_map(lambda: pairs(stream), lambda: pairs(held_out), features, settings, score, progress, step)
        fits.append(fit)
        maps.append(fit.affine)
    return _result(RestPointRecurrence(state_layers, tuple(maps), features), settings.strengths, fits)


@dataclass(frozen=True, eq=False)
class _MapFit:
    """One chosen map, the index of its strength, and the scores of all."""

    affine: AffineMap
    best: int
    scores: Float64[Tensor, " strengths"]
    rows: int
    held_out_rows: int


def _fit_map(
    pairs: Callable[[], Iterator[Pair]],
    held_out: Callable[[], Iterator[Pair]],
    features: RandomFeatures | None,
    settings: FitSettings,
    score: Score,
    progress: Callable[[FitProgress], None] | None,
    step: int = 0,
) -> _MapFit:
    """One ridge fit: accumulate, solve for every strength, keep the best on held-out rows."""
    gram = accumulate(pairs(), features, settings, step, progress)
    candidates = solve_ridge_path(gram, settings.strengths, standardise=settings.standardise)
    return replace(_choose(candidates, held_out(), features, settings, step, score, progress), rows=gram.count)


def _choose(
    candidates: tuple[AffineMap, ...],
    held_out: Iterator[Pair],
    features: RandomFeatures | None,
    settings: FitSettings,
    step: int,
    score: Score,
    progress: Callable[[FitProgress], None] | None,
) -> _MapFit:
    """Score every candidate over one pass of held-out rows and keep the best."""
    ready: tuple[AffineMap, ...] = ()

    def prepared(x: Tensor) -> tuple[AffineMap, ...]:
        nonlocal ready
        ready = tuple(candidate.to(x.device, x.dtype) for candidate in candidates)
        return ready

    lifted = ((lift(x, features), y) for x, y in blocks(held_out, settings.chunk_rows))
    scores, rows = mean_scores(prepared, lifted, step, score, progress)
    best = int(scores.argmax())
    return _MapFit(ready[best], best, scores, 0, rows)


def _recurrent_pairs(
    chunk: Chunk,
    state_layers: tuple[int, ...],
    maps: list[AffineMap],
    features: RandomFeatures | None,
    rows: int,
) -> Pair:
    """The inputs and targets of map len(maps), by running the maps before it along the sequence."""
    states, rest = states_of(chunk, state_layers), floating(chunk.rest)
    known = rest  # after j maps: their prediction of rest from position j on
    for step, affine in enumerate(maps, start=1):
        x = torch.cat((states[:, step:], known[:, :-1]), -1)
        lifted = [affine(lift(block, features)) for block in x.flatten(0, 1).split(rows)]
        known = torch.cat(lifted).unflatten(0, x.shape[:2])
    first = len(maps) + 1
    x = torch.cat((states[:, first:], known[:, :-1]), -1)
    return x.flatten(0, 1), rest[:, first:].flatten(0, 1)


def _result(predictor: Fitted, strengths: tuple[float, ...], fits: list[_MapFit]) -> FitResult[Fitted]:
    return FitResult(
        predictor,
        strengths,
        tuple(strengths[fit.best] for fit in fits),
        torch.stack([fit.scores for fit in fits]),
        tuple(fit.rows for fit in fits),
        tuple(fit.held_out_rows for fit in fits),
    )
