"""Drafts from a corpus: what followed the text's last tokens there."""

from heapq import heappop, heappush
from typing import ClassVar

from restpoint.decode.draft import ROOT, Candidates, InstantDrafter, TokenPath
from restpoint.decode.drafters.datastore import CONTEXT, Datastore
from restpoint.errors import RestpointError

_NODES = 24
_DEEPEST = 8
_OCCURRENCES = 64
_LEAST = 0.02
_DOUBT = 24.0


class RetrievalDrafter(InstantDrafter):
    """Best-first tree of what followed the longest suffix of the text that occurs in a corpus.

    Up to 64 occurrences, evenly spread where there are more, go on together as long as their tokens agree. With N of
    them left after m tokens in common with the text, drafted ones counted, of which n go on with token c, the
    confidence of c is

        n / (N + 24 / m^1.5):

    a single occurrence of a short context says little, many that agree say much.

    Pays where the corpus is of the same kind as the text: a code base, manuals, answers to questions asked before.
    A corpus of another kind finds short matches only, which cost little and help little.

    Args:
        datastore: the corpus; see that it was built with the model's tokenizer (:meth:`Datastore.require`).
        nodes: size of the tree.
        deepest: largest depth.

    Raises:
        RestpointError: the tree would have no node.

    Paper:
        He et al. 2023, "REST: Retrieval-Based Speculative Decoding"; Quan et al. 2025, "RASD: Retrieval-Augmented
        Speculative Decoding".
    """

    name = "retrieval"
    edges: ClassVar[tuple[float, ...]] = (0.06, 0.12, 0.25, 0.4, 0.6, 0.8)
    prior: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.15, 0.27, 0.5, 0.75, 0.97)

    def __init__(self, datastore: Datastore, nodes: int = _NODES, deepest: int = _DEEPEST):
        if nodes < 1 or deepest < 1:
            raise RestpointError(f"nodes={nodes}, deepest={deepest} allow no draft; give at least 1 of each")
        self.datastore = datastore
        self.nodes = nodes
        self.deepest = deepest

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """See :meth:`InstantDrafter.candidates`."""
        deepest = min(room, self.deepest)
        match, found = self.datastore.find(path.tokens[-CONTEXT:])
        places = found[:: -(-len(found) // _OCCURRENCES)] if found else found
        rows = [self.datastore.after(place, deepest) for place in places]
        tokens: list[int] = []
        parents: list[int] = []
        confidences: list[float] = []
        waiting: list[tuple[float, int, int, int, float, list[list[int]]]] = []
        node, depth, negative = ROOT, 0, -1.0
        while True:
            following: dict[int, list[list[int]]] = {}
            for row in rows:
                if depth < len(row):
                    following.setdefault(row[depth], []).append(row)
            share = 1 / (len(rows) + _DOUBT / (match + depth) ** 1.5) if rows else 0.0
            for token, agreeing in following.items():
                confidence = len(agreeing) * share
                probability = negative * confidence
                if probability < -_LEAST:
                    heappush(waiting, (probability, depth + 1, node, token, confidence, agreeing))
            if not waiting or len(tokens) == self.nodes:
                return Candidates(tokens, parents, confidences)
            negative, depth, parent, token, confidence, rows = heappop(waiting)
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            confidences.append(confidence)
