"""Attention masks built per pass: who sees whom, with windows, ragged rows, trees and linear position biases."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True)
class Tree:
    """A draft tree, written in one pass.

    Attributes:
        parents: parent of each node, -1 for a root; a parent comes before its children.
    """

    parents: tuple[int, ...]

    def depths(self) -> list[int]:
        """Distance of each node from its root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestors(self) -> Bool[Tensor, "node node"]:
        """Entry (i, j) is true where node j is node i or one of its ancestors."""
        seen = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return torch.from_numpy(seen)


@dataclass(frozen=True)
class MaskKind:
    """What a layer expects as its attention mask, read off a mask that the model built itself.

    Attributes:
        convention: ``visible`` (true where attention may look), ``hidden`` (true where it may not) or ``additive``.
        window: number of positions, its own included, that a query sees; None for all before it.
        biased: the mask also carries a bias by position (ALiBi).
    """

    convention: Literal["visible", "hidden", "additive"]
    window: int | None
    biased: bool

    @classmethod
    def read(cls, mask: Tensor, past: int) -> "MaskKind":
        """Recognise the kind from a native mask of two queries after ``past`` earlier tokens.

        Raises:
            RestpointError: the visible slots are not the latest ones, so the pattern is neither causal nor a window.
        """
        first = mask[0, :, 0]
        if mask.dtype == torch.bool:
            convention = "visible" if bool(first[0, past]) else "hidden"
            visible = first[0] if convention == "visible" else ~first[0]
            biased = False
        else:
            convention = "additive"
            visible = first[0] > torch.finfo(mask.dtype).min / 2
            biased = bool((first[:, visible] != 0).any())
        count = int(visible.sum())
        if not bool(visible[past + 1 - count : past + 1].all()) or bool(visible[past + 1]):
            raise RestpointError("model: a layer's attention pattern is neither causal nor a sliding window")
        return cls(convention, None if count == past + 1 else count, biased)


@dataclass(frozen=True)
class Layout:
    """Where the queries of one pass lie.

    Attributes:
        slots: cache slot that each query is written to.
        positions: position of each query; equal to ``slots`` except inside a tree.
        length: number of slots shown to attention.
        uniform: all rows write the same consecutive slots.
        trees: for each row the tree that its queries are the last nodes of, if any; earlier nodes lie in the slots
            before.
    """

    slots: Int[Tensor, "batch query"]
    positions: Int[Tensor, "batch query"]
    length: int
    uniform: bool
    trees: tuple[Tree, ...] | None = None

    def slot_positions(self) -> Int[Tensor, "batch slot"]:
        """Position held by each slot: its own index, except where a tree lies."""
        indices = torch.arange(self.length, device=self.slots.device).repeat(self.slots.shape[0], 1)
        for row, (tree, root) in enumerate(self._rooted()):
            depths = torch.tensor(tree.depths(), device=indices.device)
            indices[row, root : root + len(tree.parents)] = root + depths
        return indices

    def _rooted(self) -> list[tuple[Tree, int]]:
        """Each row's tree and the slot of its first node; empty without trees."""
        if self.trees is None:
            return []
        ends = self.slots[:, -1].tolist()
        return [(tree, end + 1 - len(tree.parents)) for tree, end in zip(self.trees, ends, strict=True)]

    def visible(self, window: int | None) -> Bool[Tensor, "batch query slot"]:
        """Which slots each query attends to: causal, along a tree only ancestors, within the window."""
        indices = torch.arange(self.length, device=self.slots.device)
        if self.trees is None:
            visible = indices <= self.slots[..., None]
        else:
            queries = self.slots.shape[1]
            visible = torch.zeros(*self.slots.shape, self.length, dtype=torch.bool)
            for row, (tree, root) in enumerate(self._rooted()):
                visible[row, :, :root] = True
                visible[row, :, root : root + len(tree.parents)] = tree.ancestors()[-queries:]
            visible = visible.to(self.slots.device)
        if window is not None:
            visible = visible & (self.slot_positions()[:, None] > self.positions[..., None] - window)
        return visible

    def needs_mask(self, kind: MaskKind) -> bool:
        """False where attention's own causal rule (lower-right aligned) already says the same."""
        queries = self.slots.shape[1]
        if kind.convention != "visible" or self.trees is not None or not self.uniform:
            return True
        if kind.window is not None and self.length > kind.window:
            return True
        return queries > 1 and queries != self.length

    def mask(self, kind: MaskKind, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask that layers of this kind are given, of shape (batch, heads or 1, query, slot).

        Args:
            kind: what those layers expect.
            bias: for biased kinds, the bias of each position, shape (batch, heads, 1, slot).
            dtype: dtype of additive masks.
        """
        if not self.needs_mask(kind):
            return None
        visible = self.visible(kind.window)[:, None]
        if kind.convention == "visible":
            return visible
        if kind.convention == "hidden":
            return ~visible
        lowest = torch.finfo(dtype).min
        if bias is None:
            return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, lowest)
        return by_slot(bias, self.slot_positions()).masked_fill(~visible, lowest)


def by_slot(bias: Tensor, slot_positions: Int[Tensor, "batch slot"]) -> Tensor:
    """Reorder a per-position bias (batch, heads, 1, position) or (batch x heads, 1, position) by slot."""
    batch = slot_positions.shape[0]
    flat = bias.ndim == 3
    if flat:
        bias = bias.view(batch, -1, *bias.shape[1:])
    index = slot_positions[:, None, None].expand(-1, bias.shape[1], bias.shape[2], -1)
    gathered = bias.expand(batch, -1, -1, -1).gather(3, index)
    return gathered.flatten(0, 1) if flat else gathered
