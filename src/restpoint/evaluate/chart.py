"""A bar chart of a benchmark: how many times plain decoding, by domain and method."""

from pathlib import Path
from typing import Any

from restpoint import files
from restpoint.errors import RestpointError
from restpoint.evaluate.rows import AVERAGE, BenchReport, Row

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito, "Color Universal Design", 2008: told apart with any colour vision, and by lightness in print.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73")
OWN_COLOUR = "#D55E00"
_BASELINE = "restpoint plain"
_OWN = "restpoint"
_BAR_SHARE = 0.84


def check_path(path: Path) -> None:
    """Refuse a name that no chart can be written to, before an hour is spent on what it would show.

    Raises:
        RestpointError: its suffix is not of a known format.
    """
    if path.suffix.lower() not in FORMATS:
        raise RestpointError(f"plot: {path} is none of {', '.join(FORMATS)}; give a name that ends in one of them")


def draw(report: BenchReport, path: Path | str) -> None:
    """Draw the ratios to plain decoding with their intervals and write the chart, complete or not at all.

    Args:
        report: what was measured.
        path: a .png, .svg or .pdf file.

    Raises:
        RestpointError: the suffix is unknown, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_path(path)
    methods = _drawn(report)
    domains = list(dict.fromkeys(row.domain for row in report.rows))
    figure = Figure(figsize=(max(7.0, 1.2 + 0.4 * len(domains) * max(3, len(methods))), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    others = [method for method in methods if method != _OWN]
    for place, (method, rows) in enumerate(methods.items()):
        colour = OWN_COLOUR if method == _OWN else COLOURS[others.index(method) % len(COLOURS)]
        _bars(axes, rows, domains, place, len(methods), colour)
    plain = next(row for row in report.rows if row.method == _BASELINE and row.domain == AVERAGE)
    name = f"{_BASELINE} ({plain.tokens_per_second:.0f} tokens/s)"
    axes.axhline(1.0, color="#333333", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1, label=name)
    _label(axes, report, domains)
    files.write(path, lambda temporary: figure.savefig(temporary, dpi=160), "plot")


def _drawn(report: BenchReport) -> dict[str, dict[str, Row]]:
    """Rows with numbers by method and domain; the baseline is the line at 1."""
    methods: dict[str, dict[str, Row]] = {}
    for row in report.rows:
        if row.ratio_to_plain is not None and row.method != _BASELINE:
            methods.setdefault(row.method, {})[row.domain] = row
    return methods


def _bars(axes: Any, rows: dict[str, Row], domains: list[str], place: int, count: int, colour: str) -> None:
    width = _BAR_SHARE / count
    shown = [(at, rows[domain]) for at, domain in enumerate(domains) if domain in rows]
    centres = [at - _BAR_SHARE / 2 + width * (place + 0.5) for at, _ in shown]
    heights = [row.ratio_to_plain or 0.0 for _, row in shown]
    average = rows[AVERAGE]
    name = f"{average.method} ({average.tokens_per_second:.0f} tokens/s)"
    axes.bar(centres, heights, width * 0.92, color=colour, label=name, zorder=2)
    for centre, (_, row), height in zip(centres, shown, heights, strict=True):
        top = height
        if row.ratio_low is not None and row.ratio_high is not None:
            whiskers = [[max(0.0, height - row.ratio_low)], [max(0.0, row.ratio_high - height)]]
            axes.errorbar(centre, height, whiskers, color="#222222", linewidth=1.1, capsize=2.5, zorder=3)
            top = max(height, row.ratio_high)
        weight = "bold" if row.method == _OWN else "normal"
        axes.annotate(
            f"{height:.2f}",
            (centre, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            fontweight=weight,
            zorder=4,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )


def _label(axes: Any, report: BenchReport, domains: list[str]) -> None:
    seen = report.conditions
    axes.set_xticks(range(len(domains)), domains, fontsize=10.5)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    if AVERAGE in domains and len(domains) > 2:
        axes.axvline(len(domains) - 1.5, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(domains) - 0.5)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    axes.set_ylabel("tokens/s, relative to restpoint plain decoding")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.suptitle(f"Decoding speed of {seen['model']}, times plain", fontsize=13, fontweight="bold")
    axes.set_title(_conditions(report), fontsize=8.5, color="#444444")
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)


def _conditions(report: BenchReport) -> str:
    seen = report.conditions
    temperature = seen["temperature"]
    runs = max((row.runs for row in report.rows), default=0)
    decoding = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    machine = f"{seen['device']}, {seen['dtype']}, {seen['attention']} attention"
    work = f"batch {seen['batch']}, {seen['new_tokens']} new tokens, {decoding}, prefill left out"
    intervals = any(row.ratio_low is not None for row in report.rows)
    whiskers = "; whiskers: 95% bootstrap intervals over prompts" if intervals else ""
    missing = {row.method: row.status for row in report.rows if row.status != "ok"}
    below = "".join(f"\n{method}: {status}" for method, status in missing.items())
    return f"{machine}, {work}\n{runs} paired runs of each method{whiskers}{below}"
