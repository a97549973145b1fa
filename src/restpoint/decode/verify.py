"""Which drafted tokens stand: the coupling that keeps the model's own law."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.decode.sampling import Sampler
from restpoint.errors import RestpointError
from restpoint.transport.variation import accepts, draw, residual


@dataclass(frozen=True)
class Outcome:
    """What verification decided.

    Attributes:
        accepted: number of drafted tokens kept.
        next_token: the token after them: the replacement of the first rejected one, or the bonus token.
    """

    accepted: int
    next_token: int


def verify(logits: Float[Tensor, "block vocab"], draft: Draft, prefix: list[int], sampler: Sampler) -> Outcome:
    """Token-wise verification by maximal coupling: the emitted tokens follow the target's law exactly.

    Row i of ``logits`` is the target after the pending token and i drafted ones. Greedy: a drafted token is kept
    while it equals the target's argmax. Sampling: token x_i ~ q_i is kept with probability min(1, p_i(x_i)/q_i(x_i));
    the first rejected one is replaced by a draw from norm((p_i - q_i)_+); after k kept ones a bonus token is drawn
    from p_{k+1}. The expected share kept at position i is 1 - TV(p_i, q_i).

    Args:
        logits: the target's logits on the pending and the drafted tokens.
        draft: the drafted tokens with the law that they were drawn from.
        prefix: all tokens up to and with the last drafted one.
        sampler: processors and random numbers.

    Raises:
        RestpointError: the target's logits contain NaN.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
        "Accelerating Large Language Model Decoding with Speculative Sampling".
    """
    count = len(draft.tokens)
    if sampler.greedy:
        best = sampler.best(logits, prefix)
        *targets, finite = torch.cat([best, torch.isfinite(logits.amax()).long()[None]]).tolist()
        _require(bool(finite))
        accepted = 0
        while accepted < count and draft.tokens[accepted] == targets[accepted]:
            accepted += 1
        return Outcome(accepted, targets[accepted])
    p = sampler.law(logits, prefix)
    _require(bool(torch.isfinite(p[:, 0]).all()))
    accepted = 0
    if count:
        drafted = torch.tensor(draft.tokens, device=p.device)
        q = draft.law
        if q is None:
            q = torch.zeros_like(p[:count]).scatter_(1, drafted[:, None], 1.0)
        kept = accepts(drafted, p[:count], q, sampler.uniforms(count)).tolist()
        accepted = kept.index(False) if False in kept else count
        if accepted < count:
            replacement = draw(residual(p[accepted], q[accepted]), sampler.uniforms(1)[0])
            return Outcome(accepted, int(replacement))
    return Outcome(accepted, int(draw(p[count], sampler.uniforms(1)[0])))


def _require(finite: bool) -> None:
    if not finite:
        raise RestpointError(
            "model: its logits are NaN or infinite at this prompt; check the weights, or load in float32 (dtype)"
        )
