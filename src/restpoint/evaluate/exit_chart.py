"""A chart of early exits: what each signal saves, against the share of tokens that become others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from restpoint import files
from restpoint.errors import RestpointError
from restpoint.evaluate.chart import COLOURS, OWN_COLOUR, check_path
from restpoint.exit.bootstrap import Estimate
from restpoint.exit.sweep import LASTING_ORACLE, ORACLE, STATIC, Curve, Point

_LINES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))
_SHADED = 4
"""Curves of which intervals are drawn: more of them would hide each other."""

Against = Literal["layers", "speed"]


def draw(
    curves: Mapping[str, Curve],
    path: Path | str,
    *,
    shows: Against = "layers",
    most: float = 0.1,
    model: str = "",
) -> None:
    """Draw layers saved or expected speed against disagreement, and write the chart, complete or not at all.

    Curves by a signal are lines with their 95% intervals, oracles are dashed, and fixed depths are dots. An oracle
    with budgets is a ceiling at every disagreement, one without at none.

    Args:
        curves: by name, of the same traces.
        path: a .png, .svg or .pdf file.
        shows: what is drawn upwards: layers left out, or expected rate over plain decoding.
        most: largest disagreement that is drawn, a share of tokens.
        model: name for the title.

    Raises:
        RestpointError: the suffix is unknown, there is no curve, the share is not in (0, 1], a curve has no speed, or
            the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_path(path)
    if not curves:
        raise RestpointError("curves: there is none; give at least one")
    if not 0 < most <= 1:
        raise RestpointError(f"most is {most}; give a share of tokens above 0, up to 1")
    figure = Figure(figsize=(8.0, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    signals = [name for name in curves if name not in (ORACLE, LASTING_ORACLE, STATIC)]
    tops = [0.0]
    for name, curve in curves.items():
        points = _within(curve, most, shows)
        if not points:
            continue
        if name in signals:
            tops.append(_line(axes, name, points, signals.index(name), len(signals) <= _SHADED))
        elif name == STATIC:
            tops.append(_dots(axes, name, points))
        else:
            tops.append(_ceiling(axes, name, points, most))
    axes.set_xlim(0, 100 * most)
    base = 1.0 if shows == "speed" else 0.0
    axes.set_ylim(None if shows == "speed" else 0.0, base + 1.06 * (max(*tops, base + 0.1) - base))
    _label(axes, next(iter(curves.values())), shows, model, len(signals) <= _SHADED)
    files.write(path, lambda temporary: figure.savefig(temporary, dpi=160), "plot")


_Drawn = tuple[float, Estimate]
"""Disagreement in percent, and what is drawn upwards."""


def _within(curve: Curve, most: float, shows: Against) -> list[_Drawn]:
    """Points up to a disagreement, by disagreement, and the first one beyond, so that lines reach the edge."""
    points = sorted(curve.points(), key=lambda point: (point.disagreement.value, -point.layers_seen.value))
    inside = sum(point.disagreement.value <= most for point in points)
    shown = points[: inside + 1] if curve.name not in (ORACLE, LASTING_ORACLE, STATIC) else points[:inside]
    return [(100 * point.disagreement.value, _upwards(curve, point, shows)) for point in shown]


def _upwards(curve: Curve, point: Point, shows: Against) -> Estimate:
    if shows == "speed":
        if point.speed is None:
            raise RestpointError(f"curves: {curve.name} has no speed; sweep with costs, or show layers")
        return point.speed
    seen = point.layers_seen
    if seen.low is None or seen.high is None:
        return Estimate(curve.depth - seen.value)
    return Estimate(curve.depth - seen.value, curve.depth - seen.high, curve.depth - seen.low)


def _line(axes: Any, name: str, points: list[_Drawn], place: int, shaded: bool) -> float:
    colours = (OWN_COLOUR, *COLOURS)
    colour = colours[place % len(colours)]
    at = [share for share, _ in points]
    style = _LINES[place // len(colours) % len(_LINES)]
    axes.plot(at, [own.value for _, own in points], color=colour, linestyle=style, linewidth=1.9, label=name, zorder=3)
    if shaded and all(own.low is not None for _, own in points):
        low, high = [own.low for _, own in points], [own.high for _, own in points]
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    return max(own.value for _, own in points[:-1] or points)


def _dots(axes: Any, name: str, points: list[_Drawn]) -> float:
    heights = [own.value for _, own in points]
    axes.plot(
        [share for share, _ in points],
        heights,
        linestyle="none",
        marker="D",
        markersize=6.5,
        markerfacecolor="white",
        markeredgecolor="#333333",
        label=name,
        zorder=4,
        clip_on=False,
    )
    return max(heights)


def _ceiling(axes: Any, name: str, points: list[_Drawn], most: float) -> float:
    colour = "#222222" if name == ORACLE else "#888888"
    heights = [own.value for _, own in points]
    if len(points) == 1:
        axes.plot(0, heights[0], marker="*", markersize=13, color=colour, linestyle="none", clip_on=False, zorder=5)
        axes.axhline(heights[0], color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
        axes.plot([], [], color=colour, linestyle=(0, (5, 3)), marker="*", markersize=10, label=f"{name}, none differs")
        return heights[0]
    at = [share for share, _ in points]
    if at[-1] < 100 * most:  # nothing more is to be had from more errors
        at, heights = [*at, 100 * most], [*heights, heights[-1]]
    label = f"{name} (ceiling)" if name == ORACLE else name
    axes.plot(at, heights, color=colour, linewidth=1.6, linestyle=(0, (5, 3)), label=label, zorder=2)
    return max(heights)


def _label(axes: Any, curve: Curve, shows: Against, model: str, shaded: bool) -> None:
    axes.set_xlabel("tokens that are not the full model's, %")
    if shows == "speed":
        axes.axhline(1.0, color="#333333", linewidth=1.0, zorder=1)
        axes.set_ylabel("expected speed, times plain decoding")
    else:
        axes.set_ylabel(f"layers left out per token, of {curve.depth}")
    axes.grid(color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    title = "What early exit could save" if shows == "layers" else "How fast early exit could be"
    axes.figure.suptitle(f"{title}{f' on {model}' if model else ''}", fontsize=13, fontweight="bold")
    layers = ", ".join(map(str, curve.layers))
    bands = "; bands: 95% bootstrap intervals over texts" if shaded and curve.sequences > 2 else ""
    below = f"exits after layers {layers} of {curve.depth}; {curve.sequences} greedy texts{bands}"
    axes.set_title(below, fontsize=9, color="#444444")
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
