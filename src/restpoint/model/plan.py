"""One pass, prepared: what its layers are given, and where they write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.model.cache import Address, SlotCache
from restpoint.model.masks import Layout


@dataclass(frozen=True)
class Plan:
    """One pass, prepared: any of its layers can be run, in any number of segments.

    Attributes:
        hidden: h_0 of the pass.
        arguments: keyword arguments of every layer.
        cache: where keys and values go, if anywhere.
        address: which slots are written and shown.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    arguments: list[dict[str, Any]]
    cache: SlotCache | None
    address: Address


def address_of(layout: Layout, rows: Sequence[int] | None) -> Address:
    """Where a pass laid out so writes: these rows of the cache take part, or all if None."""
    if rows is not None:
        return Address(layout.length, slots=layout.slots, rows=torch.tensor(list(rows), device=layout.slots.device))
    if layout.uniform:
        return Address(layout.length, start=layout.length - layout.slots.shape[1])
    return Address(layout.length, slots=layout.slots)
