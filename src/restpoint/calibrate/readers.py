"""What exits read: predictors of the rest state, and signals fitted on text that the model wrote."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.calibrate.options import ReadOptions
from restpoint.equilibrium.fitting import fit_affine
from restpoint.equilibrium.predictors import Predictor
from restpoint.equilibrium.streaming import Chunk, FitSettings
from restpoint.errors import RestpointError
from restpoint.exit.gate import Gate, fit_gate
from restpoint.exit.policy import rounded
from restpoint.exit.radius import fit_radius
from restpoint.exit.registry import SIGNALS
from restpoint.exit.signals import Signal
from restpoint.exit.task_signal import TaskSaturation
from restpoint.exit.view import Readout
from restpoint.fit.options import FitOptions
from restpoint.fit.recording import record
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import continue_texts
from restpoint.trajectory.task_examples import TaskExamples
from restpoint.trajectory.task_probe import fit_probe

Progress = Callable[[str, int, int], None]

_OWN = 0.3
"""Share of the text that predictors are fitted on that the model writes itself."""
_LENGTH = 128
_SCORED = 16
"""Held-out sequences that ridge strengths are compared on."""
_DEPTHS = (1 / 4, 1 / 2, 5 / 8, 11 / 16, 3 / 4, 13 / 16)
"""Shares of the depth where exits are considered."""
_GATE_PARTS = ("weights", "directions", "bias", "centres")


def candidate_layers(depth: int, options: ReadOptions) -> tuple[int, ...]:
    """Layers that the options name, or some between a quarter and most of the depth, closer together later on.

    Raises:
        RestpointError: a layer is not below the depth.
    """
    if not all(0 <= layer < depth for layer in options.layers):
        raise RestpointError(f"layers is {options.layers}; each must lie between 0 and {depth - 1}")
    return options.layers or tuple(sorted({min(max(1, round(share * depth)), depth - 1) for share in _DEPTHS}))


def fit_readout(
    loaded: Loaded,
    layered: LayeredModel,
    texts: Sequence[str],
    layers: tuple[int, ...],
    options: ReadOptions,
    folder: Path,
    report: Progress,
    *,
    whole_vocabulary: bool = False,
) -> Readout:
    """A predictor of the rest state for each layer, rounded as it will be saved; none where the lens is asked for.

    With ``whole_vocabulary`` exits may emit every token, whatever the options say: the rest radius needs that.

    States are recorded under ``folder``, where an interrupted recording resumes, and removed in the end. With the lens
    the whole vocabulary is read.
    """
    if options.lens:
        return Readout(layered)
    how = FitOptions(
        max_tokens=options.fit_tokens,
        own_share=_OWN,
        sequence_length=_LENGTH,
        features=options.features,
        seed=options.seed,
    )
    recorded = record(loaded, layered, texts, how, layers, folder / "states", report)
    settings = FitSettings(
        strengths=(1e-5, 1e-4, 1e-3), features=options.features, seed=options.seed, product_precision="float32"
    )

    def fitted() -> Iterator[Chunk]:
        return recorded.chunks(recorded.fitted)

    def held_out() -> Iterator[Chunk]:
        return recorded.chunks(recorded.held_out[:: max(1, len(recorded.held_out) // _SCORED)])

    solved: dict[int, Predictor] = {}
    for done, layer in enumerate(layers):
        report("solve predictors", done, len(layers))
        solved[layer] = rounded(fit_affine(fitted, held_out, (layer,), settings, score=recorded.score).predictor)
    report("solve predictors", len(layers), len(layers))
    size = layered.vocabulary_size // 4 if options.vocabulary is None else options.vocabulary
    size = 0 if whole_vocabulary else size
    vocabulary = recorded.frequent_tokens(size) if size and layered.head.direct else None
    recorded.store.remove()
    return Readout(layered, solved, vocabulary)


def write_texts(
    layered: LayeredModel, prompts: Sequence[list[int]], options: ReadOptions, report: Progress
) -> list[Float[Tensor, "tokens levels hidden"]]:
    """States h_0 .. h_L of tokens that the model wrote greedily, each as it is read when the next one is chosen."""
    length = options.prompt_tokens + options.new_tokens - 1
    written: list[Tensor] = []
    for first in range(0, len(prompts), options.batch):
        report("write text", first, len(prompts))
        some = torch.tensor(prompts[first : first + options.batch], device=layered.device)
        _, states = continue_texts(layered, some, length, tuple(range(layered.depth)), lambda _row: True, options.seed)
        written += states[:, options.prompt_tokens :].float().unbind(0)
    report("write text", len(prompts), len(prompts))
    return written


def fit_signal(
    name: str,
    texts: Sequence[Float[Tensor, "tokens levels hidden"]],
    layers: tuple[int, ...],
    readout: Readout,
    seed: int,
    apart: bool = False,
) -> Signal:
    """The signal of that name, fitted where it has something to fit.

    Args:
        name: of the signal.
        texts: as `write_texts` gives them.
        layers: candidate layers.
        readout: how states are read there.
        seed: of what is drawn.
        apart: fit a gate for each layer as if it were the only one, so that any of them can be left out.
    """
    if name in SIGNALS:
        return SIGNALS[name]
    if name == Gate.kind:
        groups = [(layer,) for layer in layers] if apart else [layers]
        gates = [fit_gate(texts, group, readout).gate for group in groups]
        return Gate(layers, *(torch.cat([getattr(gate, part) for gate in gates]) for part in _GATE_PARTS))
    if name == TaskSaturation.kind:
        layered = readout.layered
        examples = TaskExamples(lambda states: layered.logits(states[None])[0])
        for index, states in enumerate(texts):
            examples.add(Trajectory(states.transpose(0, 1), index))
        return TaskSaturation.of(fit_probe(examples.balanced(), seed=seed))
    return fit_radius(texts, layers, readout, seed=seed).signal
