"""Record states while a model reads text, and while it writes its own."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.model.layered import LayeredModel
from restpoint.model.plan import Plan
from restpoint.transport.variation import draw


def pack(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Lay documents end to end and cut them into sequences of ``length`` tokens; a shorter rest is dropped."""
    held: list[int] = []
    for document in documents:
        held.extend(document)
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


@torch.no_grad()
def states_of(
    layered: LayeredModel, ids: Int[Tensor, "batch seq"], layers: tuple[int, ...]
) -> Float[Tensor, "batch seq layers hidden"]:
    """States of whole sequences after some layers (0 is the embedding output) and after the last one."""
    kept = _run(layered, layered.plan(ids), layers)
    return torch.stack(kept, 2)


@torch.no_grad()
def continue_texts(
    layered: LayeredModel,
    prompts: Int[Tensor, "batch prompt"],
    length: int,
    layers: tuple[int, ...],
    greedy: Callable[[int], bool],
    seed: int,
) -> tuple[Int[Tensor, "batch seq"], Float[Tensor, "batch seq layers hidden"]]:
    """Let the model continue many prompts at once, keeping the states that it passes through.

    Args:
        layered: the model; it must have the ``cached`` capability.
        prompts: prompts of one length.
        length: tokens of each finished sequence, prompt included.
        layers: layers whose states are kept beside the last one's.
        greedy: whether a row takes the most probable token; others are sampled at temperature 1.
        seed: seed of the random numbers.

    Returns:
        Ids and states of the finished sequences.
    """
    batch = prompts.shape[0]
    generator = torch.Generator(device=layered.device).manual_seed(seed)
    sampled = torch.tensor([row for row in range(batch) if not greedy(row)], device=layered.device)
    cache = layered.cache(batch=batch, capacity=length)
    ids, block, states = [prompts], prompts, []
    while True:
        kept = _run(layered, layered.plan(block, cache), layers)
        cache.commit([block.shape[1]] * batch)
        states.append(torch.stack(kept, 2))
        if cache.lengths[0] == length:
            return torch.cat(ids, 1), torch.cat(states, 1)
        logits = layered.logits(kept[-1][:, -1:])[:, 0].float()
        tokens = logits.argmax(-1)
        if len(sampled):
            uniform = torch.rand(len(sampled), generator=generator, device=layered.device)
            tokens[sampled] = draw(torch.softmax(logits[sampled], -1), uniform)
        block = tokens[:, None]
        ids.append(block)


def _run(layered: LayeredModel, plan: Plan, layers: tuple[int, ...]) -> list[Tensor]:
    states = [plan.hidden]
    layered.run(plan, keep=states)
    return [states[layer] for layer in layers] + [states[-1]]
