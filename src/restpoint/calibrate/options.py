"""What to calibrate, as options of the library and of the command line; torch is not needed for it."""

from dataclasses import dataclass, fields

from restpoint.errors import RestpointError
from restpoint.flags import Flag, Layers, Number

_SIGNAL = ("signal", "most_layers", "catch_up")
_READ = ("layers", "lens", "read_layers", "refine", "features", "vocabulary", "fit_tokens")
_IDLE = {"threshold": (), "position": _SIGNAL, "layer-skip": (*_SIGNAL, *_READ)}
"""Rules that can be calibrated, with the options that each makes no use of."""


@dataclass(frozen=True)
class ReadOptions:
    """What exits read, and on which text that is fitted."""

    layers: Layers = ()
    """Layers to stop after; chosen by expected speed, from half to three quarters of the depth, if left out. Of rule
    position the last layers to try; from half of the depth on if left out."""
    lens: Flag = False
    """Emit the logit lens at an exit instead of a predictor that is fitted first."""
    read_layers: int = 5
    """Layers whose states that predictor reads: the one that a token stops after, and those just before it."""
    refine: int = 1000
    """Gradient steps that refine it towards the model's laws over the tokens that an exit may emit; 0 for none."""
    features: int = 0
    """Random features of that predictor; 0 for an affine map."""
    vocabulary: Number = None
    """Tokens that an exit may emit, the most frequent of the text: reading the head in part makes looks cheaper. 0 for
    all; a quarter of all if left out, and all for rule position, where no token runs the whole depth."""
    fit_tokens: int = 150_000
    """Tokens of text to fit predictors on, at most."""
    prompt_tokens: int = 32
    """Tokens of text that each of the model's own texts begins with."""
    new_tokens: int = 64
    """Tokens that the model continues each by."""
    batch: int = 25
    """Texts decoded at once."""
    seed: int = 0
    """Of whatever is drawn."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("prompt_tokens", "batch", "read_layers"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.new_tokens < 2:
            raise RestpointError(f"new_tokens is {self.new_tokens}; the first comes at full depth, so give at least 2")
        for name in ("features", "refine", "vocabulary"):
            if (getattr(self, name) or 0) < 0:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be 0 or positive")
        if self.layers and list(self.layers) != sorted(set(self.layers)):
            raise RestpointError(f"layers is {self.layers}; give them ascending, each once")


@dataclass(frozen=True)
class CalibrateOptions(ReadOptions):
    """What loss is tolerated, how rarely it may be more, and how exits are chosen."""

    rule: str = "threshold"
    """Which tokens stop early: threshold (those that a signal is sure of), position (the later in the text, the
    earlier, down to a last layer) or layer-skip (none; evenly spaced layers are left out of all)."""
    loss: str = "disagreement"
    """What counts as a loss, of one text, in [0, 1]: disagreement (share of tokens that are not the full model's after
    the same prefix), perplexity-increase (mean loss of log-probability, clipped at 1 nat) or, in Python only,
    score-drop (what the score of a task falls by)."""
    epsilon: float = 0.05
    """Largest expected loss."""
    delta: float = 0.1
    """How often, over draws of calibration texts, the expected loss may be above epsilon after all."""
    signal: str = "gate"
    """What decides: gate (learned), logit-margin, max-p, margin, entropy, entropy-difference, kl, cosine,
    relative-step, acceleration, disagreement, transport, task-saturation or rest-radius."""
    most_layers: int = 2
    """How many layers to look at, at most, where they are chosen."""
    catch_up: str = "exact"
    """What later tokens see of one that stopped: exact (it is run with the next deep one) or propagated."""
    sequences: int = 500
    """Texts to certify on."""
    method: str = "betting"
    """P-value: betting, hoeffding-bentkus, or binomial for losses of 0 and 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be calibrated; what is asked of the risk is checked by it."""
        super().__post_init__()
        for name in ("most_layers", "sequences"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.catch_up not in ("exact", "propagated"):
            raise RestpointError(f"catch_up is {self.catch_up!r}; choose exact or propagated")
        if self.rule not in _IDLE:
            raise RestpointError(f"rule is {self.rule!r}; choose {', '.join(list(_IDLE)[:-1])} or {list(_IDLE)[-1]}")
        for one in fields(self):
            if one.name in _IDLE[self.rule] and (value := getattr(self, one.name)) != one.default:
                raise RestpointError(f"{one.name} is {value}; rule {self.rule} makes no use of it: leave it out")

    @property
    def fits(self) -> bool:
        """Whether readouts are fitted."""
        return not self.lens and self.rule != "layer-skip"


@dataclass(frozen=True)
class SweepOptions(ReadOptions):
    """Which signals are compared, on how much text."""

    signals: tuple[str, ...] = ()
    """Names of signals; all if left out."""
    sequences: int = 200
    """Texts that are traced."""
    disagreements: tuple[float, ...] = (0.01, 0.03, 0.05)
    """Shares of tokens that may differ, at which signals are compared."""

    def __post_init__(self) -> None:
        """Refuse what cannot be swept."""
        super().__post_init__()
        if self.sequences < 2:
            raise RestpointError(f"sequences is {self.sequences}; intervals need at least 2")
        if not self.disagreements or not all(0 <= own < 1 for own in self.disagreements):
            raise RestpointError(f"disagreements is {self.disagreements}; give shares from 0 on, below 1")
