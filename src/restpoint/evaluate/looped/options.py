"""What to sweep on a model that iterates a block; torch is not needed for it."""

from dataclasses import dataclass

from restpoint.errors import RestpointError
from restpoint.flags import Flag, Number


@dataclass(frozen=True)
class LoopOptions:
    """For models that iterate a block (recurrent depth): which criteria, on how much text."""

    criteria: tuple[str, ...] = ()
    """Names of exit criteria; all if left out."""
    steps: Number = None
    """Core steps that count as the full count; the config's mean recurrence if left out."""
    texts: int = 40
    """Texts to judge on."""
    text_tokens: int = 64
    """Tokens of each."""
    points: int = 8
    """Thresholds of each criterion, spread evenly over the mean number of steps; two more where it matters."""
    increase: float = 0.005
    """Share by which perplexity may rise, where criteria are compared."""
    tolerance: float = 0.1
    """Relative step at which a token counts as at rest, where starts are compared."""
    start_tokens: int = 60_000
    """Tokens of text to fit the predicted start on."""
    no_starts: Flag = False
    """Leave out the starts."""
    speed_prompts: int = 8
    """Texts that are decoded to take the time, half of each given and the other half decoded; 0 takes none."""

    def __post_init__(self) -> None:
        """Refuse what cannot be swept."""
        least = {"texts": 2, "text_tokens": 8, "points": 2, "start_tokens": 1, "speed_prompts": 0}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least {fewest}")
        if self.steps is not None and self.steps < 3:
            raise RestpointError(f"steps is {self.steps}; exits need at least 3 to choose from")
        for name in ("increase", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; give a share above 0, below 1")
