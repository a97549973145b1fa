"""A sweep of a loop as tables: criteria, starts and the time they take."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from restpoint.evaluate.looped.curves import Matched
from restpoint.evaluate.looped.run import LoopReport
from restpoint.exit.bootstrap import Estimate


def loop_table(found: LoopReport) -> RenderableType:
    """Steps at one rise of perplexity, steps to a tolerance, and decoding times."""
    rise = f"{found.increase:.2%}"
    parts: list[RenderableType] = [
        _matched(f"Steps per token where perplexity rises by {rise}, of {found.steps}", found.matched, found.reference)
    ]
    ceiling = found.oracle.points()[0]
    parts.append(
        Text(
            f"oracle: {ceiling.steps.value:.2f} steps, every prediction that of the full count, perplexity "
            f"{ceiling.increase.value:+.2%}"
        )
    )
    if found.starts is not None:
        table = _table(f"Steps until the relative step is below {found.starts.tolerance:g}")
        for heading in ("start", "steps", "95%", "fewer than noise", "95%", "ran the full count"):
            table.add_column(heading, justify="left" if heading == "start" else "right", no_wrap=True)
        for row in found.starts.rested:
            table.add_row(row.name, *_steps(row.steps), *_fewer(row.fewer), f"{row.capped:.0%}")
        parts += [
            table,
            _matched(
                f"Steps per token from other starts where perplexity rises by {rise}", found.starts.matched, "noise"
            ),
        ]
    if found.timed:
        table = _table(f"Decoding at the setting that keeps the rise within {rise}")
        for heading in ("way", "setting", "steps", "ms per token", "full count", "speed", "95%"):
            table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
        for row in found.timed:
            table.add_row(
                row.name,
                f"{row.setting:.4g}",
                f"{row.steps:.2f}",
                f"{row.milliseconds:.2f}",
                f"{row.full_milliseconds:.2f}",
                f"{row.speed.value:.2f}",
                _range(row.speed.low, row.speed.high),
            )
        parts.append(table)
    about = (
        f"{found.model}, {found.steps} steps at most; {found.texts} texts of {found.text_tokens} given tokens; "
        f"perplexity {found.perplexity:.3f} at the full count. Intervals are over texts, differences in pairs."
    )
    return Group(*parts, Text(about, style="dim"))


def _matched(title: str, rows: tuple[Matched, ...], reference: str) -> Table:
    table = _table(title)
    for heading in ("name", "steps", "95%", f"fewer than {reference}", "95%", "setting"):
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.steps.value):
        setting = "–" if row.setting is None else f"{row.setting:.4g}"
        table.add_row(row.name, *_steps(row.steps), *_fewer(row.fewer), setting)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", pad_edge=False, show_edge=False)


def _steps(steps: Estimate) -> tuple[str, str]:
    return f"{steps.value:.2f}", _range(steps.low, steps.high)


def _fewer(fewer: Estimate | None) -> tuple[str, str]:
    if fewer is None:
        return "", ""
    both = "" if fewer.low is None or fewer.high is None else f"{fewer.low:+.1%} to {fewer.high:+.1%}"
    return f"{fewer.value:+.1%}", both


def _range(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"
