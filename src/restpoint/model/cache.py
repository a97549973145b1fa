"""The key-value cache that makes rollback free: in every row, a token's slot is its position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Address:
    """Where a pass writes its keys and values, and how many slots its queries are shown.

    Attributes:
        length: slots ``0 .. length-1`` are handed to attention; the mask says which of them each query sees.
        start: first of the consecutive slots written by every row, or None where rows or nodes scatter.
        slots: the slots written, one per row and query, where ``start`` is None.
        rows: the rows of the cache that take part, where ``start`` is None; all if None.
    """

    length: int
    start: int | None = None
    slots: Int[Tensor, "batch query"] | None = None
    rows: Int[Tensor, " batch"] | None = None


class KeysWrittenError(Exception):
    """A layer has written its keys and values, and was asked for no more."""


class SlotLayer(CacheLayerMixin):
    """One layer's preallocated keys and values, shape (batch, heads, capacity, head size)."""

    is_sliding = False

    def __init__(self, owner: "SlotCache"):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on first use, when head count, head sizes, dtype and device are known."""
        batch, capacity = key_states.shape[0], self.owner.capacity
        self.keys = key_states.new_zeros(batch, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(batch, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write at the current address and return the slots that attention may be shown."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(key_states, value_states)
        if self.owner.only_write:
            raise KeysWrittenError
        keys, values = self.stored
        address = self.owner.address
        if address.rows is not None:
            rows = address.rows.to(keys.device)
            keys, values = (kept.narrow(2, 0, address.length).index_select(0, rows) for kept in (keys, values))
        return keys.narrow(2, 0, address.length), values.narrow(2, 0, address.length)

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        keys, values = self.stored
        address = self.owner.address
        if address.start is not None:
            keys.narrow(2, address.start, key_states.shape[2]).copy_(key_states)
            values.narrow(2, address.start, value_states.shape[2]).copy_(value_states)
        else:
            slots = address.slots
            assert slots is not None
            slots = slots.to(key_states.device)
            rows = torch.arange(key_states.shape[0], device=key_states.device)
            if address.rows is not None:
                rows = address.rows.to(key_states.device)
            keys[rows[:, None], :, slots] = key_states.transpose(1, 2)
            values[rows[:, None], :, slots] = value_states.transpose(1, 2)

    def written(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the slots of the current address, as they were last written."""
        keys, values = self.stored
        address = self.owner.address
        if address.start is not None:
            count = address.length - address.start
            return keys.narrow(2, address.start, count), values.narrow(2, address.start, count)
        slots = address.slots
        assert slots is not None
        slots = slots.to(keys.device)
        rows = torch.arange(slots.shape[0]) if address.rows is None else address.rows
        rows = rows.to(keys.device)[:, None]
        return keys[rows, :, slots].transpose(1, 2), values[rows, :, slots].transpose(1, 2)

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values over the whole capacity."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def grow(self, capacity: int) -> None:
        """Enlarge to ``capacity`` slots, keeping what is written."""
        if not self.is_initialized:
            return
        keys, values = self.stored
        self.keys, self.values = (
            torch.nn.functional.pad(kept, (0, 0, 0, capacity - kept.shape[2])) for kept in (keys, values)
        )

    def move(self, row: int, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` of one row to slots ``target``."""
        if self.is_initialized:
            for kept in self.stored:
                kept[row, :, target.to(kept.device)] = kept[row, :, source.to(kept.device)]

    def retain(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self.is_initialized:
            self.keys, self.values = (kept.index_select(0, rows.to(kept.device)) for kept in self.stored)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes that a model asks for when it builds a mask of its own."""
        return self.owner.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Slots filled before the pass that is being planned."""
        return self.owner.seen

    def get_max_length(self) -> int:
        """No maximum: capacity grows by doubling."""
        return -1


class SlotCache(Cache):
    """A ``transformers`` cache whose slot is the position, separately for each row.

    Rejecting drafted tokens costs nothing: a row's length is not advanced and later writes land on the stale slots.
    The nodes of a tree go to consecutive slots with their depths as positions; :meth:`keep` then moves only the
    accepted path. Rows of different lengths need no compaction.

    Args:
        depth: number of layers.
        batch: number of rows.
        capacity: slots allocated at first; doubles when exceeded.
    """

    def __init__(self, depth: int, batch: int = 1, capacity: int = 256):
        self.slot_layers = [SlotLayer(self) for _ in range(depth)]
        super().__init__(layers=list(self.slot_layers))
        self.batch = batch
        self.capacity = capacity
        self.lengths = [0] * batch
        self.address = Address(length=0, start=0)
        self.seen = 0
        self.only_write = False
        self.lookahead: Any = None

    @classmethod
    def join(cls, caches: "Sequence[SlotCache]") -> "SlotCache":
        """One cache of all rows of several that have the same capacity and have been written to."""
        first = caches[0]
        joined = cls(len(first.slot_layers), sum(cache.batch for cache in caches), first.capacity)
        joined.lengths = [length for cache in caches for length in cache.lengths]
        joined.seen = max(cache.seen for cache in caches)
        for index, layer in enumerate(joined.slot_layers):
            if not first.slot_layers[index].is_initialized:
                continue  # a layer that no token runs
            sides = zip(*(cache.slot_layers[index].stored for cache in caches), strict=True)
            layer.keys, layer.values = (torch.cat(side) for side in sides)
            layer.is_initialized = True
        return joined

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values; see :meth:`SlotLayer.update`."""
        return self.slot_layers[layer_idx].update(key_states, value_states)

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        if slots > self.capacity:
            self.capacity = max(slots, 2 * self.capacity)
            for layer in self.slot_layers:
                layer.grow(self.capacity)

    def commit(self, counts: list[int]) -> None:
        """Advance each row by the number of its newly written tokens that are kept."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, row: int, nodes: list[int]) -> None:
        """Keep the accepted path of a tree whose nodes were written after ``row``'s length, and commit it."""
        base = self.lengths[row]
        moved = [(base + node, base + depth) for depth, node in enumerate(nodes) if node != depth]
        if moved:
            source, target = (torch.tensor(side) for side in zip(*moved, strict=True))
            for layer in self.slot_layers:
                layer.move(row, source, target)
        self.lengths[row] = base + len(nodes)

    def retain(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        chosen = torch.tensor(list(rows))
        for layer in self.slot_layers:
            layer.retain(chosen)
        self.lengths = [self.lengths[row] for row in rows]
        self.batch = len(rows)
        self.lookahead = None
