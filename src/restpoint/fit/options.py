"""What to fit and on how much text, as options of the library and of the command line; torch is not needed for it."""

from dataclasses import dataclass

from restpoint.errors import RestpointError
from restpoint.flags import Flag, Layers


@dataclass(frozen=True)
class FitOptions:
    """What to fit, on how much text."""

    max_tokens: int = 200_000
    """Tokens of text to fit on, the model's own included."""
    own_share: float = 0.2
    """Share of these that the model writes itself, as continuations of the text: decoding sees its own words."""
    exit_layers: Layers = ()
    """Layers to draft from; empty for 0 and a quarter of the depth. At 0 no layer runs."""
    features: int = 1024
    """Random features of the rest-point recurrence; more draft better and slower. 0 for linear maps only."""
    feature_layers: Layers = (0,)
    """Exit layers whose recurrence is fitted with random features too, which takes most of the time."""
    steps: int = 2
    """Maps of the recurrence, one per drafted position; later positions use the last."""
    heads: int = 0
    """Positions that multi-token heads predict at once, for the drafter `heads`; 0 for no heads."""
    extrapolate: Flag = False
    """Also draft by extrapolation along depth (RRE, Anderson, dynamic modes) from exit layers that have one before."""
    start: Flag = False
    """Also fit where tokens begin the loop of a model that iterates a block, for `generate --loop-start predicted`."""
    refine: int = 500
    """Gradient steps that refine the recurrence with random features towards the model's laws, the model itself left as
    it is; 0 for none. More of them draft better: a thousand take a minute or two on the bundled model."""
    tuned_lens: Flag = False
    """Also refine each ridge map (the tuned lens), by as many steps; for comparison."""
    vocabulary: int = 2048
    """Tokens that may be drafted, the most frequent of the text; 0 for all. Verification is exact in any case."""
    sequence_length: int = 256
    """Tokens of each recorded sequence."""
    batch: int = 32
    """Sequences read at once."""
    held_out: float = 0.06
    """Share of the text kept aside for ridge strengths, acceptance and calibration; of the model's own, a quarter."""
    seed: int = 0
    """Seed of the random features and of the model's own text."""
    keep_states: Flag = False
    """Keep the recorded states on disk afterwards."""

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.max_tokens < 40 * self.sequence_length:
            raise RestpointError(
                f"max_tokens is {self.max_tokens}; at least {40 * self.sequence_length} are needed "
                f"(40 sequences of {self.sequence_length})"
            )
        if not 0 <= self.own_share < 1:
            raise RestpointError(f"own_share is {self.own_share}; it must lie in [0, 1)")
        if not 0 < self.held_out < 0.5:
            raise RestpointError(f"held_out is {self.held_out}; it must lie between 0 and 0.5")
        for name in ("features", "heads", "refine", "vocabulary"):
            if getattr(self, name) < 0:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be 0 or positive")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.sequence_length < 32:
            raise RestpointError(f"sequence_length is {self.sequence_length}; it must be at least 32")
