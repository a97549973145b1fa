"""Depth and tokens as one system: several tokens drafted by sweeps over all layers at all positions at once."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.depth import sweep_depth
from restpoint.equilibrium.slopes import Slopes
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.depth import layer_functions
from restpoint.model.layered import LayeredModel


def joint_sweeps(
    layered: LayeredModel,
    cache: SlotCache,
    pending: int,
    guesses: Sequence[int],
    previous: Float[Tensor, "levels hidden"] | None = None,
    slopes: Slopes | None = None,
) -> Iterator[list[int]]:
    """Refine guesses of the next n tokens together with the states of every layer; one sweep reads all weights once.

    Unknown are the tokens y_1 .. y_n after the pending one and h_1 .. h_L at all n + 1 positions. A sweep evaluates
    every layer at every position at the states of the sweep before, takes the step of
    :func:`~restpoint.equilibrium.depth.sweep_depth`, and reads y_{j+1} off h_L of position j. Where a token changes,
    its states move with its embedding.

    Its fixed point is Jacobi iteration's, the greedy text, and position 0 is exact after L sweeps, position j after
    (j + 1) L at most. But a pass of Jacobi iteration, which runs the layers one after the other, reads the same
    weights as a sweep and gets every position's states right for the guesses that it was given. So on one device a
    sweep can only do better by luck; sweeps are for layers that run in parallel.

    Nothing is committed to the cache.

    Args:
        layered: the model.
        cache: of one text, up to before the pending token.
        pending: the token after it.
        guesses: first y_1 .. y_n.
        previous: h_0 .. h_L of the last token in the cache, whose increments every position starts with; None starts
            from h_l = h_0.
        slopes: Jacobians of the layers; the identity if None.

    Yields:
        y_1 .. y_{n+1} after every sweep, without end.

    Raises:
        RestpointError: the cache holds several texts.
    """
    if cache.batch != 1:
        raise RestpointError(f"cache: it holds {cache.batch} texts; give the cache of one")
    tokens = [pending, *guesses]
    plan = layered.plan(torch.tensor([tokens], device=layered.device), cache)
    layers, first = layer_functions(layered, plan), plan.hidden
    states = first.expand(layered.depth, *first.shape).clone()
    if previous is not None:
        states += (previous[1:] - previous[:1])[:, None, None]
    while True:
        states = next(sweep_depth(layers, first, states, slopes)).states
        choices = layered.logits(states[-1])[0].argmax(-1).tolist()
        yield choices
        tokens = [pending, *choices[:-1]]
        moved = layered.embed(torch.tensor([tokens], device=layered.device), cache.lengths[0])
        states, first = states + (moved - first), moved
