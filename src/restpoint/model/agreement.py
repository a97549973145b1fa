"""Whether compiled passes say what the LayeredModel says, and the same at every width: established by numbers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.masks import Tree

if TYPE_CHECKING:
    from restpoint.model.compiled import CompiledModel

_TREE = (-1, 0, 0, 1, 2, 1, 3, -1)
_ROUNDS = 4


def require_agreement(compiled: "CompiledModel", width: int) -> None:
    """Compare a chain and a tree of one width with the LayeredModel, on random tokens after a random prompt.

    The largest difference allowed is 16 units in the last place of the largest logit, and 1e-4 of it.

    Raises:
        RestpointError: they differ.
    """
    layered = compiled.layered
    ids = _tokens(compiled, _prompt_length(compiled) + width)
    prompt, block = ids[:, :-width], ids[:, -width:]
    for tree in (None, Tree(_TREE[:width])):
        nodes = block if tree is None else block[:, : len(tree.parents)]
        eager = layered.cache()
        layered.run(layered.plan(prompt, eager))
        eager.commit([prompt.shape[1]])
        expected = layered.logits(layered.run(layered.plan(nodes, eager, tree=tree)))
        logits, _ = compiled.score(nodes, _filled(compiled, prompt), tree)
        largest = float(expected.float().abs().max())
        difference = float((logits.float() - expected.float()).abs().max())
        if not difference <= max(16 * torch.finfo(layered.dtype).eps, 1e-4) * largest:
            what = "a chain" if tree is None else "a tree"
            raise RestpointError(
                f"compile: {layered.config.model_type} cannot be compiled, because {what} of {width} tokens then gives"
                f" other logits (by {difference:.2g} of {largest:.2g}): leave compile out"
            )


def is_row_invariant(compiled: "CompiledModel") -> bool:
    """Whether a token's logits and h_L were the same to the last bit in every block that it was computed in.

    One-token passes over a text, committed one by one, are compared with wide passes at every position, of chains that
    go on with other tokens, and of trees that hold the text as one of their paths.
    """
    count = min(8, compiled.widths[-1])
    for seed in range(_ROUNDS):
        ids = _tokens(compiled, _prompt_length(compiled) + 2 * count, seed)
        prompt, text, other = ids[:, : -2 * count], ids[:, -2 * count : -count], ids[:, -count:]
        cache = _filled(compiled, prompt)
        single = []
        for token in text.split(1, dim=1):
            single.append(compiled.score(token, cache))
            cache.commit([1])
        expected = [torch.cat(parts, 1) for parts in zip(*single, strict=True)]
        for width in compiled.widths:
            kept = min(width, count)
            block = torch.cat([text[:, :kept], other.repeat(1, width)[:, : width - kept]], 1)
            if not _equal(compiled.score(block, _filled(compiled, prompt)), expected, range(kept), range(kept)):
                return False
            path = range(0, width, 2)[:count]
            if len(path) > 1:
                parents = tuple(
                    node - 2 if node % 2 == 0 and node else (node - 1 if node else -1) for node in range(width)
                )
                branched = other.repeat(1, width)[:, :width].clone()
                branched[:, list(path)] = text[:, : len(path)]
                cache = _filled(compiled, prompt)
                scored = compiled.score(branched, cache, Tree(parents))
                cache.keep(0, list(path[:-1]))
                if not _equal(scored, expected, path, range(len(path))):
                    return False
                last = compiled.score(text[:, len(path) - 1 : len(path)], cache)
                if not _equal(last, expected, range(1), range(len(path) - 1, len(path))):
                    return False
    return True


def _equal(scored: tuple[Tensor, Tensor], expected: list[Tensor], places: range, tokens: range) -> bool:
    return all(
        torch.equal(found[:, list(places)], wanted[:, list(tokens)])
        for found, wanted in zip(scored, expected, strict=True)
    )


def _filled(compiled: "CompiledModel", prompt: Tensor) -> SlotCache:
    """A cache with a prompt in it, read by the LayeredModel."""
    cache = compiled.cache()
    compiled.layered.run(compiled.layered.plan(prompt, cache))
    cache.commit([prompt.shape[1]])
    return cache


def _prompt_length(compiled: "CompiledModel") -> int:
    """Longer than most windows, where the model has the room."""
    windows = [kind.window for kind in compiled.layered.mask_kinds if kind is not None and kind.window is not None]
    room = (compiled.limit or compiled.capacity) - 2 * compiled.widths[-1] - 1
    return max(1, min(max([7, *(window + 3 for window in windows if window < 512)]), room))


def _tokens(compiled: "CompiledModel", count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, compiled.layered.vocabulary_size, (1, count), generator=generator)
    return ids.to(compiled.layered.device)
