"""What a pass costs on this machine, by the number of tokens in it."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from restpoint.decode.draft import Draft
from restpoint.decode.target import LayeredTarget

_CPU_INFO = Path("/proc/cpuinfo")
_SIZES = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        device: name of the device that they were measured on.
        dtype: dtype of the model.
        verify: seconds of one pass over 1, 2, 3, .. tokens, over the layers that verification runs.
        draft: seconds to draft one token.
    """

    device: str
    dtype: str
    verify: tuple[float, ...]
    draft: float

    @property
    def longest(self) -> int:
        """Largest number of drafted tokens that a cost is known for."""
        return len(self.verify) - 1


@torch.inference_mode()
def measure_costs(
    target: LayeredTarget,
    draft_one: Callable[[], object],
    exit_layer: int = 0,
    context: int = 128,
    repeats: int = 7,
) -> Costs:
    """Time passes of every length and one drafted token: medians, warm-up excluded, about a second on a small model.

    Args:
        target: the model; its cache is used up.
        draft_one: drafts one token.
        exit_layer: layer that verification resumes at.
        context: number of tokens in the cache.
        repeats: measurements of each length, in turn.
    """
    layered = target.layered
    target.prefill([1 % layered.vocabulary_size] * context)
    exits = torch.zeros(1, max(_SIZES), layered.hidden_size, dtype=layered.dtype, device=layered.device)

    def verify(size: int) -> object:
        return target.score(1, Draft([1] * (size - 1), exit_layer=exit_layer, exits=exits[:, :size]))

    seconds: dict[int, list[float]] = {size: [] for size in (0, *_SIZES)}
    for repeat in range(repeats + 1):
        for size, samples in seconds.items():
            elapsed = _timed(layered.device, draft_one if size == 0 else lambda size=size: verify(size))
            if repeat:
                samples.append(elapsed)
    median = {size: statistics.median(samples) for size, samples in seconds.items()}
    verify_costs = [_interpolate(median, size) for size in range(1, max(_SIZES) + 1)]
    rising = [max(verify_costs[: index + 1]) for index in range(len(verify_costs))]
    return Costs(device_name(layered.device), str(layered.dtype).removeprefix("torch."), tuple(rising), median[0])


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


def _interpolate(median: dict[int, float], size: int) -> float:
    below = max(known for known in _SIZES if known <= size)
    above = min(known for known in _SIZES if known >= size)
    if below == above:
        return median[size]
    share = (size - below) / (above - below)
    return (1 - share) * median[below] + share * median[above]
