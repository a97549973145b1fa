"""Drafts copied from the text itself: what followed the last tokens where they stood before."""

from collections.abc import Iterator, Sequence
from heapq import nlargest
from typing import ClassVar, NamedTuple

from restpoint.decode.draft import ROOT, Candidates, InstantDrafter, TokenPath

LONGEST_MATCH = 16
"""Longer matches are as good as this one."""

MATCH_EDGES = tuple((length + 0.5) / LONGEST_MATCH for length in (1, 2, 5, 8, 15))
"""Edges of calibration bins, on the scale of :func:`match_confidences`."""

_LINKS = 24
_CONTEXTS = 3
_EARLY = 3
_BRANCHES = 2
_BRANCH_LENGTH = 8


class Continuation(NamedTuple):
    """A token that followed some suffix of the text.

    Attributes:
        token: the token.
        match: length of that suffix.
        share: of the suffix's occurrences before the text's end, how many the token followed.
        latest: how many tokens the text had when it last did.
    """

    token: int
    match: int
    share: float
    latest: int


class SuffixIndex:
    """A suffix automaton: every distinct piece of a text, so that the longest earlier match of its end is known.

    A state stands for the pieces that end at the same places. Appending a token takes amortised O(1), plus a walk that
    notes the new end in the states of all suffixes; it is cut after 24 of these, so in a text that goes round in
    circles very short suffixes may count fewer occurrences than there are, and not the latest.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._latest = [0]
        self._count = [0]
        self._last = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the tokens that a text has gained.

        Args:
            tokens: the whole text.
        """
        for token in tokens[len(self.tokens) :]:
            self._note_end()
            self._append(token)
            self.tokens.append(token)

    def longest(self, limit: int) -> tuple[list[int], int]:
        """What followed the longest earlier match of the text's end, and how many tokens matched.

        The latest of equally long matches counts. Where the match reaches into the end, what is copied repeats itself.

        Args:
            limit: largest number of tokens to return.
        """
        state = self._link[self._last]
        if state <= 0:
            return [], 0
        return self.copied(self._latest[state], limit), self._length[state]

    def copied(self, start: int, limit: int) -> list[int]:
        """The text from ``start`` on, which goes on by repeating itself."""
        copied = self.tokens[start : start + limit]
        period = len(copied)
        while len(copied) < limit:
            copied += copied[: min(period, limit - len(copied))]
        return copied

    def others(self, copied: Sequence[int]) -> Iterator[tuple[int, Continuation]]:
        """Tokens that followed suffixes of the text, before its end, where others followed than the copied ones.

        Args:
            copied: what :meth:`longest` returned.

        Yields:
            How many copied tokens stand before it, and what followed: after longer suffixes first, no token twice
            after as many.
        """
        state = self._link[self._last]
        match = self._length[state]
        for depth, token in enumerate(copied):
            seen, suffix, length = {token}, state, match
            for _ in range(_CONTEXTS):
                for other, after in self._next[suffix].items():
                    if other not in seen and self._latest[after]:
                        seen.add(other)
                        share = min(self._count[after] / self._count[suffix], 1.0)  # a cut walk may count less
                        yield depth, Continuation(other, length, share, self._latest[after])
                suffix = self._link[suffix]
                length = self._length[suffix]
                if length <= depth:  # the drafted tokens alone, or fewer
                    break
            state = self._next[state].get(token, 0)
            match += 1
            if state == 0:
                return

    def _note_end(self) -> None:
        """Count the present end among the occurrences of all suffixes; done late, so that matches are earlier ones."""
        state, end = self._last, len(self.tokens)
        for _ in range(_LINKS):
            if state <= 0:
                return
            self._latest[state] = end
            self._count[state] += 1
            state = self._link[state]

    def _append(self, token: int) -> None:
        following, link, length = self._next, self._link, self._length
        new = self._state(length[self._last] + 1, {}, 0)
        state = self._last
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        self._last = new
        if state < 0:
            link[new] = 0
            return
        after = following[state][token]
        if length[after] == length[state] + 1:
            link[new] = after
            return
        shorter = self._state(length[state] + 1, following[after].copy(), link[after])
        self._latest[shorter], self._count[shorter] = self._latest[after], self._count[after]
        link[after] = link[new] = shorter
        while state >= 0 and following[state].get(token) == after:
            following[state][token] = shorter
            state = link[state]

    def _state(self, length: int, following: dict[int, int], link: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._latest.append(0)
        self._count.append(0)
        return len(self._link) - 1


def match_confidences(length: int, count: int) -> list[float]:
    """Confidence of each copied token: the match that it has if all before it stand, as a share of the longest."""
    return [min(length + index, LONGEST_MATCH) / LONGEST_MATCH for index in range(count)]


class LookupDrafter(InstantDrafter):
    """Copies what followed the longest earlier occurrence of the text's last tokens. Costs next to nothing.

    With m the length of that match, copied token i has the confidence min(m + i, 16) / 16. Up to two branches leave
    the copy at one of its first three tokens, for what followed other occurrences: of the same suffix, or of a shorter
    one. Where a suffix of length m was followed by a branch's first token in a share s of its occurrences, that token
    has the confidence s (1 - 1 / 2m) / 16, below that of any copy; the tokens after it have theirs by their match.

    Pays where texts repeat themselves or their prompt: code, summaries, answers that quote. Elsewhere it rarely finds
    anything, which costs nothing.

    Paper:
        Hu et al. 2024, "SAM Decoding: Speculative Decoding via Suffix Automaton"; Saxena 2023, "Prompt Lookup
        Decoding"; Yang et al. 2023, "Inference with Reference"; Blumer et al. 1985, "The smallest automaton
        recognizing the subwords of a text".
    """

    name = "lookup"
    edges: ClassVar[tuple[float, ...]] = (0.2 / LONGEST_MATCH, 0.4 / LONGEST_MATCH, 0.99 / LONGEST_MATCH, *MATCH_EDGES)
    prior: ClassVar[tuple[float, ...]] = (0.07, 0.13, 0.2, 0.35, 0.6, 0.7, 0.82, 0.9, 0.98)

    def __init__(self) -> None:
        self.index = SuffixIndex()

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the text before."""
        self.index = SuffixIndex()
        self.index.extend(prompt)

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """See :meth:`InstantDrafter.candidates`."""
        self.index.extend(path.tokens)
        copied, match = self.index.longest(room)
        if not copied:
            return Candidates()
        tokens, parents = copied.copy(), list(range(ROOT, len(copied) - 1))
        confidences = match_confidences(match, len(copied))
        branches = (
            (other.share * (1 - 0.5 / other.match) / LONGEST_MATCH, depth, other)
            for depth, other in self.index.others(copied[:_EARLY])
        )
        for confidence, depth, other in nlargest(_BRANCHES, branches, key=lambda branch: branch[0] * 0.75 ** branch[1]):
            count = min(_BRANCH_LENGTH, room - depth) - 1
            parents += [depth - 1, *range(len(tokens), len(tokens) + count)]
            tokens += [other.token, *self.index.copied(other.latest, count)]
            confidences += [confidence, *match_confidences(other.match + 1, count)]
        return Candidates(tokens, parents, confidences)
