"""A chart of a loop's exits: steps per token against what they cost in perplexity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restpoint import files
from restpoint.evaluate.chart import COLOURS, OWN_COLOUR, check_path
from restpoint.evaluate.looped.curves import LoopCurve, LoopPoint
from restpoint.evaluate.looped.run import STATIC, LoopReport

_LINES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))
_MOST = 8
"""Times the rise at which ways are compared: what the chart shows upwards."""
_SHADED = 2


def draw(found: LoopReport, path: Path | str) -> None:
    """Draw the rise of perplexity over steps per token, criteria left and starts right, and write the chart.

    The lowest and leftmost curve is the best. Bands are 95% intervals over texts, for the first two curves: more of
    them would hide each other. The line across is the rise at which ways are compared.

    Args:
        found: the sweep.
        path: a .png, .svg or .pdf file.

    Raises:
        RestpointError: the suffix is unknown, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_path(path)
    panels: list[tuple[str, Mapping[str, LoopCurve]]] = [("exit criteria", found.curves)]
    if found.starts is not None:
        panels.append(("starts, by relative step", found.starts.curves))
    figure = Figure(figsize=(7.4 * len(panels), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(every, panels, strict=True):
        _panel(axes, title, curves, found)
    ceiling = found.oracle.points()[0].steps.value
    every[0].axvline(ceiling, color="#222222", linewidth=1.4, linestyle=(0, (5, 3)), label="oracle", zorder=1)
    for axes in every:
        axes.legend(loc="upper right", frameon=False, fontsize=9, handlelength=3.6)  # so long that dashes show
    figure.suptitle(f"Leaving the loop early on {found.model}", fontsize=13, fontweight="bold")
    files.write(path, lambda temporary: figure.savefig(temporary, dpi=150), "plot")


def _panel(axes: Any, title: str, curves: Mapping[str, LoopCurve], found: LoopReport) -> None:
    colours = (OWN_COLOUR, *COLOURS)
    drawn = [name for name in curves if name != STATIC]
    for name, curve in curves.items():
        points = sorted(curve.points(), key=lambda point: point.steps.value)
        at, rises = [point.steps.value for point in points], [100 * point.increase.value for point in points]
        if name == STATIC:
            look = {"markerfacecolor": "white", "markeredgecolor": "#333333", "zorder": 4}
            axes.plot(at, rises, linestyle="none", marker="D", markersize=6, label="same for all tokens", **look)
            continue
        place = drawn.index(name)
        colour, style = colours[place % len(colours)], _LINES[place // len(colours) % len(_LINES)]
        axes.plot(at, rises, color=colour, linestyle=style, marker=".", linewidth=1.7, label=name, zorder=3)
        if place < _SHADED:
            _shade(axes, points, colour)
    axes.axhline(100 * found.increase, color="#333333", linewidth=0.9, zorder=1)
    axes.axhline(0, color="#bbbbbb", linewidth=0.9, zorder=1)
    axes.set_ylim(-200 * found.increase, 100 * _MOST * found.increase)
    axes.set_xlim(0.8, found.steps + 0.2)
    axes.set_xlabel(f"core steps per token, of {found.steps}")
    axes.set_ylabel("perplexity above that of the full count, %")
    axes.grid(color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}; {found.texts} texts of {found.text_tokens} tokens", fontsize=9.5, color="#444444")


def _shade(axes: Any, points: list[LoopPoint], colour: str) -> None:
    lows, highs = [point.increase.low for point in points], [point.increase.high for point in points]
    if None in lows or None in highs:
        return
    axes.fill_between(
        [point.steps.value for point in points],
        [100 * low for low in lows if low is not None],
        [100 * high for high in highs if high is not None],
        color=colour,
        alpha=0.14,
        linewidth=0,
        zorder=2,
    )
