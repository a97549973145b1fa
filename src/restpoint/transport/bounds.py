"""What a distance still to go means for a distribution: a bound that always holds, and an estimate that does not."""

import torch
from jaxtyping import Float
from torch import Tensor


def softmax_variation_bound(
    a: Float[Tensor, "*batch vocab"], b: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """TV(softmax a, softmax b) <= tanh(osc(a - b) / 4), osc x = max x - min x; a bound, attained for any osc.

    osc(a - b) is Hilbert's projective distance between the two laws. Equality holds where a - b takes two values only
    and the tokens with the larger one have mass 1 / (1 + exp(osc / 2)) under b. Logits that differ by a constant have
    osc 0 and one law. Logits must be finite: leave masked tokens out of both.

    Paper:
        Cohen, Fausti 2023, "Hyperbolic contractivity and the Hilbert metric on probability measures".
    """
    apart = a - b
    return torch.tanh((apart.amax(-1) - apart.amin(-1)) / 4)


def contraction_estimate(step: Float[Tensor, "*#batch"], ratio: Float[Tensor, "*#batch"]) -> Float[Tensor, "*#batch"]:
    """The distance still to go if all later steps shrink at one rate: sum_k step ratio^k = step / (1 - ratio).

    With step = s_{l+1} = |h_{l+1} - h_l| and s_{k+1} <= ratio s_k for every later k it bounds |h_L - h_l|. A rate that
    was measured on the steps so far says nothing certain about later ones, so the result is an estimate.

    Args:
        step: size of the next step.
        ratio: size of a step divided by the one before.

    Returns:
        In units of the step; inf where the ratio is 1 or more, where the sum has no limit.
    """
    return torch.where(ratio < 1, step / (1 - ratio), torch.inf)
