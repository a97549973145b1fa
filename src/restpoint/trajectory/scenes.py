"""Scenes: a few sentences kept whole, to be looked at."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from restpoint.model.watch import Loop
from restpoint.trajectory.measure import Readout, Trajectory


@dataclass(frozen=True, eq=False)
class Scene:
    """One sentence on its way through the layers.

    Attributes:
        text: the sentence.
        tokens: its tokens as they are read.
        plane: states in the three leading principal directions of all the states of the sentence, after each has been
            divided by its norm.
        norms: ‖h_l(t)‖.
        predicted: the most probable next token by the lens of every state; empty where the model predicts none.
        probability: its probability.
        entropy: of that law in nats.
        settled: the first layer from which the most probable token is the last layer's at every later one.
        domain: the kind of text.
        path: where a block is iterated, s_1 .. s_r in the two leading principal directions of s_k - s_r over the
            sentence's tokens, s_r in the origin; s_0, which the text has no part in, is left out.
    """

    text: str
    tokens: list[str]
    plane: Float[Tensor, "depth tokens 3"]
    norms: Float[Tensor, "depth tokens"]
    predicted: list[list[str]]
    probability: Float[Tensor, "depth tokens"]
    entropy: Float[Tensor, "depth tokens"]
    settled: Int[Tensor, " tokens"]
    domain: str = ""
    path: Float[Tensor, "iterates tokens 2"] | None = None


@torch.inference_mode()
def scene(
    trajectory: Trajectory,
    readout: Readout | None,
    tokenizer: PreTrainedTokenizerBase,
    most: int = 32,
    loop: Loop | None = None,
) -> Scene:
    """The first tokens of a text, to be looked at.

    Args:
        trajectory: of a text.
        readout: final norm and unembedding; None for a model without, whose states predict nothing.
        tokenizer: for the names of tokens.
        most: tokens kept.
        loop: where iterates stand among the states, if there are any.
    """
    assert trajectory.ids is not None
    ids, states = trajectory.ids[:most], trajectory.states[:, :most]
    norms = states.norm(dim=-1)
    units = states / norms.unsqueeze(-1).clamp_min(torch.finfo(states.dtype).tiny)
    cloud = units.flatten(0, 1) - units.mean((0, 1))
    directions = torch.linalg.svd(cloud, full_matrices=False).Vh[:3]
    plane = torch.zeros(*norms.shape, 3)
    plane[..., : len(directions)] = ((units - units.mean((0, 1))) @ directions.T).float()
    probability, entropy = torch.zeros_like(norms), torch.zeros_like(norms)
    best = torch.zeros(norms.shape, dtype=torch.long)
    for layer, own in enumerate(trajectory.read[:, :most] if readout is not None else ()):
        assert readout is not None
        law = readout(own).float().softmax(-1)
        top = law.max(-1)
        probability[layer], best[layer] = top.values, top.indices
        entropy[layer] = torch.special.entr(law).sum(-1)
    same = (best == best[-1]).flip(0).int().cumprod(0)  # from the last layer back, as long as nothing differs
    return Scene(
        text=_text(tokenizer, ids.tolist()),
        tokens=_names(tokenizer, ids),
        plane=plane,
        norms=norms,
        predicted=[_names(tokenizer, row) for row in best] if readout is not None else [],
        probability=probability,
        entropy=entropy,
        settled=len(states) - same.sum(0).long(),
        domain=trajectory.domain,
        path=None if loop is None else path_of(states[loop.iterates()[1:]]),
    )


def path_of(iterates: Float[Tensor, "iterates tokens hidden"]) -> Float[Tensor, "iterates tokens 2"]:
    """Iterates, seen from the last, in the two directions that their squared distances from it are largest along."""
    way = iterates - iterates[-1]
    directions = torch.linalg.svd(way.flatten(0, 1), full_matrices=False).Vh[:2]
    path = torch.zeros(*way.shape[:2], 2)
    path[..., : len(directions)] = (way @ directions.T).float()
    return path


def _names(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [_text(tokenizer, [token]) for token in ids.tolist()]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))
