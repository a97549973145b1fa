"""What a pass costs on this machine, by the number of tokens in it."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from restpoint.decode.draft import Draft
from restpoint.decode.target import LayeredTarget

_CPU_INFO = Path("/proc/cpuinfo")
_SIZES = (1, 2, 3, 4, 5, 6, 8, 11)
_DRAFTED = 4


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        device: name of the device that they were measured on.
        dtype: dtype of the model.
        verify: seconds of one pass over 1, 2, 3, .. tokens, over the layers that verification runs.
        draft: seconds of the first drafted token, whose weights come from memory, and of each later one.
    """

    device: str
    dtype: str
    verify: tuple[float, ...]
    draft: tuple[float, float]

    @property
    def longest(self) -> int:
        """Largest number of drafted tokens that a cost is known for."""
        return len(self.verify) - 1

    def drafting(self, count: int) -> float:
        """Seconds to draft so many tokens."""
        return self.draft[0] + (count - 1) * self.draft[1] if count else 0.0


@torch.inference_mode()
def measure_passes(
    target: LayeredTarget, exit_layer: int = 0, context: int = 128, repeats: int = 9
) -> tuple[float, ...]:
    """Seconds of one pass over 1, 2, 3, .. tokens: medians in turn, warm-up excluded; a second on a small model.

    Smoothed so that they rise with length (isotonic regression).

    Args:
        target: the model; its cache is used up.
        exit_layer: layer that verification of drafts resumes at. A pass over one token has no draft and runs them all.
        context: number of tokens in the cache.
        repeats: measurements of each length.
    """
    layered = target.layered
    target.prefill([1 % layered.vocabulary_size] * context)
    exits = torch.zeros(1, _SIZES[-1], layered.hidden_size, dtype=layered.dtype, device=layered.device)

    def score(size: int) -> None:
        own = exits[:, :size] if exit_layer and size > 1 else None
        target.score(1, Draft([1] * (size - 1), exit_layer=exit_layer, exits=own))

    seconds: dict[int, list[float]] = {size: [] for size in _SIZES}
    for _ in range(repeats + 1):
        for size, samples in seconds.items():
            samples.append(_timed(layered.device, lambda size=size: score(size)))
    medians = [statistics.median(samples[1:]) for samples in seconds.values()]
    rising = [medians[0], *isotonic_regression(medians[1:]).x] if exit_layer else isotonic_regression(medians).x
    return tuple(float(np.interp(size, _SIZES, rising)) for size in range(1, _SIZES[-1] + 1))


@torch.inference_mode()
def measure_drafts(
    target: LayeredTarget, draft: Callable[[int], object], context: int = 128, repeats: int = 9
) -> tuple[float, float]:
    """Seconds of the first and of each later drafted token; medians, warm-up excluded.

    Timed right after a pass, as drafts run in decoding: their weights are not in the processor's cache then.

    Args:
        target: the model; its cache is used up.
        draft: drafts that many tokens.
        context: number of tokens in the cache.
        repeats: measurements of each.
    """
    target.prefill([1 % target.layered.vocabulary_size] * context)
    seconds: dict[int, list[float]] = {1: [], _DRAFTED: []}
    for _ in range(repeats + 1):
        for count, samples in seconds.items():
            target.score(1, Draft())
            samples.append(_timed(target.layered.device, lambda count=count: draft(count)))
    first, several = (statistics.median(samples[1:]) for samples in seconds.values())
    return first, max((several - first) / (_DRAFTED - 1), 0.0)


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _processor() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    _synchronize(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
