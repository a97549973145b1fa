"""Which tokens of a text are looked at where looking at all of them costs too much."""

import torch
from jaxtyping import Int64
from torch import Tensor


def evenly_spaced(tokens: int, most: int) -> Int64[Tensor, " chosen"]:
    """Positions of at most ``most`` of so many tokens: all, or the first, the last and others evenly between."""
    if tokens <= most:
        return torch.arange(tokens)
    return torch.arange(most) * (tokens - 1) // max(1, most - 1)
