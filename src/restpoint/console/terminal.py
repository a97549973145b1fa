"""Standard output and standard error: results, remarks beside them, progress."""

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn, track
from rich.progress import Progress as Bars

from restpoint.progress import Progress

Item = TypeVar("Item")


def version() -> str:
    """The installed version of restpoint."""
    try:
        return importlib.metadata.version("restpoint")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def show(what: RenderableType) -> None:
    """Print to standard output; where that is no terminal, without colours and wide enough for any table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    console.print(what)


def say(line: str) -> None:
    """Print one line beside the output, to standard error."""
    print(f"restpoint: {' '.join(line.split())}", file=sys.stderr)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on standard error, one for each stage; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            kind = stage.partition(" ")[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(stage, total=total)
            bars.update(tasks[kind], description=stage, completed=done, total=total)

        yield report


def counted(items: Iterable[Item], what: str) -> Iterable[Item]:
    """The same items, counted on standard error as they are used, if that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal)
