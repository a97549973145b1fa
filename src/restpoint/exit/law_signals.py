"""Signals that look at the law that an exit would emit: how sharp it is, and whether another look finds the same."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.exit.signals import Signal, unknown
from restpoint.exit.view import View
from restpoint.transport.variation import acceptance

_CALM = "Schuster et al. 2022, Confident Adaptive Language Modeling"
_RECURRENT_DEPTH = "Geiping et al. 2025, Scaling up Test-Time Compute with Latent Reasoning"


@dataclass(frozen=True)
class MaxProbability(Signal):
    """max_v p_l(v), the largest probability of the law read at layer l.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (softmax response).
    """

    kind: ClassVar[str] = "max-p"
    papers: ClassVar[tuple[str, ...]] = (_CALM,)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        return view.top_two[:, 0]


@dataclass(frozen=True)
class Margin(Signal):
    """p_l(first) - p_l(second), the lead of the most probable token.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (their softmax response is this difference).
    """

    kind: ClassVar[str] = "margin"
    papers: ClassVar[tuple[str, ...]] = (_CALM,)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        return view.top_two[:, 0] - view.top_two[:, 1]


@dataclass(frozen=True)
class LogitMargin(Signal):
    """1 - p_l(second) / p_l(first) = 1 - exp(-(z_1 - z_2)): the lead of the top logit, whatever mass the others have.

    It orders tokens by z_1 - z_2. A predicted law is flatter than the final one, so that its probabilities underrate
    tokens that are far ahead of a long tail. No softmax is taken.
    """

    kind: ClassVar[str] = "logit-margin"

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        first, second = view.lead[0].unbind(-1)
        return -torch.expm1(second - first)


@dataclass(frozen=True)
class Entropy(Signal):
    """1 - H(p_l) / log V: 0 for the uniform law, 1 where one token has all the mass.

    Paper:
        Teerapittayanon, McDanel, Kung 2016, "BranchyNet: fast inference via early exiting from deep neural networks".
    """

    kind: ClassVar[str] = "entropy"
    papers: ClassVar[tuple[str, ...]] = ("Teerapittayanon, McDanel, Kung 2016, BranchyNet",)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        return (1 - view.entropy / math.log(max(view.logits.shape[-1], 2))).clamp(0, 1)


@dataclass(frozen=True)
class EntropyDifference(Signal):
    """exp(-|H(p_l) - H(p_b)|), b the candidate layer before; 0 at the first one. Entropies are in nats.

    A threshold of exp(-tau) stops where the entropy changed by at most tau.

    Paper:
        Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning" (for iterated blocks).
    """

    kind: ClassVar[str] = "entropy-difference"
    papers: ClassVar[tuple[str, ...]] = (_RECURRENT_DEPTH,)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.earlier is None:
            return unknown(view)
        return (-(view.entropy - view.earlier.entropy).abs()).exp()


@dataclass(frozen=True)
class KullbackLeibler(Signal):
    """exp(-KL(p_l ‖ p_b)), b the candidate layer before; 0 at the first one. The divergence is in nats.

    A threshold of exp(-tau) stops where it is at most tau.

    Paper:
        Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning" (for iterated blocks).
    """

    kind: ClassVar[str] = "kl"
    papers: ClassVar[tuple[str, ...]] = (_RECURRENT_DEPTH,)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.earlier is None:
            return unknown(view)
        divergence = (view.log_law.exp() * (view.log_law - view.earlier.log_law)).sum(-1)
        return (-divergence.clamp_min(0)).exp()


@dataclass(frozen=True)
class Disagreement(Signal):
    """1 - TV(p_l, p_b), b the candidate layer before; 0 at the first one.

    Two predictors of one final law: the probability that draws from both agree, coupled as well as can be. The layer
    before has been read already, so it costs nothing; the logit lens of this layer would cost the head once more, and
    where the predictors are good it tells less.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding" (1 - TV as the rate
        of agreement).
    """

    kind: ClassVar[str] = "disagreement"
    papers: ClassVar[tuple[str, ...]] = (
        "Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding",
    )

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.earlier is None:
            return unknown(view)
        return acceptance(view.log_law.exp(), view.earlier.log_law.exp()).clamp(0, 1)
