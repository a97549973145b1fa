"""Verification of a tree from its leaves to the root."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Draft
from restpoint.decode.verifiers.base import LongestFirst, Stop
from restpoint.transport.siblings import Drawing, without


@dataclass(frozen=True)
class Traversal(LongestFirst):
    """Try the deepest path first; where a node is refused, what is left of its parent's law falls to its siblings.

    A node v is tried with worth P: the measure w = P p(. | v) is what the text through v may still claim. Its children
    are tried in turn, those drawn at random in the order drawn, then those chosen without chance (as if drawn from
    the point mass at their token):

    * child x, drawn from q, is worth min(1, w(x)/q(x)) and is tried with all of its own subtree;
    * if it is refused, w <- (w - q)_+ / (1 - sum min(w, q)); without replacement, q <- norm(q with x zeroed);
    * if all children are refused, v itself stands with probability sum w, the next token drawn from norm(w).

    A leaf stands with probability P, and at the root sum w = 1. On a chain this is block verification.

    Exact, by induction on the subtree: trying v with worth P yields v with a continuation y with probability
    P p(y | v), and refuses v otherwise. So for a leaf. For the first child, x ~ q, the yield at x is q(x) min(1,
    w(x)/q(x)) = min(w, q)(x) times the target after x. This is part of w, the refusal has probability 1 - sum min(w, q)
    whatever follows, and given it and the value of x the next children have to yield (w - min(w, q)) / (1 - sum
    min(w, q)), which the induction hypothesis for the remaining children, with their law given x, says they do. When
    no child is left, v with a token drawn from w has just that law. A token drawn again after it was refused has w(x) =
    0 and is refused at once. The order of siblings and how many are drawn may depend on the values before.

    In which order children are tried never changes the law; drawn ones first keeps more where q avoids the chosen
    ones, and then attains what node-wise verification does at one node.

    Use it for trees with drawn tokens more than one level deep. It waits for the device once for each node tried, and
    needs three passes over a row of the vocabulary for each refused one.

    Attributes:
        drawing: how siblings are drawn: "one", "independent" or "without replacement". One drawn sibling is right for
            any of them.

    Raises:
        RestpointError: from :meth:`verify`, where siblings were drawn otherwise.

    Paper:
        Weng, Hu, Chen, Liu, Mei, Qiu, Tian, Shi 2025, "Traversal Verification for Speculative Tree Decoding".
    """

    name: str = "traversal"
    drawing: Drawing = "without replacement"

    @property
    def drawn(self) -> Drawing:
        return self.drawing

    def stops(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> Iterator[Stop]:
        children = [list(tokens.values()) for tokens in draft.children()]
        yield from self._try(p, draft, children, ROOT, (), 1.0)

    def _try(
        self,
        p: Float[Tensor, "rows vocab"],
        draft: Draft,
        children: list[list[int]],
        node: int,
        path: tuple[int, ...],
        worth: float,
    ) -> Iterator[Stop]:
        """All places in the subtree of a node, which is tried with this worth."""
        if not children[node + 1]:
            yield Stop(worth, path, p[node + 1])
            return
        left = _Left.of(p[node + 1], worth)
        group = draft.drawn.get(node)
        order = group.nodes if group else ()
        q = group.law.double() / group.law.double().sum() if group else left.law
        tried = set()
        for child in order:
            token = draft.tokens[child]
            value = left.share(token, q)
            if child in tried:
                yield Stop(value, (*path, child), p[child + 1])
            else:
                yield from self._try(p, draft, children, child, (*path, child), value)
            tried.add(child)
            left = left.after_drawn(q)
            if self.drawing == "without replacement":
                q = without(q, [token])
        for child in children[node + 1]:
            if child not in tried:
                token = draft.tokens[child]
                yield from self._try(p, draft, children, child, (*path, child), left.share(token))
                left = left.after_chosen(token)
        yield Stop(1.0 if node == ROOT else float(left.total), path, left.measure)


@dataclass(frozen=True, eq=False)
class _Left:
    """What is left of a node's claim after some of its children were refused.

    Attributes:
        law: the target's after the node.
        measure: w, what the text through the node may still claim.
        total: sum w, at most 1.
    """

    law: Float[Tensor, " vocab"]
    measure: Float[Tensor, " vocab"]
    total: Float[Tensor, ""]

    @classmethod
    def of(cls, law: Float[Tensor, " vocab"], worth: float) -> "_Left":
        """The whole claim of a node of this worth."""
        law = law.double()
        law = law / law.sum()
        return cls(law, law * worth, torch.full_like(law[0], worth))

    def share(self, token: int, q: Float[Tensor, " vocab"] | None = None) -> float:
        """What a child that holds this token is worth, drawn from q or chosen without chance."""
        if q is None:
            return min(1.0, float(self.measure[token]))
        claimed, drafted = torch.stack([self.measure[token], q[token]]).tolist()
        if drafted <= 0:
            return float(claimed > 0)
        return min(1.0, claimed / drafted)

    def after_drawn(self, q: Float[Tensor, " vocab"]) -> "_Left":
        """A child drawn from q was refused."""
        return self._rest((self.measure - q).clamp_min_(0))

    def after_chosen(self, token: int) -> "_Left":
        """A child chosen without chance was refused."""
        rest = self.measure.clone()
        rest[token] = 0.0
        return self._rest(rest)

    def _rest(self, rest: Float[Tensor, " vocab"]) -> "_Left":
        total = rest.sum()
        refused = 1 - self.total + total
        # A refusal this improbable is rounding, and what it leaves has no direction.
        real = refused > 4 * torch.finfo(rest.dtype).eps
        refused = torch.where(real, refused, 1.0)
        measure = torch.where(real, rest / refused, self.law)
        return _Left(self.law, measure, torch.where(real, (total / refused).clamp_max(1.0), 1.0))
