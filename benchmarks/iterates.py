"""Where the iteration of a recurrent-depth model comes to rest, told from its first steps.

    python benchmarks/iterates.py FOLDER
    python benchmarks/iterates.py FOLDER --steps 4 8 --rest 32

s_r is predicted for every token from s_1 .. s_k. Vector extrapolation fits nothing; dynamic modes and ridge regression
are fitted on the steps up to k and on s_r, on text that is not measured on. Error is the squared error over the squared
norm of s_r; acceptance (1 - TV) and top-1 agreement are to the model's law after r steps, when all tokens' states are
replaced by predictions and the coda is run on them. "Kept" is s_k itself: the model stopped after k steps.
"""

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
    fit_affine,
    fit_dynamic_modes,
    fit_extrapolation,
)
from restpoint.model.load import load
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM, recurrent_states
from restpoint.model.recurrent.layers import Pass
from restpoint.trajectory.record import pack
from restpoint.transport.variation import acceptance


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: tyro.conf.Positional[str]
    """Folder of a recurrent-depth model."""
    steps: tuple[int, ...] = (4, 6, 8)
    """k: steps that are run."""
    rest: int = 32
    """r: steps after which the state is taken to be at rest."""
    orders: tuple[int, ...] = (1, 2)
    """Orders of extrapolation; k steps allow those up to k - 2."""
    sequences: int = 60
    """Sequences to fit on; a sixth as many to choose on, and as many again to measure on."""
    length: int = 128
    """Tokens of each sequence."""
    threads: int = 1
    """Processor threads of torch."""


def main(options: Options) -> None:
    """Fit, measure and print."""
    torch.set_num_threads(options.threads)
    loaded = load(options.model, dtype="float32", device="cpu")
    model = loaded.model
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise SystemExit(f"model is {options.model}, which does not iterate a block")
    aside = max(1, options.sequences // 6)
    wanted = options.sequences + 2 * aside
    documents = (list(loaded.tokenizer(text)["input_ids"]) for text in bundled.fit_texts())
    packed = pack(documents, options.length)
    ids = torch.tensor([next(packed) for _ in range(wanted)])
    states = torch.cat([recurrent_states(model, some, options.rest).movedim(0, 2) for some in ids.split(10)])
    parts = states.split((options.sequences, aside, aside))
    moved = (states[:, :, 1:] - states[:, :, :-1]).norm(dim=-1) / states[:, :, 1:].norm(dim=-1)
    told = ", ".join(f"{step}: {float(moved[:, :, step - 1].mean()):.3f}" for step in (1, 2, 4, 8, 16, options.rest))
    print(f"r = {options.rest}; mean |s_k - s_(k-1)| / |s_k| at k = {told}")

    def stream(part: Tensor, last: int) -> Callable[[], Iterator[Chunk]]:
        chunk = Chunk(part[:, :, : last + 1], part[:, :, -1])
        return lambda: iter((chunk,))

    for last in options.steps:
        fitted, chosen = stream(parts[0], last), stream(parts[1], last)
        print(f"\nfrom s_1 .. s_{last}\n{'predictor':34s} {'accepted':>8s} {'top-1':>6s} {'error':>9s}  chosen")

        def show(name: str, predictor: Predictor, note: str = "", last: int = last) -> None:
            values = _measure(model, parts[2][:, :, : last + 1], parts[2][:, :, -1], predictor)
            print(f"{name:34s} {values[0]:8.3f} {values[1]:6.3f} {values[2]:9.2e}  {note}", flush=True)

        show("kept", IdentityPredictor((last,)))
        linear = FitSettings(strengths=(1e-6, 1e-4, 1e-2), features=0)
        ridge = fit_affine(fitted, chosen, (last,), linear)
        show("ridge", ridge.predictor, f"strength {ridge.chosen[0]:g}")
        for order in (order for order in options.orders if order <= last - 2):
            layers = tuple(range(last - order - 1, last + 1))
            strengths = FitSettings(strengths=(1e-6, 1e-4, 1e-2, 1e-1, 1.0))
            for name, mixing in (("RRE", 0.0), ("Anderson", 1.0)):
                fit = fit_extrapolation(chosen, layers, strengths, mixing=mixing)
                show(f"{name}, order {order}", fit.predictor, f"r {fit.chosen[0]:g}")
            fit = fit_extrapolation(chosen, layers, strengths, weighting="minimal-polynomial")
            show(f"MPE, order {order}", fit.predictor, f"r {fit.chosen[0]:g}")
        outsides: tuple[Literal["hold", "drop"], ...] = ("hold", "drop")
        for outside in outsides:
            settings = ModeSettings(dimensions=(4, 16, 64, 256), outside=outside)
            fit = fit_dynamic_modes(
                fitted, chosen, tuple(range(max(1, last - 3), last + 1)), options.rest - last, modes=settings
            )
            note = f"m {fit.predictor.dimension}, spectral radius {fit.predictor.spectral_radius:.3f}"
            show(f"DMD, {outside}", fit.predictor, note)


@torch.no_grad()
def _measure(
    model: RecurrentDepthForCausalLM, states: Tensor, rest: Tensor, predictor: Predictor
) -> tuple[float, float, float]:
    """Acceptance, top-1 agreement and relative squared error."""
    predicted = predictor.predict([states[:, :, layer] for layer in predictor.state_layers])
    true, law = (_laws(model, each) for each in (rest, predicted))
    error = (predicted - rest).square().sum(-1) / rest.square().sum(-1)
    agreed = (true.argmax(-1) == law.argmax(-1)).float()
    return float(acceptance(true, law).mean()), float(agreed.mean()), float(error.mean())


def _laws(model: RecurrentDepthForCausalLM, states: Tensor) -> Tensor:
    positions = torch.arange(states.shape[1])[None]
    passing = Pass(model.model.rotary_emb(states, positions), None, None)
    return torch.softmax(model.lm_head(model.model.finish(states, passing)), -1)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
