"""The rest-point recurrence, carried on by gradient descent on the divergence between the laws along its drafts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.descent import (
    Head,
    RefineProgress,
    RefineResult,
    RefineSettings,
    Scales,
    descend,
    divergence,
    shuffled,
)
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.predictors import RestPointRecurrence
from restpoint.equilibrium.streaming import Pair, Stream, floating, lift, states_of
from restpoint.errors import RestpointError

_BEYOND = 1
"""Drafted positions beyond the last map that are refined too: it reads its own predictions there."""


def refine_recurrence(
    predictor: RestPointRecurrence,
    stream: Stream,
    held_out: Stream,
    head: Head,
    settings: RefineSettings | None = None,
    *,
    progress: Callable[[RefineProgress], None] | None = None,
) -> RefineResult[RestPointRecurrence]:
    """Minimise the mean KL(softmax head(rest(t + j)) | softmax head(f_j)) along drafts, over all maps and features.

    A draft of J tokens is a chain: f_1 reads the true rest state before it, f_j the prediction f_{j-1}, and the
    gradient flows through the chain. J is one more than there are maps. Random features are where it starts; their
    weights are refined with the maps. What a draft costs stays the same.

    The closed form minimises squared errors of states, all directions alike. A law reads some directions more than
    others, so the same number of multiplications can draft much better. Take `fit_recurrence` first.

    Args:
        predictor: a recurrence in the chunks' dtype.
        stream: starts a pass over the chunks to refine on; passes follow each other until the steps are done.
        held_out: starts a pass over other chunks, which decide when to stop and which predictor is returned.
        head: the model's own, over as many tokens as are drafted; its parameters get no gradient.
        settings: defaults of `RefineSettings` if None; ``rows`` counts drafted positions.
        progress: called after each look.

    Raises:
        RestpointError: a stream has no sequence longer than a chain, a layer is missing from a chunk, or the divergence
            is not finite.

    Paper:
        The recurrence is restpoint's. Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the
        Tuned Lens" (the divergence); Zhang et al. 2024, "Learning Harmonized Representations for Speculative Sampling"
        (training along the draft's own predictions).
    """
    settings = settings or RefineSettings()
    length = len(predictor.maps) + _BEYOND
    features = predictor.features
    into_maps, into_features = _scales(predictor, stream, settings.buffer_rows)

    def changed(changes: Sequence[Tensor]) -> RestPointRecurrence:
        pairs = list(zip(changes[::2], changes[1::2], strict=True))
        lifted = features
        if features is not None:
            weighted = into_features.apply(AffineMap(features.weight, features.bias), *pairs.pop())
            lifted = RandomFeatures(weighted.matrix, weighted.offset).to()
        maps = (into_maps.apply(given, *pair).to() for given, pair in zip(predictor.maps, pairs, strict=True))
        return replace(predictor, maps=tuple(maps), features=lifted)

    shapes = [tensor for given in predictor.maps for tensor in (given.matrix, given.offset)]
    if features is not None:
        shapes += [features.weight, features.bias]

    def drafted(current: RestPointRecurrence, draft: "_Draft") -> Tensor:
        previous, found = draft.rest[:, 0], []
        for step in range(length):
            previous = current.predict([draft.states[:, step]], previous, step)
            found.append(previous)
        return divergence(head, torch.cat(found), draft.rest[:, 1:].transpose(0, 1).flatten(0, 1))

    def kept_aside() -> Iterator[_Draft]:
        for buffer in _buffers(held_out, predictor.state_layers, length, settings.buffer_rows):
            yield from (buffer.drafts(part, length) for part in buffer.starts.split(_drafts(settings, length)))

    return descend(
        predictor,
        [torch.zeros_like(tensor, dtype=into_maps.dtype) for tensor in shapes],
        changed,
        _batches(stream, predictor.state_layers, length, settings),
        kept_aside,
        drafted,
        settings,
        progress,
    )


@dataclass(frozen=True, eq=False)
class _Draft:
    """Stretches of neighbouring positions: the states of all but the first one, and the rest states of all."""

    states: Float[Tensor, "rows length inputs"]
    rest: Float[Tensor, "rows positions rest"]


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Positions of several sequences one after another, and those after which a whole draft has room."""

    states: Float[Tensor, "positions inputs"]
    rest: Float[Tensor, "positions rest"]
    starts: Int[Tensor, " drafts"]

    def drafts(self, starts: Int[Tensor, " rows"], length: int) -> _Draft:
        places = starts[:, None] + torch.arange(length + 1, device=starts.device)
        return _Draft(self.states[places[:, 1:]], self.rest[places])


def _drafts(settings: RefineSettings, length: int) -> int:
    """Drafts in a gradient step."""
    return max(1, settings.rows // length)


def _buffers(stream: Stream, layers: tuple[int, ...], length: int, rows: int) -> Iterator[_Buffer]:
    """The chunks, about ``rows`` positions at a time."""
    states: list[Tensor] = []
    rests: list[Tensor] = []
    starts: list[Tensor] = []
    count = 0

    def full() -> _Buffer:
        return _Buffer(torch.cat(states), torch.cat(rests), torch.cat(starts))

    for chunk in stream():
        rest = floating(chunk.rest)
        places = torch.arange(rest.shape[0] * rest.shape[1], device=rest.device).view(rest.shape[:2]) + count
        states.append(states_of(chunk, layers).flatten(0, 1))
        rests.append(rest.flatten(0, 1))
        starts.append(places[:, : max(0, rest.shape[1] - length)].flatten())
        count += rest.shape[0] * rest.shape[1]
        if count >= rows:
            yield full()
            states, rests, starts, count = [], [], [], 0
    if count:
        yield full()


def _batches(stream: Stream, layers: tuple[int, ...], length: int, settings: RefineSettings) -> Iterator[_Draft]:
    """Drafts from pass after pass, shuffled within buffers."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        rows = 0
        for buffer in _buffers(stream, layers, length, settings.buffer_rows):
            rows += len(buffer.starts)
            if len(buffer.starts):
                for part in shuffled(len(buffer.starts), _drafts(settings, length), generator):
                    yield buffer.drafts(buffer.starts[part.to(buffer.starts.device)], length)
        if not rows:
            raise RestpointError(f"the stream gave no row; pass sequences longer than {length} tokens")


def _scales(predictor: RestPointRecurrence, stream: Stream, rows: int) -> tuple[Scales, Scales]:
    """Of what the maps read and predict, and of what the features read and are, on the first rows of the stream."""
    buffer = next(_buffers(stream, predictor.state_layers, 1, rows), None)
    pair: Pair | None = None
    if buffer is not None and len(buffer.starts):
        first = buffer.drafts(buffer.starts, 1)
        pair = torch.cat((first.states[:, 0], first.rest[:, 0]), -1), first.rest[:, 1]
    into_maps = Scales.of(None if pair is None else (lift(pair[0], predictor.features), pair[1]))
    if pair is None or predictor.features is None:
        return into_maps, into_maps
    read = Scales.of((pair[0], pair[0]))
    return into_maps, replace(read, deviation=torch.ones_like(predictor.features.bias))  # features' own scale
