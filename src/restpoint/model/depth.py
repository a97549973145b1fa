"""A model's layers as the functions that a solve over the depth takes, and the bytes that calling them reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree
from restpoint.model.plan import Plan

StateMap = Callable[[Tensor], Tensor]


def layer_functions(layered: LayeredModel, plan: Plan) -> list[StateMap]:
    """f_1 .. f_L of a planned pass, each on its own; keys and values that a call writes replace those of the last."""

    def function(index: int) -> StateMap:
        return lambda state: layered.run(plan, index, index + 1, state)

    return [function(index) for index in range(layered.depth)]


@dataclass(frozen=True, eq=False)
class TokensAlone:
    """Every token of a text as a system of its own, whose past is exact: what decoding one token after another meets.

    Attributes:
        states: h_0 .. h_L of the plain pass.
        layers: f_1 .. f_L; each token attends to the plain pass's states of earlier tokens and to its own state given.
    """

    states: Float[Tensor, "levels tokens hidden"]
    layers: Sequence[StateMap]


def tokens_alone(layered: LayeredModel, ids: Int[Tensor, "1 tokens"]) -> TokensAlone:
    """Split a text into systems of one token each, all evaluated in one call of a layer.

    The text is planned twice in one pass: as itself, and once more as a leaf beside each of its tokens, which sees the
    tokens before it and itself. A layer is given the plain pass's states for the former and the guesses for the latter.

    Args:
        layered: a model that can see trees (``check(layered).tree``).
        ids: the text.

    Raises:
        RestpointError: the text is empty, or the model shows no mask to be told of a tree.
    """
    count = ids.shape[1]
    if not count:
        raise RestpointError("ids: there is no token; give at least one")
    if any(kind is None for kind in layered.mask_kinds):
        raise RestpointError("layered: its layers take no attention mask, so tokens cannot be kept apart")
    before = range(-1, count - 1)
    plan = layered.plan(ids.repeat(1, 2), tree=Tree((*before, *before)))
    kept = [plan.hidden]
    layered.run(plan, keep=kept)
    states = torch.cat([state[:, :count] for state in kept])

    def function(index: int) -> StateMap:
        def run(state: Tensor) -> Tensor:
            both = torch.cat((states[index : index + 1], state[None]), 1)
            return layered.run(plan, index, index + 1, both)[0, count:]

        return run

    return TokensAlone(states, [function(index) for index in range(layered.depth)])


def layer_bytes(layered: LayeredModel) -> list[int]:
    """Bytes of the parameters of each layer, all read by one call at batch 1 (of experts: all of them, so a bound)."""
    return [_bytes(layer.parameters()) for layer in layered.stack.layers]


def head_bytes(layered: LayeredModel) -> int:
    """Bytes of the unembedding, read wherever logits are asked for."""
    return _bytes(layered.unembedding.parameters())


def sweep_bytes(layered: LayeredModel, sweeps: int) -> int:
    """Bytes of layers that so many sweeps over the depth read, each leaving out the layers that are exact before it."""
    sizes = layer_bytes(layered)
    return sum(sum(sizes[exact:]) for exact in range(min(sweeps, layered.depth)))


def _bytes(parameters) -> int:
    return sum(own.numel() * own.element_size() for own in parameters)
