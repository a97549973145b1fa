"""What a gate should read: held-out log loss, and the layers that it saves, with more inputs and with fewer.

    python benchmarks/gate_inputs.py
    python benchmarks/gate_inputs.py --fit 400 --judge 400 --penalty 0.01

The bundled model continues prompts at full depth; on some of these texts logistic regressions are fitted after each
layer that the bundled profile's exits read, on others of other documents they are judged. A token stops at the first
layer where the probability reaches a threshold; the threshold is the lowest at which so many tokens differ.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from restpoint import bundled
from restpoint.calibrate.options import ReadOptions
from restpoint.calibrate.passages import deal
from restpoint.calibrate.readers import write_texts
from restpoint.exit.gate import logistic_regression
from restpoint.exit.recorded import blocks_of
from restpoint.exit.registry import SIGNALS
from restpoint.exit.sweep import first_exits, thresholds_of
from restpoint.exit.view import Readout, View
from restpoint.model.load import load
from restpoint.model.unrolled import layered_model
from restpoint.profile import Profile

_LEAST = 1e-6


def _column(read: Callable[[View], Tensor]) -> Callable[[View], Tensor]:
    return lambda view: read(view)[:, None]


def _relative_step(view: View) -> Tensor:
    return (1 / SIGNALS["relative-step"].confidence(view) - 1).clamp_min(_LEAST).log()


def _agreement(view: View) -> Tensor:
    return torch.zeros(len(view.state)) if view.earlier is None else (view.tokens == view.earlier.tokens).float()


INPUTS: dict[str, Callable[[View], Tensor]] = {
    "two logits": lambda view: view.lead[0],
    "their lead": _column(lambda view: view.lead[0][:, 0] - view.lead[0][:, 1]),
    "mass": lambda view: view.logits.logsumexp(-1, keepdim=True),
    "state": lambda view: view.state,
    "rest state": lambda view: view.rest,
    "max-p": _column(lambda view: view.top_two[:, 0].logit(eps=_LEAST)),
    "margin": _column(lambda view: (view.top_two[:, 0] - view.top_two[:, 1]).clamp_min(_LEAST).log()),
    "entropy": _column(lambda view: view.entropy),
    "relative step": _column(_relative_step),
    "acceleration": _column(lambda view: SIGNALS["acceleration"].confidence(view)),
    "agreement": _column(_agreement),
    "length": _column(lambda view: view.state.norm(dim=-1).log()),
    "five logits": lambda view: view.logits.topk(5, -1).values,
}
"""What a view gives, by the name that the table calls it."""

_LAW = ("two logits", "mass")
_WIDE = ("state", "rest state")
SETS: tuple[tuple[str, ...], ...] = (
    ("max-p",),
    ("their lead",),
    _LAW,
    (*_LAW, "max-p", "margin", "entropy", "relative step", "acceleration", "agreement", "length"),
    (*_LAW, "state"),
    (*_LAW, "rest state"),
    ("two logits", "state"),
    (*_LAW, "state", "relative step", "acceleration", "length"),
    (*_LAW, "state", "agreement"),
    (*_LAW, "state", "max-p", "margin", "entropy", "relative step", "acceleration", "agreement", "length"),
    (*_LAW, "state", "rest state", "five logits"),
)


@dataclass(frozen=True)
class Options:
    """How much text is used, and what may differ."""

    fit: int = 400
    """Texts to fit on."""
    judge: int = 400
    """Texts to judge on."""
    penalty: float = 0.01
    """On squared weights of states, which are standardised."""
    disagreements: tuple[float, ...] = (0.01, 0.05)
    """Shares of tokens that may differ."""
    threads: int = 2
    """Processor threads of torch."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Of all tokens at one layer: each input, and whether the readout's token is the full model's."""

    inputs: dict[str, Tensor]
    right: Tensor


def main(options: Options) -> None:
    """Write texts, fit, judge and print."""
    torch.set_num_threads(options.threads)
    loaded = load(bundled.REFERENCE, dtype="float32", device="cpu")
    layered = layered_model(loaded.model)
    policy = Profile.load(bundled.PROFILE_PATH).exits
    assert policy is not None
    readout, layers = policy.readout(layered), policy.rule.candidates(layered.depth)
    how = ReadOptions(fit_tokens=1)
    passages = deal(bundled.fit_texts(), loaded.tokenizer, how, options.fit, options.judge)
    fitted, judged = (
        _seen(write_texts(layered, prompts, how, lambda *_: None), layers, readout)
        for prompts in (passages.tune, passages.judge)
    )
    print(f"{len(passages.tune)} texts fitted on, {len(passages.judge)} judged; layers {layers}; log loss by layer,")
    print("and layers saved where so many tokens differ: " + ", ".join(f"{own:.0%}" for own in options.disagreements))
    for names in SETS:
        found = [_fit(names, *pair, options.penalty) for pair in zip(fitted, judged, strict=True)]
        losses = " ".join(f"{loss:.4f}" for _, loss in found)
        right = torch.stack([each.right for each in judged], -1)
        confidence = torch.stack([own for own, _ in found], -1)
        saved = " ".join(f"{own:.2f}" for own in _saved(confidence, right, layers, layered.depth, options))
        print(f"{losses}   {saved}   {', '.join(names)}", flush=True)


@torch.inference_mode()
def _seen(texts: Sequence[Tensor], layers: tuple[int, ...], readout: Readout) -> list[Seen]:
    """By layer."""

    def parts() -> Iterator[list[Seen]]:
        for _, views, rest in blocks_of(texts, layers, readout):
            target = readout.layered.logits(rest[None])[0].argmax(-1)
            yield [Seen({name: read(view) for name, read in INPUTS.items()}, view.tokens == target) for view in views]

    return [
        Seen(
            {name: torch.cat([part.inputs[name] for part in own]) for name in INPUTS},
            torch.cat([part.right for part in own]),
        )
        for own in zip(*parts(), strict=True)
    ]


def _fit(names: tuple[str, ...], fitted: Seen, judged: Seen, penalty: float) -> tuple[Tensor, float]:
    """Probabilities that judged tokens are right, and their log loss."""
    rows, others = (torch.cat([seen.inputs[name] for name in names], -1).double() for seen in (fitted, judged))
    mean, scale = rows.mean(0), rows.std(0).clamp_min(_LEAST)
    rows, others = (functional.pad((own - mean) / scale, (0, 1), value=1.0) for own in (rows, others))
    widths = [fitted.inputs[name].shape[1] for name in names]
    each = [penalty if name in _WIDE else _LEAST for name in names]
    penalties = torch.repeat_interleave(torch.tensor([*each, 0.0]), torch.tensor([*widths, 1])).double()
    weights = logistic_regression(rows, fitted.right.double(), penalties, torch.zeros_like(penalties))
    logits = others @ weights
    return torch.sigmoid(logits), float(functional.binary_cross_entropy_with_logits(logits, judged.right.double()))


def _saved(confidence: Tensor, right: Tensor, layers: tuple[int, ...], depth: int, options: Options) -> list[float]:
    """Mean layers saved at each share of tokens that may differ."""
    thresholds = torch.tensor(thresholds_of(confidence, 1000), dtype=torch.float64)
    exits = first_exits(confidence[None], thresholds)[:, 0].T  # tokens x thresholds
    wrong = functional.pad(~right, (0, 1)).gather(1, exits).double().mean(0)
    saved = torch.tensor([*(depth - layer for layer in layers), 0]).double()[exits].mean(0)
    return [float(saved[wrong <= most].max()) for most in options.disagreements]


if __name__ == "__main__":
    main(tyro.cli(Options))
