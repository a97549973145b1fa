"""The state that a stopped training resumes from: weights, optimisers and what they belong to, in one file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from restpoint.errors import RestpointError
from restpoint.tensors import save


@dataclass(frozen=True)
class TrainingState:
    """Where a training is kept, and what it must belong to.

    Attributes:
        folder: of its files.
        binding: options and text that a resumed training must agree in.
    """

    folder: Path
    binding: dict[str, Any]

    def save(self, model: nn.Module, optimisers: list[torch.optim.Optimizer], step: int) -> None:
        """Write the state after ``step`` steps; the one before stays until this one is complete."""
        tensors = {f"model.{name}": value for name, value in model.named_parameters()}
        for number, optimiser in enumerate(optimisers):
            for index, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser{number}.{index}.{name}": value for name, value in entry.items()}
        what = json.dumps({"step": step, "binding": self.binding})
        save(self._path, tensors, {"training": what})

    def resume(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> int:
        """Put the saved state in place and return the steps that it has behind it; 0 where there is none.

        Raises:
            RestpointError: the state belongs to other options or another text, or is damaged.
        """
        if not self._path.is_file():
            return 0
        step, binding = self._belongs()
        for name, wanted in self.binding.items():
            if binding.get(name) != wanted:
                raise RestpointError(
                    f"output: {self.folder.parent} holds an unfinished training with {name} {binding.get(name)}, not "
                    f"{wanted}; repeat its options, or give another folder"
                )
        tensors = load_file(self._path)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(tensors[f"model.{name}"])
        for number, optimiser in enumerate(optimisers):
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, _, rest = name.partition(".")
                if owner == f"optimiser{number}":
                    index, _, key = rest.partition(".")
                    entries.setdefault(int(index), {})[key] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})
        return step

    @property
    def _path(self) -> Path:
        return self.folder / "state.safetensors"

    def _belongs(self) -> tuple[int, dict[str, Any]]:
        try:
            with safe_open(self._path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["training"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise RestpointError(
                f"output: {self._path} is no training state; delete it, or give another folder"
            ) from error
        return found["step"], found["binding"]
