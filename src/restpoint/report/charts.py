"""What a chart shows, whoever draws it: the page draws it with plotly, files with matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

PALETTE = ("#3b82c4", "#d9622b", "#2a9d76", "#c98a1b", "#a56bb8", "#7f8c8d")
"""Told apart with any colour vision, and legible on white and on black."""

_RELATIVE = "relative depth (layer / number of layers)"


@dataclass(frozen=True, eq=False)
class Line:
    """One quantity over depth, or over ranks.

    Attributes:
        name: in the legend.
        x: where.
        y: what; not finite where there is nothing to draw.
        bands: (low, high) of ranges around it, the widest first.
        colour: index into the palette.
        second: whether it is the other atlas's, and dashed.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    bands: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    colour: int = 0
    second: bool = False

    @property
    def scattered(self) -> bool:
        """Whether no point has a neighbour to be joined to, so that points themselves must be seen."""
        there = np.isfinite(self.y)
        return not (there[1:] & there[:-1]).any()


@dataclass(frozen=True, eq=False)
class Heat:
    """A matrix of shades.

    Attributes:
        values: rows from the bottom up.
        rows: names of the rows.
        columns: names of the columns.
        unit: of the values, beside the scale of colours.
        limits: of that scale; None for the values' own.
    """

    values: np.ndarray
    rows: list[str]
    columns: list[str]
    unit: str
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Trail:
    """The way of one token in a plane, coloured by step.

    Attributes:
        name: of the token.
        x: first coordinate at each step.
        y: second.
        steps: their numbers.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True, eq=False)
class Chart:
    """One picture with what to look at in it.

    Attributes:
        name: for a file and an anchor, unique in its section.
        title: what is drawn.
        caption: what to look at, and what theory says.
        x: title of the axis, with its unit.
        y: likewise.
        lines: drawn over one another.
        heat: drawn instead of lines.
        trails: drawn instead of both.
        ticks: names of the places 0, 1, .. of the axis that layers are on, or of x; their numbers if left out.
        layers: L, where x or y is the number of a layer; 0 where both are something else.
        upright: whether that is y.
        mark: a layer to point at, with what it is.
        logarithmic: whether y is.
        wide: whether it takes the whole width of the page.
    """

    name: str
    title: str
    caption: str
    x: str
    y: str
    lines: list[Line] = field(default_factory=list)
    heat: Heat | None = None
    trails: list[Trail] = field(default_factory=list)
    ticks: tuple[str, ...] = ()
    layers: int = 0
    upright: bool = False
    mark: tuple[float, str] | None = None
    logarithmic: bool = False
    wide: bool = False

    @property
    def compared(self) -> bool:
        """Whether another atlas is drawn into it."""
        return any(line.second for line in self.lines)

    def __bool__(self) -> bool:
        return self.heat is not None or bool(self.lines) or bool(self.trails)


def beside(charts: Sequence[Chart], others: Sequence[Chart], label: str) -> list[Chart]:
    """Charts with another atlas's lines drawn dashed into those of the same name, on relative depth if depths differ.

    Bands are drawn for the first atlas only; so are matrices.

    Args:
        charts: of the first atlas.
        others: of the second.
        label: of the second, in the legend.
    """
    found = {chart.name: chart for chart in others}
    return [_beside(chart, found[chart.name], label) if chart.name in found else chart for chart in charts]


def _beside(chart: Chart, other: Chart, label: str) -> Chart:
    if not chart.lines or not other.lines:
        return chart
    dashed = [replace(line, name=f"{line.name}, {label}", bands=(), second=True) for line in other.lines]
    if chart.layers == other.layers and chart.ticks == other.ticks:
        return replace(chart, lines=chart.lines + dashed)
    chart = replace(chart, ticks=())
    ours = [_relative(line, chart) for line in chart.lines]
    theirs = [_relative(line, other) for line in dashed]
    if chart.upright:
        return replace(chart, lines=ours + theirs, y=_RELATIVE)
    mark = None if chart.mark is None else (chart.mark[0] / chart.layers, chart.mark[1])
    return replace(chart, lines=ours + theirs, mark=mark, x=_RELATIVE)


def _relative(line: Line, chart: Chart) -> Line:
    return replace(line, y=line.y / chart.layers) if chart.upright else replace(line, x=line.x / chart.layers)
