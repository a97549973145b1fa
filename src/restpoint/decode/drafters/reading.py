"""A model of its own that reads along with a text and drafts on."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from restpoint.decode.drafters.walk import LayeredWalk
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

_ROOM = 64


class Reader:
    """A model that follows a text on its own cache: every token is read once, and drafted tokens that stood count.

    Each :meth:`start` is given the whole text. What its beginning has in common with what was read before stays in
    the cache, drafted nodes on its path are committed from where they were written, anything else is rolled back, and
    the missing tokens run in one pass with the pending one. So any text may follow any other.

    Past the model's context, only the text's end is read: the window begins at a multiple of half the context, so that
    it moves, and is read again, once in half a context.

    Args:
        layered: the model.
        context_length: the most positions that it takes; None for no limit.
        trees: whether it can see a tree of drafted tokens.

    Raises:
        RestpointError: the context is too short to draft in.
    """

    def __init__(self, layered: LayeredModel, context_length: int | None = None, trees: bool = True):
        if context_length is not None and context_length < 8:
            raise RestpointError(
                f"context_length={context_length} leaves no room to draft in; give at least 8, or None"
            )
        self.layered = layered
        self.context_length = context_length
        self._cache = layered.cache()
        self._walk = LayeredWalk(layered, lambda: self._cache, trees=trees)
        self._read: list[int] = []
        self._pending: int | None = None

    def start(self, tokens: Sequence[int]) -> Float[Tensor, "1 1 hidden"]:
        """Catch up with a text and return the state of its last token."""
        tokens = recent(tokens, self.context_length)
        self._catch_up(tokens)
        before = tokens[len(self._read) : -1]
        state = self._walk.start(tokens[-1], before)
        self._read.extend(before)
        self._pending = tokens[-1]
        return state

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "1 added hidden"]:
        """See :meth:`LayeredWalk.extend`."""
        return self._walk.extend(parents, tokens)

    def _catch_up(self, tokens: list[int]) -> None:
        """Keep what was read or drafted of this text, and forget the rest."""
        read = self._read
        common = _common(read, tokens[:-1])
        if common == len(read) < len(tokens) - 1 and tokens[common] == self._pending:
            nodes = self._walk.follow(tokens[common + 1 : -1])
            self._walk.keep(nodes)
            read.extend(tokens[common : common + 1 + len(nodes)])
        elif common < len(read):
            self._cache.commit([common - len(read)])
            del read[common:]


def recent(tokens: Sequence[int], context_length: int | None) -> list[int]:
    """The text's end that is read: all of it where a draft still fits behind it."""
    if context_length is None:
        return list(tokens)
    excess = len(tokens) + min(_ROOM, context_length // 4) - context_length
    step = context_length // 2
    return list(tokens[max(0, -(-excess // step)) * step :])


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(index for index in range(shorter) if one[index] != other[index])
