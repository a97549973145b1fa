"""What a solve over all layers at once is worth: error, agreement and acceptance after k sweeps, and bytes read.

Held-out text is the bundled prompts; slopes and starts are fitted on bundled fitting text. Every token is a system of
its own whose past is exact, as in decoding one token after another. Columns:

    error       median over tokens of |h_L after k sweeps - h_L| / |h_L|
    top-1       share of tokens whose most probable next token is the full model's
    acceptance  mean of sum min(p, q) = 1 - TV: how often a draft from q would be kept
    bytes       weights of layers read by k sweeps, divided by those of the plain pass (a sweep leaves out layers that
                are exact)
    extra       numbers of fitted starts and slopes read by the k sweeps besides, in the same unit

`plain pass, first E layers` is the yardstick: the logit lens after half and three quarters of the layers. The second
table drafts n + 1 tokens at once: leading tokens that are right after k sweeps over depth and tokens together, beside
k passes of Jacobi iteration over tokens alone from the same guesses; both read k times the weights.

    python benchmarks/depth_parallel.py
    python benchmarks/depth_parallel.py MODEL --texts 16 --json depth.json
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from torch import Tensor

import restpoint
from restpoint import LayeredModel, bundled, load
from restpoint.decode.joint import joint_sweeps
from restpoint.equilibrium import Anderson, Broyden, Method
from restpoint.equilibrium.depth import images_of, sweep_depth
from restpoint.equilibrium.depth_starts import FittedStart, StartFit, start_from_first, start_from_previous
from restpoint.equilibrium.slopes import SlopeFit, Slopes
from restpoint.files import write
from restpoint.model.depth import head_bytes, layer_bytes, sweep_bytes, tokens_alone
from restpoint.transport.variation import acceptance


@dataclass(frozen=True)
class Options:
    """Depth-parallel solves of one model, measured."""

    model: tyro.conf.Positional[str] = "reference"
    """Checkpoint folder, Hub name, or `reference`."""
    sweeps: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K ...")] = (1, 2, 3, 4, 6, 8, 12, 16)
    """Numbers of sweeps to report."""
    texts: int = 8
    """Held-out texts."""
    fit_texts: int = 40
    """Texts that slopes and starts are fitted on."""
    length: int = 160
    """Tokens of each text at most."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Methods of the first table, as it names them; all if left out."""
    drafted: int = 4
    """Tokens drafted at once in the second table; 0 leaves it out."""
    places: int = 6
    """Places in each text at which they are drafted."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write conditions and rows here."""


@dataclass(frozen=True)
class Row:
    """One method from one start after k sweeps; see the head of this file."""

    start: str
    method: str
    sweeps: int
    error: float
    top_1: float
    acceptance: float
    bytes: float
    extra: float


@dataclass(frozen=True)
class JointRow:
    """Leading drafted tokens that are right, on average, after k sweeps or passes; of ``drafted + 1``."""

    method: str
    sweeps: int
    right: float
    tokens_per_pass: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """What fitting text gave."""

    starts: FittedStart
    slopes: dict[tuple[str, str], Slopes]


@dataclass(frozen=True)
class Setup:
    """A start, slopes and a method, by name."""

    start: str
    method: str
    slopes: str = "identity"
    solver: Method | None = None


STARTS = ("h_0", "previous token", "fitted")
SETUPS = [
    *(Setup(start, "Jacobi (J = 0)", "zero") for start in STARTS),
    *(Setup(start, "identity-Newton") for start in STARTS),
    *(Setup(start, "gain by layer", "scaled") for start in STARTS),
    *(Setup(start, "gain by channel", "diagonal") for start in STARTS),
    *(Setup(start, "dense map", "dense") for start in STARTS),
    *(Setup(start, "identity-Newton, Anderson", solver=Anderson()) for start in STARTS),
    *(Setup(start, "identity-Newton, Broyden", solver=Broyden()) for start in STARTS),
]


def main(options: Options) -> None:
    """Measure, print, write."""
    loaded = load(options.model, dtype=options.dtype, device="cpu")
    layered = LayeredModel(loaded.model)
    encode = loaded.tokenizer.encode
    fitting = [encode(text)[: options.length] for text in islice(bundled.fit_texts(), options.fit_texts)]
    held_out = [encode(prompt.text)[: options.length] for prompt in bundled.prompts()[: options.texts]]
    fitting, held_out = ([ids for ids in texts if len(ids) > 16] for texts in (fitting, held_out))
    sizes = layer_bytes(layered)
    seen = {
        "model": loaded.name,
        "layers": layered.depth,
        "hidden": layered.hidden_size,
        "dtype": options.dtype,
        "fitting tokens": sum(map(len, fitting)),
        "held-out tokens": sum(len(ids) - 1 for ids in held_out),
        "MB of layers": round(sum(sizes) / 1e6, 1),
        "MB of head": round(head_bytes(layered) / 1e6, 1),
        "versions": {module.__name__: module.__version__ for module in (restpoint, torch, transformers)},
    }
    print(", ".join(f"{key} {value}" for key, value in seen.items()))
    with torch.no_grad():
        rows = list(alone(layered, fit(layered, fitting), held_out, options))
        joint = list(together(layered, held_out, options)) if options.drafted else []
    if options.json is not None:
        content = {"conditions": seen, "rows": [asdict(row) for row in rows], "joint": [asdict(row) for row in joint]}
        write(
            options.json, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"), "json"
        )


def systems(layered: LayeredModel, texts: list[list[int]]) -> Iterator[tuple[Tensor, list]]:
    """For every text its states, without those of the first token, which has no previous one; and the layers."""
    for ids in texts:
        found = tokens_alone(layered, torch.tensor([ids], device=layered.device))
        yield found.states, [_from_second(layer) for layer in found.layers]


def _from_second(layer):
    """The layer on all tokens but the first, which is filled up with zeros: no other one sees it."""
    return lambda state: layer(torch.cat((torch.zeros_like(state[:1]), state)))[1:]


def fit(layered: LayeredModel, texts: list[list[int]]) -> Fitted:
    """Starts, then the slopes that suit each start."""
    depth, dim = layered.depth, layered.hidden_size
    starts = StartFit(depth, dim)
    known = list(systems(layered, texts))
    for states, _ in known:
        starts.update(states)
    fitted = starts.fit(dtype=layered.dtype)
    slopes: dict[tuple[str, str], Slopes] = {}
    for start in STARTS:
        fits = {kind: SlopeFit(depth, dim, kind) for kind in ("scaled", "diagonal", "dense")}
        for states, layers in known:
            first = states[0, 1:]
            guess = _start(start, fitted, states)
            images = images_of(layers, first, guess)
            for one in fits.values():
                one.update(states[:, 1:], guess, images)
        slopes |= {(start, kind): one.fit(dtype=layered.dtype) for kind, one in fits.items()}
        for kind in ("scaled", "diagonal"):
            value = slopes[start, kind].value[1:]
            print(f"{kind} slopes from {start}: mean {float(value.mean()):.3f}, deviation {float(value.std()):.3f}")
    return Fitted(fitted, slopes)


def _start(name: str, fitted: FittedStart, states: Tensor) -> Tensor:
    first, previous = states[0, 1:], states[:, :-1]
    if name == "fitted":
        return fitted(first, previous)
    if name == "previous token":
        return start_from_previous(first, previous)
    return start_from_first(first, len(states) - 1)


def alone(layered: LayeredModel, fitted: Fitted, texts: list[list[int]], options: Options) -> Iterator[Row]:
    """The first table."""
    whole, one = sum(layer_bytes(layered)), torch.zeros(1, dtype=layered.dtype, device=layered.device)
    size = one.element_size()
    known = [(states, layers, _law(layered, states[-1, 1:])) for states, layers in systems(layered, texts)]
    print(
        f"{'start':16} {'method':28} {'sweeps':>6} {'error':>8} {'top-1':>7} {'acceptance':>11} "
        f"{'bytes':>7} {'extra':>7}"
    )
    for share in (0.5, 0.75):
        exit_layer = int(layered.depth * share)
        parts = [_compared(layered, states[exit_layer, 1:], states, law) for states, _, law in known]
        yield _show(Row("", f"plain pass, first {exit_layer} layers", 0, *_means(parts), share, 0.0))
    for start in STARTS:
        parts = [_compared(layered, _start(start, fitted.starts, states)[-1], states, law) for states, _, law in known]
        extra = fitted.starts.entries / layered.depth * size / whole if start == "fitted" else 0.0
        yield _show(Row(start, "the start itself", 0, *_means(parts), 0.0, extra))
    for setup in SETUPS:
        if options.methods and setup.method not in options.methods:
            continue
        slopes = {"identity": Slopes.identity, "zero": Slopes.zero}
        made = slopes[setup.slopes](layered.depth, one) if setup.slopes in slopes else None
        chosen = made or fitted.slopes[setup.start, setup.slopes]
        found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for states, layers, law in known:
            guess = _start(setup.start, fitted.starts, states)
            for swept in islice(
                sweep_depth(layers, states[0, 1:], guess, chosen, setup.solver), min(max(options.sweeps), layered.depth)
            ):
                if swept.exact in options.sweeps:
                    found.setdefault(swept.exact, []).append(_compared(layered, swept.states[-1], states, law))
        for sweeps, parts in found.items():
            entries = fitted.starts.entries if setup.start == "fitted" else 0
            entries += sweeps * chosen.entries if setup.slopes in ("diagonal", "dense") else 0
            read, extra = sweep_bytes(layered, sweeps) / whole, entries * size / whole
            yield _show(Row(setup.start, setup.method, sweeps, *_means(parts), read, extra))


def _show(row: Row) -> Row:
    print(
        f"{row.start:16} {row.method:28} {row.sweeps:6d} {row.error:8.3f} {row.top_1:7.3f} {row.acceptance:11.3f} "
        f"{row.bytes:7.2f} {row.extra:7.2f}",
        flush=True,
    )
    return row


def _law(layered: LayeredModel, rest: Tensor) -> Tensor:
    return layered.logits(rest[None])[0].float().softmax(-1)


def _compared(layered: LayeredModel, rest: Tensor, states: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token: relative error of h_L, whether the most probable token is the same, acceptance."""
    true = states[-1, 1:]
    q = _law(layered, rest.nan_to_num(0.0, 0.0, 0.0))
    error = (rest - true).norm(dim=-1) / true.norm(dim=-1)
    return error, (p.argmax(-1) == q.argmax(-1)).float(), acceptance(p, q)


def _means(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float]:
    error, same, kept = (torch.cat(side) for side in zip(*parts, strict=True))
    return float(error.nan_to_num(torch.inf).median()), float(same.mean()), float(kept.mean())


def together(layered: LayeredModel, texts: list[list[int]], options: Options) -> Iterator[JointRow]:
    """The second table."""
    count, most = options.drafted, max(own for own in options.sweeps if own <= layered.depth)
    right: dict[tuple[str, int], list[int]] = {}
    for ids in texts:
        places = torch.linspace(8, len(ids) - 1, options.places).long().tolist()
        for place in places:
            text, cache, before = _greedy(layered, ids[:place], count + 1)
            start = [ids[place - 1]] * count
            for name, previous in (("joint, from h_0", None), ("joint, from the previous token", before)):
                sweeps = joint_sweeps(layered, cache, ids[place - 1], start, previous)
                for number, tokens in enumerate(islice(sweeps, most), 1):
                    right.setdefault((name, number), []).append(_leading(tokens, text))
            tokens = start
            for number in range(1, most + 1):
                plan = layered.plan(torch.tensor([[ids[place - 1], *tokens[:count]]], device=layered.device), cache)
                tokens = layered.logits(layered.run(plan))[0].argmax(-1).tolist()
                right.setdefault(("Jacobi over tokens", number), []).append(_leading(tokens, text))
    print(f"{'drafting ' + str(count + 1) + ' at once':32} {'sweeps':>6} {'right':>6} {'tokens/pass':>12}")
    for (name, number), counts in right.items():
        if number not in options.sweeps:
            continue
        mean = sum(counts) / len(counts)
        # A sweep's tokens must be verified by a pass, which gives one more; a pass of Jacobi iteration verifies itself.
        rate = (mean + 1) / (number + 1) if name.startswith("joint") else mean / number
        print(f"{name:32} {number:6d} {mean:6.2f} {rate:12.2f}")
        yield JointRow(name, number, mean, rate)


def _greedy(layered: LayeredModel, ids: list[int], count: int):
    """The next tokens, a cache of all but the last token of the text, and the states of the last token in it."""
    cache = layered.cache()
    kept: list[Tensor] = []
    plan = layered.plan(torch.tensor([ids[:-1]], device=layered.device), cache)
    kept.append(plan.hidden)
    layered.run(plan, keep=kept)
    cache.commit([len(ids) - 1])
    before = torch.cat([state[0, -1:] for state in kept])
    text, token = list[int](), ids[-1]
    for _ in range(count):
        plan = layered.plan(torch.tensor([[token]], device=layered.device), cache)
        token = int(layered.logits(layered.run(plan))[0, -1].argmax())
        cache.commit([1])
        text.append(token)
    cache.commit([-count])
    return text, cache, before


def _leading(tokens: list[int], text: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(tokens, text, strict=True)) if pair[0] != pair[1]), len(text))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
