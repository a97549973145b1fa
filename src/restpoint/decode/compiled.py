"""The target in compiled passes: the same loop, fewer instructions."""

from collections.abc import Sequence

from restpoint.decode.draft import Draft
from restpoint.decode.target import LayeredTarget, Scored, tree_of
from restpoint.model.cache import SlotCache
from restpoint.model.compiled import CompiledModel


class CompiledTarget(LayeredTarget):
    """Verifies in the passes of a :class:`CompiledModel`; prompts, and layers that drafters run, are run one by one.

    A pass runs all layers, also those that a draft has run already.

    Args:
        compiled: the compiled model.
    """

    def __init__(self, compiled: CompiledModel):
        self.compiled = compiled
        self.widths = compiled.widths
        super().__init__(compiled.layered)

    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """See :meth:`Target.score`."""
        (token,), (draft,) = pending, drafts
        ids = self._ids([[token, *draft.tokens]])
        tree = None if draft.is_chain else tree_of(draft, ids.shape[1])
        logits, states = self.compiled.score(ids, self.cache, tree)
        return [Scored(logits[0], states)]

    def _new_cache(self, rows: int, longest: int) -> SlotCache:
        cache = self.compiled.cache(rows)
        cache.reserve(longest)
        return cache
