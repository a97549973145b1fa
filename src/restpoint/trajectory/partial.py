"""An unfinished survey on disk, to be taken up again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from restpoint import files
from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure

_STATE = "partial.safetensors"


class Partial:
    """What an unfinished survey has measured so far, on disk.

    Args:
        folder: where it lies.
        measures: whose sums are kept.
        recipe: of the survey; it can only be taken up by the same.
    """

    def __init__(self, folder: Path, measures: Sequence[Measure], recipe: dict[str, Any]):
        self.folder = folder
        self.measures = measures
        self.recipe = recipe

    def save(self, done: int) -> None:
        """Keep the sums after so many pieces."""
        sums = {f"{one.name}/{name}": own.contiguous() for one in self.measures for name, own in one.sums.items()}
        metadata = {"place": json.dumps({"done": done, "recipe": self.recipe})}
        files.write(self.folder / _STATE, lambda path: save_file(sums, path, metadata=metadata))

    def resume(self) -> int:
        """Take the sums up again: how many pieces they hold.

        Raises:
            RestpointError: they are of another survey.
        """
        path = self.folder / _STATE
        if not path.exists():
            return 0
        with safe_open(path, "pt") as file:
            place = json.loads(file.metadata()["place"])
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if place["recipe"] != self.recipe:
            raise RestpointError(
                f"output: {self.folder} holds an unfinished survey of another model or with other options; "
                f"finish that one, remove {path.name}, or give another folder"
            )
        for measure in self.measures:
            prefix = f"{measure.name}/"
            own = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
            measure.restore(own)
        return place["done"]

    def remove(self) -> None:
        """The survey is finished."""
        (self.folder / _STATE).unlink(missing_ok=True)
