"""All measures by name: how each is made for a model, and which a model allows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.watch import Loop, WatchedLayers
from restpoint.trajectory.bounds import Bounds
from restpoint.trajectory.geometry import Geometry
from restpoint.trajectory.lens import FittedLens, Lens
from restpoint.trajectory.measure import Measure, Readout
from restpoint.trajectory.options import MEASURES, SurveyOptions
from restpoint.trajectory.pairs import Pairs
from restpoint.trajectory.saturation import Saturation
from restpoint.trajectory.sinks import Sinks
from restpoint.trajectory.surveyed import Surveyed
from restpoint.trajectory.transport import Transport
from restpoint.trajectory.two_scale import TwoScale, blocks_of

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
        length: L; there are L + 1 states.
        loop: where iterates stand among them, if there are any.
        readout: final norm and unembedding.
        vocabulary: number of tokens; 0 where there is no unembedding.
        embeddings: of the tokens, where they are few enough to be compared with one another.
        lenses: of fitted predictors, by name.
        rounding: relative, of the states.
    """

    options: SurveyOptions
    length: int
    loop: Loop | None = None
    readout: Readout = unread
    vocabulary: int = 0
    embeddings: Float[Tensor, "vocabulary hidden"] | None = None
    lenses: Mapping[str, FittedLens] = field(default_factory=dict)
    rounding: float = torch.finfo(torch.float32).eps


_MAKERS: dict[str, Callable[[Means], Measure]] = {
    "geometry": lambda _means: Geometry(),
    "pairs": lambda means: Pairs(seed=means.options.seed),
    "lens": lambda means: Lens(means.readout, means.lenses),
    "saturation": lambda means: Saturation(
        means.readout, means.options.top, every=4, last=None if means.loop is None else means.loop.last
    ),
    "sinks": lambda means: Sinks(vocabulary=means.vocabulary),
    "transport": lambda means: Transport(every=8, seed=means.options.seed),
    "bounds": lambda means: Bounds(means.readout, means.embeddings, every=8),
    "two-scale": lambda means: TwoScale(blocks_of(means.length, means.loop, means.options.blocks), means.rounding),
}
_OF_LAWS = ("lens", "saturation", "tasks", "bounds")
"""Measures that need a law over tokens for every state."""


def make(name: str, means: Means) -> Measure:
    """A measure that has seen nothing yet."""
    return _MAKERS[name](means)


def allowed(
    subject: Surveyed, layers: WatchedLayers, options: SurveyOptions, lenses: Mapping[str, FittedLens] | None = None
) -> tuple[list[Measure], list[str]]:
    """The measures of a survey that a model allows, and notes on those that it does not.

    Raises:
        RestpointError: a measure is named that the model does not allow, or lenses are given whose predictors count
            other layers.
    """
    refused: dict[str, str] = {}
    head = subject.head()
    if head is None:
        refused |= dict.fromkeys(_OF_LAWS, "the model has no head that could be found: it is no causal LM")
    elif subject.iterates and layers.loop is None:
        refused |= dict.fromkeys(_OF_LAWS, "its head reads the coda, not these layers; leave out part and layers")
    elif subject.iterates:
        refused["tasks"] = "the layers of a model that iterates a block do not run once, one after another"
    reason = subject.attention_refused()
    if reason:
        refused["sinks"] = reason
    for name in options.measures:
        if name in refused:
            raise RestpointError(f"measures: {name} cannot be measured ({refused[name]}); leave it out")
    if lenses and (subject.iterates or layers.length != subject.model.config.num_hidden_layers):
        raise RestpointError(
            "lenses: predictors count the layers of a whole decoder that runs each once; leave out profile and lenses"
        )
    means = Means(options, layers.length, layers.loop, rounding=torch.finfo(subject.model.dtype).eps)
    if head is not None:
        few = len(head.weight) <= _MOST_EMBEDDINGS and head.weight.shape[1] == subject.hidden_size
        embeddings = head.weight.float() if few else None
        means = replace(
            means,
            readout=head.readout,
            vocabulary=len(head.weight),
            embeddings=embeddings,
            lenses={name: lens.to(head.weight.device) for name, lens in (lenses or {}).items()},
        )
    chosen = options.measures or MEASURES
    notes = [f"{name} is left out: {refused[name]}" for name in chosen if name in refused]
    return [make(name, means) for name in chosen if name not in refused and name in _MAKERS], notes
