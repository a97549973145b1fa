"""What to measure on how much text, as options of the library and of the command line; torch is not needed for it."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from restpoint.errors import RestpointError
from restpoint.flags import Flag, Name, Number

MEASURES = ("geometry", "pairs", "lens", "saturation", "tasks", "sinks", "transport", "bounds", "two-scale")
"""All that can be measured."""


@dataclass(frozen=True)
class SurveyOptions:
    """What to measure, on how much text."""

    measures: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """geometry, pairs (of layers), lens, saturation, tasks, sinks, transport, bounds, two-scale; all that a model
    allows if left out."""
    max_tokens: int = 50_000
    """Tokens to read."""
    sequence_length: int = 256
    """Texts are cut into pieces of at most so many tokens."""
    batch: int = 8
    """Pieces of one length read at once."""
    top: int = 5
    """How many of the most probable tokens are followed until they are settled."""
    scenes: int = 4
    """Sentences kept to be looked at."""
    share: Name = None
    """Read a share of the text: `1/4` is the first of four. The atlases of all shares merge to that of the whole."""
    part: Name = None
    """Which stack of layers, where a model has several: `encoder`, `decoder`."""
    layers: Name = None
    """Path of the list of layers in the model, where it is not found."""
    blocks: int = 4
    """Stretches of layers that steps and drift are told apart by; a model that iterates has prelude, loop and coda."""
    inner_layers: Flag = False
    """Of a model that iterates a block: record the layers inside each iteration too."""
    checkpoint_every: Number = None
    """Save what is measured after so many batches; 64 if left out. An interrupted survey resumes from there."""
    seed: int = 0
    """Seed of what is drawn: directions of projections, permutations, weights of an untrained twin."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise RestpointError(f"measures: {unknown[0]!r} is unknown; choose from {', '.join(MEASURES)}")
        if self.max_tokens < 2:
            raise RestpointError(f"max_tokens is {self.max_tokens}; at least 2 are needed")
        if self.sequence_length < 2:
            raise RestpointError(f"sequence_length is {self.sequence_length}; a trajectory needs two tokens at least")
        for name in ("batch", "top", "blocks", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RestpointError(f"{name} is {value}; it must be at least 1")
        if self.scenes < 0:
            raise RestpointError(f"scenes is {self.scenes}; it must be 0 or positive")
        self.shares()

    def shares(self) -> tuple[int, int]:
        """Which share of the text, from 0, of how many."""
        if self.share is None:
            return 0, 1
        which, slash, count = self.share.partition("/")
        if not (slash and which.isdigit() and count.isdigit() and 1 <= int(which) <= int(count)):
            raise RestpointError(f"share is {self.share!r}; write it as 1/4 for the first of four")
        return int(which) - 1, int(count)
