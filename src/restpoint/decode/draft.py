"""What drafters say of the tokens to come, the tree that is made of it, and what became of the tree."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

ROOT = -1
"""Index of the pending token, as the parent of nodes."""


@dataclass
class TokenPath:
    """The text so far, as the loop keeps it.

    Attributes:
        tokens: prompt and everything decoded; the last one is *pending*: it is not in the cache yet.
        rest: h_L of the last position in the cache, whose logits gave the pending token; None where the target
            cannot tell.
    """

    tokens: list[int]
    rest: Float[Tensor, "1 1 hidden"] | None

    @property
    def pending(self) -> int:
        """The newest token, not yet in the cache."""
        return self.tokens[-1]


@dataclass(frozen=True)
class Drawn:
    """Tokens that were drawn at random to follow one node.

    Attributes:
        law: the distribution they were drawn from.
        nodes: the drafted nodes that hold them, in the order drawn; one of them more than once if drawn again.
    """

    law: Float[Tensor, " vocab"]
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """A tree of drafted tokens that follow the pending one. A chain is the tree 0 <- 1 <- 2; no node is plain decoding.

    Siblings hold different tokens. A node that stands in no :class:`Drawn` was chosen without chance.

    Attributes:
        tokens: the token of each node.
        parents: the node that each follows, before it in the list; ``ROOT`` (-1) is the pending token.
        drawn: for nodes (or the root) with children drawn at random, which these are and from which law.
        exit_layer: layers below this one have already run on the pending token and the first nodes.
        exits: the states before ``exit_layer`` of the pending token and of as many first nodes as it has run on; None
            where no layer has run.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    drawn: Mapping[int, Drawn] = field(default_factory=dict)
    exit_layer: int = 0
    exits: Float[Tensor, "1 ran hidden"] | None = None

    @classmethod
    def chain(cls, tokens: Sequence[int], law: Float[Tensor, "drafted vocab"] | None = None) -> "Draft":
        """Tokens one after the other, each drawn from its row of ``law``, or chosen without chance."""
        drawn = {} if law is None else {index - 1: Drawn(law[index], (index,)) for index in range(len(tokens))}
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), drawn)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    def children(self) -> list[dict[int, int]]:
        """For the root and every node (entry node + 1): its children, token to node."""
        found: list[dict[int, int]] = [{} for _ in range(len(self.tokens) + 1)]
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            found[parent + 1][token] = node
        return found

    def prefixes(self, tokens: Sequence[int]) -> list[list[int]]:
        """The whole text up to the pending token and up to every node."""
        texts = [list(tokens)]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            texts.append([*texts[parent + 1], token])
        return texts


@dataclass(frozen=True)
class Verified:
    """What became of a draft.

    Attributes:
        draft: the draft.
        logits: the target's, unprocessed: after the pending token, then after every node.
        nodes: the nodes that stood: a path from the root.
        next_token: the token after them.
    """

    draft: Draft
    logits: Float[Tensor, "rows vocab"]
    nodes: Sequence[int]
    next_token: int

    @property
    def new_tokens(self) -> list[int]:
        """What the text gains, before any cut by a stop rule."""
        return [*(self.draft.tokens[node] for node in self.nodes), self.next_token]


@dataclass(frozen=True)
class Candidates:
    """Tokens that a drafter expects, as a tree like :class:`Draft`'s.

    Attributes:
        tokens: the token of each node.
        parents: the node that each follows, before it in the list; ``ROOT`` (-1) is the pending token.
        confidences: in [0, 1], on the drafter's own scale: how sure it is of the token if its parent stands. What that
            is worth is learnt from outcomes; only its order matters.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    confidences: Sequence[float] = ()

    @classmethod
    def chain(cls, tokens: Sequence[int], confidences: Sequence[float]) -> "Candidates":
        """Tokens one after the other."""
        return cls(tokens, range(-1, len(tokens) - 1), confidences)


class Drafter(ABC):
    """Says which tokens may follow a text. It serves one text at a time.

    Attributes:
        name: what tables call it.
        edges: inner edges of the bins in which the worth of its confidences is learnt.
        prior: plausible acceptance in each bin, before anything was measured.
        needs_every_round: whether it must learn of rounds in which it was not asked, to know the text.
    """

    name: str
    edges: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
    prior: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.07, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.98)
    needs_every_round: ClassVar[bool] = True

    def begin(self, prompt: Sequence[int]) -> None:  # noqa: B027  # most have nothing to do
        """A new text begins. What was learnt from other texts may be kept; what belongs to a text may not."""

    def learn(self, path: TokenPath, verified: Verified) -> None:  # noqa: B027
        """A round is over; ``path`` is the text before it.

        Called after every round, drafted or plain, but for rounds in which nobody was asked where that is enough.
        """


class InstantDrafter(Drafter):
    """A drafter that names all its candidates at once, at next to no cost: tables, copies, pools."""

    @abstractmethod
    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """Tokens that may follow the pending one, at most ``room`` deep; none is always allowed.

        They may depend on the text and on what was learnt from earlier rounds, on nothing else.
        """


class SteppedDrafter(Drafter):
    """A drafter that has a law for the next token after any node, at a cost: predictors, smaller models, fewer layers.

    Nodes are numbered in the order in which :meth:`extend` was given them, from 0; the pending token is ``ROOT``.

    Attributes:
        trees: whether a level may have several nodes; else nodes follow each other in a chain.
    """

    trees: bool = True

    @abstractmethod
    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """Logits of the token after the pending one; forgets the nodes of the round before."""

    @abstractmethod
    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """Add nodes, all of one depth, and return the logits of the token after each."""

    @classmethod
    def start_together(
        cls, drafters: "Sequence[SteppedDrafter]", paths: Sequence[TokenPath]
    ) -> list[Float[Tensor, "1 vocab"]]:
        """:meth:`start` for the rows of a batch, with a drafter each; one by one, unless a class can do better."""
        return [one.start(path) for one, path in zip(drafters, paths, strict=True)]

    @classmethod
    def extend_together(
        cls,
        drafters: "Sequence[SteppedDrafter]",
        parents: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
    ) -> list[Float[Tensor, "added vocab"]]:
        """:meth:`extend` for the rows of a batch, by nodes of the same depth in each."""
        return [one.extend(*nodes) for one, *nodes in zip(drafters, parents, tokens, strict=True)]

    def goes_on(self, levels: int) -> bool:
        """Whether it wants another level after so many in this round; with 0, whether it wants to draft at all.

        It is asked beside the costs, never instead of them: either may say no.
        """
        return True

    @property
    def cost_name(self) -> str:
        """The name that the costs know it by; where it drafts in several ways, that of the one in use."""
        return self.name

    def exits(self) -> tuple[int, Tensor] | None:
        """Layer and states (1, 1 + nodes, hidden) that the target may resume from, if these are its own layers."""
        return None


class Speculator(ABC):
    """Makes one draft of what drafters say, round by round; the decode loop asks it. It serves one text at a time."""

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> None:
        """A new text, whose prompt has just been read."""

    @abstractmethod
    def propose(self, path: TokenPath, room: int) -> Draft:
        """Draft a tree of depth at most ``room`` after the path's pending token; none is always allowed.

        The law of each token, and whether it is proposed at all, must be fixed before anything of the target at
        that position is seen, and must not depend on the value drawn: exactness rests on it.
        """

    @abstractmethod
    def observe(self, path: TokenPath, verified: Verified) -> None:
        """Learn what became of the draft; ``path`` is the text before this round."""

    @property
    def group(self) -> object:
        """Speculators of rows of one batch that have this in common draft together."""
        return self

    @classmethod
    def propose_together(
        cls, speculators: "Sequence[Speculator]", paths: Sequence[TokenPath], rooms: Sequence[int]
    ) -> list[Draft]:
        """:meth:`propose` for rows whose speculators are of this class and of one group."""
        return [one.propose(path, room) for one, path, room in zip(speculators, paths, rooms, strict=True)]
