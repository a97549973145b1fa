"""A benchmark as a table for the terminal."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from restpoint.evaluate.rows import AVERAGE, BenchReport, Row

_EMPTY = "–"


def table(report: BenchReport) -> RenderableType:
    """Rows by method, the average of each last, with the conditions below."""
    shown = Table(title=f"Decoding speed, {report.conditions['model']}", title_justify="left", pad_edge=False)
    shown.add_column("method", no_wrap=True)
    shown.add_column("domain", no_wrap=True)
    for heading in ("tokens/s", "times plain", "95%", "tokens\na pass", "layers\na token", "identical", "prefill ms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    missing: list[str] = []
    for row in report.rows:
        average = row.domain == AVERAGE
        if row.status == "ok":
            style = "bold" if average else ""
            name = row.method if average or row.domain == report.rows[0].domain else ""
            shown.add_row(name, *_cells(row), style=style, end_section=average)
        elif average:
            missing.append(f"{row.method}: {row.status}")
    return Group(shown, *(Text(line, style="dim") for line in [*missing, *_lines(report)]))


def _cells(row: Row) -> Iterator[str]:
    yield row.domain
    yield _number(row.tokens_per_second, ".1f")
    yield _number(row.ratio_to_plain, ".2f")
    yield _EMPTY if row.ratio_low is None else f"{row.ratio_low:.2f}–{row.ratio_high:.2f}"
    yield _number(row.tokens_per_pass, ".2f")
    yield _number(row.layers_per_token, ".1f")
    yield _EMPTY if row.identical is None else "yes" if row.identical == 1 else f"{row.identical:.0%}"
    yield _number(None if row.prefill_seconds is None else 1000 * row.prefill_seconds, ".0f")


def _lines(report: BenchReport) -> Iterator[str]:
    settings = dict.fromkeys((row.method, row.settings) for row in report.rows if row.settings)
    if settings:
        yield "chosen in the warm-up or by the profile: " + "; ".join(f"{name}: {what}" for name, what in settings)
    slowest = [row for row in report.rows if row.domain == AVERAGE and row.slowest_quarter is not None]
    if slowest:
        quarters = "; ".join(f"{row.method} {row.slowest_quarter:.2f}" for row in slowest)
        yield f"times plain on the slowest quarter of the prompts: {quarters}"
    lossy = [row for row in report.rows if row.domain == AVERAGE and row.disagreement is not None]
    for row in lossy:
        yield f"{row.method}: {row.disagreement:.1%} of the tokens are not the model's own after the same prefix"
    for row in report.rows:
        for gap in row.divergences if row.domain == AVERAGE else ():
            yield f"{row.method} leaves the plain text of {gap.prompt} at token {gap.index}, margin {gap.margin:.2g}"
    seen = report.conditions
    versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
    decoding = "greedy" if seen["temperature"] == 0 else f"temperature {seen['temperature']:g}"
    machine = f"{seen['device']}, {seen['dtype']}, {seen['attention']} attention"
    work = f"batch {seen['batch']}, {decoding}, {seen['new_tokens']} new tokens"
    yield f"{machine}, {work}, prompts of each domain: {seen['prompts_per_domain']}; {versions}"
    yield from seen["notes"]


def _number(value: float | None, form: str) -> str:
    return _EMPTY if value is None else format(value, form)
