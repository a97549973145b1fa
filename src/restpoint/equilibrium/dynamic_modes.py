"""Dynamic-mode decomposition of depth: one affine operator from each state to the next, applied many times."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.fitting import FitResult
from restpoint.equilibrium.gram import GramAccumulator
from restpoint.equilibrium.predictors import AffinePredictor
from restpoint.equilibrium.streaming import (
    FitProgress,
    FitSettings,
    Pair,
    Score,
    Stream,
    accumulate,
    blocks,
    floating,
    mean_scores,
    negative_squared_error,
    states_of,
)
from restpoint.errors import RestpointError

Outside = Literal["hold", "drop"]


@dataclass(frozen=True)
class ModeSettings:
    """How an operator between successive states is fitted."""

    dimensions: tuple[int, ...] = (8, 32, 128)
    """Dimensions m of the subspace, chosen from by the score on held-out text; cut to what the states have."""
    offset: bool = True
    """Whether the operator is affine; without, it is linear and the subspace that of uncentred states."""
    outside: Outside = "hold"
    """What becomes of the part of the state outside the subspace: held as it is, or dropped for the mean."""
    regularisation: float = 1e-6
    """Ridge on the operator, as a fraction of the mean variance in the subspace."""
    standardise: bool = True
    """Take principal directions of coordinates scaled to unit variance, so that massive activations do not fill it."""

    def __post_init__(self) -> None:
        if not self.dimensions or min(self.dimensions) < 1:
            raise RestpointError(f"dimensions is {self.dimensions}; give at least one positive number, such as 32")
        if self.outside not in ("hold", "drop"):
            raise RestpointError(f"outside is {self.outside!r}; use hold or drop")
        if not 0 <= self.regularisation < float("inf"):
            raise RestpointError(f"regularisation is {self.regularisation}; it must be finite and not negative")


@dataclass(frozen=True, eq=False)
class DynamicModes:
    """z = (x - mean) encoder, z' = z operator + drift, x ~ mean + z decoder: one step along depth in m coordinates.

    Paper:
        Schmid 2010, "Dynamic mode decomposition of numerical and experimental data"; Tu et al. 2014, "On dynamic mode
        decomposition: theory and applications", for pairs from many sequences; Hirsh et al. 2020, "Centering data
        improves the dynamic mode decomposition", for the affine term.
    """

    mean: Float64[Tensor, " hidden"]
    encoder: Float64[Tensor, "hidden modes"]
    decoder: Float64[Tensor, "modes hidden"]
    operator: Float64[Tensor, "modes modes"]
    drift: Float64[Tensor, " modes"]

    @property
    def spectral_radius(self) -> float:
        """The largest modulus of an eigenvalue: above 1 the states run away, below 1 they come to rest."""
        return float(torch.linalg.eigvals(self.operator).abs().max())

    def advance(self, steps: int, outside: Outside = "hold") -> AffineMap:
        """The map from a state to the one ``steps`` steps later: powers of an affine map are affine."""
        modes = self.drift.shape[0]
        step = torch.eye(modes + 1, dtype=self.operator.dtype, device=self.operator.device)
        step[:modes, :modes], step[modes, :modes] = self.operator, self.drift
        power = torch.linalg.matrix_power(step, steps)
        operator, drift = power[:modes, :modes], power[modes, :modes]
        if outside == "drop":
            matrix = self.encoder @ operator @ self.decoder
            return AffineMap(matrix, self.mean + drift @ self.decoder - self.mean @ matrix)
        identity = torch.eye(modes, dtype=operator.dtype, device=operator.device)
        change = self.encoder @ (operator - identity) @ self.decoder
        matrix = change + torch.eye(len(self.mean), dtype=change.dtype, device=change.device)
        return AffineMap(matrix, drift @ self.decoder - self.mean @ change)


def dynamic_modes(gram: GramAccumulator, dimension: int, settings: ModeSettings | None = None) -> DynamicModes:
    """The operator of the pairs (state, next state) whose second moments ``gram`` holds, by projected DMD.

    The subspace is that of the leading principal directions of the states; in its coordinates the operator minimises
    mean |z' - z operator - drift|² + ridge.

    Args:
        gram: second moments of the pairs.
        dimension: m; cut to what the states have.
        settings: defaults of `ModeSettings` if None; ``dimensions`` and ``outside`` are not used.

    Raises:
        RestpointError: the accumulator is empty, its pairs are not equally wide, or the states do not vary.
    """
    settings = settings or ModeSettings()
    if gram.inputs != gram.outputs:
        raise RestpointError(f"gram has pairs of {gram.inputs} and {gram.outputs} columns; a step keeps the width")
    moments = gram.moments()
    own, cross = moments.covariance_xx, moments.covariance_xy
    mean, change = moments.mean_x, moments.mean_y - moments.mean_x
    if not settings.offset:
        own, cross = own + mean.outer(mean), cross + mean.outer(moments.mean_y)
        mean, change = torch.zeros_like(mean), torch.zeros_like(change)
    variances = own.diagonal()
    if not float(variances.max()) > 0:
        raise RestpointError("gram holds states that do not vary; give more than one")
    scale = torch.ones_like(variances)
    if settings.standardise:
        scale = variances.clamp_min(1e-16 * variances.mean()).sqrt()
    values, vectors = torch.linalg.eigh(own / scale.outer(scale))
    rank = int((values > 1e-14 * len(values) * values[-1]).sum())
    kept = values.flip(0)[: min(dimension, rank)]
    basis = vectors.flip(1)[:, : len(kept)]
    encoder, decoder = basis / scale.unsqueeze(1), basis.T * scale
    operator = (encoder.T @ cross @ encoder) / (kept + settings.regularisation * kept.mean()).unsqueeze(1)
    return DynamicModes(mean, encoder, decoder, operator, change @ encoder)


@dataclass(frozen=True, eq=False)
class DynamicModePredictor(AffinePredictor):
    """rest(t) ~ K^n h_E(t): one step K along depth, fitted between successive states, n = L - E times.

    Folded into one affine map of h_E. Of all those, ridge regression on the rest state itself has the least squared
    error on the text it is fitted on, so this one can have the lesser error elsewhere only where ridge overfits; what
    it has over ridge is that the rest state is never read. It asks that all layers do the same, where ridge asks
    nothing, and an eigenvalue above 1 is raised to the power n.

    Paper:
        Schmid 2010; Tu et al. 2014; see `DynamicModes`.
    """

    kind: ClassVar[str] = "dmd"

    dimension: int = 0
    """m: of the subspace; 0 where it is not known."""
    spectral_radius: float = float("nan")
    """Of the operator K in the subspace."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As for every predictor; the config also holds the dimension and the spectral radius."""
        config, tensors = super().state()
        return config | {"dimension": self.dimension, "spectral_radius": self.spectral_radius}, tensors

    @classmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "DynamicModePredictor":
        affine = AffineMap(tensors["matrix"], tensors["offset"]).to()
        found = config["dimension"], config["spectral_radius"]
        return cls(tuple(config["state_layers"]), affine, *found, name=config["name"])


def fit_dynamic_modes(
    stream: Stream,
    held_out: Stream,
    layers: tuple[int, ...],
    steps: int,
    settings: FitSettings | None = None,
    *,
    exit_layer: int | None = None,
    modes: ModeSettings | None = None,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[DynamicModePredictor]:
    """Fit K on the pairs of successive layers, all together, by one pass, and choose its dimension on held-out text.

    Args:
        stream: starts a pass over the chunks to fit on; their rest states are not read.
        held_out: starts a pass over other chunks, on which the dimension is chosen.
        layers: ascending and evenly spaced; every one but the last goes with the next.
        steps: n: how many of these steps there are from the exit layer to the rest state.
        settings: defaults of `FitSettings` if None; only how rows are accumulated is used.
        exit_layer: E, that K is applied at; the last of ``layers`` if None. Others may come after it, to fit on.
        modes: how K is fitted; defaults of `ModeSettings` if None.
        score: what to maximise on held-out rows, for example acceptance computed with the model's head.
        progress: called after each block of rows.

    Returns:
        The predictor; ``strengths`` and ``chosen`` are dimensions.

    Raises:
        RestpointError: fewer than two layers or unevenly spaced ones, ``steps`` below 1, a stream without a row or with
            rows that are not finite, a layer missing from a chunk, or a score that is not finite.
    """
    settings, modes = settings or FitSettings(), modes or ModeSettings()
    if len(layers) < 2 or len({later - earlier for earlier, later in pairwise(layers)}) > 1:
        raise RestpointError(f"layers is {layers}; name at least two, each as far from the last")
    if steps < 1:
        raise RestpointError(f"steps is {steps}; it must be at least 1")
    at = layers[-1] if exit_layer is None else exit_layer

    def successive() -> Iterator[Pair]:
        for chunk in stream():
            states = states_of(chunk, layers).flatten(0, 1).unflatten(-1, (len(layers), -1))
            yield states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)

    def pairs() -> Iterator[Pair]:
        for chunk in held_out():
            yield states_of(chunk, (at,)).flatten(0, 1), floating(chunk.rest).flatten(0, 1)

    gram = accumulate(successive(), None, settings, 0, progress)
    fitted = [dynamic_modes(gram, dimension, modes) for dimension in modes.dimensions]
    maps: list[AffineMap] = []

    def ready(x: Tensor) -> list[AffineMap]:
        maps.extend(one.advance(steps, modes.outside).to(x.device, x.dtype) for one in fitted)
        return maps

    scores, rows = mean_scores(ready, blocks(pairs(), settings.chunk_rows), 0, score, progress)
    best = int(scores.argmax())
    chosen = fitted[best]
    found = len(chosen.drift), chosen.spectral_radius
    candidates = tuple(float(dimension) for dimension in modes.dimensions)
    counts = (gram.count,), (rows,)
    predictor = DynamicModePredictor((at,), maps[best], *found)
    return FitResult(predictor, candidates, (candidates[best],), scores.unsqueeze(0), *counts)
