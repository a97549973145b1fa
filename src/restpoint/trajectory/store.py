"""Recorded states on disk: appended sequence by sequence, resumed after an interruption, read in chunks."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True)
class StoreLayout:
    """What one store holds; it can only be continued with the same.

    Attributes:
        fingerprint: of the model.
        recipe: of the text and the options that the sequences come from.
        length: tokens in each sequence.
        layers: which layers' states are kept, ascending; the last layer is kept beside them.
        hidden: width of the states.
        dtype: dtype that they are kept in.
    """

    fingerprint: str
    recipe: str
    length: int
    layers: tuple[int, ...]
    hidden: int
    dtype: str


class StateStore:
    """Sequences of token ids with their states at some layers and after the last one.

    Two flat files and a JSON header. A sequence counts once both of its records are written, so an interrupted
    recording is continued where it stopped; memory does not grow with the number of sequences.

    Args:
        folder: where the files lie; made if missing.
        layout: what is stored.

    Raises:
        RestpointError: the folder holds states with another layout.
    """

    def __init__(self, folder: Path, layout: StoreLayout):
        self.folder = folder
        self.layout = layout
        self._torch_dtype: torch.dtype = getattr(torch, layout.dtype)
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "layout.json"
        described = json.loads(json.dumps(asdict(layout)))
        if header.exists():
            if json.loads(header.read_text()) != described:
                raise RestpointError(
                    f"output: {folder} holds an unfinished recording with another model, text or options; "
                    "repeat the same command to resume it, or delete that folder to start again"
                )
        else:
            temporary = header.with_suffix(".tmp")
            temporary.write_text(json.dumps(described))
            os.replace(temporary, header)
        self._ids_path, self._states_path = folder / "ids.bin", folder / "states.bin"
        for path in (self._ids_path, self._states_path):
            path.touch()
        self.count = min(
            self._ids_path.stat().st_size // self._ids_bytes,
            self._states_path.stat().st_size // self._states_bytes,
        )
        for path, size in ((self._ids_path, self._ids_bytes), (self._states_path, self._states_bytes)):
            with path.open("r+b") as file:
                file.truncate(self.count * size)

    @property
    def _ids_bytes(self) -> int:
        return 4 * self.layout.length

    @property
    def _states_bytes(self) -> int:
        layout = self.layout
        return layout.length * (len(layout.layers) + 1) * layout.hidden * self._torch_dtype.itemsize

    def append(self, ids: Int[Tensor, "batch seq"], states: Float[Tensor, "batch seq layers hidden"]) -> None:
        """Add whole sequences; the last entry of the ``layers`` axis is the state after the last layer."""
        with self._ids_path.open("ab") as file:
            file.write(_bytes(ids.to(torch.int32)))
        with self._states_path.open("ab") as file:
            file.write(_bytes(states.to(self._torch_dtype)))
        self.count += ids.shape[0]

    def read(
        self, indices: Iterable[int], batch: int = 16
    ) -> Iterator[tuple[Int[Tensor, "batch seq"], Float[Tensor, "batch seq layers hidden"]]]:
        """Yield the sequences ``indices`` in batches, ids and states."""
        layout = self.layout
        shape = (layout.length, len(layout.layers) + 1, layout.hidden)
        wanted = list(indices)
        with self._ids_path.open("rb") as ids_file, self._states_path.open("rb") as states_file:
            for start in range(0, len(wanted), batch):
                ids, states = [], []
                for index in wanted[start : start + batch]:
                    ids_file.seek(index * self._ids_bytes)
                    states_file.seek(index * self._states_bytes)
                    ids.append(torch.frombuffer(bytearray(ids_file.read(self._ids_bytes)), dtype=torch.int32))
                    raw = bytearray(states_file.read(self._states_bytes))
                    states.append(torch.frombuffer(raw, dtype=self._torch_dtype).view(shape))
                yield torch.stack(ids).long(), torch.stack(states)

    def remove(self) -> None:
        """Delete the files; the store cannot be used any more."""
        for path in (self._ids_path, self._states_path, self.folder / "layout.json"):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
