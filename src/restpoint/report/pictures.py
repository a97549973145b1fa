"""Charts of an atlas as PNG files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from restpoint.files import write
from restpoint.report.charts import PALETTE, Chart, Heat, Trail
from restpoint.report.sections import sections
from restpoint.trajectory.atlas import Atlas
from restpoint.trajectory.scenes import Scene

_TICKS = 12
_LONG = 4


def export_pictures(atlas: Atlas, folder: Path, compare: Atlas | None = None) -> list[Path]:
    """Write ``SECTION-CHART.png`` for every chart of the report, and ``trajectories-N.png`` for the N-th scene.

    Args:
        atlas: what was measured.
        folder: where to write; made if it is not there.
        compare: drawn dashed into every profile.

    Returns:
        The files.

    Raises:
        RestpointError: a file cannot be written.
    """
    written = []
    for number, found in enumerate(atlas.scenes, 1):
        path = folder / f"trajectories-{number}.png"
        _save(path, f"Tokens of sentence {number} through the layers", partial(_scene, found))
        written.append(path)
    for section in sections(atlas, compare):
        for chart in section.charts:
            path = folder / f"{section.name}-{chart.name}.png"
            _save(path, chart.title, partial(_chart, chart))
            written.append(path)
    return written


def _save(path: Path, title: str, draw: Callable[[Any, Any], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, figure)
    axes.set_title(title, fontsize=11)
    write(path, lambda temporary: figure.savefig(temporary, dpi=150))


def _scene(scene: Scene, axes: Any, figure: Any) -> None:
    """Paths in the plane, coloured by layer; without the tokens' text, whose script a font may lack."""
    plane = scene.plane[..., :2].detach().cpu().double().numpy()
    depth, tokens, _ = plane.shape
    axes.plot(plane[..., 0], plane[..., 1], color=PALETTE[5], linewidth=0.6, alpha=0.4, zorder=1)
    shades = np.repeat(np.arange(depth), tokens)
    dots = axes.scatter(*plane.reshape(-1, 2).T, c=shades, cmap="viridis", s=10, zorder=2)
    figure.colorbar(dots, label="layer")
    axes.set_xlabel("first principal direction (of states of length 1)")
    axes.set_ylabel("second principal direction")
    axes.set_aspect("equal", adjustable="datalim")


def _chart(chart: Chart, axes: Any, figure: Any) -> None:
    if chart.trails:
        _trails(chart.trails, axes, figure)
    elif chart.heat is not None:
        _heat(chart.heat, axes, figure)
    else:
        _lines(chart, axes)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)


def _lines(chart: Chart, axes: Any) -> None:
    for line in chart.lines:
        colour = PALETTE[line.colour % len(PALETTE)]
        for low, high in line.bands:
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = "o" if line.scattered else ""
        style = "--" if line.second else "-"
        axes.plot(line.x, line.y, color=colour, linestyle=style, marker=marker, label=line.name)
    if chart.mark is not None:
        axes.axvline(chart.mark[0], color=PALETTE[5], linestyle=":", label=chart.mark[1])
    if all(float(place).is_integer() for line in chart.lines for place in line.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.ticks:
        places = range(0, len(chart.ticks), -(-len(chart.ticks) // _TICKS))
        axis = axes.yaxis if chart.upright else axes.xaxis
        axis.set_ticks(list(places), [chart.ticks[place] for place in places])
        if not chart.upright and max(map(len, chart.ticks)) > _LONG:
            axes.tick_params(axis="x", rotation=30)
    if chart.logarithmic:
        axes.set_yscale("log")
    if len(chart.lines) > 1 or chart.mark is not None:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _trails(trails: list[Trail], axes: Any, figure: Any) -> None:
    """Ways in the plane, coloured by step; without the tokens' names, whose script a font may lack."""
    for trail in trails:
        axes.plot(trail.x, trail.y, color=PALETTE[5], linewidth=0.8, alpha=0.6, zorder=1)
    x, y, steps = (np.concatenate([getattr(trail, part) for trail in trails]) for part in ("x", "y", "steps"))
    dots = axes.scatter(x, y, c=steps, cmap="viridis", s=16, zorder=2)
    figure.colorbar(dots, label="step")
    axes.set_aspect("equal", adjustable="datalim")


def _heat(heat: Heat, axes: Any, figure: Any) -> None:
    low, high = heat.limits if heat.limits is not None else (None, None)
    values = np.ma.masked_invalid(heat.values)
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, label=heat.unit)
    for set_ticks, names in ((axes.set_xticks, heat.columns), (axes.set_yticks, heat.rows)):
        chosen = range(0, len(names), -(-len(names) // _TICKS))
        set_ticks(list(chosen), [names[at] for at in chosen])
    if max(len(name) for name in heat.columns) > _LONG:
        axes.tick_params(axis="x", rotation=30)
