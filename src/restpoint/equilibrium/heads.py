"""Heads for several tokens at once, fitted in closed form: the rest states of the next positions from one row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.fitting import FitResult
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
    negative_squared_error,
    states_of,
)
from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class MultiTokenHeads:
    """rest(t + j) ~ c_j + x A_j + relu(x R + b) B_j for j = 0 .. k-1, all from x = [states(t), rest(t-1)].

    Position t is that of the pending token: its embedding and the rest state before it are known before anything is
    drafted. Head j never sees the tokens between, so all k come out of one matrix product and there is no loop over
    drafted tokens; what it predicts is the mean over these tokens, and its law the blurrier the larger j is.

    Use them where a call costs more than the arithmetic in it (accelerators, interpreters), and to name siblings at
    every depth at once. Do not use them where one step of :class:`RestPointRecurrence` is cheap: that follows the
    drafted token, which is worth much more from the second position on. Head 0 is the recurrence's first map.

    Raises:
        RestpointError: ``state_layers`` does not ascend from 0 or more, or the map, the features and the number of
            positions do not fit together.

    Paper:
        Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (heads for
        later positions, trained); Wu et al. 2024, "Parallel Decoding via Hidden Transfer for Lossless Large Language
        Model Acceleration" (hidden states instead of laws); Gloeckle et al. 2024, "Better & Faster Large Language
        Models via Multi-token Prediction".
    """

    kind: ClassVar[str] = "heads"

    state_layers: tuple[int, ...]
    """The layers whose states of the pending token are read, ascending; (0,) reads its embedding and runs no layer."""
    positions: int
    """k: how many positions are predicted."""
    affine: AffineMap
    """From [x, features(x)] (or x alone) to the k rest states, side by side."""
    features: RandomFeatures | None = None
    """Shared by all heads; None for linear heads."""
    name: str = field(default="", kw_only=True)
    """How reports call it; made from the kind and the last layer read if empty."""

    def __post_init__(self) -> None:
        layers = self.state_layers
        if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise RestpointError(f"state_layers is {layers}; name at least one layer, ascending from 0, each once")
        inputs, outputs = self.affine.matrix.shape
        if self.positions < 1 or outputs % self.positions:
            raise RestpointError(
                f"positions is {self.positions}, which does not divide the map's {outputs} outputs; "
                "give one rest state for each position"
            )
        if self.features is not None and sum(self.features.weight.shape) != inputs:
            raise RestpointError(
                f"affine takes {inputs} inputs but features give {tuple(self.features.weight.shape)} inputs and "
                "features; fit the map on [x, features(x)]"
            )
        if not self.name:
            object.__setattr__(self, "name", f"{self.kind}@{layers[-1]}")

    def predict(
        self, states: Sequence[Float[Tensor, "*batch hidden"]], rest: Float[Tensor, "*batch rest"]
    ) -> Float[Tensor, "*batch positions rest"]:
        """Predict the rest states of the pending token's position and of the ones after it.

        Args:
            states: the pending token's, after ``state_layers``, in that order.
            rest: the model's own rest state of the position before.

        Raises:
            RestpointError: states and rest are not as wide as what the heads were fitted on.
        """
        x = torch.cat((*states, rest), -1)
        wanted = self.affine.matrix.shape[0] if self.features is None else self.features.weight.shape[0]
        if x.shape[-1] != wanted:
            raise RestpointError(
                f"states and rest have {x.shape[-1]} entries together but {self.name} reads {wanted}; pass the states "
                f"after layers {self.state_layers} of the model that it was fitted to, and one rest state"
            )
        if self.features is not None:
            x = torch.cat((x, self.features(x)), -1)
        return self.affine(x).unflatten(-1, (self.positions, -1))

    def parameters_read(self) -> int:
        """Multiply-adds of one call on one row, for cost reports."""
        return self.affine.multiplications + (0 if self.features is None else self.features.multiplications)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MultiTokenHeads":
        """A copy on that device and in that dtype."""
        features = None if self.features is None else self.features.to(device, dtype)
        return replace(self, affine=self.affine.to(device, dtype), features=features)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-able config and contiguous tensors for safetensors; `from_state` reads them."""
        config = {
            "kind": self.kind,
            "name": self.name,
            "state_layers": list(self.state_layers),
            "positions": self.positions,
            "features": 0 if self.features is None else self.features.bias.shape[0],
        }
        tensors = {"matrix": self.affine.matrix, "offset": self.affine.offset}
        if self.features is not None:
            tensors |= {"features.weight": self.features.weight, "features.bias": self.features.bias}
        return config, {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "MultiTokenHeads":
        """The heads that `state` described.

        Raises:
            RestpointError: the state is of another kind, or an entry is missing.
        """
        if config.get("kind") != MultiTokenHeads.kind:
            raise RestpointError(
                f"kind is {config.get('kind')!r}, not {MultiTokenHeads.kind!r}; read it with Predictor.from_state"
            )
        try:
            features = None
            if config["features"]:
                features = RandomFeatures(tensors["features.weight"], tensors["features.bias"]).to()
            affine = AffineMap(tensors["matrix"], tensors["offset"]).to()
            layers = tuple(config["state_layers"])
            return MultiTokenHeads(layers, config["positions"], affine, features, name=config["name"])
        except KeyError as error:
            raise RestpointError(
                f"the state of heads lacks {error.args[0]!r}; pass both halves of state() unchanged"
            ) from error


def fit_heads(
    stream: Stream,
    held_out: Stream,
    state_layers: tuple[int, ...] = (0,),
    settings: FitSettings | None = None,
    *,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[MultiTokenHeads]:
    """Fit all heads by ridge regression: one pass over either stream, one system for all of them.

    The inputs [states(t), rest(t-1)] are the same for every head, so the Gram matrix and its factorisation are shared
    and each further head adds only columns to the right-hand side. Each takes the strength that serves it best on
    held-out text: the later the position, the less can be known and the stronger the penalty should be.

    Args:
        stream: starts a pass over the chunks to fit on.
        held_out: starts a pass over other chunks, on which the strengths are chosen.
        state_layers: the layers to read, ascending; (0,) runs no layer.
        settings: defaults of `FitSettings` if None; ``steps`` is the number of heads k.
        score: what to maximise on held-out rows, for example acceptance computed with the model's head.
        progress: called after each block of rows; its ``step`` is that of the last head.

    Returns:
        The heads; ``scores`` has a row for each of them.

    Raises:
        RestpointError: a stream has no sequence longer than ``steps`` or rows that are not finite, a layer is
            missing from a chunk, or a score is not finite.

    Paper:
        Hoerl, Kennard 1970 (ridge); see `MultiTokenHeads` for the heads.
    """
    settings = settings or FitSettings()

    def pairs(of: Stream) -> Iterator[Pair]:
        for chunk in of():
            yield _pairs(chunk, state_layers, settings.steps)

    features = draw_features(pairs(stream), settings) if settings.features else None
    gram = accumulate(pairs(stream), features, settings, settings.steps - 1, progress)
    candidates = solve_ridge_path(gram, settings.strengths, standardise=settings.standardise)
    totals = torch.zeros(settings.steps, len(candidates), dtype=torch.float64)
    rows, ready = 0, candidates
    for x, y in blocks(pairs(held_out), settings.chunk_rows):
        if not rows:
            ready = tuple(candidate.to(x.device, x.dtype) for candidate in candidates)
        inputs, true = lift(x, features), y.unflatten(-1, (settings.steps, -1))
        for index, candidate in enumerate(ready):
            predicted = candidate(inputs).unflatten(-1, (settings.steps, -1))
            for position in range(settings.steps):
                totals[position, index] += _total(score, predicted[:, position], true[:, position])
        rows += x.shape[0]
        if progress is not None:
            progress(FitProgress("score", settings.steps - 1, rows))
    if not rows:
        raise RestpointError(f"held_out gave no row; pass sequences longer than {settings.steps} tokens")
    scores = totals / rows
    if not bool(scores.isfinite().all()):
        raise RestpointError(f"the held-out scores are not finite: {scores.tolist()}; check held_out and score")
    best = scores.argmax(1).tolist()
    heads = MultiTokenHeads(state_layers, settings.steps, _side_by_side(ready, best), features)
    chosen = tuple(settings.strengths[index] for index in best)
    counts = (gram.count,) * settings.steps, (rows,) * settings.steps
    return FitResult(heads, settings.strengths, chosen, scores, *counts)


def _pairs(chunk: Chunk, state_layers: tuple[int, ...], positions: int) -> Pair:
    """[states(t), rest(t-1)] and [rest(t), .., rest(t+k-1)] for every t that has them all."""
    states, rest = states_of(chunk, state_layers), floating(chunk.rest)
    count = max(0, rest.shape[1] - positions)
    x = torch.cat((states[:, 1 : count + 1], rest[:, :count]), -1)
    y = torch.cat([rest[:, first : first + count] for first in range(1, positions + 1)], -1)
    return x.flatten(0, 1), y.flatten(0, 1)


def _total(score: Score, predicted: Tensor, true: Tensor) -> float:
    values = score(predicted, true)
    if values.shape != predicted.shape[:1]:
        raise RestpointError(f"score gave {tuple(values.shape)}; return one number for each of {len(predicted)} rows")
    return float(values.sum(dtype=torch.float64))


def _side_by_side(candidates: Sequence[AffineMap], best: Sequence[int]) -> AffineMap:
    """The chosen candidate's columns for each position."""
    width = candidates[0].offset.shape[0] // len(best)
    columns = [slice(position * width, (position + 1) * width) for position in range(len(best))]
    chosen = [(candidates[index], column) for index, column in zip(best, columns, strict=True)]
    matrix = torch.cat([candidate.matrix[:, column] for candidate, column in chosen], 1)
    return AffineMap(matrix, torch.cat([candidate.offset[column] for candidate, column in chosen])).to()
