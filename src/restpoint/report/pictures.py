"""Charts of an atlas as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np

from restpoint.report.charts import PALETTE, Chart, Heat
from restpoint.report.sections import sections
from restpoint.theory.study import write
from restpoint.trajectory.atlas import Atlas

_TICKS = 12


def export_pictures(atlas: Atlas, folder: Path, compare: Atlas | None = None) -> list[Path]:
    """Write ``SECTION-CHART.png`` for every chart of the report.

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
    for section in sections(atlas, compare):
        for chart in section.charts:
            path = folder / f"{section.name}-{chart.name}.png"
            _draw(chart, path)
            written.append(path)
    return written


def _draw(chart: Chart, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if chart.heat is None:
        _lines(chart, axes)
    else:
        _heat(chart.heat, axes, figure)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.set_title(chart.title, fontsize=11)
    write(path, lambda temporary: figure.savefig(temporary, dpi=150))


def _lines(chart: Chart, axes: Any) -> None:
    for line in chart.lines:
        colour = PALETTE[line.colour % len(PALETTE)]
        for low, high in line.bands:
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = "o" if len(line.x) == 1 else ""
        style = "--" if line.second else "-"
        axes.plot(line.x, line.y, color=colour, linestyle=style, marker=marker, label=line.name)
    if chart.mark is not None:
        axes.axvline(chart.mark[0], color=PALETTE[5], linestyle=":", label=chart.mark[1])
    if chart.logarithmic:
        axes.set_yscale("log")
    if len(chart.lines) > 1 or chart.mark is not None:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _heat(heat: Heat, axes: Any, figure: Any) -> None:
    low, high = heat.limits if heat.limits is not None else (None, None)
    values = np.ma.masked_invalid(heat.values)
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, label=heat.unit)
    for set_ticks, names in ((axes.set_xticks, heat.columns), (axes.set_yticks, heat.rows)):
        chosen = range(0, len(names), -(-len(names) // _TICKS))
        set_ticks(list(chosen), [names[at] for at in chosen])
