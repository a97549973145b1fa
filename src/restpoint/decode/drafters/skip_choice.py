"""Which layers to leave out, chosen from one token's states by dynamic programming."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.drafters.skips import SkipSet
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree

RunLayer = Callable[[int, Float[Tensor, "states hidden"]], Float[Tensor, "states hidden"]]
"""Applies one layer to states of the same token."""


@dataclass(frozen=True)
class SkipChoice:
    """How layers are chosen while decoding.

    Attributes:
        skipped: how many layers to leave out.
        every: rounds between two choices; one costs about a pass of ``skipped + 1`` tokens.

    Raises:
        RestpointError: one of them is less than 1.
    """

    skipped: int
    every: int = 8

    def __post_init__(self) -> None:
        if self.skipped < 1 or self.every < 1:
            raise RestpointError(f"skipped={self.skipped}, every={self.every}: both must be at least 1")


def choose_layers(
    states: Float[Tensor, "levels hidden"], run_layer: RunLayer, most: int
) -> list[tuple[SkipSet, float]]:
    """For m = 0 .. most, which m layers to leave out so that the last state stays nearest to the full one.

    g(l, m) is the state after l layers of which m were left out::

        g(l, m) = the one of f_l(g(l-1, m)) and g(l-1, m-1) with the larger cosine to h_l

    which is one pass of most + 1 tokens, O(layers x most). It keeps one state for each (l, m), so it finds the best set
    where a nearer state stays nearer through the layers that follow, and a good one elsewhere.

    When to use: on one recent token, to adapt the set to the text. When not: to find the set that suits a whole corpus,
    which :func:`search_skip_set` judges by acceptance itself.

    Args:
        states: h_0 .. h_L of the token.
        run_layer: the layers.
        most: the largest number of layers to leave out.

    Returns:
        For each m the set and the cosine of its last state to h_L.

    Raises:
        RestpointError: ``most`` is not below the number of layers.

    Paper:
        Chen et al. 2025, "CLaSp: In-Context Layer Skip for Self-Speculative Decoding".
    """
    depth = states.shape[0] - 1
    if not 0 <= most < depth:
        raise RestpointError(f"most={most} is not below the number of layers, {depth}; give from 0 to {depth - 1}")
    reached = states[:1].expand(most + 1, -1)
    left_out: list[tuple[int, ...] | None] = [(), *[None] * most]
    similarity = torch.ones(most + 1)
    for layer in range(depth):
        full = states[layer + 1 : layer + 2]
        ran = run_layer(layer, reached)
        passed = reached.roll(1, 0)
        near = torch.stack([_cosine(ran, full), _cosine(passed, full)]).tolist()
        before = left_out
        left_out = [before[0]]
        passes = [False]
        for m in range(1, most + 1):
            can_run, can_pass = before[m] is not None, before[m - 1] is not None
            passes.append(can_pass and (not can_run or near[1][m] > near[0][m]))
            left_out.append((*(before[m - 1] or ()), layer) if passes[-1] else before[m])
        chosen = torch.tensor(passes, device=states.device)
        reached = torch.where(chosen[:, None], passed, ran)
        similarity = _cosine(reached, full)
    found = zip(left_out, similarity.tolist(), strict=True)
    return [(SkipSet(layers), near) for layers, near in found if layers is not None]


def choose_online(
    layered: LayeredModel, cache: SlotCache, states: Float[Tensor, "levels hidden"], choice: SkipChoice
) -> SkipSet:
    """Choose layers by the last token in a cache, of which ``states`` are h_0 .. h_L; slots behind it are used."""
    return choose_layers(states, layers_at_end(layered, cache, choice.skipped + 1), choice.skipped)[-1][0]


def layers_at_end(layered: LayeredModel, cache: SlotCache, count: int) -> RunLayer:
    """The model's layers on ``count`` versions of the last token in its cache at once.

    They stand at its position as siblings of it, in slots behind the text, so each sees the text before and itself.
    """
    cache.commit([-1])
    siblings = Tree((-1,) * (count + 1))
    ids = torch.zeros(1, count, dtype=torch.long, device=layered.device)
    plan = layered.plan(ids, cache, offset=1, tree=siblings)
    cache.commit([1])

    def run_layer(layer: int, states: Tensor) -> Tensor:
        return layered.run(plan, layer, layer + 1, states[None].to(layered.dtype))[0]

    return run_layer


def _cosine(states: Tensor, full: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(states.float(), full.float(), dim=-1)
