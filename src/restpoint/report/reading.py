"""Reads results of a measure and remembers which, so that a page can list what it had no chart for."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from restpoint.model.watch import Loop
from restpoint.report.charts import Line

_NOT_DEPTH = {"energy.betas", "layer.mean"}
_LAST_AXIS = {"energy", "layer.histogram"}
_LISTED = 20_000


class Reader:
    """Results of one measure.

    Attributes:
        layers: L; there are L + 1 states.
        ticks: names of the states, where a number does not say what they are.
        loop: where among them iterates stand, if there are any.
        taken: names of what was read.
    """

    def __init__(
        self, results: Mapping[str, Tensor], layers: int, names: Sequence[str] = (), loop: Loop | None = None
    ) -> None:
        self._results = results
        self.layers = layers
        self.ticks = tuple(names)
        self.loop = loop
        self.taken: set[str] = set()

    def names(self) -> list[str]:
        """Of all results."""
        return list(self._results)

    def array(self, name: str, axes: int) -> np.ndarray | None:
        """A result with that many axes, none of them empty; None where there is none."""
        value = self._results.get(name)
        if value is None or value.ndim != axes or not value.numel():
            return None
        self.taken.add(name)
        return value.detach().cpu().double().numpy()

    def number(self, name: str) -> float | None:
        """A result that is one finite number."""
        value = self._results.get(name)
        if value is None or value.numel() != 1:
            return None
        self.taken.add(name)
        found = float(value)
        return found if math.isfinite(found) else None

    def profile(self, name: str, label: str, colour: int = 0, first: int | None = None) -> list[Line]:
        """A result over depth as a line; no line where there is none.

        What is known of n layers or states is known of the last n: of n = L + 1 states, L steps or L - 1 turns; or of
        those from ``first`` on.
        """
        value = self.array(name, 1)
        if value is None:
            return []
        depths = self.depths(len(value)) if first is None else np.arange(first, first + len(value), dtype=float)
        return [Line(label, depths, value, colour=colour)]

    def depths(self, count: int) -> np.ndarray:
        """The last so many of the layers 0 .. L."""
        return np.arange(self.layers + 1 - count, self.layers + 1, dtype=float)

    def called(self, depths: Iterable[float | int]) -> list[str]:
        """Names of states, or their numbers."""
        return [self.ticks[int(depth)] if self.ticks else f"{depth:.0f}" for depth in depths]

    def rest(self) -> list[tuple[str, list[str]]]:
        """What was not read: a name, with an index where it has several rows, and its numbers."""
        rows = []
        for name, value in self._results.items():
            if name not in self.taken:
                rows += _rows(name, value.detach().cpu().double().numpy())
        return rows


def depth_axis(name: str, value: Tensor, layers: int) -> int | None:
    """Which axis of a result is depth; None where none is.

    An axis of L - 1, L or L + 1 entries is, the first one if there are several. Where a name is known, it decides.
    """
    if name in _NOT_DEPTH or name.startswith("blocks.") or not value.ndim:
        return None
    sizes = {layers - 1, layers, layers + 1} - {0}
    order = (value.ndim - 1,) if name in _LAST_AXIS else (0, value.ndim - 1)
    return next((axis for axis in order if value.shape[axis] in sizes), None)


def shown(value: float) -> str:
    """A number to be read."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _rows(name: str, value: np.ndarray) -> list[tuple[str, list[str]]]:
    if value.size > _LISTED:
        sizes = " x ".join(str(size) for size in value.shape)
        return [(name, [f"{sizes} numbers, too many to list here; the exported tables have them"])]
    if value.ndim <= 1:
        return [(name, [f"{number:.5g}" for number in value.reshape(-1).tolist()])]
    return [
        (f"{name}[{', '.join(str(at) for at in index)}]", [f"{number:.5g}" for number in value[index].tolist()])
        for index in np.ndindex(value.shape[:-1])
    ]
