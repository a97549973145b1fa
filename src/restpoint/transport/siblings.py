"""Siblings drafted for one position: how they are drawn from one law, and which drafts can have been drawn so."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.transport.variation import draw

Drawing = Literal["one", "independent", "without replacement"]
"""How siblings are drawn: one only, several from the same law, or each from what the ones before it left."""


def draw_siblings(
    q: Float[Tensor, " vocab"], count: int, drawn: Drawing, uniforms: Float[Tensor, " count"]
) -> list[int]:
    """Tokens that a coupling of this ``drawn`` may be given, in the order drawn; waits for the device once.

    Without replacement each is drawn from q without those before it, which is the law of Gumbel-top-k; it stops where
    q has no more tokens, so that fewer may come.

    Args:
        q: the law of the first; need not be normalised.
        count: how many.
        drawn: how.
        uniforms: one number in [0, 1) for each.

    Raises:
        RestpointError: ``count`` is below 1, or above 1 where one is to be drawn, or not the number of ``uniforms``.

    Paper:
        Kool, van Hoof, Welling 2019, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
        Sequences Without Replacement".
    """
    check_count(count, drawn)
    if uniforms.shape[0] != count:
        raise RestpointError(f"uniforms has {uniforms.shape[0]} numbers for count={count}: give one for each draw")
    if drawn != "without replacement":
        return draw(q.expand(count, -1), uniforms).tolist()
    left = q.clone()
    tokens = [(q > 0).sum()]
    for uniform in uniforms:
        token = draw(left, uniform)
        tokens.append(token)
        left.scatter_(0, token[None], 0.0)
    possible, *found = torch.stack(tokens).tolist()
    return found[:possible]


def without(q: Float[Tensor, " vocab"], tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
    """norm(q with these tokens zeroed): the law of the next draft without replacement; zero where none is left."""
    if not tokens:
        return q
    left = q.clone()
    if len(tokens) == 1:
        left[tokens[0]] = 0.0
    else:
        left[torch.tensor(tokens, device=q.device)] = 0.0
    return left / left.sum().clamp_min(torch.finfo(q.dtype).tiny)


def check_drafts(drafts: Sequence[int], vocab: int, drawn: Drawing) -> None:
    """Refuses drafts that cannot have been drawn so.

    Raises:
        RestpointError: they are none, too many, outside the vocabulary, or repeated though drawn without replacement.
    """
    check_count(len(drafts), drawn, "drafts")
    if min(drafts) < 0 or max(drafts) >= vocab:
        raise RestpointError(f"drafts={list(drafts)} leave the vocabulary of {vocab} tokens: give token ids of p")
    if drawn == "without replacement" and len(set(drafts)) < len(drafts):
        raise RestpointError(
            f"drafts={list(drafts)} repeat a token, so they were not drawn without replacement: draw them with "
            "draw_siblings(..., drawn='without replacement'), or take a coupling for independent drafts"
        )


def check_count(count: int, drawn: Drawing, argument: str = "count") -> None:
    """Refuses a number of drafts below 1, or above 1 where one is drawn.

    Raises:
        RestpointError: as said.
    """
    if count < 1:
        raise RestpointError(f"{argument} must be at least one draft, got {count}")
    if drawn == "one" and count > 1:
        raise RestpointError(
            f"{argument}: {count} drafts for a coupling of one; take one that is drawn 'independent' or "
            "'without replacement'"
        )


def require_several(drawn: Drawing) -> None:
    """Refuses "one" for a coupling that exists for several drafts.

    Raises:
        RestpointError: as said.
    """
    if drawn == "one":
        raise RestpointError(
            "drawn='one' needs no coupling of several drafts: take MaximalCoupling, or give 'independent' or "
            "'without replacement'"
        )
