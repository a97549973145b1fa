"""Drafts from counts: which tokens followed the last two, or the last one, in the text and in the target's mind."""

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Candidates, Draft, InstantDrafter, TokenPath, Verified
from restpoint.errors import RestpointError

_CONTEXTS = 50_000
_FOLLOWERS = 8
_PROBABLE = 4
_BACKING_OFF = 1.0
_NODES = 24
_DEEPEST = 8
_LEAST = 0.02

_Counts = OrderedDict[tuple[int, ...], dict[int, float]]


class NgramTables:
    """Counts of what follows two tokens and one, in bounded memory.

    Of the contexts, the one longest not counted goes first; of the tokens that follow one, the rarest.
    Drafters of several texts may share one, one text after the other.

    Args:
        contexts: largest number of contexts in each of the two tables.

    Raises:
        RestpointError: no context is allowed.
    """

    def __init__(self, contexts: int = _CONTEXTS):
        if contexts < 1:
            raise RestpointError(f"contexts={contexts} leaves no room for counts; give at least 1")
        self.contexts = contexts
        self.pairs: _Counts = OrderedDict()
        self.singles: _Counts = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self.pairs.clear()
        self.singles.clear()

    def count(self, before: int, last: int, token: int, weight: float = 1.0) -> None:
        """Count that ``token`` followed ``before`` and ``last``, for certain or with a probability."""
        self._count(self.pairs, (before, last), token, weight)
        self._count(self.singles, (last,), token, weight)

    def following(self, before: int, last: int) -> dict[int, float]:
        """Smoothed probabilities of what follows two tokens; what they lack to 1 is for tokens never seen there."""
        found: dict[int, float] = {}
        for table, context in ((self.singles, (last,)), (self.pairs, (before, last))):
            counts = table.get(context)
            if counts is None:
                continue
            share = 1 / (sum(counts.values()) + _BACKING_OFF)
            if found:
                kept = _BACKING_OFF * share
                found = {token: probability * kept for token, probability in found.items()}
                for token, count in counts.items():
                    found[token] = found.get(token, 0.0) + count * share
            else:
                found = {token: count * share for token, count in counts.items()}
        return found

    def _count(self, table: _Counts, context: tuple[int, ...], token: int, weight: float) -> None:
        counts = table.get(context)
        if counts is None:
            table[context] = {token: weight}
            if len(table) > self.contexts:
                table.popitem(last=False)
            return
        table.move_to_end(context)
        if token not in counts and len(counts) >= _FOLLOWERS:
            del counts[min(counts, key=counts.__getitem__)]
        counts[token] = counts.get(token, 0.0) + weight


class NgramDrafter(InstantDrafter):
    """Best-first tree under the probabilities of an adaptive trigram model that backs off to bigrams.

    With n the counts of what followed, and N their sums,

        P(c | b) = n(b c) / (N(b) + 1),    P(c | a b) = (n(a b c) + P(c | b)) / (N(a b) + 1),

    which is the confidence. Every token of the prompt and of the text counts 1, and each of the four most probable
    tokens after every verified node, rejected nodes too, counts as much as its probability.

    Pays on any text, more the longer it grows or where tables are shared between texts of one kind. Long repetitions
    are better copied.

    Args:
        nodes: size of the tree.
        deepest: largest depth.
        shared: tables to use and to keep between texts; None for its own, forgotten when a text begins.

    Raises:
        RestpointError: the tree would have no node.

    Paper:
        Liu et al. 2024, "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED).
    """

    name = "ngrams"
    edges: ClassVar[tuple[float, ...]] = (0.06, 0.12, 0.25, 0.4, 0.6, 0.8)
    prior: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.23, 0.5, 0.8, 0.96)

    def __init__(self, nodes: int = _NODES, deepest: int = _DEEPEST, shared: NgramTables | None = None):
        if nodes < 1 or deepest < 1:
            raise RestpointError(f"nodes={nodes}, deepest={deepest} allow no draft; give at least 1 of each")
        self.nodes = nodes
        self.deepest = deepest
        self.tables = NgramTables() if shared is None else shared
        self._keeps = shared is not None

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the text before, unless the tables are shared, and count the prompt."""
        if not self._keeps:
            self.tables.clear()
        self._count(prompt)

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """See :meth:`InstantDrafter.candidates`."""
        deepest = min(room, self.deepest)
        tokens: list[int] = []
        parents: list[int] = []
        confidences: list[float] = []
        waiting: list[tuple[float, int, int, int, int, float]] = []
        node, last, depth, negative = ROOT, path.pending, 0, -1.0
        before = path.tokens[-2] if len(path.tokens) > 1 else ROOT
        while True:
            if depth < deepest:
                least = -_LEAST / negative
                for token, share in self.tables.following(before, last).items():
                    if share > least:
                        heappush(waiting, (negative * share, depth + 1, node, last, token, share))
            if not waiting or len(tokens) == self.nodes:
                return Candidates(tokens, parents, confidences)
            negative, depth, parent, before, last, share = heappop(waiting)
            node = len(tokens)
            tokens.append(last)
            parents.append(parent)
            confidences.append(share)

    def learn(self, path: TokenPath, verified: Verified) -> None:
        """Count what the text gained, and what the target held probable after every node."""
        draft = verified.draft
        self._count([*path.tokens[-2:], *verified.new_tokens])
        for (before, last), expected in zip(_contexts(path, draft), _probable(verified.logits), strict=True):
            for token, probability in expected:
                self.tables.count(before, last, token, probability)

    def _count(self, tokens: Sequence[int]) -> None:
        for before, last, token in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self.tables.count(before, last, token)


def _contexts(path: TokenPath, draft: Draft) -> list[tuple[int, int]]:
    """The last two tokens up to the pending one and up to every node; ROOT for none."""
    contexts = [(path.tokens[-2] if len(path.tokens) > 1 else ROOT, path.pending)]
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        contexts.append((contexts[parent + 1][1], token))
    return contexts


def _probable(logits: Float[Tensor, "nodes vocab"]) -> list[list[tuple[int, float]]]:
    """The most probable tokens of every row and their probabilities."""
    best = logits.softmax(-1, dtype=torch.float32).topk(min(_PROBABLE, logits.shape[-1]), dim=-1)
    return [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
