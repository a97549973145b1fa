"""What a decode round spends outside the model: planning, verification, bookkeeping, Python.

Two generations of the same tokens take turns. One runs as it is, for the seconds that `Round` says a round takes. The
other runs with clocks around the layers (`LayeredModel.run`), the head (target's and draft's), the predictor, the plan,
what instant drafters name and learn, and the merging of it; what its rounds take beyond these is the rest. Both come
from one run, so that a machine that is faster at one time than at another does not show up as a part:

    rest  = seconds of a clocked round - layers - head - predictor - plan - drafters - trie
    share = (plan + drafters + trie + rest) / seconds of a clocked round     what is not model work

Numbers are medians over repetitions, per round; warm-up and the prompt's round are not counted. The clocks wait for the
device, so on a GPU a clocked round takes longer than one as it is, where Python and the device overlap.

    python benchmarks/loop.py
    python benchmarks/loop.py MODEL --profile profile/ --new-tokens 256 --json loop.json
    python benchmarks/loop.py --drafters lookup recycling ngrams --draft-tokens 8
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import tyro

import restpoint
from restpoint import Decoder, LayeredModel, Profile, load
from restpoint.bundled import PROFILE_PATH, prompts
from restpoint.decode.costs import device_name
from restpoint.decode.draft import InstantDrafter
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Round
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.decode.trie import Trie
from restpoint.model.head import Head

_MODEL_WORK = ("layers", "head", "predictor")
_PARTS = (*_MODEL_WORK, "plan", "drafters", "trie")


@dataclass(frozen=True)
class Options:
    """Share of a decode round that is not model work."""

    model: tyro.conf.Positional[str] = "reference"
    """Checkpoint folder, Hub name, or `reference`."""
    profile: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A profile of this model; the bundled model has one already. Without one only plain decoding is measured."""
    drafters: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Who drafts; with a profile lookup, recycling and predictor, if left out."""
    draft_tokens: int | None = None
    """Verify so many drafted tokens in every round; decided round by round if left out."""
    new_tokens: int = 128
    """Tokens of each generation."""
    repeats: int = 7
    """Generations of each kind, in turn, warm-up not counted."""
    domain: str = "code"
    """Kind of the prompt: code, maths, prose or plays."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write conditions and rows here."""


@dataclass(frozen=True)
class Row:
    """One way of decoding; all times in milliseconds a round.

    Attributes:
        decoding: plain, or who drafts.
        rounds: rounds of one generation, the prompt's not counted.
        tokens_per_round: tokens emitted by a round on average.
        round_ms: a whole round, without clocks.
        clocked_ms: a whole round with clocks: the sum of what follows.
        layers_ms: the layers, of drafts and of the full pass.
        head_ms: the head, likewise.
        predictor_ms: the predictor of rest states.
        plan_ms: preludes, masks, cache slots, embeddings.
        drafters_ms: what instant drafters name and learn.
        trie_ms: candidates merged, and the tree chosen.
        rest_ms: what is left.
        share: of a clocked round that is no model work.
    """

    decoding: str
    rounds: int
    tokens_per_round: float
    round_ms: float
    clocked_ms: float
    layers_ms: float
    head_ms: float
    predictor_ms: float
    plan_ms: float
    drafters_ms: float
    trie_ms: float
    rest_ms: float
    share: float


class Clocks:
    """Seconds inside parts of the model; where one part calls another, only the outer one counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self._inside = False

    def clocked(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function with its time added to ``part``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            began = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self._now() - began
                self._inside = False

        return timed

    @contextmanager
    def attached(self, decoder: Decoder) -> Iterator[None]:
        """Put the clocks into the code that decodes."""
        places = [
            (LayeredModel, "run", "layers"),
            (LayeredModel, "plan", "plan"),
            (LayeredModel, "embed", "plan"),
            (Head, "logits", "head"),
            (Head, "rest_state", "head"),
            (Head, "unembed", "head"),
        ]
        places += [(Trie, "merge", "trie"), (Fusion, "_choose", "trie")]
        if decoder.drafting is not None:
            places += [(kind, name, "drafters") for kind in _instant(decoder) for name in ("candidates", "learn")]
        if decoder.profile is not None:
            kinds = {type(predictor) for predictor in decoder.profile.predictors.values()}
            places += [(kind, "predict", "predictor") for kind in kinds]
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(mock.patch.object(owner, name, self.clocked(part, getattr(owner, name))))
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def _instant(decoder: Decoder) -> list[type[InstantDrafter]]:
    """The kinds of instant drafters that draft."""
    assert decoder.drafting is not None
    (speculator,) = decoder.drafting.speculators(LayeredTarget(decoder.layered), [Sampler(SamplingSettings())])
    return [] if speculator is None else [type(one) for one in speculator.instant]


def measure(decoder: Decoder, prompt: list[int], options: Options) -> Row:
    """Decode as it is and with clocks, in turn."""
    whole: list[float] = []
    parts: list[dict[str, float]] = []
    count = tokens = 0
    for repeat in range(options.repeats + 1):
        rounds = _decode(decoder, prompt, options)
        clocks = Clocks(decoder.layered.device)
        clocked = _decode(decoder, prompt, options, clocks)
        if [turn.tokens for turn in rounds] != [turn.tokens for turn in clocked]:
            raise RuntimeError("the two generations took different rounds, so their times cannot be compared")
        count, tokens = len(rounds), sum(len(turn.tokens) for turn in rounds)
        if repeat:
            whole.append(_seconds(rounds) / count)
            total = _seconds(clocked)
            inside = sum(clocks.seconds.values())
            outside = {
                "clocked": total,
                "rest": total - inside,
                "share": 1 - sum(clocks.seconds[part] for part in _MODEL_WORK) / total,
            }
            parts.append(clocks.seconds | outside)
    median = {name: statistics.median(one[name] for one in parts) for name in parts[0]}
    times = {f"{name}_ms": 1000 * value / count for name, value in median.items() if name != "share"}
    return Row(
        decoding="plain" if decoder.drafting is None else " ".join(decoder.drafting.names),
        rounds=count,
        tokens_per_round=tokens / count,
        round_ms=1000 * statistics.median(whole),
        share=median["share"],
        **times,
    )


def _seconds(rounds: list[Round]) -> float:
    return sum(turn.draft_seconds + turn.verify_seconds for turn in rounds)


def _decode(decoder: Decoder, prompt: list[int], options: Options, clocks: Clocks | None = None) -> list[Round]:
    """Rounds after the prompt's; with clocks, these are attached once the prompt is read."""
    asked = options.draft_tokens if decoder.drafting is not None else None
    pieces = decoder.stream(prompt, max_tokens=options.new_tokens, ignore_end=True, draft_tokens=asked)
    next(pieces)
    if clocks is None:
        return [piece.round for piece in pieces]
    with clocks.attached(decoder):
        return [piece.round for piece in pieces]


def main(options: Options) -> None:
    """Measure, print, write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    folder = options.profile or (PROFILE_PATH if options.model == "reference" and PROFILE_PATH.is_dir() else None)
    decoders = [Decoder(loaded)]
    if folder is not None or options.drafters:
        profile = None if folder is None else Profile.load(folder)
        decoders.append(Decoder(loaded, profile, options.drafters or None))
    prompt = prompts(options.domain)[0]
    seen = {
        "model": loaded.name,
        "layers": decoders[0].layered.depth,
        "device": device_name(decoders[0].layered.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "batch": 1,
        "prompt": prompt.id,
        "new tokens": options.new_tokens,
        "repeats": options.repeats,
        "decoding": "greedy",
        "versions": {module.__name__: module.__version__ for module in (restpoint, torch, transformers)},
    }
    print(", ".join(f"{key} {value}" for key, value in seen.items()))
    rows = [measure(decoder, decoder.encode(prompt.text), options) for decoder in decoders]
    names = ("round", "clocked", *_PARTS, "rest")
    print(f"{'decoding':36} {'tokens/round':>12} " + " ".join(f"{name + ' ms':>12}" for name in names) + "  share")
    for row in rows:
        times = " ".join(f"{getattr(row, f'{name}_ms'):12.3f}" for name in names)
        print(f"{row.decoding:36} {row.tokens_per_round:12.2f} {times} {row.share:6.1%}")
    if options.json is not None:
        content = {"conditions": seen, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
