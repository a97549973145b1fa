"""What a pass costs on this machine, by the number of tokens in it."""

import functools
import platform
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from restpoint.decode.draft import ROOT, Draft, SteppedDrafter, TokenPath
from restpoint.decode.target import NO_DRAFT, LayeredTarget
from restpoint.model.load import context_length

_CPU_INFO = Path("/proc/cpuinfo")
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 65)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 65)
_LEVELS = 3
_LOOK = 8
_LOOKS = 6
_VARIES = 1.3
_WIDTH = 4
_MOST = 256


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        device: name of the device that they were measured on.
        dtype: dtype of the model.
        verify: seconds of one pass over 1, 2, 3, .. tokens.
        draft: for each stepped drafter, seconds of its first law, whose weights come from memory, and of each later
            level of the tree.
    """

    device: str
    dtype: str
    verify: tuple[float, ...]
    draft: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """Largest number of drafted tokens that a cost is known for."""
        return len(self.verify) - 1

    def drafting(self, drafter: str, levels: int) -> float:
        """Seconds of so many levels of a drafter."""
        if levels == 0:
            return 0.0
        first, later = self.draft[drafter]
        return first + (levels - 1) * later


def between(one: Costs, other: Costs, share: float) -> Costs:
    """Costs at this share of the way from one to another, as far as both are known."""

    def mixed(a: float, b: float) -> float:
        return (1 - share) * a + share * b

    return replace(
        one,
        verify=tuple(map(mixed, one.verify, other.verify)),
        draft={
            name: (mixed(own[0], other.draft[name][0]), mixed(own[1], other.draft[name][1]))
            for name, own in one.draft.items()
            if name in other.draft
        },
    )


@torch.inference_mode()
def measure_passes(target: LayeredTarget, context: int = 128, repeats: int = 9, rows: int = 1) -> tuple[float, ...]:
    """Seconds of one pass over 1, 2, 3, .. tokens: medians in turn, warm-up excluded; seconds on a small model.

    Smoothed so that they rise with length (isotonic regression).

    Args:
        target: the model; its cache is used up.
        context: number of tokens in the cache.
        repeats: measurements of each length.
        rows: texts in the batch; each has that many tokens. The more there are, the shorter the longest pass.
    """
    token = 1 % target.layered.vocabulary_size
    limit = context_length(target.layered.model) or context + _SIZES[-1]
    most = min(limit - 1, max(_MOST // rows, _LOOK))
    sizes = target.widths or tuple(size for size in (_SIZES if rows == 1 else _BATCH_SIZES) if size <= most)
    target.prefill([[token] * min(context, limit - sizes[-1])] * rows)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats + 1):
        for size, samples in seconds.items():
            draft = Draft.chain([token] * (size - 1))
            samples.append(
                timed(target.layered.device, lambda draft=draft: target.score([token] * rows, [draft] * rows))
            )
    medians = isotonic_regression([statistics.median(samples[1:]) for samples in seconds.values()]).x
    if target.widths:
        return tuple(float(medians[bisect_left(sizes, size)]) for size in range(1, sizes[-1] + 1))
    return tuple(float(np.interp(size, sizes, medians)) for size in range(1, sizes[-1] + 1))


@torch.inference_mode()
def still_hold(target: LayeredTarget, costs: Costs, context: int = 128) -> bool:
    """Whether passes of one and of eight tokens cost about what was measured once: a look, in a fraction of a second.

    Another process on the machine, or threads that wait otherwise, change what a longer pass costs beside a short one.

    Args:
        target: the model; its cache is used up.
        costs: measured on the same device in the same dtype.
        context: number of tokens in the cache.
    """
    if costs.largest < _LOOK:
        return True
    token = 1 % target.layered.vocabulary_size
    target.prefill([[token] * min(context, (context_length(target.layered.model) or context + _LOOK) - _LOOK)])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_LOOKS):
        for samples, size in zip(seconds, (1, _LOOK), strict=True):
            draft = Draft.chain([token] * (size - 1))
            samples.append(timed(target.layered.device, lambda draft=draft: target.score([token], [draft])))
    short, long = (min(samples) for samples in seconds)
    for now, then in ((long / short, costs.verify[_LOOK - 1] / costs.verify[0]), (short, costs.verify[0])):
        if not 1 / _VARIES <= now / then <= _VARIES:
            return False
    return True


@torch.inference_mode()
def measure_drafts(
    target: LayeredTarget, drafters: Sequence[SteppedDrafter], context: int = 128, repeats: int = 9
) -> tuple[float, float]:
    """Seconds of the first law and of each later level of four nodes, for rows together; medians, warm-up excluded.

    Timed right after a pass, as drafts run in decoding: their weights are not in the processor's cache then.

    Args:
        target: the model; its cache is used up.
        drafters: who drafts, one for each row, all of a kind.
        context: number of tokens in the cache.
        repeats: measurements of each.
    """
    layered = target.layered
    token = 1 % layered.vocabulary_size
    limit = context_length(layered.model) or context + _LEVELS + 2
    context = min(context, limit - _LEVELS - 2)
    target.prefill([[token] * context])
    rest = torch.zeros(1, 1, layered.hidden_size, dtype=layered.dtype, device=layered.device)
    path = TokenPath([token] * (context + 1), rest)
    kind, rows = type(drafters[0]), len(drafters)
    width = _WIDTH if drafters[0].trees else 1
    tokens = [(token + index) % layered.vocabulary_size for index in range(width)]

    def draft(levels: int) -> None:
        _read(kind.start_together(drafters, [path] * rows))
        above = ROOT
        for level in range(levels - 1):
            _read(kind.extend_together(drafters, [[above] * width] * rows, [tokens] * rows))
            above = level * width

    seconds: dict[int, list[float]] = {1: [], 1 + _LEVELS: []}
    for _ in range(repeats + 1):
        for levels, samples in seconds.items():
            target.score([token], [NO_DRAFT])
            samples.append(timed(layered.device, lambda levels=levels: draft(levels)))
    first, several = (statistics.median(samples[1:]) for samples in seconds.values())
    return first, max((several - first) / _LEVELS, 0.0)


def _read(logits: Sequence[torch.Tensor]) -> None:
    """What is done with the logits of a level, at least."""
    torch.softmax(torch.cat(list(logits)).float(), -1).topk(8).indices.tolist()


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


@functools.cache
def _processor() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of some work, the device's own included."""
    _synchronize(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
