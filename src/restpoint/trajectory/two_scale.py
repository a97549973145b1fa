"""The measure of two scales: small steps within a block of layers or iterates, and the drift from block to block."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.watch import Loop
from restpoint.trajectory.histogram import Scale
from restpoint.trajectory.kinematics import kinematics
from restpoint.trajectory.measure import Measure, Trajectory

STEPS = ("step", "relative_step", "angle", "acceleration", "curvature", "remaining")
"""Quantities of single steps, each told of the state that the step arrives at."""

LEGS = ("within", "path", "net", "entry", "across", "straightness", "drift_ratio", "step_ratio")
"""Quantities of whole blocks."""

_LENGTH = Scale(1e-9, 1e6, 3000, logarithmic=True)
_SCALES = dict.fromkeys((*STEPS, *LEGS), _LENGTH) | {
    "angle": Scale(-1.0, 1.0, 1000),
    "straightness": Scale(0.0, 1.0, 1000),
}
_NOISE = 8


@dataclass(frozen=True)
class Block:
    """A stretch of the states h_0 .. h_L.

    Attributes:
        name: prelude, loop, coda, or the layers.
        states: numbers of x_0 .. x_n, in order.
    """

    name: str
    states: tuple[int, ...]


def blocks_of(length: int, loop: Loop | None, count: int) -> list[Block]:
    """The blocks of a model with L layers.

    Prelude (h_0 .. e), loop (s_0 .. s_r) and coda (s_r, and what leaves its layers) where a block is iterated. Else
    ``count`` stretches of layers, as equal as they can be, each beginning with the state that the one before ends with;
    as many as there are layers where these are fewer.
    """
    if loop is None:
        count = min(count, length)
        edges = [round(number * length / count) for number in range(count + 1)]
        return [
            Block(f"layers {first + 1}-{last}" if last > first + 1 else f"layer {last}", tuple(range(first, last + 1)))
            for first, last in pairwise(edges)
        ]
    stretches = {
        "prelude": tuple(range(loop.first)),
        "loop": tuple(loop.iterates()),
        "coda": tuple(range(loop.last, length + 1)),
    }
    return [Block(name, states) for name, states in stretches.items() if len(states) > 1]


class TwoScale(Measure):
    """Steps within blocks against the drift across them, for every token; lengths are in units of the states.

    A block has the states x_0 .. x_n and the steps D_k = x_k - x_{k-1}; y is the last state of the block before, or
    x_0 in the first one. Results, one value a state that a step of a block arrives at (NaN at others):

    * ``step``: ‖D_k‖. ``relative_step``: ‖D_k‖ / ‖x_{k-1}‖.
    * ``angle``: cos(D_k, D_{k-1}). 1 goes straight on, 0 turns square, -1 goes back; a logarithmic spiral in the
      plane, x_k = a^k R^k x_0 with R a turn by t, has cos t at all k.
    * ``acceleration``: ‖D_k - D_{k-1}‖. ``curvature``: ‖D_k / ‖D_k‖ - D_{k-1} / ‖D_{k-1}‖‖ over the mean of both
      lengths, in 1 / state units.
    * ``remaining``: ‖x_k - x_n‖ / ‖x_n - x_0‖, what is left of the way; above 1 behind a detour, 0 at the end.
    * ``still``: the share of tokens whose step is lost in rounding, below 8 units of rounding of their state.
      It has no direction, so it has no part in ``angle`` and ``curvature``.

    and one value a block, ``blocks.`` and:

    * ``within``: (1/n) sum ‖D_k‖, the mean step. ``path``: sum ‖D_k‖. ``net``: ‖x_n - x_0‖.
    * ``straightness``: net / path. 1 on a straight line, 0 on a closed loop; below 1 / sqrt(n) the steps undo one
      another more than independent ones of one length would.
    * ``entry``: ‖x_0 - y‖, 0 where a block begins with y. ``across``: ‖x_n - y‖, the drift from block to block.
    * ``drift_ratio``: ‖x - y‖ / (``within`` of the block before), with x the first state that the block adds: x_0, or
      x_1 where the block begins with y. Not defined in the first block. Two scales are told apart where it is far
      above 1.
    * ``step_ratio``: within / across, of one block.
    * ``first`` and ``last``: numbers of x_0 and x_n.

    Each has ``.mean`` and ``.std`` over tokens and quantiles ``.q05`` to ``.q95``, the last of every second text. Where
    a token does not move, what would be divided by zero is left out.

    Args:
        blocks: of the model.
        rounding: relative, of the states as the model computes them: ``torch.finfo(dtype).eps``.

    Raises:
        RestpointError: a trajectory has fewer states than the blocks name.

    Paper:
        Pappone et al. 2025, "Two-scale latent dynamics for recurrent-depth transformers".
    """

    name: ClassVar[str] = "two-scale"
    papers: ClassVar[tuple[str, ...]] = (
        "Pappone et al. 2025, Two-scale latent dynamics for recurrent-depth transformers",
        "Geiping et al. 2025, Scaling up test-time compute with latent reasoning: a recurrent depth approach",
    )

    def __init__(self, blocks: Sequence[Block], rounding: float = 2.0**-23):
        super().__init__()
        self.blocks = list(blocks)
        self.rounding = rounding

    def add(self, trajectory: Trajectory) -> None:
        """See :meth:`Measure.add`."""
        states = trajectory.states
        depth, tokens, _ = states.shape
        last = max(block.states[-1] for block in self.blocks)
        if depth <= last:
            raise RestpointError(f"states: there are {depth}, and the blocks go up to state {last}; give those of all")
        steps = {name: torch.full((depth, tokens), torch.nan) for name in STEPS}
        legs = {name: torch.full((len(self.blocks), tokens), torch.nan) for name in LEGS}
        still = torch.zeros(depth, dtype=torch.int64)
        before, pace = states[self.blocks[0].states[0]], None
        for number, block in enumerate(self.blocks):
            own = states[list(block.states)]
            resting = own.diff(dim=0).norm(dim=-1) <= _NOISE * self.rounding * own[:-1].norm(dim=-1)
            arrived = torch.tensor(block.states[1:])
            still[arrived] = resting.sum(-1).cpu()
            for name, values in _steps(own, resting).items():
                steps[name][arrived[-len(values) :] if len(values) else arrived[:0]] = values.cpu().float()
            found = _legs(own, before)
            if pace is not None:
                shared = block.states[0] == self.blocks[number - 1].states[-1]
                found["drift_ratio"] = (own[int(shared)] - before).norm(dim=-1) / pace
            for name, value in found.items():
                legs[name][number] = value.cpu().float()
            before, pace = own[-1], found["within"]
        self._add("tokens", torch.tensor(tokens))
        self._add("still", still)
        for name, values in (steps | {f"blocks.{name}": values for name, values in legs.items()}).items():
            self._add_values(name, values, spread=trajectory.index % 2 == 0)

    def _add_values(self, name: str, values: Float[Tensor, "rows tokens"], spread: bool) -> None:
        known = values.isfinite()
        kept = values.double().where(known, 0.0)
        self._add(f"{name}.seen", known.sum(-1))
        self._add(f"{name}.sum", kept.sum(-1))
        self._add(f"{name}.squares", kept.square().sum(-1))
        if spread:
            scale = _SCALES[name.removeprefix("blocks.")]
            self._add(f"{name}.histogram", scale.count(values.masked_fill(~known, torch.nan)))

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """See :meth:`Measure.results`."""
        arrived = [state for block in self.blocks for state in block.states[1:]]
        still = torch.full_like(self.sums["still"], torch.nan, dtype=torch.float64)
        still[arrived] = self.sums["still"][arrived] / self.sums["tokens"].double()
        found: dict[str, Tensor] = {"tokens": self.sums["tokens"].double(), "still": still}
        for name in (*STEPS, *(f"blocks.{name}" for name in LEGS)):
            found |= self._values(name)
        for end, place in (("first", 0), ("last", -1)):
            ends = [float(block.states[place]) for block in self.blocks]
            found[f"blocks.{end}"] = torch.tensor(ends, dtype=torch.float64)
        return found

    def _values(self, name: str) -> dict[str, Tensor]:
        seen = self.sums[f"{name}.seen"].double()
        mean = self.sums[f"{name}.sum"] / seen
        variance = (self.sums[f"{name}.squares"] / seen - mean.square()).clamp_min(0)
        found = {f"{name}.mean": mean, f"{name}.std": variance.sqrt()}
        if f"{name}.histogram" in self.sums:
            scale, counts = _SCALES[name.removeprefix("blocks.")], self.sums[f"{name}.histogram"]
            found |= {f"{name}.{label}": values for label, values in scale.named_quantiles(counts).items()}
        return found


def _steps(states: Float[Tensor, "block tokens hidden"], still: Tensor) -> dict[str, Tensor]:
    """Quantities of the last so many steps of a block; not finite where there is nothing to tell."""
    motions = kinematics(states)
    directed = ~(still[1:] | still[:-1])
    found = {name: motions[name] for name in STEPS[:-1]}
    for name in ("angle", "curvature"):
        found[name] = found[name].where(directed, torch.nan)
    found["remaining"] = (states[1:] - states[-1]).norm(dim=-1) / (states[-1] - states[0]).norm(dim=-1)
    return found


def _legs(states: Float[Tensor, "block tokens hidden"], before: Float[Tensor, "tokens hidden"]) -> dict[str, Tensor]:
    steps = states.diff(dim=0).norm(dim=-1)
    path, within = steps.sum(0), steps.mean(0)
    net, across = (states[-1] - states[0]).norm(dim=-1), (states[-1] - before).norm(dim=-1)
    return {
        "within": within,
        "path": path,
        "net": net,
        "entry": (states[0] - before).norm(dim=-1),
        "across": across,
        "straightness": (net / path).clamp(max=1.0),  # rounding may exceed it
        "step_ratio": within / across,
    }
