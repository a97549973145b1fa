"""Drafts copied from the text itself: what followed the last tokens where they stood before."""

from restpoint.decode.control import Controller
from restpoint.decode.draft import Draft, Drafter, TokenPath

LONGEST_MATCH = 16
MATCH_EDGES = tuple((length + 0.5) / LONGEST_MATCH for length in (2, 3, 4, 6, 9, 15))
"""Edges of calibration bins, on the scale of :func:`match_confidences`."""

_SHORTEST_MATCH = 2
_CANDIDATES = 16


class SuffixIndex:
    """Where each pair of tokens stood in a text, so that the longest earlier match of its end is found at once."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: list[int]) -> None:
        """Add the tokens that a text has gained."""
        for token in tokens[len(self.tokens) :]:
            if len(self.tokens) >= _SHORTEST_MATCH:
                key = tuple(self.tokens[-_SHORTEST_MATCH:])
                self._ends.setdefault(key, []).append(len(self.tokens))
            self.tokens.append(token)

    def longest(self, limit: int) -> tuple[list[int], int]:
        """What followed the longest earlier match of the text's end, and how many tokens matched.

        The latest of equally long matches counts. Where the match reaches into the end, what is copied repeats itself.

        Args:
            limit: largest number of tokens to return.
        """
        tokens = self.tokens
        best_start, best_length = 0, 0
        ends = self._ends.get(tuple(tokens[-_SHORTEST_MATCH:]), [])
        for start in reversed(ends[-_CANDIDATES:]):
            length = _SHORTEST_MATCH
            while length < min(LONGEST_MATCH, start) and tokens[start - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > best_length:
                best_start, best_length = start, length
        if best_length == 0:
            return [], 0
        period = len(tokens) - best_start
        return [tokens[best_start + index % period] for index in range(limit)], best_length


def match_confidences(length: int, count: int) -> list[float]:
    """Confidence of each copied token: the match that it has if all before it stand, as a share of the longest."""
    return [min(length + index, LONGEST_MATCH) / LONGEST_MATCH for index in range(count)]


class LookupDrafter(Drafter):
    """Copies what followed the longest earlier occurrence of the text's last tokens. Costs next to nothing.

    Args:
        controller: how many tokens to draft.

    Paper:
        Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference".
    """

    def __init__(self, controller: Controller):
        self.controller = controller
        self.index = SuffixIndex()

    def prospect(self, path: TokenPath, room: int) -> tuple[list[int], list[float]]:
        """Tokens that could be drafted, and their confidences."""
        self.index.extend(path.tokens)
        tokens, length = self.index.longest(min(room, self.controller.longest))
        return tokens, match_confidences(length, len(tokens))

    def propose(self, path: TokenPath, room: int) -> Draft:
        """See :meth:`Drafter.propose`."""
        tokens, confidences = self.prospect(path, room)
        count = self.controller.best_length(confidences, room)
        return Draft(tokens[:count], None, confidences[:count])

    def observe(self, draft: Draft, accepted: int) -> None:
        """See :meth:`Drafter.observe`."""
        self.controller.observe(draft.confidences, accepted, len(draft.tokens))
