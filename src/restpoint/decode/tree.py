"""The tree of one round while it grows: what it is drafted from, and its limits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from restpoint.decode.draft import ROOT, Drawn, TokenPath
from restpoint.decode.trie import Trie


@dataclass(frozen=True)
class TreeSettings:
    """Limits of the tree.

    Attributes:
        nodes: largest number of drafted nodes in a round.
        fixed: verify exactly so many nodes (as far as drafters name them) instead of choosing the number.
        levels: a fixed number of levels for the stepped drafter instead of choosing it.
        children: tokens that a stepped drafter names after each node.
        width: nodes of one level after which a stepped drafter goes on.
        draws: tokens drawn after each expanded node when tokens are sampled, where the verifier couples several.
        branching: False for a chain: one token after the other.
    """

    nodes: int = 48
    fixed: int | None = None
    levels: int | None = None
    children: int = 8
    width: int = 4
    draws: int = 1
    branching: bool = True

    def limit(self, largest: int) -> int:
        """Nodes that a round may have, where the largest pass whose cost is known has so many."""
        return min(self.nodes, largest)


@dataclass
class RoundTree:
    """What a round is drafted from.

    Attributes:
        path: the text so far.
        room: the deepest that a node may lie.
        trie: all that was named or drawn.
        expanded: nodes that the stepped drafter has a law after, with its own numbers for them.
        drawn: for nodes with children drawn at random, which these are and from which law.
        frontier: nodes that the stepped drafter would go on after.
        levels: of the stepped drafter.
        asked: whether drafters were asked at all.
        expected: nodes of the draft that stand, on average.
        resumes: whether the verification goes on where the stepped drafter's layers ended.
    """

    path: TokenPath
    room: int
    trie: Trie = field(default_factory=Trie)
    expanded: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    levels: int = 0
    asked: bool = False
    expected: float = 0.0
    resumes: bool = False

    def uncovered(self, node: int) -> float:
        """Probability that a node stands and the token after it has not been named yet."""
        return self.trie.reach(node) * (1.0 - self.trie.covered(node))

    def text(self, node: int) -> list[int]:
        """The whole text up to a node."""
        trie, tokens = self.trie, list[int]()
        while node != ROOT:
            tokens.append(trie.tokens[node])
            node = trie.parents[node]
        return [*self.path.tokens, *reversed(tokens)]

    def with_ancestors(self, nodes: Sequence[int]) -> set[int]:
        """These nodes and all before them, without the root."""
        found: set[int] = set()
        for node in nodes:
            while node != ROOT and node not in found:
                found.add(node)
                node = self.trie.parents[node]
        return found
