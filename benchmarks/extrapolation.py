"""Where each predictor of the rest state ends up: the lens, closed-form maps, refined maps, extrapolation along depth.

    python benchmarks/extrapolation.py
    python benchmarks/extrapolation.py --layers 8 --refine-steps 1000

All are fitted on the same text, have what they choose (strength, dimension, order's regularisation, step to stop at)
chosen on a second part and are measured on a third; the parts share no document. Acceptance is the mean of 1 - TV to
the model's own law of the next token, top-1 the share of tokens where the most probable one is the model's, KL in nats,
error the squared error over the rest state's variance. No vocabulary is cut. Numbers depend on the seed through the
refinement only; nothing is timed.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from restpoint import bundled
from restpoint.equilibrium import (
    Chunk,
    FitSettings,
    IdentityPredictor,
    ModeSettings,
    Predictor,
    RefineSettings,
    fit_affine,
    fit_dynamic_modes,
    fit_extrapolation,
    fit_monge,
    fit_recurrence,
    refine,
)
from restpoint.model.layered import LayeredModel
from restpoint.model.load import load
from restpoint.trajectory.record import pack, states_of
from restpoint.transport.variation import acceptance


@dataclass(frozen=True)
class Options:
    """What is measured."""

    layers: tuple[int, ...] = (4, 8, 12)
    """Exit layers."""
    tokens: int = 20_000
    """Tokens to fit on."""
    length: int = 256
    """Tokens of each sequence."""
    aside: int = 2_000
    """Tokens to choose on, and as many again to measure on."""
    families: tuple[Literal["maps", "refined", "extrapolation", "modes"], ...] = (
        "maps",
        "refined",
        "extrapolation",
        "modes",
    )
    """What is measured beside the lens and the ridge map."""
    orders: tuple[int, ...] = (1, 3)
    """Orders k of extrapolation, which reads k + 2 layers."""
    refine_steps: int = 400
    """Gradient steps at most."""
    threads: int = 1
    """Processor threads of torch."""


Stream = Callable[[], Iterator[Chunk]]
Score = Callable[[Tensor, Tensor], Tensor]

_METHODS: tuple[tuple[str, Literal["reduced-rank", "minimal-polynomial"], float], ...] = (
    ("RRE", "reduced-rank", 0.0),
    ("MPE", "minimal-polynomial", 0.0),
    ("Anderson", "reduced-rank", 1.0),
)


def main(options: Options) -> None:
    """Fit, measure and print."""
    torch.set_num_threads(options.threads)
    loaded = load(dtype="float32", device="cpu")
    layered = LayeredModel(loaded.model)
    fitted, chosen, measured = _parts(options, loaded.tokenizer, layered)

    def laws(rest: Tensor) -> Tensor:
        return torch.softmax(layered.logits(rest[None])[0], -1)

    def score(predicted: Tensor, true: Tensor) -> Tensor:
        blocks = zip(predicted.split(512), true.split(512), strict=True)
        return torch.cat([acceptance(laws(one), laws(other)) for one, other in blocks])

    print(
        f"{layered.depth} layers, d = {layered.hidden_size}, vocabulary {layered.vocabulary_size}, "
        f"torch {torch.__version__}"
    )
    print(f"fitted on {_count(fitted)} tokens, chosen on {_count(chosen)}, measured on {_count(measured)}")
    linear = FitSettings(strengths=(1e-5, 1e-3, 1e-2), features=0, steps=1, product_precision="float32")
    measure = _Measure(measured, laws)
    for layer in options.layers:
        print(f"\nfrom layer {layer}")
        print(f"{'predictor':36s} {'accepted':>8s} {'top-1':>6s} {'KL':>6s} {'error':>8s}  chosen", flush=True)
        measure.show("lens", IdentityPredictor((layer,)))
        ridge = fit_affine(fitted, chosen, (layer,), linear, score=score)
        measure.show("ridge", ridge.predictor, f"strength {ridge.chosen[0]:g}")
        if "maps" in options.families:
            measure.show("monge", fit_monge(fitted, chosen, layer, linear, score=score).predictor)
            reads = tuple(sorted({0, layer}))
            measure.show("recurrence, linear", fit_recurrence(fitted, chosen, reads, linear, score=score).predictor)
            several = tuple(range(max(0, layer - max(options.orders) - 1), layer + 1))
            many = fit_affine(fitted, chosen, several, linear, score=score)
            measure.show(f"ridge on layers {several[0]} to {layer}", many.predictor, f"strength {many.chosen[0]:g}")
        if "refined" in options.families:
            settings = RefineSettings(steps=options.refine_steps)
            found = refine(ridge.predictor, fitted, chosen, lambda rest: layered.head.logits(rest[None])[0], settings)
            note = f"step {found.step}; where chosen, KL {found.before:.3f} to {found.after:.3f}"
            measure.show("ridge, refined", found.predictor, note)
        if "extrapolation" in options.families:
            _extrapolations(measure, chosen, layer, options, score)
        if "modes" in options.families:
            _modes(measure, fitted, chosen, layer, layered.depth, linear, score)
    print(f"\nload {os.getloadavg()[0]:.2f} at the end")


def _extrapolations(measure: "_Measure", chosen: Stream, layer: int, options: Options, score: Score) -> None:
    """Every method and order, regularised as serves it best, and the highest order as it is."""
    regularised, bare = FitSettings(strengths=(1e-6, 1e-2, 1e-1, 1.0)), FitSettings(strengths=(0.0,))
    for order in options.orders:
        layers = tuple(range(layer - order - 1, layer + 1))
        if layers[0] < 0:
            continue
        for name, weighting, mixing in _METHODS:
            for settings in (regularised, bare) if order == max(options.orders) else (regularised,):
                fit = fit_extrapolation(chosen, layers, settings, weighting=weighting, mixing=mixing, score=score)
                how = "bare" if settings is bare else "regularised"
                measure.show(f"{name}, order {order}, {how}", fit.predictor, f"r {fit.chosen[0]:g}")


def _modes(
    measure: "_Measure", fitted: Stream, chosen: Stream, layer: int, depth: int, linear: FitSettings, score: Score
) -> None:
    """Operators fitted on the five layers up to the exit and on all of them."""
    window, whole = tuple(range(max(0, layer - 4), layer + 1)), tuple(range(depth))
    outsides: tuple[tuple[Literal["hold", "drop"], bool], ...] = (("hold", True), ("drop", True), ("hold", False))
    for layers, where in ((window, "window"), (whole, "all layers")):
        for outside, offset in outsides:
            settings = ModeSettings(dimensions=(4, 16, 64, 256), outside=outside, offset=offset)
            fit = fit_dynamic_modes(
                fitted, chosen, layers, depth - layer, linear, exit_layer=layer, modes=settings, score=score
            )
            kind = "affine" if offset else "linear"
            note = f"m {fit.predictor.dimension}, spectral radius {fit.predictor.spectral_radius:.3f}"
            measure.show(f"DMD, {where}, {kind}, {outside}", fit.predictor, note)


def _parts(options: Options, tokenizer: object, layered: LayeredModel) -> tuple[Stream, Stream, Stream]:
    """Streams of states to fit on, to choose on and to measure on: each domain's documents dealt out 8 to 1 to 1."""
    documents: list[list[list[int]]] = [[], [], []]
    wanted = (options.tokens, options.aside, options.aside)
    seen: Counter[str] = Counter()
    for domain, text in bundled.documents():
        part = {0: 1, 5: 2}.get(seen[domain] % 10, 0)
        seen[domain] += 1
        if sum(map(len, documents[part])) >= wanted[part]:
            if all(sum(map(len, each)) >= count for each, count in zip(documents, wanted, strict=True)):
                break
            continue
        documents[part].append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])  # pyright: ignore
    streams = []
    for part, count in zip(documents, wanted, strict=True):
        sequences = list(pack(part, options.length))[: count // options.length]
        recorded = [
            states_of(layered, torch.tensor(sequences[first : first + 8]), tuple(range(layered.depth)))[:, 1:]
            for first in range(0, len(sequences), 8)
        ]
        chunks = [Chunk(states[:, :, :-1], states[:, :, -1]) for states in recorded]
        streams.append(lambda chunks=chunks: iter(chunks))
    return streams[0], streams[1], streams[2]


def _count(stream: Stream) -> int:
    return sum(chunk.rest[..., 0].numel() for chunk in stream())


class _Measure:
    """Acceptance, top-1 agreement, KL and relative error on the tokens of a stream that have a rest state before."""

    def __init__(self, stream: Stream, laws: Callable[[Tensor], Tensor]) -> None:
        self.sequences = [(chunk.states[row], chunk.rest[row]) for chunk in stream() for row in range(len(chunk.rest))]
        self.laws = laws
        self.true = [laws(rest[1:]) for _, rest in self.sequences]
        self.variance = torch.cat([rest for _, rest in self.sequences]).var(0).sum()

    @torch.no_grad()
    def show(self, name: str, predictor: Predictor, note: str = "") -> None:
        """Print a line."""
        rows = []
        for (states, rest), true in zip(self.sequences, self.true, strict=True):
            predicted = predictor.predict([states[1:, layer] for layer in predictor.state_layers], rest[:-1])
            law = self.laws(predicted)
            divergence = torch.xlogy(true, true / law.clamp_min(1e-38)).sum(-1)
            error = (predicted - rest[1:]).square().sum(-1) / self.variance
            values = (acceptance(true, law), true.argmax(-1) == law.argmax(-1), divergence, error)
            rows.append(torch.stack([value.double() for value in values]))
        accepted, agreed, divergence, error = torch.cat(rows, 1).mean(1).tolist()
        print(f"{name:36s} {accepted:8.3f} {agreed:6.3f} {divergence:6.3f} {error:8.3g}  {note}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
