"""Layer arguments of every position, as tables that a pass of fixed shape looks its own positions up in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.model.lookahead import rope_depends_on_length


@dataclass(frozen=True)
class Tables:
    """Arguments of every layer over the positions ``0 .. count-1``, from the model's own code.

    Attributes:
        count: number of positions.
        prepared: keyword arguments of every layer over all of these positions.
        axes: for each layer and argument, the axis over positions (see :func:`restpoint.model.lookahead.query_axes`).
    """

    count: int
    prepared: list[dict[str, Any]]
    axes: list[dict[str, Any]]

    @classmethod
    @torch.no_grad()
    def read(cls, layered: LayeredModel, count: int) -> "Tables":
        """Run the model's prelude over ``count`` positions, after finding out which arguments follow them.

        Raises:
            RestpointError: an argument depends on more than the position of its token.
        """
        _refuse(layered)
        axes = layered.argument_axes()
        if axes is None:
            raise _refusal(layered, "its layers are given more than depends on the position of each token")
        return cls(count, layered.prelude_at(0, count).arguments, axes)

    def look_up(self, positions: Int[Tensor, "batch token"]) -> list[Tensor]:
        """What the layers are given for tokens at these positions, each tensor once."""
        found = []
        for value, axes in self._distinct():
            found.extend(_tensors(_take(value, axes, positions), axes))
        return found

    def arguments(self, layer: int, looked_up: Sequence[Tensor], cache: Any) -> dict[str, Any]:
        """The arguments of one layer; masks are left to the caller.

        Args:
            layer: its index.
            looked_up: from :meth:`look_up`.
            cache: what the layer is given as its cache.
        """
        rest = iter(looked_up)
        placed = {id(value): _put(value, axes, rest) for value, axes in self._distinct()}
        keywords = {}
        for name, value in self.prepared[layer].items():
            keywords[name] = cache if isinstance(value, Cache) else value
            if name in self.axes[layer]:
                keywords[name] = placed[id(value)]
        return keywords

    def _distinct(self) -> list[tuple[Any, Any]]:
        """Arguments that follow the positions, with their axes, each once."""
        found: dict[int, tuple[Any, Any]] = {}
        for keywords, axes in zip(self.prepared, self.axes, strict=True):
            for name, own in axes.items():
                found.setdefault(id(keywords[name]), (keywords[name], own))
        return list(found.values())


def _refuse(layered: LayeredModel) -> None:
    """What no table can hold."""
    if rope_depends_on_length(layered.config):
        raise _refusal(layered, "its rotary tables change with the length of the text")
    if any(kind is None for kind in layered.mask_kinds):
        raise _refusal(layered, "its layers take no attention mask")
    if any(kind is not None and kind.biased for kind in layered.mask_kinds):
        raise _refusal(layered, "its attention is biased by distance (ALiBi)")
    if not layered.stack.takes_positions:
        raise _refusal(layered, "it cannot be told the positions of its tokens")


def _refusal(layered: LayeredModel, reason: str) -> RestpointError:
    return RestpointError(
        f"compile: {layered.config.model_type} cannot be compiled, because {reason}: leave compile out"
    )


def _take(value: Any, axis: Any, positions: Tensor) -> Any:
    if axis is None:
        return value
    if isinstance(value, Tensor):
        if value.ndim == 1:
            return value[positions[0]]
        return value[0].movedim(axis - 1, 0)[positions].movedim(1, axis)
    return type(value)(_take(item, own, positions) for item, own in zip(value, axis, strict=True))


def _tensors(value: Any, axis: Any) -> Iterator[Tensor]:
    """The tensors in a nested argument that follow the positions."""
    if isinstance(value, Tensor):
        if axis is not None:
            yield value
    elif axis is not None:
        for item, own in zip(value, axis, strict=True):
            yield from _tensors(item, own)


def _put(value: Any, axis: Any, rest: Iterator[Tensor]) -> Any:
    """The nested argument again, with the next of ``rest`` wherever a tensor follows the positions."""
    if axis is None:
        return value
    if isinstance(value, Tensor):
        return next(rest)
    return type(value)(_put(item, own, rest) for item, own in zip(value, axis, strict=True))
