"""Tokens per second of a batch: Hugging Face `generate`, restpoint plain, restpoint with drafts, taking turns.

Every method gets the same prompts, of all kinds of text in turn, and makes the same number of new tokens for every row,
ends of text ignored. Rates are of everything, prompts included. Ratios are to restpoint plain in the same run; medians
over repetitions, warm-up left out.

    python benchmarks/batch.py
    python benchmarks/batch.py MODEL --profile profile/ --rows 16 --json batch.json
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import tyro

import restpoint
from restpoint import Decoder, Profile, SamplingSettings, load
from restpoint.bundled import DOMAINS, PROFILE_PATH, prompts
from restpoint.decode.costs import device_name


@dataclass(frozen=True)
class Options:
    """Speed of a batch."""

    model: tyro.conf.Positional[str] = "reference"
    """Checkpoint folder, Hub name, or `reference`."""
    profile: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = PROFILE_PATH
    """A profile of this model."""
    rows: int = 8
    """Texts in the batch."""
    new_tokens: int = 128
    """New tokens of each."""
    repeats: int = 3
    """Runs of each method, warm-up not counted."""
    temperature: float = 0.0
    """Sample at this temperature instead of decoding greedily."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write conditions and rates here."""


def main(options: Options) -> None:
    """Measure, print, write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options.model, dtype=options.dtype)
    plain, fast = Decoder(loaded), Decoder(loaded, Profile.load(options.profile))
    texts = [prompts(DOMAINS[row % len(DOMAINS)])[row // len(DOMAINS)].text for row in range(options.rows)]
    ids = [plain.encode(text) for text in texts]
    sampling = SamplingSettings(temperature=options.temperature)
    passes: dict[str, float] = {}

    def ours(name: str, decoder: Decoder) -> list[list[int]]:
        done = decoder.generate_batch(ids, sampling, max_tokens=options.new_tokens, ignore_end=True)
        passes[name] = statistics.fmean(one.statistics.tokens_per_pass for one in done)
        return [one.tokens for one in done]

    methods: dict[str, Callable[[], list[list[int]]]] = {
        "huggingface": lambda: _hugging_face(loaded, ids, options),
        "restpoint plain": lambda: ours("restpoint plain", plain),
        "restpoint": lambda: ours("restpoint", fast),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    same: dict[str, bool] = {}
    for repeat in range(options.repeats + 1):
        tokens: dict[str, list[list[int]]] = {}
        for name, run in methods.items():
            began = time.perf_counter()
            tokens[name] = run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
        same = {name: own == tokens["restpoint plain"] for name, own in tokens.items()}
    seen = {
        "model": loaded.name,
        "device": device_name(plain.layered.device),
        "rows": options.rows,
        "new tokens": options.new_tokens,
        "temperature": options.temperature,
        "dtype": options.dtype,
        "versions": {module.__name__: module.__version__ for module in (restpoint, torch, transformers)},
    }
    print(", ".join(f"{key} {value}" for key, value in seen.items()))
    rates = {name: options.rows * options.new_tokens / statistics.median(own) for name, own in seconds.items()}
    for name, rate in rates.items():
        ratios = [base / own for base, own in zip(seconds["restpoint plain"], seconds[name], strict=True)]
        identical = "" if options.temperature else f", identical tokens: {'yes' if same[name] else 'no'}"
        made = f", {passes[name]:.2f} tokens a pass and row" if name in passes else ""
        print(f"{name:16} {rate:8.1f} tokens/s, {statistics.median(ratios):.2f} times plain{made}{identical}")
    if options.json is not None:
        options.json.write_text(json.dumps({"conditions": seen, "rates": rates}, indent=1) + "\n", encoding="utf-8")


def _hugging_face(loaded: Any, ids: list[list[int]], options: Options) -> list[list[int]]:
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(one)) + one for one in ids], device=loaded.model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids], device=loaded.model.device)
    sampled = {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature else {}
    config = transformers.GenerationConfig(
        max_new_tokens=options.new_tokens, pad_token_id=0, **({"do_sample": False} | sampled)
    )
    own, loaded.model.generation_config = loaded.model.generation_config, transformers.GenerationConfig(pad_token_id=0)
    try:
        output = loaded.model.generate(padded, attention_mask=mask, generation_config=config)
    finally:
        loaded.model.generation_config = own
    return output[:, longest:].tolist()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
