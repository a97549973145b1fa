"""Layer arguments of the next positions, prepared in one prelude and sliced for each pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class _NotSliceableError(Exception):
    """An argument depends on more than the positions of its queries."""


@dataclass(frozen=True)
class Lookahead:
    """Arguments of every layer for the positions ``start .. start+count-1``.

    Attributes:
        start: first position prepared.
        count: number of positions prepared.
        prepared: keyword arguments of every layer over all of these positions.
        axes: for each layer and argument, the axis over queries, as found by :func:`query_axes`.
    """

    start: int
    count: int
    prepared: list[dict[str, Any]]
    axes: list[dict[str, Any]]

    def covers(self, positions: Sequence[int]) -> bool:
        """Whether these positions are prepared."""
        return self.start <= min(positions) and max(positions) < self.start + self.count

    def arguments(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The arguments of a pass over these positions; masks are left to the caller."""
        chosen: slice | list[int] = [position - self.start for position in positions]
        if isinstance(positions, range):
            chosen = slice(chosen[0], chosen[-1] + 1)
        sliced: dict[int, Any] = {}
        passes = []
        for keywords, axes in zip(self.prepared, self.axes, strict=True):
            own = dict(keywords)
            for name, axis in axes.items():
                value = keywords[name]
                if id(value) not in sliced:
                    sliced[id(value)] = _choose(value, axis, chosen)
                own[name] = sliced[id(value)]
            passes.append(own)
        return passes


def query_axes(
    first: list[dict[str, Any]], second: list[dict[str, Any]], counts: tuple[int, int], total: int
) -> list[dict[str, Any]] | None:
    """Find the axis of each layer argument that runs over queries, by comparing two preludes.

    Args:
        first: arguments of a prelude over ``counts[0]`` queries.
        second: arguments of a prelude over ``counts[1]`` queries, ending at the same position.
        counts: the two numbers of queries.
        total: number of slots shown in both; an argument with such an axis depends on the past and is not sliceable.

    Returns:
        For each layer the axes of the arguments that vary with the queries, or None where slicing would be wrong.
    """
    try:
        return [
            {
                name: axes
                for name in one
                if name != "attention_mask" and (axes := _axes(one[name], other.get(name), counts, total)) is not None
            }
            for one, other in zip(first, second, strict=True)
        ]
    except _NotSliceableError:
        return None


def rope_depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether the rotary tables of a position change with the length of the text."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {value.get("rope_type") for value in rope.values() if isinstance(value, dict)}
    return bool(kinds & _LENGTH_DEPENDENT_ROPE)


def _axes(one: Any, other: Any, counts: tuple[int, int], total: int) -> Any:
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim:
        if total in one.shape:
            raise _NotSliceableError
        varying = [axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]]
        if not varying:
            if not torch.equal(one, other):
                raise _NotSliceableError
            return None
        if len(varying) > 1 or (one.shape[varying[0]], other.shape[varying[0]]) != counts:
            raise _NotSliceableError
        return varying[0]
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        found = tuple(_axes(a, b, counts, total) for a, b in zip(one, other, strict=True))
        return None if all(axis is None for axis in found) else found
    if isinstance(one, Cache) and isinstance(other, Cache):
        return None
    if type(one) is not type(other) or (not callable(one) and one != other):
        raise _NotSliceableError
    return None


def _choose(value: Any, axis: Any, chosen: slice | list[int]) -> Any:
    """The chosen entries of a tensor, or of each in a tuple, along its axis: a view where they are consecutive."""
    if axis is None:
        return value
    if isinstance(value, Tensor):
        if isinstance(chosen, slice):
            return value.narrow(axis, chosen.start, chosen.stop - chosen.start)
        return value.index_select(axis, torch.tensor(chosen, device=value.device))
    return type(value)(_choose(item, own, chosen) for item, own in zip(value, axis, strict=True))
