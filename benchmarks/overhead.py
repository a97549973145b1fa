"""What taking a model apart costs: a full-depth pass of `LayeredModel` against the model's own forward.

Both give logits of the same tokens: ours by plan, run and logits on a `SlotCache`, the model's by `model(...)` on a
`DynamicCache`. Passes over 1, 4 and 8 tokens follow a context, as in decoding; passes over 128 tokens start an
empty cache, as a prompt does.

A sample after a context is a stretch of 64 new positions, in passes of one size, so that it holds one prelude, which
serves 64 positions; times are per pass. Both start each stretch from the same context. The two take turns
(A B A B ...); the first turn of each is warm-up and not counted. Reported are medians, the median of the paired
ratios, and the largest difference between the two sets of logits.

    python benchmarks/overhead.py
    python benchmarks/overhead.py gpt2 --repeats 31 --json overhead.json
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import tyro
from torch import Tensor
from transformers import DynamicCache

import restpoint
from restpoint import LayeredModel, Loaded, load
from restpoint.decode.costs import device_name

_STRETCH = 64
_PROMPT = 128
_SIZES = (1, 4, 8)


@dataclass(frozen=True)
class Options:
    """Time a full-depth pass against the model's own forward."""

    model: tyro.conf.Positional[str] = "reference"
    """Checkpoint folder, Hub name, or `reference`."""
    repeats: int = 15
    """Samples of each, in turn, warm-up not counted."""
    context: int = 128
    """Tokens in the cache before passes over 1, 4 and 8 tokens."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    attention: str = "sdpa"
    """sdpa or eager."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write conditions and rows here."""


@dataclass(frozen=True)
class Row:
    """One size of pass.

    Attributes:
        tokens: tokens in a pass.
        context: tokens in the cache before it, at least.
        native_ms: milliseconds of a pass by the model's own forward, median.
        layered_ms: the same of a pass by `LayeredModel`.
        ratio: median of the paired ratios, layered to native.
        difference: largest absolute difference between the logits.
    """

    tokens: int
    context: int
    native_ms: float
    layered_ms: float
    ratio: float
    difference: float


@torch.inference_mode()
def measure(loaded: Loaded, options: Options) -> list[Row]:
    """One row for each size of pass."""
    layered = LayeredModel(loaded.model)
    rows = [_in_turn(layered, size, options.context, _STRETCH, options.repeats) for size in _SIZES]
    return [*rows, _in_turn(layered, _PROMPT, 0, _PROMPT, options.repeats)]


def _in_turn(layered: LayeredModel, size: int, context: int, stretch: int, repeats: int) -> Row:
    """Time stretches of both kinds, one after the other."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, layered.vocabulary_size, (1, context + stretch), generator=generator).to(layered.device)
    blocks = list(ids[:, context:].split(size, 1))
    prompt = ids[:, :context]
    native, own = _native(layered, prompt, blocks), _layered(layered, prompt, blocks)
    seconds: tuple[list[float], list[float]] = ([], [])
    difference = 0.0
    for repeat in range(repeats + 1):
        first, second = native(), own()
        difference = max(difference, float((first[1].float() - second[1].float()).abs().max()))
        if repeat:
            seconds[0].append(first[0] / len(blocks))
            seconds[1].append(second[0] / len(blocks))
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    native_ms, layered_ms = (1000 * statistics.median(samples) for samples in seconds)
    return Row(size, context, native_ms, layered_ms, ratio, difference)


Sample = Callable[[], tuple[float, Tensor]]
"""Runs one stretch; gives its seconds and its logits."""


def _native(layered: LayeredModel, prompt: Tensor, blocks: list[Tensor]) -> Sample:
    model: Any = layered.model
    filled, name = DynamicCache(config=layered.model.config), layered.stack.cache_argument
    if prompt.shape[1]:
        model(input_ids=prompt, use_cache=True, **{name: filled})

    def sample() -> tuple[float, Tensor]:
        cache = copy.deepcopy(filled)
        began = _now(layered.device)
        logits = [model(input_ids=block, use_cache=True, **{name: cache}).logits for block in blocks]
        return _now(layered.device) - began, torch.cat(logits, 1)

    return sample


def _layered(layered: LayeredModel, prompt: Tensor, blocks: list[Tensor]) -> Sample:
    count = prompt.shape[1]
    kept = layered.cache(capacity=count + _STRETCH)
    if count:
        layered.run(layered.plan(prompt, kept))
        kept.commit([count])

    def sample() -> tuple[float, Tensor]:
        kept.lengths, kept.lookahead = [count], None
        began = _now(layered.device)
        cache = kept if count else layered.cache(capacity=blocks[0].shape[1])
        logits = []
        for block in blocks:
            logits.append(layered.logits(layered.run(layered.plan(block, cache))))
            cache.commit([block.shape[1]])
        return _now(layered.device) - began, torch.cat(logits, 1)

    return sample


def _now(device: torch.device) -> float:
    """The time at which the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def conditions(loaded: Loaded, options: Options) -> dict[str, Any]:
    """What the numbers hold for."""
    model = loaded.model
    return {
        "model": loaded.name,
        "layers": LayeredModel(model).depth,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": options.attention,
        "batch": 1,
        "repeats": options.repeats,
        "versions": {module.__name__: module.__version__ for module in (restpoint, torch, transformers)},
    }


def main(options: Options) -> None:
    """Measure, print, write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options.model, dtype=options.dtype, device=options.device, attention=options.attention)
    seen = conditions(loaded, options)
    print(", ".join(f"{key} {value}" for key, value in seen.items()))
    rows = measure(loaded, options)
    print(f"{'tokens':>6} {'context':>7} {'native ms':>10} {'layered ms':>10} {'ratio':>6} {'logits differ by':>16}")
    for row in rows:
        print(
            f"{row.tokens:6} {row.context:7} {row.native_ms:10.3f} {row.layered_ms:10.3f} {row.ratio:6.3f} "
            f"{row.difference:16.1e}"
        )
    if options.json is not None:
        content = {"conditions": seen, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
