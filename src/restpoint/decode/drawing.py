"""Tokens drawn at random, from what the tokens chosen before them leave of a drafter's law."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Drawn
from restpoint.decode.sampling import Sampler
from restpoint.decode.tree import RoundTree, TreeSettings
from restpoint.decode.trie import BY_CHANCE
from restpoint.transport.siblings import Drawing, draw_siblings
from restpoint.transport.variation import draw


@dataclass(frozen=True)
class ChildDrawing:
    """How children are drawn.

    Attributes:
        sampler: random numbers.
        settings: limits of the tree.
        how: how the verifier wants the children of a node drawn.
    """

    sampler: Sampler
    settings: TreeSettings
    how: Drawing

    @property
    def count(self) -> int:
        """Tokens drawn after a node."""
        return 1 if self.how == "one" or not self.settings.branching else self.settings.draws

    def draw(
        self, tree: RoundTree, nodes: Sequence[int], law: Float[Tensor, "nodes vocab"], worth: float, stands: float
    ) -> None:
        """Draw a token after each node that is worth one, from what its likely children leave of the law.

        Args:
            tree: of the round; the drawn nodes are added to it.
            nodes: to draw after.
            law: after each of them.
            worth: the probability of standing from which a node pays for its place in the pass.
            stands: the probability that a drawn token stands where its parent does.
        """
        trie, settings = tree.trie, self.settings
        chosen: list[int] = []
        rests: list[Tensor] = []
        for row, node in enumerate(nodes):
            if settings.fixed is None and trie.reach(node) * stands <= worth:
                continue
            rest = law[row]
            if settings.branching:
                likely = [token for token, child in trie.children[node + 1].items() if trie.reaches[child] > worth]
                rest = rest.index_fill(0, torch.tensor(likely, dtype=torch.long, device=law.device), 0.0)
            elif trie.covered(node) > max(stands, 0.5):
                continue
            chosen.append(node)
            rests.append(rest)
        if not chosen:
            return
        weights = torch.stack(rests).nan_to_num()
        masses = weights.sum(-1)
        if self.count == 1:
            drawn = draw(weights, self.sampler.uniforms(len(chosen)))[:, None].tolist()
        else:
            drawn = [draw_siblings(row, self.count, self.how, self.sampler.uniforms(self.count)) for row in weights]
        laws = weights / masses[:, None]
        for node, law_of_rest, tokens, mass in zip(chosen, laws, drawn, masses.tolist(), strict=True):
            if mass > 0:
                children = tuple(trie.add(node, token, BY_CHANCE, 0.0, stands) for token in tokens)
                tree.drawn[node] = Drawn(law_of_rest, children)
