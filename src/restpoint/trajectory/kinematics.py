"""Steps, angles, accelerations and curvature of tokens along depth."""

import torch
from jaxtyping import Float
from torch import Tensor

ORDERS = {"norm": 0, "step": 1, "relative_step": 1, "state_angle": 1, "angle": 2, "acceleration": 2, "curvature": 2}
"""Of each quantity of :func:`kinematics`: 0 is of states, 1 of steps, 2 of pairs of steps."""

MOTIONS = tuple(ORDERS)
"""Quantities of :func:`kinematics`."""


def kinematics(states: Float[Tensor, "depth *tokens hidden"]) -> dict[str, Float[Tensor, "..."]]:
    """How tokens move, with D_l = h_l - h_{l-1}; angles are cosines, lengths are in units of the states.

    * ``norm``: ‖h_l‖, for l = 0 .. L.
    * ``step``: ‖D_l‖, and ``relative_step``: ‖D_l‖ / ‖h_{l-1}‖, for l = 1 .. L.
    * ``state_angle``: cos(h_l, h_{l-1}), for l = 1 .. L.
    * ``angle``: cos(D_l, D_{l-1}), ``acceleration``: ‖D_l - D_{l-1}‖, and ``curvature``: the distance between the
      directions of D_l and D_{l-1}, divided by the mean of their lengths, for l = 2 .. L.

    Where a token does not move, or is zero, what would be divided by zero is NaN.

    Paper:
        Pappone et al. 2025, "Two-scale latent dynamics for recurrent-depth transformers" (angles, acceleration);
        Hosseini, Fedorenko 2023, "Large language models implicitly learn to straighten neural sentence
        trajectories" (curvature).
    """
    steps = states.diff(dim=0)
    norms, sizes = states.norm(dim=-1), steps.norm(dim=-1)
    angles = torch.linalg.vecdot(steps[1:], steps[:-1]) / (sizes[1:] * sizes[:-1])
    angles = angles.clamp(-1, 1)
    return {
        "norm": norms,
        "step": sizes,
        "relative_step": _defined(sizes / norms[:-1]),
        "state_angle": (torch.linalg.vecdot(states[1:], states[:-1]) / (norms[1:] * norms[:-1])).clamp(-1, 1),
        "angle": angles,
        "acceleration": steps.diff(dim=0).norm(dim=-1),
        "curvature": _defined((2 - 2 * angles).sqrt() / ((sizes[1:] + sizes[:-1]) / 2)),
    }


def _defined(values: Tensor) -> Tensor:
    """A length divided by zero is no number either."""
    return values.masked_fill(values.isinf(), float("nan"))
