"""One tree of all that drafters expect: the same token after the same tokens is one node."""

from restpoint.decode.acceptance import Acceptance, Correction
from restpoint.decode.draft import ROOT, Candidates

BY_CHANCE = -1
"""In place of a drafter's index: the token was drawn at random."""


class Trie:
    """Candidates of several drafters, merged, with the probability that each node stands.

    Args:
        correction: of what drafters claim together; None takes it as it is.

    Attributes:
        tokens: the token of each node.
        parents: the node that each follows; ``ROOT`` (-1) is the pending token.
        depths: 0 for a node that follows the pending token.
        claims: what drafters give a node together: 1 - prod (1 - c). (Their errors are not independent, so this is too
            sure; it orders nodes better than the largest c does.)
        chances: probability that a node stands if its parent does: the claim, corrected.
        reaches: probability that a node stands with all before it.
        offers: for each node, who named it: index of the drafter (or ``BY_CHANCE``) and its confidence.
        children: for the root and every node (entry node + 1): token to node.
    """

    def __init__(self, correction: Correction | None = None) -> None:
        self.correction = correction
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.claims: list[float] = []
        self.chances: list[float] = []
        self.reaches: list[float] = []
        self.offers: list[list[tuple[int, float]]] = []
        self.children: list[dict[int, int]] = [{}]

    def __len__(self) -> int:
        return len(self.tokens)

    def depth_after(self, node: int) -> int:
        """Depth of a node's children."""
        return 0 if node == ROOT else self.depths[node] + 1

    def reach(self, node: int) -> float:
        """Probability that a node stands; 1 for the root."""
        return 1.0 if node == ROOT else self.reaches[node]

    def add(self, parent: int, token: int, drafter: int, confidence: float, chance: float) -> int:
        """Add a node, or another drafter's word for it, and return it."""
        siblings = self.children[parent + 1]
        node = siblings.get(token)
        if node is None:
            node = siblings[token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depth_after(parent))
            self.offers.append([(drafter, confidence)])
            self.children.append({})
            self.claims.append(chance)
            self.chances.append(self._corrected(node))
            self.reaches.append(self.reach(parent) * self.chances[node])
        else:
            self.offers[node].append((drafter, confidence))
            self.claims[node] = 1.0 - (1.0 - self.claims[node]) * (1.0 - chance)
            self._change(node, self._corrected(node))
        return node

    def merge(self, candidates: Candidates, drafter: int, acceptance: Acceptance) -> None:
        """Add all candidates of a drafter."""
        placed: list[int] = []
        for token, parent, confidence in zip(
            candidates.tokens, candidates.parents, candidates.confidences, strict=True
        ):
            above = ROOT if parent == ROOT else placed[parent]
            chance = acceptance.of(self.depth_after(above), confidence)
            placed.append(self.add(above, token, drafter, confidence, chance))

    def covered(self, node: int) -> float:
        """Probability, at most 1, that the token after a node is among its children."""
        return min(1.0, sum((self.chances[child] for child in self.children[node + 1].values()), 0.0))

    def exclusive_reaches(self) -> list[float]:
        """Reaches in which siblings exclude each other: one stands only where none that is likelier does.

        Chances are learnt for each drafter by itself, so they may sum to more than 1 over siblings. With c_1 >= c_2 ..
        their chances, the i-th sibling stands with probability c_i (1 - c_1) .. (1 - c_{i-1}).
        """
        reaches = [0.0] * len(self.tokens)
        for above, siblings in enumerate(self.children):  # a parent is numbered before its children
            left = 1.0 if above == 0 else reaches[above - 1]
            for node in sorted(siblings.values(), key=self.chances.__getitem__, reverse=True):
                reaches[node] = left * self.chances[node]
                left -= reaches[node]
        return reaches

    def _corrected(self, node: int) -> float:
        claim, voices = self.claims[node], len(self.offers[node])
        return claim if self.correction is None else self.correction.of(self.depths[node], voices, claim)

    def _change(self, node: int, chance: float) -> None:
        """Give a node another chance; what lies below it is reached more or less often too."""
        self.chances[node] = chance
        waiting = [node]
        while waiting:
            changed = waiting.pop()
            self.reaches[changed] = self.reach(self.parents[changed]) * self.chances[changed]
            waiting.extend(self.children[changed + 1].values())
