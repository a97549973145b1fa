"""Tensors on disk: safetensors files that are complete or not there at all, and a hash of what they hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from restpoint import files


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file.

    Raises:
        RestpointError: it cannot be written.
    """
    stored = {name: own.detach().cpu().contiguous() for name, own in tensors.items()}
    files.write(path, lambda temporary: save_file(stored, temporary, None if metadata is None else dict(metadata)))


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and the bytes, whatever the order that they come in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
