"""What to benchmark; by itself, so that the command line need not import torch to show its help."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from restpoint.bundled import DOMAINS
from restpoint.errors import RestpointError
from restpoint.flags import Flag, Number, Seconds

_FULL = (128, 5, 3)
_QUICK = (32, 2, 2)
_QUICK_SECONDS = 32.0  # leaves room for start-up within the 50 seconds that a quick benchmark may take

Domains = Annotated[tuple[str, ...], arg(metavar="DOMAIN ...")]


@dataclass(frozen=True)
class BenchOptions:
    """How much to measure."""

    quick: Flag = False
    """Under a minute for the bundled model: 32 new tokens, at most 2 prompts a domain and 2 repetitions."""
    new_tokens: Number = None
    """New tokens of every run (128; quick: 32); all methods generate exactly so many, end tokens ignored."""
    prompts: Number = None
    """Prompts of each domain (5; quick: 2)."""
    repetitions: Number = None
    """Timed runs of each method on each prompt (3; quick: 2)."""
    domains: Domains = DOMAINS
    """Kinds of text to continue: code, maths, prose, plays."""
    compile: Flag = False
    """Measure compiled passes too, plain and with drafts; compiling takes a minute or so the first time."""
    exits: Flag = False
    """Measure early exits too, as the profile is calibrated, and the same exit as a draft that is verified."""
    alone: Flag = False
    """Measure every drafter by itself too, and those that can remember other texts cold and warm."""
    fixed: Annotated[tuple[int, ...], arg(metavar="NODES ...", help_behavior_hint="")] = ()
    """Measure trees of fixed sizes too, to hold the choice round by round against them."""
    verifier: str = "traversal"
    """How drafts are verified when tokens are sampled."""
    temperature: float = 0.0
    """Sample at this temperature instead of decoding greedily; identical tokens are then not claimed."""
    budget_seconds: Seconds = None
    """Add no further prompts or repetitions that would end later than this (no limit; quick: 32)."""
    seed: int = 0
    """Seed of the sampling and of the bootstrap."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("new_tokens", "prompts", "repetitions"):
            least = 2 if name == "new_tokens" else 1
            value = getattr(self, name)
            if value is not None and value < least:
                raise RestpointError(f"{name} is {value}; it must be at least {least}")
        if any(nodes < 1 for nodes in self.fixed):
            raise RestpointError(f"fixed is {self.fixed}; each tree must have at least 1 node")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RestpointError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise RestpointError(f"budget_seconds is {self.budget_seconds}; it must be positive, or be left out")
        unknown = [domain for domain in self.domains if domain not in DOMAINS]
        if unknown or not self.domains:
            what = repr(unknown[0]) + " is not bundled" if unknown else "is empty"
            raise RestpointError(f"domains: {what}; choose from {', '.join(DOMAINS)}")
        if len(set(self.domains)) < len(self.domains):
            raise RestpointError(f"domains: {', '.join(self.domains)} names one twice; give each once")

    def resolved(self) -> "BenchOptions":
        """The same with every default that depends on ``quick`` filled in."""
        new_tokens, prompts, repetitions = _QUICK if self.quick else _FULL
        return BenchOptions(
            quick=self.quick,
            new_tokens=self.new_tokens or new_tokens,
            prompts=self.prompts or prompts,
            repetitions=self.repetitions or repetitions,
            domains=self.domains,
            compile=self.compile,
            exits=self.exits,
            alone=self.alone,
            fixed=self.fixed,
            verifier=self.verifier,
            temperature=self.temperature,
            budget_seconds=self.budget_seconds or (_QUICK_SECONDS if self.quick else None),
            seed=self.seed,
        )
