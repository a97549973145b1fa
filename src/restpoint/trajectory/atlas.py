"""The atlas of a model: all that was measured of its trajectories on some text, in one artefact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from restpoint.trajectory.scenes import Scene

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Subject:
    """What was measured.

    Attributes:
        model: name or path of the checkpoint.
        fingerprint: of its weights and configuration.
        family: model type.
        part: which stack of layers, where a model has several (``encoder``, ``decoder``).
        layers: their number L; there are L + 1 states.
        hidden: size of the states.
        vocabulary: number of tokens; 0 where there is no unembedding.
        parameters: of the model.
        dtype: that it was run in.
        untrained: whether its weights were replaced by random ones.
    """

    model: str
    fingerprint: str
    family: str
    part: str
    layers: int
    hidden: int
    vocabulary: int
    parameters: int
    dtype: str
    untrained: bool = False


@dataclass(frozen=True, eq=False)
class Atlas:
    """Measurements of one model on one corpus.

    Attributes:
        subject: what was measured.
        corpus: of what was read: ``texts``, ``tokens``, ``skipped`` (texts of fewer than two tokens), ``domains`` (tokens
            of each kind), ``hash``, ``source``.
        conditions: versions, date, threads, seconds, settings.
        results: for each measure by name, its results by name.
        papers: for each measure, the papers that it follows.
        scenes: sentences to look at.
        sums: of each measure, what further texts or another part's atlas are added to.
    """

    subject: Subject
    corpus: dict[str, Any]
    conditions: dict[str, Any]
    results: Mapping[str, Mapping[str, Float64[Tensor, "..."]]]
    papers: Mapping[str, list[str]]
    scenes: list[Scene] = field(default_factory=list)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
