"""What exits read: predictors of the rest state, and signals fitted on text that the model wrote."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.calibrate.options import ReadOptions
from restpoint.equilibrium.descent import RefineProgress, RefineSettings
from restpoint.equilibrium.fitting import fit_affine
from restpoint.equilibrium.predictors import AffinePredictor, Predictor
from restpoint.equilibrium.refining import refine
from restpoint.equilibrium.streaming import Chunk, FitSettings, Stream
from restpoint.errors import RestpointError
from restpoint.exit.gate import Gate, fit_gate
from restpoint.exit.policy import rounded
from restpoint.exit.radius import fit_radius
from restpoint.exit.registry import SIGNALS
from restpoint.exit.signals import Signal
from restpoint.exit.task_signal import TaskSaturation
from restpoint.exit.view import Readout
from restpoint.fit.options import FitOptions
from restpoint.fit.recording import Recording, record
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.progress import Progress
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import continue_texts
from restpoint.trajectory.task_examples import TaskExamples
from restpoint.trajectory.task_probe import fit_probe

_OWN = 0.3
"""Share of the text that predictors are fitted on that the model writes itself."""
_LENGTH = 128
"""Held-out sequences that ridge strengths are compared on."""
_LOOK = 100
"""Gradient steps between two looks at the held-out text."""
_DEPTHS = (1 / 2, 9 / 16, 5 / 8, 11 / 16, 3 / 4)
"""Shares of the depth where exits are considered."""


def candidate_layers(depth: int, options: ReadOptions) -> tuple[int, ...]:
    """Layers that the options name, or some between half and three quarters of the depth.

    Raises:
        RestpointError: a layer is not below the depth.
    """
    if not all(0 <= layer < depth for layer in options.layers):
        raise RestpointError(f"layers is {options.layers}; each must lie between 0 and {depth - 1}")
    return options.layers or tuple(sorted({min(max(1, round(share * depth)), depth - 1) for share in _DEPTHS}))


def state_layers(layer: int, options: ReadOptions) -> tuple[int, ...]:
    """Layers that a readout after ``layer`` reads: h_0 is the embedding, there is none before it."""
    return tuple(range(max(0, layer - options.read_layers + 1), layer + 1))


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

    Each is a ridge regression on the states of several layers, then refined by gradient steps on the divergence
    between the laws that are emitted and the model's own, over the same tokens. Held-out text, much of it the model's
    own, says when to stop, and keeps the ridge where no step betters it.

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
    read = tuple(sorted({own for layer in layers for own in state_layers(layer, options)}))
    recorded = record(loaded, layered, texts, how, read, folder / "states", report)
    size = layered.vocabulary_size // 4 if options.vocabulary is None else options.vocabulary
    size = 0 if whole_vocabulary else size
    vocabulary = recorded.frequent_tokens(size) if size and layered.head.direct else None
    solved = _solve(recorded, layers, vocabulary, options, report)
    recorded.store.remove()
    return Readout(layered, solved, vocabulary)


def _solve(
    recorded: Recording,
    layers: tuple[int, ...],
    vocabulary: Int[Tensor, " tokens"] | None,
    options: ReadOptions,
    report: Progress,
) -> dict[int, Predictor]:
    """The predictor of each layer: in closed form, refined, rounded."""
    settings = FitSettings(
        strengths=(1e-6, 1e-5, 1e-4, 1e-3),
        features=options.features,
        seed=options.seed,
        product_precision="float32",
    )

    def fitted() -> Iterator[Chunk]:
        return recorded.chunks(recorded.fitted)

    solved: dict[int, AffinePredictor] = {}
    for done, layer in enumerate(layers):
        report("solve predictors", done, len(layers))
        solved[layer] = fit_affine(
            fitted, recorded.scored, state_layers(layer, options), settings, score=recorded.score
        ).predictor
    report("solve predictors", len(layers), len(layers))
    if options.refine:
        steps = len(layers) * options.refine
        for done, layer in enumerate(layers):
            before = done * options.refine
            solved[layer] = _refined(
                solved[layer],
                fitted,
                recorded.set_aside,
                recorded.head(vocabulary),
                options,
                lambda look, before=before: report("refine predictors", before + look.step, steps),
            )
        report("refine predictors", steps, steps)
    return {layer: rounded(predictor) for layer, predictor in solved.items()}


def _refined(
    predictor: AffinePredictor,
    fitted: Stream,
    held_out: Stream,
    logits: Callable[[Tensor], Tensor],
    options: ReadOptions,
    progress: Callable[[RefineProgress], None],
) -> AffinePredictor:
    """The best predictor of a refinement that starts here, which may be this one."""
    # At least five looks, so that short refinements too are cut where they begin to fit the text by heart.
    settings = RefineSettings(steps=options.refine, every=max(1, min(_LOOK, options.refine // 5)), seed=options.seed)
    return refine(predictor, fitted, held_out, logits, settings, progress=progress).predictor


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
) -> Signal:
    """The signal of that name, fitted where it has something to fit.

    Args:
        name: of the signal.
        texts: as `write_texts` gives them.
        layers: candidate layers.
        readout: how states are read there.
        seed: of what is drawn.
    """
    if name in SIGNALS:
        return SIGNALS[name]
    if name == Gate.kind:
        return fit_gate(texts, layers, readout).gate
    if name == TaskSaturation.kind:
        layered = readout.layered
        examples = TaskExamples(lambda states: layered.logits(states[None])[0])
        for index, states in enumerate(texts):
            examples.add(Trajectory(states.transpose(0, 1), index))
        return TaskSaturation.of(fit_probe(examples.balanced(), seed=seed))
    return fit_radius(texts, layers, readout, seed=seed).signal
