"""What a verifier is, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.errors import RestpointError
from restpoint.transport.siblings import Drawing
from restpoint.transport.variation import draw

Uniforms = Callable[[int], Tensor]
"""Gives so many fresh numbers in [0, 1)."""


@dataclass(frozen=True)
class Outcome:
    """What verification decided.

    Attributes:
        nodes: the drafted nodes that stand: a path from the root, perhaps empty.
        next_token: the token after them.
    """

    nodes: tuple[int, ...]
    next_token: int


@dataclass(frozen=True)
class Possible:
    """One of the outcomes that a draft may have.

    Attributes:
        probability: of this outcome, given the draft.
        outcome: the outcome.
    """

    probability: float
    outcome: Outcome


@dataclass(frozen=True)
class Verifier(ABC):
    """Decides which nodes of a draft stand, so that nodes and next token together follow the target's law.

    Exact means: take the tokens of the outcome and go on with plain draws from the target; then, averaged over drafts,
    every text has the probability that plain decoding gives it.

    Attributes:
        name: what tables and the command line call it.
    """

    name: str

    @property
    @abstractmethod
    def drawn(self) -> Drawing:
        """How siblings must have been drawn. Siblings chosen without chance may always stand beside them."""

    @property
    def chains_only(self) -> bool:
        """Whether trees are refused."""
        return False

    @abstractmethod
    def verify(self, p: Float[Tensor, "rows vocab"], draft: Draft, uniforms: Uniforms) -> Outcome:
        """Decide at random.

        Args:
            p: the target's law after the pending token (row 0) and after each node i (row i + 1), after every warper,
                in float32 or float64.
            draft: the drafted tokens with the laws that they were drawn from.
            uniforms: source of chance.

        Raises:
            RestpointError: the draft is not of a kind that this verifier can be exact for, or p does not fit it.
        """

    @abstractmethod
    def outcomes(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> list[Possible]:
        """All that :meth:`verify` may answer, with its exact probability: for tests and analyses at small vocabularies.

        Raises:
            RestpointError: as :meth:`verify`.
        """

    def check(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> None:
        """Refuses what cannot be verified exactly; reads no number of p, so it never waits for the device.

        Raises:
            RestpointError: as said.
        """
        if p.shape[0] != len(draft.tokens) + 1:
            raise RestpointError(
                f"p has {p.shape[0]} rows for {len(draft.tokens)} nodes: give the target's law after the pending token "
                "and after every node"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise RestpointError(f"p is {p.dtype}, which cannot hold a distribution: logits.float().softmax(-1)")
        if self.chains_only and not draft.is_chain:
            raise RestpointError(
                f"verifier={self.name!r} takes chains, and this draft branches: draft a chain, or choose "
                "verifier='traversal', which is the same on chains"
            )
        for parent, group in draft.drawn.items():
            if group.law.shape[0] != p.shape[1]:
                raise RestpointError(
                    f"draft: the law after node {parent} has {group.law.shape[0]} tokens, the target {p.shape[1]}: put "
                    "it on the target's vocabulary"
                )
            if any(draft.parents[node] != parent for node in group.nodes):
                raise RestpointError(f"draft: nodes {group.nodes} are said to follow {parent}, their parents differ")
            if self.drawn == "one" and len(group.nodes) > 1:
                raise RestpointError(
                    f"verifier={self.name!r} takes one drawn token after each node, got {len(group.nodes)}: draw one, "
                    "or choose verifier='recursive' or 'optimal'"
                )
            if self.drawn == "without replacement" and len(set(group.nodes)) < len(group.nodes):
                raise RestpointError(
                    f"verifier={self.name!r} takes siblings drawn without replacement, and node {parent} has one drawn "
                    "twice: draw them so, or choose 'recursive-iid' or 'optimal-iid'"
                )


@dataclass(frozen=True)
class Stop:
    """A place where a verifier that tries long paths first may stop.

    Attributes:
        probability: that it does, given that it did not stop at the places tried before.
        nodes: the path that then stands.
        law: what the next token is then drawn from; need not be normalised.
    """

    probability: float
    nodes: tuple[int, ...]
    law: Float[Tensor, " vocab"]


class LongestFirst(Verifier):
    """A verifier that tries one place after the other, deeper ones first, and stops at the first that stands."""

    @abstractmethod
    def stops(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> Iterator[Stop]:
        """The places in the order tried, the last one with probability 1; each is worked out when it is asked for."""

    def verify(self, p: Float[Tensor, "rows vocab"], draft: Draft, uniforms: Uniforms) -> Outcome:
        self.check(p, draft)
        stop = self._first(p, draft, uniforms)
        return Outcome(stop.nodes, int(draw(stop.law, uniforms(1)[0])))

    def outcomes(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> list[Possible]:
        self.check(p, draft)
        found, reached = [], 1.0
        for stop in self.stops(p, draft):
            found += spread(reached * stop.probability, stop.nodes, stop.law)
            reached *= 1 - stop.probability
        return found

    def _first(self, p: Float[Tensor, "rows vocab"], draft: Draft, uniforms: Uniforms) -> Stop:
        # A node drawn twice is tried twice.
        tries = 1 + len(draft.tokens) + sum(len(group.nodes) - len(set(group.nodes)) for group in draft.drawn.values())
        chances = uniforms(tries).tolist()
        return next(stop for stop, u in zip(self.stops(p, draft), chances, strict=False) if u < stop.probability)


def spread(probability: float, nodes: tuple[int, ...], law: Float[Tensor, " vocab"]) -> list[Possible]:
    """The outcomes with these nodes, the next token drawn from ``law``."""
    if probability == 0:
        return []
    law = law.double() / law.double().sum()
    return [
        Possible(probability * weight, Outcome(nodes, token)) for token, weight in enumerate(law.tolist()) if weight > 0
    ]
