"""Which rank layers are at work on, read by a probe and turned by an injection, on a few texts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.reading import Piece, Reader
from restpoint.trajectory.surveyed import layered_readout
from restpoint.trajectory.switching import measure_switching
from restpoint.trajectory.task_examples import TaskExamples
from restpoint.trajectory.task_probe import fit_probe

PAPERS = ("Lioubashevski et al. 2024, Looking beyond the top-1: transformers determine top tokens in order",)
TEXTS = 48
"""Texts that the study takes: a third of them for injections, the others for the probe."""

_LENGTH = 128


def study_tasks(
    layered: LayeredModel, reader: Reader, pieces: Sequence[Piece], seed: int = 0
) -> dict[str, Float64[Tensor, "..."]]:
    """The task probe and the switching intervention.

    Args:
        layered: the model.
        reader: of the same model.
        pieces: texts; every third is kept for injections.
        seed: of shuffled labels and of what is injected where.

    Returns:
        ``probe.accuracy`` and ``probe.control`` of each fold, the latter with labels shuffled within layers,
        ``probe.chance``, ``probe.confusion`` (true task, found task), ``probe.examples``; of injected states of task 2
        and, as ``control``, of task 1: ``switching.switched``, ``.carried`` and ``.kept``, shares of ``.runs``, as
        :class:`Switching` has them. Empty where the texts are too few or too short for it.
    """
    short = [Piece(piece.number, piece.ids[:_LENGTH], domain=piece.domain) for piece in pieces]
    examples = TaskExamples(layered_readout(layered))
    for piece in short:
        if piece.number % 3:
            for trajectory in reader.read([piece]):
                examples.add(trajectory)
    try:
        balanced = examples.balanced()
        probe = fit_probe(balanced, seed=seed)
        texts = [torch.tensor(piece.ids, device=layered.device) for piece in short if piece.number % 3 == 0]
        switching = measure_switching(layered, texts, balanced, seed=seed)
    except RestpointError:
        return {}
    numbers = {
        "probe.chance": probe.chance,
        "probe.examples": len(balanced.tasks),
        "switching.runs": switching.runs,
        "switching.switched": switching.switched,
        "switching.carried": switching.carried,
        "switching.kept": switching.kept,
        "switching.control.switched": switching.control_switched,
        "switching.control.carried": switching.control_carried,
        "switching.control.kept": switching.control_kept,
    }
    return {
        "probe.accuracy": probe.accuracy,
        "probe.control": probe.control,
        "probe.confusion": probe.confusion.double(),
        **{name: torch.tensor(float(value), dtype=torch.float64) for name, value in numbers.items()},
    }
