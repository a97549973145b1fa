"""Total variation between next-token distributions, and the coupling that attains it.

Speculative sampling is optimal transport under the 0-1 cost: among all joint laws of a draft ``X ~ q`` and a
result ``Y ~ p``, the maximal coupling makes ``X = Y`` as often as possible, namely with probability ``1 -
TV(p, q)``. Everything here is vectorised over rows, leaves its arguments alone and never waits for the
device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class Coupling:
    """The outcome of `maximal_coupling`, one entry per row."""

    accepted: Bool[Tensor, "*batch"]
    """Whether the drafted token was kept."""
    token: Int[Tensor, "*batch"]
    """The drafted token where it was kept, else a draw from the residual. Its law is exactly p."""


def total_variation(p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """TV(p, q) = 1/2 sum |p - q|, in [0, 1]: the least probability that coupled draws differ."""
    return (p - q).abs().sum(-1).mul(0.5)


def acceptance(p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Sum min(p, q) = 1 - TV(p, q): the probability that a draft from q is kept under target p."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """norm((p - q)_+): the law of the token that replaces a rejected draft.

    Where p and q agree to rounding (their total variation is below four units of the dtype) the difference is
    rounding noise and has no direction; p is returned there. Such a row is reached with that tiny probability
    only, so the law of the result moves by no more than the rounding of p itself.

    Args:
        p: the target distribution, rows that sum to 1.
        q: the draft distribution, rows that sum to 1.

    Returns:
        Distributions with the same shape and dtype, without NaN for any finite p and q with p not all zero.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding".
    """
    excess = (p - q).clamp_min_(0)
    mass = excess.sum(-1, keepdim=True)
    chosen = torch.where(mass > 4 * torch.finfo(p.dtype).eps, excess, p)
    return chosen / chosen.sum(-1, keepdim=True)


def draw(weights: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Inverse-CDF draw: the first token whose cumulative weight exceeds ``uniform`` times the total.

    The weights need not sum to 1. The cumulative sum runs in float64, so that a vocabulary of 10^5 tokens
    keeps its tail, and a token of weight 0 is never drawn.

    Args:
        weights: non-negative weights, not all zero in a row.
        uniform: one number in [0, 1) for each row.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    aim = uniform.unsqueeze(-1) * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, aim, right=True).squeeze(-1)
    return token.clamp_max_(weights.shape[-1] - 1)


def accepts(
    draft: Int[Tensor, "*batch"],
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    uniform: Float[Tensor, "*batch"],
) -> Bool[Tensor, "*batch"]:
    """Whether each draft is kept: ``uniform < p(draft) / q(draft)``, written without the division.

    A draft of target probability 0 is never kept. ``q(draft) = 0`` cannot happen for a draft drawn from q;
    should a caller break that promise the answer is still a Boolean: kept exactly if p gives the token any
    probability.
    """
    index = draft.long().unsqueeze(-1)
    return uniform * q.gather(-1, index).squeeze(-1) < p.gather(-1, index).squeeze(-1)


def maximal_coupling(
    draft: Int[Tensor, "*batch"],
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    uniform: Float[Tensor, "*batch"],
    second_uniform: Float[Tensor, "*batch"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Coupling:
    """Keep ``x ~ q`` with probability min(1, p(x)/q(x)), else draw from norm((p - q)_+): the law is p.

    Use it for token-wise verification of one draft per row. It draws a replacement for every row, kept or
    not, so that nothing waits for the device; a chain verifier that needs a replacement at one row only calls
    `accepts` on the chain, then `residual` and `draw` on that row. For several drafts per row it is not
    optimal.

    Args:
        draft: token ids drawn from q, one per row.
        p: target distributions, float32 or float64.
        q: draft distributions, same dtype. They must be the law the draft was really drawn from, after every
            warper.
        uniform: numbers in [0, 1) that decide acceptance.
        second_uniform: numbers in [0, 1), independent of ``uniform``, that draw the replacement. Drawn here
            if absent.
        generator: source of ``second_uniform`` where that is absent; the device's default generator if
            absent.

    Returns:
        Which drafts were kept, and the resulting tokens.

    Raises:
        RestpointError: p and q differ in shape or dtype, or are in half precision, where a sum over the
            vocabulary is not a distribution.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et
        al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".
    """
    if p.shape != q.shape or p.dtype != q.dtype:
        raise RestpointError(
            f"p and q must have one shape and dtype, got {tuple(p.shape)} {p.dtype} and "
            f"{tuple(q.shape)} {q.dtype}; put the draft probabilities on the target's vocabulary and dtype"
        )
    if p.dtype not in (torch.float32, torch.float64):
        raise RestpointError(f"p is {p.dtype}, which cannot hold a distribution; pass logits.float().softmax(-1)")
    accepted = accepts(draft, p, q, uniform)
    if second_uniform is None:
        second_uniform = torch.rand(draft.shape, dtype=p.dtype, device=p.device, generator=generator)
    replacement = draw(residual(p, q), second_uniform)
    return Coupling(accepted, torch.where(accepted, draft, replacement.to(draft.dtype)))
