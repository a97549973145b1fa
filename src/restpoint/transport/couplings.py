"""Couplings of several drafted siblings with one target law.

A drafter proposes tokens X_1 .. X_n for one position, drawn from q; the model wants one token Y ~ p. A coupling says
with which law Y is drawn once the drafts are seen. Averaged over the drafts that law is p, so nothing of the output
changes; the more often Y is among the drafts, the more of the drafted tree is kept. The best possible coupling is
:class:`restpoint.transport.optimal.OptimalTransport`.

Everything is one row, in float64 inside, and nothing here waits for the device unless it says so.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.transport.siblings import Drawing, check_count, check_drafts, require_several, without
from restpoint.transport.variation import residual

_LARGEST_ENUMERATION = 20_000_000


@dataclass(frozen=True)
class SiblingCoupling(ABC):
    """A joint law of drafts X_1 .. X_n ~ q and a result Y ~ p, given as the law of Y when the drafts are known.

    Attributes:
        name: what tables call it.
        drawn: how the siblings must have been drawn.
    """

    name: str
    drawn: Drawing

    @abstractmethod
    def kernel(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> Float[Tensor, " vocab"]:
        """The law of Y given the drafts; over all drafts, the sum of P(drafts) times this law is p.

        Args:
            p: the target's law.
            q: the law of the first draft, after every warper.
            drafts: all siblings that were drawn, in that order. Their number may depend on q, not on their values.

        Returns:
            A distribution in float64; :func:`restpoint.transport.variation.draw` takes Y from it.

        Raises:
            RestpointError: p and q are not two rows of one vocabulary in float32 or float64, the drafts are none, too
                many, or not in the vocabulary.
        """

    @abstractmethod
    def acceptance(self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int) -> float:
        """The probability that Y is one of ``count`` drafts; waits for the device.

        Raises:
            RestpointError: as :meth:`kernel`.
        """


@dataclass(frozen=True)
class MaximalCoupling(SiblingCoupling):
    """One draft: Y = x with probability min(1, p(x)/q(x)), else Y ~ norm((p - q)_+). Attains 1 - TV(p, q).

    Use it for one drawn token, alone or beside siblings chosen without chance (see
    :func:`restpoint.transport.optimal.greedy_and_one`).

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
        "Accelerating Large Language Model Decoding with Speculative Sampling".
    """

    name: str = field(default="maximal", init=False)
    drawn: Drawing = field(default="one", init=False)

    def kernel(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> Float[Tensor, " vocab"]:
        p, q = rows(p, q)
        check_drafts(drafts, p.shape[0], self.drawn)
        accepted = _kept(p, q, drafts[0])
        law = (1 - accepted) * residual(p, q)
        law[drafts[0]] += accepted
        return law

    def acceptance(self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int) -> float:
        """1 - TV(p, q), in closed form; ``count`` must be 1."""
        check_count(count, self.drawn)
        p, q = rows(p, q)
        return float(torch.minimum(p, q).sum())


@dataclass(frozen=True)
class KSeq(SiblingCoupling):
    """Independent drafts: the first x_i that passes min(1, p/(r q)) is Y; else Y ~ norm(p - min(q, p/r) a/b).

    Here b = sum min(q, p/r) is the chance of one draft, a = 1 - (1 - b)^n that of all, and r in [1, n] is the smallest
    with a <= r b, which keeps the last law non-negative. At least 1 - 1/e of the optimum; cheap at any vocabulary and
    any number of drafts. Siblings drawn without replacement do better: prefer :class:`RecursiveRejection` or the
    optimum where the drafter can draw so.

    Attributes:
        bisections: halvings of [1, n] in the search for r. Whatever r they end at, Y's law is exactly p; the
            acceptance is short of its value at the root by less than (n - 1) 2^-bisections.

    Paper:
        Sun, Suresh, Ro, Beirami, Jain, Yu 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport".
    """

    name: str = field(default="k-seq", init=False)
    drawn: Drawing = field(default="independent", init=False)
    bisections: int = 24

    def kernel(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> Float[Tensor, " vocab"]:
        p, q = rows(p, q)
        check_drafts(drafts, p.shape[0], self.drawn)
        thinned, one, several = self._thinned(p, q, len(drafts))
        left = (p - thinned * (several / one.clamp_min(torch.finfo(p.dtype).tiny))).clamp_min_(0)
        left = torch.where(left.sum() > 4 * torch.finfo(p.dtype).eps, left, p)
        law, reached = torch.zeros_like(p), torch.ones_like(one)
        for token in drafts:
            accepted = _kept(thinned, q, token)
            law[token] += reached * accepted
            reached = reached * (1 - accepted)
        return law + reached * left / left.sum()

    def acceptance(self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int) -> float:
        """1 - (1 - b)^n, in closed form but for the bisection."""
        check_count(count, self.drawn)
        p, q = rows(p, q)
        return float(self._thinned(p, q, count)[2])

    def _thinned(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int
    ) -> tuple[Float[Tensor, " vocab"], Float[Tensor, ""], Float[Tensor, ""]]:
        """min(q, p/r), its sum b, and 1 - (1 - b)^n, at an r not below the root."""
        low, high = torch.ones_like(p[0]), torch.full_like(p[0], float(count))
        for _ in range(self.bisections if count > 1 else 0):
            middle = (low + high) / 2
            one = torch.minimum(q, p / middle).sum()
            enough = 1 - (1 - one) ** count <= middle * one
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        thinned = torch.minimum(q, p / high)
        one = thinned.sum().clamp_max(1.0)
        return thinned, one, 1 - (1 - one) ** count


@dataclass(frozen=True)
class RecursiveRejection(SiblingCoupling):
    """Each draft in turn: Y = x with probability min(1, p/q), else p <- norm((p - q)_+) and on to the next draft.

    Without replacement q also becomes norm(q with x zeroed); so each next draft is one that can still be accepted, and
    a target that q covers is met in few drafts. Cheap at any vocabulary, and with siblings drawn without replacement
    a good choice where the optimum's milliseconds are too many. It is not optimal.

    Attributes:
        drawn: "without replacement" or "independent".

    Raises:
        RestpointError: ``drawn`` is "one".

    Paper:
        Jeon et al. 2024, "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
        Replacement"; Miao et al. 2024, "SpecInfer" (independent drafts).
    """

    name: str = field(default="recursive", init=False)
    drawn: Drawing = "without replacement"

    def __post_init__(self) -> None:
        require_several(self.drawn)

    def kernel(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> Float[Tensor, " vocab"]:
        p, q = rows(p, q)
        check_drafts(drafts, p.shape[0], self.drawn)
        law, reached = torch.zeros_like(p), torch.ones_like(p[0])
        for token in drafts:
            accepted = _kept(p, q, token)
            law[token] += reached * accepted
            reached = reached * (1 - accepted)
            p = residual(p, q)
            if self.drawn == "without replacement":
                q = without(q, [token])
        return law + reached * p

    def acceptance(self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int) -> float:
        """Independent: closed form. Without replacement: by enumeration, vocab^count additions.

        Raises:
            RestpointError: as :meth:`kernel`; or vocab^count is above 2 10^7.
        """
        check_count(count, self.drawn)
        p, q = rows(p, q)
        if self.drawn == "independent":
            rejected = 1.0
            for _ in range(count):
                rejected *= 1 - float(torch.minimum(p, q).sum())
                p = residual(p, q)
            return 1 - rejected
        vocab = p.shape[0]
        if vocab**count > _LARGEST_ENUMERATION:
            raise RestpointError(
                f"count={count} drafts of {vocab} tokens without replacement are too many to enumerate: give a "
                f"smaller count, or p and q on their common top tokens (vocab^count <= {_LARGEST_ENUMERATION})"
            )
        total = 0.0
        p, q, weight = p[None], q[None], torch.ones_like(p[:1])
        for left in range(count - 1, -1, -1):
            total += float(weight @ torch.minimum(p, q).sum(-1))
            if left:
                path, token = torch.nonzero((weight[:, None] * (q - p)) > 0, as_tuple=True)
                weight = weight[path] * (q - p)[path, token]
                p = residual(p, q)[path]
                q = q[path].scatter(1, token[:, None], 0.0)
                q = q / q.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        return min(total, 1.0)


def rows(
    p: Shaped[Tensor, " vocab"], q: Shaped[Tensor, " drafted"]
) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """Both laws in float64, with sum 1.

    Raises:
        RestpointError: they differ in shape or are in half precision.
    """
    if p.shape != q.shape:
        raise RestpointError(
            f"p has {p.shape[0]} tokens and q has {q.shape[0]}: put the draft law q on the target's vocabulary"
        )
    for name, law in (("p", p), ("q", q)):
        if law.dtype not in (torch.float32, torch.float64):
            raise RestpointError(f"{name} is {law.dtype}, which cannot hold a distribution: logits.float().softmax(-1)")
    p, q = p.double(), q.double()
    return p / p.sum(), q / q.sum()


def _kept(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], token: int) -> Float[Tensor, ""]:
    """min(1, p/q) of a drafted token. Where q denies it: kept exactly if p gives it any probability."""
    wanted, drafted = p[token], q[token]
    return torch.where(drafted > 0, (wanted / drafted).clamp_max(1.0), (wanted > 0).to(p.dtype))
