"""What a calibration that is under way keeps on disk, to go on from there after an interruption."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice
from restpoint.tensors import save

_PARTIAL = "calibration.safetensors"
_SCORES = "full_scores"


class Kept:
    """A calibration that is under way, on disk: it goes on from there after an interruption.

    Args:
        folder: of the profile.
        recipe: of the calibration; what another one left is refused.

    Attributes:
        choice: of layers; None where none was made yet, or the rule makes none.
        done: by setting, losses of all texts and mean depth.
        full_scores: of the full model's own texts; None where they were not scored yet.

    Raises:
        RestpointError: the folder holds an unfinished calibration of something else.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.path = folder / _PARTIAL
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.choice: LayerChoice | None = None
        self.done: dict[float, tuple[np.ndarray, float]] = {}
        self.full_scores: np.ndarray | None = None
        self._readers = ""
        if not self.path.exists():
            return
        with safe_open(self.path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            if about["recipe"] != self.recipe:
                raise self._other()
            if (choice := about["choice"]) is not None:
                self.choice = LayerChoice(**{**choice, "layers": tuple(choice["layers"])})
            self._readers = about["readers"]
            if _SCORES in file.keys():  # noqa: SIM118
                self.full_scores = file.get_tensor(_SCORES)
            for setting, depth in about["done"]:
                self.done[setting] = file.get_tensor(repr(setting)), depth

    def begin(self, choice: LayerChoice | None, readers: str) -> None:
        """Keep what all settings have in common.

        Raises:
            RestpointError: what was begun read states in another way.
        """
        if self._readers not in ("", readers):
            raise self._other()
        self.choice, self._readers = choice, readers
        self._write()

    def add(self, setting: float, losses: np.ndarray, depth: float) -> None:
        """Keep what a setting came to."""
        self.done[setting] = losses, depth
        self._write()

    def add_scores(self, full_scores: np.ndarray) -> None:
        """Keep the scores of the full model's own texts."""
        self.full_scores = full_scores
        self._write()

    def remove(self) -> None:
        """The calibration is finished."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        about = {
            "recipe": self.recipe,
            "choice": None if self.choice is None else asdict(self.choice),
            "readers": self._readers,
            "done": [[setting, depth] for setting, (_, depth) in self.done.items()],
        }
        tensors = {repr(setting): torch.from_numpy(losses) for setting, (losses, _) in self.done.items()}
        if self.full_scores is not None:
            tensors[_SCORES] = torch.from_numpy(self.full_scores)
        save(self.path, tensors, {"about": json.dumps(about)})

    def _other(self) -> RestpointError:
        return RestpointError(
            f"output: {self.path.parent} holds an unfinished calibration of other text, options or model; finish that "
            f"one, remove {_PARTIAL}, or give another folder"
        )
