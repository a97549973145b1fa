"""Looks at the losses of a training, and their picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Look:
    """A look at the losses.

    Attributes:
        step: steps behind it.
        training: mean loss of the steps since the look before, nats per token.
        held_out: loss in nats per token on held-out text, by the number of iterations; by the solver's most for a
            deep-equilibrium model.
    """

    step: int
    training: float
    held_out: dict[int, float]


def draw_losses(looks: Sequence[Look], path: Path) -> None:
    """Losses against steps as a PNG: of training, and held out by the number of iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    steps = [look.step for look in looks]
    axes.plot(steps, [look.training for look in looks], color="0.6", label="training, since the last look")
    numbers = list(looks[-1].held_out)
    for place, number in enumerate(numbers):
        shade = (0.1 + 0.8 * (1 - (place + 1) / len(numbers)), 0.35, 0.75)
        axes.plot(steps, [look.held_out[number] for look in looks], color=shade, label=f"held out, {number} iterations")
    axes.set(xlabel="steps", ylabel="nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
