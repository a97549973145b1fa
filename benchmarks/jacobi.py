"""Jacobi decoding beside plain decoding: tokens a pass, guesses right ahead of time, and seconds, by domain and guess.

Greedy, one text at a time, on the bundled prompts; every text is compared with plain decoding's, token by token. The
two take turns on each prompt, so that a machine that is faster at one time than at another favours neither; the
prompt's own pass is not counted. The picture shows one text: pass against position, coloured by the number of
refinements that it took until the token there was right to stay (grey: still wrong).

    python benchmarks/jacobi.py
    python benchmarks/jacobi.py MODEL --windows 4 8 16 --json jacobi.json --picture jacobi.png
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import tyro

import restpoint
from restpoint import LayeredModel, RestpointError, bundled, load
from restpoint.decode.costs import device_name
from restpoint.decode.drafters.lookup import LookupDrafter
from restpoint.decode.jacobi import (
    DrafterGuess,
    Guess,
    JacobiDecoded,
    JacobiSettings,
    LastTokenGuess,
    PromptGuess,
    jacobi_decode,
)
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.files import write

GUESSES: dict[str, Callable[[], Guess]] = {
    "last token": LastTokenGuess,
    "prompt": PromptGuess,
    "lookup": lambda: DrafterGuess(LookupDrafter()),
}


@dataclass(frozen=True)
class Options:
    """Jacobi decoding, measured."""

    model: tyro.conf.Positional[str] = "reference"
    """Checkpoint folder, Hub name, or `reference`."""
    windows: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (4, 16)
    """Tokens guessed at once."""
    slide: bool = True
    """Let new guesses enter as tokens are fixed; else solve one window after the other."""
    prompts: int = 2
    """Prompts of each domain."""
    new_tokens: int = 64
    """Tokens of each text."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write conditions and rows here."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the trace of the first text here (PNG), guessed from the last token in the largest window."""


@dataclass(frozen=True)
class Row:
    """One kind of guess and window in one domain.

    Attributes:
        tokens_per_pass: over all prompts; plain decoding has 1.
        right_unseen: share of all guesses put in that were right although the token before them was not certain.
        speed: seconds of plain decoding over seconds of this, median over prompts; above 1 is faster.
        identical: texts that are plain decoding's, of all.
    """

    domain: str
    guess: str
    window: int
    tokens_per_pass: float
    right_unseen: float
    speed: float
    identical: str


def main(options: Options) -> None:
    """Measure, print, write, draw."""
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    target = LayeredTarget(LayeredModel(loaded.model))
    seen = {
        "model": loaded.name,
        "device": device_name(target.layered.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "prompts": options.prompts,
        "new tokens": options.new_tokens,
        "slide": options.slide,
        "versions": {module.__name__: module.__version__ for module in (restpoint, torch, transformers)},
    }
    print(", ".join(f"{key} {value}" for key, value in seen.items()))
    print(
        f"{'domain':8} {'guess':12} {'window':>6} {'tokens/pass':>12} {'right unseen':>13} {'speed':>6} "
        f"{'identical':>10}"
    )
    rows = []
    for domain in bundled.DOMAINS:
        texts = [loaded.tokenizer.encode(prompt.text) for prompt in bundled.prompts(domain)[: options.prompts]]
        for guess in GUESSES:
            for window in options.windows:
                row = measure(target, domain, texts, guess, window, options)
                rows.append(row)
                print(
                    f"{row.domain:8} {row.guess:12} {row.window:6d} {row.tokens_per_pass:12.3f} "
                    f"{row.right_unseen:13.3f} {row.speed:6.2f} {row.identical:>10}",
                    flush=True,
                )
    if options.json is not None:
        content = {"conditions": seen, "rows": [asdict(row) for row in rows]}
        write(
            options.json, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"), "json"
        )
    if options.picture is not None:
        prompt = loaded.tokenizer.encode(bundled.prompts("code")[0].text)
        settings = JacobiSettings(max(options.windows), options.slide)
        draw(jacobi_decode(target, prompt, Stopping(options.new_tokens), settings), options.picture)


def measure(
    target: LayeredTarget, domain: str, texts: list[list[int]], guess: str, window: int, options: Options
) -> Row:
    """Plain decoding and Jacobi decoding of every prompt, in turn."""
    stopping, settings = Stopping(options.new_tokens), JacobiSettings(window, options.slide)
    speeds, same, found = list[float](), 0, list[JacobiDecoded]()
    for prompt in texts:
        plain, plain_seconds = timed(lambda prompt=prompt: _plain(target, prompt, stopping))
        own, seconds = timed(lambda prompt=prompt: jacobi_decode(target, prompt, stopping, settings, GUESSES[guess]()))
        speeds.append((plain_seconds - plain[0].verify_seconds) / (seconds - own.rounds[0].verify_seconds))
        same += [token for turn in plain for token in turn.tokens] == list(own.tokens)
        found.append(own)
    tokens = sum(len(own.tokens) - 1 for own in found)
    passes = sum(len(own.rounds) - 1 for own in found)
    unseen = [right for own in found for right in _right_unseen(own)]
    share = sum(unseen) / len(unseen) if unseen else 0.0
    return Row(domain, guess, window, tokens / passes, share, median(speeds), f"{same} of {len(texts)}")


def _right_unseen(own: JacobiDecoded) -> list[bool]:
    """Whether each guess put in behind the first of its pass was the text's token."""
    return [
        guess == own.tokens[place]
        for one in own.trace.iterations
        for place, guess in enumerate(one.guesses[1:], one.first + 1)
        if place < len(own.tokens)
    ]


def _plain(target: LayeredTarget, prompt: list[int], stopping: Stopping) -> list[Round]:
    return list(decode(target, prompt, Sampler(SamplingSettings(), device=target.layered.device), stopping))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def draw(found: JacobiDecoded, path: Path) -> None:
    """The trace as a heat map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise RestpointError(f"picture: {path} is no PNG file; give a name that ends in .png")
    guesses, right = found.trace.matrix().numpy(), found.trace.right_after(found.tokens).numpy()
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inside = guesses >= 0
    wrong = np.ma.masked_where(~inside | (right >= 0), np.ones_like(right))
    # A position that has left its window holds the text's token, after as many refinements as its guess was wrong for.
    certain = ~inside & np.maximum.accumulate(inside, 0)
    right = np.where(certain, (inside & (right < 0)).sum(0), right)
    axes.imshow(wrong, aspect="auto", cmap="Greys", vmin=0, vmax=4, interpolation="nearest")
    image = axes.imshow(np.ma.masked_less(right, 0), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    figure.colorbar(image, label="refinements until right to stay (grey: still wrong)")
    axes.set_xlabel("position of the new token")
    axes.set_ylabel("pass")
    axes.set_title(f"Jacobi iteration: {len(found.tokens)} tokens in {len(found.rounds) - 1} passes", fontsize=11)
    write(path, lambda temporary: figure.savefig(temporary, dpi=150), "picture")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
