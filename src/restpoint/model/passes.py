"""One pass over a padded block, as a function of tensors whose shapes never change."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import MaskKind, Tree
from restpoint.model.tables import Tables


class StaticLayer:
    """What one layer is given as its cache: it writes at slots that are a tensor, and shows the whole capacity.

    Args:
        keys: of the layer, over the whole capacity.
        values: likewise.
        slots: the slots written.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Int[Tensor, "batch token"]):
        self.keys = keys
        self.values = values
        self.slots = slots

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if kept.shape[0] == 1:
                kept.index_copy_(2, self.slots[0], new)
            else:
                kept.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return self.keys, self.values


def storage(cache: SlotCache) -> list[Tensor]:
    """The tensors that a cache consists of: keys and values, layer by layer."""
    return [tensor for layer in cache.slot_layers for tensor in layer.stored]


class Pass:
    """One pass in three kinds of function: what comes before the layers, every layer, and what comes after them.

    Layers of the same code then share one compiled function, which compiles in a small part of the time that the whole
    depth takes.

    Args:
        layered: the model.
        tables: arguments of its layers.
        width: tokens in the block.
        capacity: slots in the cache.
    """

    def __init__(self, layered: LayeredModel, tables: Tables, width: int, capacity: int):
        self.layered = layered
        self.tables = tables
        self.slot = torch.arange(capacity, device=layered.device)
        self.block = torch.arange(width, device=layered.device)
        self.kinds: list[MaskKind] = list(dict.fromkeys(kind for kind in layered.mask_kinds if kind is not None))

    def opening(self, first: Tensor, base: Tensor, depths: Tensor, sees: Tensor) -> list[Tensor]:
        """State before the first layer, slots written, masks of every kind, and arguments looked up.

        Args:
            first: token ids; or h_0, where that depends on positions too.
            base: first slot of each row.
            depths: depth of each token in the block.
            sees: which tokens of the block each of them sees.
        """
        layered = self.layered
        masks = [
            _told(kind, _visible(kind.window, self.slot, base, depths, sees), layered.dtype) for kind in self.kinds
        ]
        positions = (base[:, None] + depths).clamp(max=self.tables.count - 1)
        state = first
        if layered.embedding_scale is not None:
            state = layered.embedding(first)
            state = state if layered.embedding_scale == 1 else state * layered.embedding_scale
        return [state, base[:, None] + self.block, *masks, *self.tables.look_up(positions)]

    def layer(self, index: int) -> Callable[..., Tensor]:
        """The function of one layer: of the state, what else :meth:`opening` gave, and the layer's keys and values."""
        kind = self.layered.mask_kinds[index]
        assert kind is not None
        place, count = self.kinds.index(kind), len(self.kinds)

        def run(state: Tensor, slots: Tensor, *rest: Tensor) -> Tensor:
            cache = StaticLayer(rest[-2], rest[-1], slots)
            keywords = self.tables.arguments(index, rest[count:-2], cache)
            output = self.layered.stack.layers[index](state, **{**keywords, "attention_mask": rest[place]})
            return output[0] if isinstance(output, tuple) else output

        return run

    def closing(self, state: Tensor) -> Tensor:
        """Logits of h_L."""
        return self.layered.logits(state)


def _visible(window: int | None, slot: Tensor, base: Tensor, depths: Tensor, sees: Tensor) -> Bool[Tensor, "b t s"]:
    """Which slots each token attends to: all before the block, of the block those it sees, all within the window."""
    width = depths.shape[1]
    offset = slot - base[:, None]
    inside = (offset >= 0) & (offset < width)
    node = offset.clamp(0, width - 1)
    seen = sees.gather(2, node[:, None].expand(-1, width, -1))
    visible = (offset < 0)[:, None] | (inside[:, None] & seen)
    if window is not None:
        position = torch.where(inside, base[:, None] + depths.gather(1, node), slot)
        visible = visible & (position[:, None] > (base[:, None] + depths)[..., None] - window)
    return visible


def _told(kind: MaskKind, visible: Bool[Tensor, "b t s"], dtype: torch.dtype) -> Tensor:
    shown = visible[:, None]
    if kind.convention == "visible":
        return shown
    if kind.convention == "hidden":
        return ~shown
    return torch.zeros(shown.shape, dtype=dtype, device=shown.device).masked_fill(~shown, torch.finfo(dtype).min)


def block_shape(
    tree: Tree | Sequence[Tree] | None, batch: int, count: int, width: int
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width width"]]:
    """Depth of each token of a padded block, and which tokens of the block each of them sees."""
    trees = [tree] * batch if tree is None or isinstance(tree, Tree) else list(tree)
    if len(trees) != batch or any(own is not None and len(own.parents) != count for own in trees):
        raise RestpointError(
            f"tree: give one tree of {count} nodes, as many as ids has columns, or one such tree per row"
        )
    shapes = [_row_shape(None if own is None else tuple(own.parents), width) for own in trees]
    depths, sees = zip(*shapes, strict=True)
    return torch.stack(depths), torch.stack(sees)


@functools.lru_cache(maxsize=1024)
def _row_shape(parents: tuple[int, ...] | None, width: int) -> tuple[Tensor, Tensor]:
    """A chain, or a tree whose padding sees itself only."""
    if parents is None:
        return torch.arange(width), torch.ones(width, width, dtype=torch.bool).tril()
    depths, sees = [], []
    for node in range(width):
        parent = parents[node] if node < len(parents) else -1
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        row = list(sees[parent]) if parent >= 0 else [False] * width
        row[node] = True
        sees.append(row)
    return torch.tensor(depths), torch.tensor(sees)
