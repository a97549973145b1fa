"""The instant drafters that need nothing but the text and the target's logits, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from restpoint.decode.draft import InstantDrafter
from restpoint.decode.drafters.lookahead import LookaheadDrafter
from restpoint.decode.drafters.lookup import LookupDrafter
from restpoint.decode.drafters.ngrams import NgramDrafter, NgramTables
from restpoint.decode.drafters.recycling import RecyclingDrafter, RecyclingMemory


@dataclass(frozen=True)
class Table:
    """How to make one kind of drafter.

    Attributes:
        make: from the vocabulary size and a memory to keep between texts; None for a memory of its own.
        memory: makes such a memory; None where everything belongs to one text.
    """

    make: Callable[[int, Any], InstantDrafter]
    memory: Callable[[int], Any] = lambda _vocabulary: None


TABLES: Mapping[str, Table] = {
    "lookup": Table(lambda _vocabulary, _memory: LookupDrafter()),
    "recycling": Table(lambda vocabulary, memory: RecyclingDrafter(vocabulary, shared=memory), RecyclingMemory),
    "ngrams": Table(lambda _vocabulary, memory: NgramDrafter(shared=memory), lambda _vocabulary: NgramTables()),
    "lookahead": Table(lambda _vocabulary, _memory: LookaheadDrafter()),
}
