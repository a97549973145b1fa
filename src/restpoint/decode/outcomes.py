"""What a round's tokens turned out to be worth: who named those that came, and how often the drawn ones stood."""

from collections.abc import Sequence

from restpoint.decode.acceptance import Acceptance, Correction, Estimate
from restpoint.decode.draft import ROOT, Verified
from restpoint.decode.tree import RoundTree
from restpoint.decode.trie import BY_CHANCE

_DRAWN = 0.3  # acceptance of a token drawn from what the other children leave, before any was seen
_NEW = 0.45  # how often a stepped drafter names the next token where no other did, likewise
_FEW = 4.0  # outcomes that these two are worth


class Outcomes:
    """What drafters' tokens were worth so far in a text.

    Args:
        acceptances: by confidence, for each drafter: the instant ones, then the stepped one if there is any.
        instant: number of instant drafters.

    Attributes:
        acceptances: the same, as they learn.
        drawn: how often a drawn token stands where its parent does.
        new: how often the stepped drafter names the token that comes where no instant one does: after the pending
            token, and later.
        correction: of what drafters claim together.
    """

    def __init__(self, acceptances: Sequence[Acceptance], instant: int):
        self.acceptances = list(acceptances)
        self.drawn = Estimate(_DRAWN, _FEW)
        self.new = (Estimate(_NEW, _FEW), Estimate(_NEW, _FEW))
        self.correction = Correction()
        self._instant = instant

    def learn(self, tree: RoundTree, verified: Verified) -> None:
        """Hold all that was named after tokens that stood against the tokens that came."""
        trie = tree.trie
        node, seen = ROOT, [False, False]
        for token in verified.new_tokens:
            depth = trie.depth_after(node)
            came = trie.children[node + 1].get(token)
            for child in trie.children[node + 1].values():
                self.correction.add(depth, len(trie.offers[child]), trie.claims[child], child == came)
                for drafter, confidence in trie.offers[child]:
                    if drafter != BY_CHANCE:
                        self.acceptances[drafter].add(depth, confidence, child == came)
            if node in tree.drawn:
                self.drawn.add(float(came in tree.drawn[node].nodes))
            if node in tree.expanded:
                seen[depth > 0] = True
                by = [] if came is None else [drafter for drafter, _ in trie.offers[came]]
                if not any(0 <= drafter < self._instant for drafter in by):
                    self.new[depth > 0].add(float(bool(by)))
            if came is None:
                break
            node = came
        for estimate, was_seen in zip(self.new, seen, strict=True):
            if not was_seen:
                estimate.fade()
