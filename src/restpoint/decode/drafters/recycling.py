"""Drafts recycled from what the target thought before: the likeliest successors of each token when it last stood."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Candidates, InstantDrafter, TokenPath, Verified
from restpoint.errors import RestpointError

SUCCESSORS = 8
"""How many successors of each token are remembered."""

RANKS = (0.6, 0.11, 0.05, 0.03, 0.02, 0.015, 0.012, 0.01)
"""How often the successor of each rank is the next token, roughly; the drafted tree is shaped by it."""

_NODES = 32
_DEEPEST = 6


class RecyclingMemory:
    """The most probable successors of each token, as the target saw them when the token last stood.

    Drafters of several texts may share one, one text after the other.

    Args:
        vocabulary: number of logits of the target.

    Attributes:
        successors: (vocabulary, at most 8) token ids, int32, most probable first; a row of -1 for a token not seen.
            On the CPU wherever the target is, as it is read token by token.
    """

    def __init__(self, vocabulary: int):
        if vocabulary < 1:
            raise RestpointError(f"vocabulary={vocabulary} has no token; give the number of the target's logits")
        self.successors = torch.full((vocabulary, min(SUCCESSORS, vocabulary)), -1, dtype=torch.int32)
        self._rows = self.successors.numpy()

    def clear(self) -> None:
        """Forget everything."""
        self.successors.fill_(-1)

    def after(self, token: int) -> list[int]:
        """Successors of a token, most probable first; -1 or none where none is known."""
        return self._rows[token].tolist()

    def update(self, tokens: Sequence[int], logits: Float[Tensor, "nodes vocab"]) -> None:
        """Remember the most probable successors of tokens; of a token that stands twice, those of the last.

        Args:
            tokens: one for each row.
            logits: the target's after each.

        Raises:
            RestpointError: the logits are not as many as this memory has rows.
        """
        vocabulary, width = self.successors.shape
        if logits.shape[-1] != vocabulary:
            raise RestpointError(
                f"vocabulary={vocabulary}, but the target has {logits.shape[-1]} logits; give the memory that many rows"
            )
        rows = {token: row for row, token in enumerate(tokens)}
        best = logits.topk(width, dim=-1).indices.to("cpu", torch.int32)
        if len(rows) < len(tokens):
            best = best[list(rows.values())]
        self.successors.index_copy_(0, torch.tensor(list(rows)), best)


class RecyclingDrafter(InstantDrafter):
    """Follows, from the pending token on, what the target held probable after each token when it last saw it.

    The target's logits name eight probable successors of every node of every draft, of the rejected ones too; that is
    free, and plain decoding throws it away. The tree has the same shape in every round: the best-first tree in which
    the successor of rank r has the probability ``RANKS[r]``, which is the confidence too. A token that was not seen
    yet has no successors.

    Pays on any text, some rounds after its beginning, as it needs no repetition beyond single tokens; where there are
    longer repetitions, copying the text is surer.

    Args:
        vocabulary: number of logits of the target.
        nodes: size of the tree.
        deepest: largest depth.
        shared: a memory to use and to keep between texts; None for one of its own, forgotten when a text begins.

    Raises:
        RestpointError: the shared memory is for another vocabulary, or the tree would have no node.

    Paper:
        Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
        Recycling".
    """

    name = "recycling"
    needs_every_round = False
    edges: ClassVar[tuple[float, ...]] = (0.014, 0.025, 0.04, 0.08, 0.3)
    prior: ClassVar[tuple[float, ...]] = (0.01, 0.015, 0.02, 0.035, 0.09, 0.6)

    def __init__(
        self, vocabulary: int, nodes: int = _NODES, deepest: int = _DEEPEST, shared: RecyclingMemory | None = None
    ):
        if nodes < 1 or deepest < 1:
            raise RestpointError(f"nodes={nodes}, deepest={deepest} allow no draft; give at least 1 of each")
        if shared is not None and len(shared.successors) != vocabulary:
            raise RestpointError(
                f"shared: its vocabulary is {len(shared.successors)}, the target's is {vocabulary}; "
                f"make it with RecyclingMemory({vocabulary})"
            )
        self.memory = RecyclingMemory(vocabulary) if shared is None else shared
        self._keeps = shared is not None
        self._shape = _best_first(nodes, deepest)

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the text before, unless the memory is shared."""
        if not self._keeps:
            self.memory.clear()

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """See :meth:`InstantDrafter.candidates`."""
        after = self.memory.after
        tokens: list[int] = []
        parents: list[int] = []
        confidences: list[float] = []
        places, successors = [ROOT], [after(path.pending)]
        for branch in self._shape:
            following = successors[branch.parent + 1]
            if branch.depth > room or branch.rank >= len(following) or following[branch.rank] < 0:
                places.append(ROOT)
                successors.append([])
                continue
            token = following[branch.rank]
            places.append(len(tokens))
            successors.append(after(token) if branch.inner else [])
            parents.append(places[branch.parent + 1])
            tokens.append(token)
            confidences.append(RANKS[branch.rank])
        return Candidates(tokens, parents, confidences)

    def learn(self, path: TokenPath, verified: Verified) -> None:
        """Remember the successors of the pending token and of every node; those that stood have the last word."""
        tokens, logits, stood = verified.draft.tokens, verified.logits, set(verified.nodes)
        if len(stood) < len(tokens):
            nodes = [node for node in range(len(tokens)) if node not in stood] + sorted(stood)
            tokens, logits = [tokens[node] for node in nodes], logits[[0, *(node + 1 for node in nodes)]]
        self.memory.update([path.pending, *tokens], logits)


@dataclass(frozen=True)
class _Branch:
    parent: int
    rank: int
    depth: int
    inner: bool = False


def _best_first(nodes: int, deepest: int) -> list[_Branch]:
    """The most probable nodes of the tree in which the successor of rank r has probability ``RANKS[r]`` everywhere."""
    shape: list[_Branch] = []
    waiting = [(-share, 1, ROOT, rank) for rank, share in enumerate(RANKS)]
    heapify(waiting)
    while waiting and len(shape) < nodes:
        negative, depth, parent, rank = heappop(waiting)
        if parent != ROOT:
            shape[parent] = replace(shape[parent], inner=True)
        if depth < deepest:
            for following, share in enumerate(RANKS):
                heappush(waiting, (negative * share, depth + 1, len(shape), following))
        shape.append(_Branch(parent, rank, depth))
    return shape
