"""How the next token is chosen, as an option of the library and of the command line; torch is not needed for it."""

import math
from dataclasses import dataclass

from restpoint.errors import RestpointError
from restpoint.flags import Number, Share


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen; the defaults decode greedily."""

    temperature: float = 0.0
    """Softmax temperature; 0 takes the most probable token."""
    top_k: Number = None
    """Keep only the k most probable tokens."""
    top_p: Share = None
    """Keep the smallest set of tokens whose probability reaches this (nucleus sampling)."""
    min_p: Share = None
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Divide the score of tokens already seen by this (above 1 discourages repetition)."""
    seed: int = 0
    """Seed of the random numbers; the same seed and settings give the same text."""

    def __post_init__(self) -> None:
        """Refuse values that no law of tokens belongs to."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RestpointError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise RestpointError(f"top_k is {self.top_k}; it must be at least 1, or left out")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RestpointError(f"{name} is {value}; it must lie in (0, 1], or be left out")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RestpointError(f"repetition_penalty is {self.repetition_penalty}; it must be positive (1 is off)")
        chosen = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and chosen:
            raise RestpointError(f"{chosen[0]} has no effect on greedy decoding; set temperature above 0 or drop it")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0
