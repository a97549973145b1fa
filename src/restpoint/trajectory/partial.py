"""An unfinished survey on disk, to be taken up again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from restpoint.errors import RestpointError
from restpoint.tensors import save
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

    def save(self, done: int, text: str) -> None:
        """Keep the sums after so many batches, and the hash of the text up to there."""
        sums = {f"{one.name}/{name}": own.contiguous() for one in self.measures for name, own in one.sums.items()}
        metadata = {"place": json.dumps({"done": done, "text": text, "recipe": self.recipe})}
        save(self.folder / _STATE, sums, metadata)

    def resume(self) -> tuple[int, str]:
        """Take the sums up again: how many batches they hold, and the hash of the text up to there.

        Raises:
            RestpointError: they are of another survey.
        """
        path = self.folder / _STATE
        if not path.exists():
            return 0, ""
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
        return place["done"], place["text"]

    def other_text(self) -> RestpointError:
        """What to raise where the text is not the one whose sums were taken up."""
        return RestpointError(
            f"text: {self.folder} holds an unfinished survey of another text; give that one, remove {_STATE}, "
            "or give another folder"
        )


def discard(folder: Path) -> None:
    """The survey is finished, and its outcome is kept."""
    (folder / _STATE).unlink(missing_ok=True)
