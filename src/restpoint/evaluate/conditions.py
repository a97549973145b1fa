"""What the numbers of a benchmark hold for: machine, versions, settings."""

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from restpoint.decode.costs import device_name
from restpoint.evaluate.options import BenchOptions
from restpoint.generate import Decoder


def conditions(
    decoder: Decoder, options: BenchOptions, laps: int, prompts: int, notes: Sequence[str]
) -> dict[str, Any]:
    """Everything that a reader needs to judge a number or to measure it again, ready for JSON.

    Args:
        decoder: the plain decoder.
        options: what was asked for, defaults filled in.
        laps: how many laps were run.
        prompts: how many prompts of each domain there were to run.
        notes: what the decoder has to say.
    """
    loaded, layered = decoder.loaded, decoder.layered
    wanted = prompts * (options.repetitions or 0)
    notes = list(notes)
    if laps < wanted:
        notes.append(f"the time budget of {options.budget_seconds:g} s allowed {laps} of {wanted} laps")
    return {
        "model": loaded.name,
        "device": device_name(layered.device),
        "threads": torch.get_num_threads(),
        "dtype": str(layered.dtype).removeprefix("torch."),
        "attention": loaded.model.config._attn_implementation,
        "batch": 1,
        "new_tokens": options.new_tokens,
        "domains": list(options.domains),
        "prompts_per_domain": min(laps, prompts),
        "repetitions": laps / prompts if laps > prompts else 1,
        "temperature": options.temperature,
        "seed": options.seed,
        "quick": options.quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("restpoint", "torch", "transformers")},
        "notes": notes,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
