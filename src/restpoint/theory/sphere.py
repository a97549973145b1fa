"""The unit sphere: starts, the tangential part of a velocity, and coming back after a step."""

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError


def project(
    states: Float64[Tensor, "*batch n dim"], force: Float64[Tensor, "*batch n dim"]
) -> Float64[Tensor, "*batch n dim"]:
    """P_x y = y - <x, y> x: the part of a force that is tangential to the sphere."""
    return force - (states * force).sum(-1, keepdim=True) * states


def retract(states: Float64[Tensor, "*batch n dim"]) -> Float64[Tensor, "*batch n dim"]:
    """X / |x| for every particle.

    Raises:
        RestpointError: one is the zero vector or not finite.
    """
    norms = states.norm(dim=-1, keepdim=True)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise RestpointError(
            "states: one is zero or not finite, so it is nowhere on the sphere; leave it out or set sphere=False"
        )
    return states / norms


def uniform_start(
    *shape: int, seed: int = 0, device: torch.device | str | None = None
) -> Float64[Tensor, "*batch n dim"]:
    """Particles drawn independently and uniformly on the sphere; ``shape`` is (*batch, n, dim).

    The draw is the CPU's, so a seed means the same start on every device. In one dimension the sphere is {-1, 1}, and
    no tangential velocity moves anything on it.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise RestpointError(f"shape is {shape}; give (*batch, n, dim), each at least 1")
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return retract(normal.to(device))
