"""Rules: which layer a token stops at. By what is seen of it, by its place in the text, or the same for all."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.signals import Signal
from restpoint.exit.view import View

CatchUp = Literal["exact", "propagated"]
"""What later tokens see of a token in layers that it skipped.

``exact``: its own keys and values: it is run through those layers together with the next token that needs them.
``propagated``: keys and values that those layers make of its state where it stopped; cheaper in arithmetic, not exact.
"""

_KINDS: dict[str, type["Rule"]] = {}


class Rule(ABC):
    """Which layer each token stops at; a frozen dataclass, which is its own saved JSON."""

    kind: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[tuple[str, ...]] = ("depth", "exit", "cached", "resume", "rollback")
    """What a model must be able to do, as `restpoint.model.check.Capabilities` names it."""
    catch_up: CatchUp | None = None
    """How later tokens see those that stopped; None where no later token can need what is missing."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            _KINDS[cls.kind] = cls

    @abstractmethod
    def check(self, depth: int) -> None:
        """Refuse a model that this rule makes no sense for.

        Raises:
            RestpointError: a layer is not below the model's depth.
        """

    def candidates(self, depth: int) -> tuple[int, ...]:
        """Layers after which some token may stop, ascending, of a model of so many."""
        return ()

    def skipped(self, depth: int) -> frozenset[int]:
        """Layers that no token runs."""
        return frozenset()

    def stops(self, view: View, places: Sequence[int], signal: Signal | None) -> Bool[Tensor, " rows"]:
        """Which tokens stop at a candidate layer; nobody, where a rule has no candidates.

        Args:
            view: what is seen of them there.
            places: of each, how many new tokens came before it.
            signal: the one that the rule names, where it names one.
        """
        return torch.zeros(len(places), dtype=torch.bool)

    def described(self) -> dict[str, Any]:
        """JSON-able; `from_described` reads it."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_described(entry: dict[str, Any]) -> "Rule":
        """The rule that `described` gave.

        Raises:
            RestpointError: the kind is unknown.
        """
        own = dict(entry)
        kind = own.pop("kind", None)
        if kind not in _KINDS:
            raise RestpointError(f"rule: {kind!r} is unknown; known are {', '.join(sorted(_KINDS))}")
        return _KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """Stop at the first candidate layer where confidence >= threshold.

    With ``decay_over`` N the threshold of the t-th new token is 0.9 threshold + 0.1 threshold exp(-4 t / N): early
    tokens, on which all later ones rest, need more.

    Raises:
        RestpointError: a number is out of range, or the layers do not ascend.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling".
    """

    kind: ClassVar[str] = "threshold"
    papers: ClassVar[tuple[str, ...]] = ("Schuster et al. 2022, Confident Adaptive Language Modeling",)

    signal: str
    """Name of the signal."""
    threshold: float
    """Stop where the confidence is at least so large; above 1, never."""
    layers: tuple[int, ...]
    """Candidate layers, ascending; the first is the earliest."""
    decay_over: int | None = None
    """Length of text over which the threshold falls to nine tenths; None keeps it."""
    catch_up: CatchUp | None = "exact"
    """What later tokens see of one that stopped."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        _check_layers(self.layers)
        if math.isnan(self.threshold) or self.threshold < 0:
            raise RestpointError(f"threshold is {self.threshold}; it must be 0 or more (above 1: never stop)")
        if self.decay_over is not None and self.decay_over < 1:
            raise RestpointError(f"decay_over is {self.decay_over}; it must be at least 1 token, or left out")
        if self.catch_up not in ("exact", "propagated"):
            raise RestpointError(f"catch_up is {self.catch_up!r}; choose exact or propagated")

    def check(self, depth: int) -> None:
        """See :meth:`Rule.check`."""
        if self.layers[-1] >= depth:
            raise RestpointError(
                f"layers: an exit after layer {self.layers[-1]} of {depth} does not exist or saves nothing; "
                f"name layers up to {depth - 1}"
            )

    def candidates(self, depth: int) -> tuple[int, ...]:
        """The layers."""
        return self.layers

    def threshold_at(self, place: int) -> float:
        """Of the token after so many new ones."""
        if self.decay_over is None:
            return self.threshold
        return self.threshold * (0.9 + 0.1 * math.exp(-4 * place / self.decay_over))

    def stops(self, view: View, places: Sequence[int], signal: Signal | None) -> Bool[Tensor, " rows"]:
        """See :meth:`Rule.stops`."""
        if signal is None:
            raise RestpointError(f"signal: the rule asks for {self.signal}, which was not given")
        confidence = signal.confidence(view)
        if self.decay_over is None:
            return confidence >= self.threshold
        return confidence >= torch.tensor([self.threshold_at(place) for place in places], device=confidence.device)


@dataclass(frozen=True)
class PositionRule(Rule):
    """Stop by place: the t-th new token after layer first + (last - first) min(t / (length - 1), 1), rounded down.

    No later token goes deeper than an earlier one, so nothing that was skipped is ever needed. first = last is a
    static depth.

    Raises:
        RestpointError: a number is out of range, or later tokens would go deeper.

    Paper:
        Del Corro et al. 2023, "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM
        Inference".
    """

    kind: ClassVar[str] = "position"
    papers: ClassVar[tuple[str, ...]] = ("Del Corro et al. 2023, SkipDecode",)

    first: int
    """Layers of the first new token."""
    last: int
    """Layers of the ``length``-th new token, and of all later ones."""
    length: int = 1
    """New tokens over which the depth falls."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not 1 <= self.last <= self.first:
            raise RestpointError(
                f"first is {self.first} and last {self.last}; need 1 <= last <= first, since a later token that went "
                "deeper would miss what earlier ones skipped"
            )
        if self.length < 1:
            raise RestpointError(f"length is {self.length}; it must be at least 1 token")

    def check(self, depth: int) -> None:
        """See :meth:`Rule.check`."""
        if self.first > depth:
            raise RestpointError(f"first is {self.first}, and the model has {depth} layers; give at most so many")

    def candidates(self, depth: int) -> tuple[int, ...]:
        """All depths that occur, but for the whole."""
        return tuple(range(self.last, min(self.first + 1, depth)))

    def layer_at(self, place: int) -> int:
        """Depth of the token after so many new ones."""
        way = 1.0 if self.length == 1 else min(place / (self.length - 1), 1.0)
        return self.first - math.ceil(way * (self.first - self.last))

    def stops(self, view: View, places: Sequence[int], signal: Signal | None) -> Bool[Tensor, " rows"]:
        """See :meth:`Rule.stops`."""
        return torch.tensor([view.layer >= self.layer_at(place) for place in places], device=view.state.device)


@dataclass(frozen=True)
class LayerSkipRule(Rule):
    """Leave out evenly spaced layers of every token, the prompt's too, for a target speed.

    Of L layers k = round(L / speed) remain, the first and the last among them: layer round(i (L - 1) / (k - 1)) for
    i = 0 .. k - 1. The speed counts layers; head and embedding are not skipped.

    Raises:
        RestpointError: the speed is below 1, or leaves fewer than two layers.

    Paper:
        Liu et al. 2024, "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy".
    """

    kind: ClassVar[str] = "layer-skip"
    papers: ClassVar[tuple[str, ...]] = ("Liu et al. 2024, Unified Layer Skipping",)

    needed: ClassVar[tuple[str, ...]] = ("depth", "skip", "cached", "rollback")

    speed: float
    """How many times fewer layers."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not (math.isfinite(self.speed) and self.speed >= 1):
            raise RestpointError(f"speed is {self.speed}; it must be 1 or more")

    def check(self, depth: int) -> None:
        """See :meth:`Rule.check`."""
        if round(depth / self.speed) < 2:
            raise RestpointError(
                f"speed is {self.speed}: of {depth} layers fewer than 2 would remain; give at most {depth / 2}"
            )

    @classmethod
    def leaving_out(cls, count: int, depth: int) -> "LayerSkipRule":
        """The rule that leaves out so many of a model's layers."""
        return cls(depth / (depth - count))

    def skipped(self, depth: int) -> frozenset[int]:
        """See the class."""
        kept = round(depth / self.speed)
        return frozenset(range(depth)) - {round(index * (depth - 1) / (kept - 1)) for index in range(kept)}


def _check_layers(layers: Sequence[int]) -> None:
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise RestpointError(f"layers is {tuple(layers)}; name at least one, ascending from 0, each once")
