"""Drafts named by several heads at once, each for its own position, none knowing what the others say."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Candidates, InstantDrafter, TokenPath
from restpoint.decode.drafters.precision import draft_dtype
from restpoint.equilibrium.heads import MultiTokenHeads
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

Head = Callable[[Float[Tensor, "positions hidden"]], Float[Tensor, "positions drafted"]]
"""From rest states to logits, of all tokens or of those that may be drafted."""

Embedding = Callable[[int, int], Float[Tensor, "1 hidden"]]
"""h_0 of a token at a position."""


@dataclass(frozen=True)
class HeadsSettings:
    """How large a tree the heads offer."""

    nodes: int = 32
    """Most nodes of the tree."""
    width: int = 8
    """Most tokens of one position, under one parent."""

    def __post_init__(self) -> None:
        for name in ("nodes", "width"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")


class HeadsDrafter(InstantDrafter):
    """Offers the most probable paths under the product of k laws, one for each position after the pending token.

    q(x_1 .. x_k) = q_1(x_1) .. q_k(x_k), q_j = softmax(head(rest_j)) with all rest_j from one product of matrices,
    [h_0(t), h_L(t-1)] -> (rest_0, .., rest_{k-1}): no layer runs, and no drafted token is waited for. The tree is grown
    best first: always the node next whose path is the most probable one left.

    Use it where the round trip of every drafting step is what drafting costs, or as a wide first level beside drafters
    that go deep. Do not use it for depth: a token's law does not know its parent, so a path of probable tokens need
    not be a probable path; the rest-point recurrence, whose steps read the drafted token, goes deeper.

    Args:
        heads: fitted on layer 0 alone.
        head: gives the logits of rest states.
        embed: gives the pending token's embedding.
        settings: defaults of :class:`HeadsSettings` if None.
        vocabulary: which token each column of the logits is; None for every token in order.

    Raises:
        RestpointError: the heads read states of layers above the embedding, which do not exist before a pass.

    Paper:
        Cai et al. 2024, "Medusa"; Wu et al. 2024, "Parallel Decoding via Hidden Transfer".
    """

    name = "heads"
    edges: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
    """Edges of calibration bins on the scale of the confidences, the heads' probabilities."""
    prior: ClassVar[tuple[float, ...]] = (0.02, 0.035, 0.08, 0.14, 0.2, 0.28, 0.42, 0.48, 0.75)
    """Acceptance of each bin until outcomes are known."""

    def __init__(
        self,
        heads: MultiTokenHeads,
        head: Head,
        embed: Embedding,
        settings: HeadsSettings | None = None,
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        if heads.state_layers != (0,):
            raise RestpointError(
                f"heads read the states of layers {heads.state_layers}, but before a pass only the embedding is known; "
                "fit them with state_layers=(0,)"
            )
        self.heads = heads
        self.head = head
        self.embed = embed
        self.settings = settings or HeadsSettings()
        self.vocabulary = None if vocabulary is None else tuple(vocabulary)

    @classmethod
    def of_model(
        cls,
        heads: MultiTokenHeads,
        layered: LayeredModel,
        settings: HeadsSettings | None = None,
        vocabulary: Tensor | None = None,
    ) -> "HeadsDrafter":
        """With a model's own embedding and head, the latter cut to the tokens of ``vocabulary`` where that is given.

        Raises:
            RestpointError: a vocabulary is asked of a model whose head has no direct form, or as in the class.
        """
        if vocabulary is not None and not layered.head.direct:
            raise RestpointError("vocabulary: this model's head cannot be cut to some tokens; leave it out")
        dtype = draft_dtype(layered)
        rows = layered.head.rows(vocabulary, dtype) if layered.head.direct else None

        def head(rest: Tensor) -> Tensor:
            rest = rest[None].to(layered.dtype)
            if rows is None:
                return layered.logits(rest)[0]
            return layered.head.unembed(layered.head.rest_state(rest), *rows)[0]

        def embed(token: int, position: int) -> Tensor:
            return layered.embed(torch.tensor([[token]], device=layered.device), position)[0].to(dtype)

        fitting = heads.to(layered.device, dtype)
        return cls(fitting, head, embed, settings, None if vocabulary is None else vocabulary.tolist())

    @torch.no_grad()
    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """The best tree under the product of the heads' laws; none where the target tells no rest state."""
        if path.rest is None or room < 1:
            return Candidates()
        embedded = self.embed(path.pending, len(path.tokens) - 1)
        predicted = self.heads.predict([embedded], path.rest[0].to(embedded.dtype))[0, :room]
        laws = torch.softmax(self.head(predicted).float(), -1)
        best = laws.topk(min(self.settings.width, laws.shape[-1]))
        columns, vocabulary = best.indices.tolist(), self.vocabulary
        named = columns if vocabulary is None else [[vocabulary[column] for column in row] for row in columns]
        return best_first(named, best.values.tolist(), self.settings.nodes)


def best_first(tokens: Sequence[Sequence[int]], probabilities: Sequence[Sequence[float]], nodes: int) -> Candidates:
    """The tree of the most probable paths when the token of every depth is drawn without regard to the others.

    Args:
        tokens: for every depth, the most probable tokens, best first.
        probabilities: theirs; a token of probability 0 is left out.
        nodes: how many nodes the tree has at most.
    """
    chosen: list[tuple[int, int, float]] = []
    waiting: list[tuple[float, int, int, int]] = []  # minus the path's probability; depth, rank, parent

    def wait(reach: float, depth: int, rank: int, parent: int) -> None:
        if depth < len(tokens) and rank < len(tokens[depth]) and probabilities[depth][rank] > 0:
            heapq.heappush(waiting, (-reach * probabilities[depth][rank], depth, rank, parent))

    wait(1.0, 0, 0, ROOT)
    while waiting and len(chosen) < nodes:
        path, depth, rank, parent = heapq.heappop(waiting)
        confidence = probabilities[depth][rank]
        wait(-path, depth + 1, 0, len(chosen))
        wait(-path / confidence, depth, rank + 1, parent)
        chosen.append((tokens[depth][rank], parent, min(confidence, 1.0)))
    return Candidates(*zip(*chosen, strict=True)) if chosen else Candidates()
