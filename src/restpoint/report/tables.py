"""Tables of an atlas: what spreadsheets and plotting programs read."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from restpoint.files import write
from restpoint.report.reading import depth_axis
from restpoint.trajectory.atlas import Atlas


def export_tables(atlas: Atlas, folder: Path) -> list[Path]:
    """Write ``MEASURE.csv`` for every measure: a row for each layer 0 .. L, a column for each quantity.

    A quantity that several heads, positions or pairs have gets a column for each, ``name[index]``. What is known of the
    last n layers only (steps begin at layer 1, turns at 2) leaves the cells before empty. Where states have names, such
    as ``prelude 1`` or ``step 3``, they are in the second column. What does not run along depth is in
    ``MEASURE.other.csv``: a row for each number, with its name and index. Numbers are written in full.

    Args:
        atlas: what was measured.
        folder: where to write; made if it is not there.

    Returns:
        The files.

    Raises:
        RestpointError: a file cannot be written.
    """
    written = []
    for measure, results in atlas.results.items():
        columns = _columns(results, atlas.subject.layers)
        if columns:
            depth = atlas.subject.layers + 1
            cells = [[""] * (depth - len(values)) + [repr(value) for value in values] for values in columns.values()]
            names = [[name] for name in atlas.subject.depths] or [[]] * depth
            rows = ([str(layer), *names[layer], *row] for layer, row in enumerate(zip(*cells, strict=True)))
            header = ["layer", "state"] if atlas.subject.depths else ["layer"]
            written.append(_write(folder / f"{measure}.csv", [*header, *columns], rows))
        others = _others(results, atlas.subject.layers)
        if others:
            written.append(_write(folder / f"{measure}.other.csv", ["quantity", "index", "value"], others))
    return written


def _columns(results: Mapping[str, Tensor], layers: int) -> dict[str, list[float]]:
    """Numbers of the last layers, by the column's name."""
    columns = {}
    for name, value in results.items():
        axis = depth_axis(name, value, layers)
        if axis is None:
            continue
        value = value.movedim(axis, -1)
        if value.ndim == 1:
            columns[name] = value.tolist()
            continue
        shape = value.shape[:-1]
        for at, numbers in enumerate(value.flatten(0, -2).tolist()):
            columns[f"{name}[{_index(at, shape)}]"] = numbers
    return columns


def _others(results: Mapping[str, Tensor], layers: int) -> list[list[str]]:
    return [
        [name, _index(at, value.shape), repr(number)]
        for name, value in results.items()
        if depth_axis(name, value, layers) is None
        for at, number in enumerate(value.flatten().tolist())
    ]


def _index(at: int, shape: Iterable[int]) -> str:
    """The index of an entry, from its place in row-major order: ``2`` or ``2,5``."""
    index = []
    for size in reversed(list(shape)):
        index.append(at % size)
        at //= size
    return ",".join(str(part) for part in reversed(index))


def _write(path: Path, header: list[str], rows: Iterable[list[str]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
    return path
