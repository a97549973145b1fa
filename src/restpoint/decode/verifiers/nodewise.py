"""Verification from the root on, one node after the other."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Draft
from restpoint.decode.verifiers.base import Outcome, Possible, Uniforms, Verifier, spread
from restpoint.transport.couplings import SiblingCoupling
from restpoint.transport.siblings import Drawing
from restpoint.transport.variation import draw


@dataclass(frozen=True)
class NodeWise(Verifier):
    """At each node draw the next token Y by the coupling of its drawn children; go on where a child holds Y.

    Y has the target's law given everything before it, whether or not it was drafted, so the text has it too; and
    children chosen without chance cost nothing: where Y is one of them the walk goes on. The expected number of nodes
    that stand is the sum over nodes of the chance to reach them; at each node it is the best that the coupling offers,
    though not the best over whole paths (see :class:`~restpoint.decode.verifiers.traversal.Traversal`).

    It waits for the device once for each node passed, besides what the coupling itself waits.

    Attributes:
        coupling: what ties Y to the drawn children. With :class:`~restpoint.transport.couplings.MaximalCoupling` on a
            chain this is token-wise speculative sampling.

    Raises:
        RestpointError: from :meth:`verify`, where siblings were not drawn as the coupling wants.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"; Miao et al. 2024,
        "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification".
    """

    coupling: SiblingCoupling

    @property
    def drawn(self) -> Drawing:
        return self.coupling.drawn

    def verify(self, p: Float[Tensor, "rows vocab"], draft: Draft, uniforms: Uniforms) -> Outcome:
        self.check(p, draft)
        children = draft.children()
        chances = uniforms(len(draft.tokens) + 1)
        path: list[int] = []
        node = ROOT
        while True:
            token = int(draw(self._emission(p, draft, node), chances[len(path)]))
            below = children[node + 1].get(token)
            if below is None:
                return Outcome(tuple(path), token)
            path.append(below)
            node = below

    def outcomes(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> list[Possible]:
        self.check(p, draft)
        children = draft.children()
        found = []
        waiting: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
        while waiting:
            reached, path = waiting.pop()
            node = path[-1] if path else ROOT
            for possible in spread(reached, path, self._emission(p, draft, node)):
                below = children[node + 1].get(possible.outcome.next_token)
                if below is None:
                    found.append(possible)
                else:
                    waiting.append((possible.probability, (*path, below)))
        return found

    def _emission(self, p: Float[Tensor, "rows vocab"], draft: Draft, node: int) -> Float[Tensor, " vocab"]:
        """The law of the token after a node, given its drafted children."""
        group = draft.drawn.get(node)
        if group is None or not group.nodes:
            return p[node + 1]
        # The draft law in the target's dtype would be rounded; each is normalised in float64 as it came.
        return self.coupling.kernel(p[node + 1].double(), group.law.double(), [draft.tokens[i] for i in group.nodes])
