"""All measures by name: how each is made for a model, and which a model allows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.bounds import Bounds
from restpoint.trajectory.geometry import Geometry
from restpoint.trajectory.lens import Lens, Predict
from restpoint.trajectory.measure import Measure, Readout
from restpoint.trajectory.options import MEASURES, SurveyOptions
from restpoint.trajectory.pairs import Pairs
from restpoint.trajectory.saturation import Saturation
from restpoint.trajectory.sinks import Sinks
from restpoint.trajectory.surveyed import Surveyed, layered_readout
from restpoint.trajectory.transport import Transport

_MOST_EMBEDDINGS = 20_000
"""Distances between all pairs of more tokens would take longer than the survey."""


def unread(_states: Tensor) -> Tensor:
    """In place of a model's head, where nothing is read any more.

    Raises:
        RestpointError: always.
    """
    raise RestpointError("readout: there is none; only what was measured before can be merged")


@dataclass(frozen=True, eq=False)
class Means:
    """What measures need of a model beside its trajectories.

    Attributes:
        options: of the survey.
        readout: final norm and unembedding.
        vocabulary: number of tokens; 0 where there is no unembedding.
        embeddings: of the tokens, where they are few enough to be compared with one another.
        lenses: further lenses by name.
    """

    options: SurveyOptions
    readout: Readout = unread
    vocabulary: int = 0
    embeddings: Float[Tensor, "vocabulary hidden"] | None = None
    lenses: Mapping[str, Predict] = field(default_factory=dict)


_MAKERS: dict[str, Callable[[Means], Measure]] = {
    "geometry": lambda _means: Geometry(),
    "pairs": lambda means: Pairs(seed=means.options.seed),
    "lens": lambda means: Lens(means.readout, means.lenses),
    "saturation": lambda means: Saturation(means.readout, means.options.top, every=4),
    "sinks": lambda means: Sinks(vocabulary=means.vocabulary),
    "transport": lambda means: Transport(every=8, seed=means.options.seed),
    "bounds": lambda means: Bounds(means.readout, means.embeddings, every=8),
}
_OF_LAWS = ("lens", "saturation", "tasks", "bounds")
"""Measures that need a law over tokens for every state."""


def make(name: str, means: Means) -> Measure:
    """A measure that has seen nothing yet."""
    return _MAKERS[name](means)


def allowed(
    subject: Surveyed, options: SurveyOptions, lenses: Mapping[str, Predict] | None = None
) -> tuple[list[Measure], list[str]]:
    """The measures of a survey that a model allows, and notes on those that it does not.

    Raises:
        RestpointError: a measure is named that the model does not allow.
    """
    refused: dict[str, str] = {}
    layered = subject.layered()
    if layered is None:
        refused |= dict.fromkeys(_OF_LAWS, "the model has no head that could be found: it is no causal LM")
    reason = subject.attention_refused()
    if reason:
        refused["sinks"] = reason
    for name in options.measures:
        if name in refused:
            raise RestpointError(f"measures: {name} cannot be measured ({refused[name]}); leave it out")
    means = Means(options)
    if layered is not None:
        weight = layered.unembedding.weight.detach()
        few = len(weight) <= _MOST_EMBEDDINGS and weight.shape[1] == layered.hidden_size
        embeddings = weight.float() if few else None
        means = Means(options, layered_readout(layered), len(weight), embeddings, lenses or {})
    chosen = options.measures or MEASURES
    notes = [f"{name} is left out: {refused[name]}" for name in chosen if name in refused]
    return [make(name, means) for name in chosen if name not in refused and name in _MAKERS], notes
