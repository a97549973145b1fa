"""What a simulation found: numbers for a table, a file and a picture."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from restpoint.files import write


@dataclass(frozen=True, eq=False)
class Study:
    """One simulation.

    Attributes:
        name: of the study.
        title: what was simulated, with its sizes.
        facts: what it comes to, by name.
        columns: of the rows.
        rows: everything that was measured, for a file.
        arrays: what a picture needs.
        papers: where the question is from.
    """

    name: str
    title: str
    facts: dict[str, float | str]
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    arrays: dict[str, np.ndarray] = field(repr=False)
    papers: tuple[str, ...]

    def write_csv(self, path: Path) -> None:
        """Write the rows, complete or not at all.

        Raises:
            RestpointError: the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        write(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
