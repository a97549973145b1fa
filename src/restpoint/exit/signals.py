"""Signals: how sure it is, at a candidate layer, that the token has come to rest; and those that look at states only.

Every signal is a confidence in [0, 1], larger where stopping is safer; 0 where it cannot be told yet. Quantities that
are not probabilities are mapped there without changing their order, so that a threshold says the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.view import View

_KINDS: dict[str, type["Signal"]] = {}
_TINY = 1e-12  # in place of a length of 0 below a fraction line


class Signal(ABC):
    """A confidence that stopping at a layer changes nothing.

    A subclass names its ``kind``; that registers it for `from_state`. Those with fitted tensors give them in `state`.
    """

    kind: ClassVar[str] = ""
    reads_law: ClassVar[bool] = True
    """Whether it needs the law that an exit would emit, which costs a predictor and the model's head."""
    papers: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            _KINDS[cls.kind] = cls

    @abstractmethod
    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """One number in [0, 1] for each token."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-able config and tensors for safetensors; `from_state` reads them."""
        return {"kind": self.kind}, {}

    @staticmethod
    def from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Signal":
        """The signal that `state` described, of whichever kind; importing `restpoint.exit.registry` makes all known.

        Raises:
            RestpointError: the kind is unknown, or an entry is missing.
        """
        kind = config.get("kind")
        if kind not in _KINDS:
            raise RestpointError(f"signal: {kind!r} is unknown; known are {', '.join(sorted(_KINDS))}")
        try:
            return _KINDS[kind].build(config, tensors)
        except KeyError as error:
            raise RestpointError(
                f"signal: the state of a {kind!r} lacks {error.args[0]!r}; fit and calibrate again"
            ) from error

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Signal":
        """From what `state` gave."""
        return cls()


@dataclass(frozen=True)
class RelativeStep(Signal):
    """1 / (1 + s), s = ‖h_l - h_{l-1}‖ / ‖h_{l-1}‖: how little the last layer moved the token. Needs no law.

    Paper:
        Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning" (for iterated blocks).
    """

    kind: ClassVar[str] = "relative-step"
    reads_law: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = ("Geiping et al. 2025, Scaling up Test-Time Compute with Latent Reasoning",)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer == 0:
            return unknown(view)
        return 1 / (1 + relative_step(view))


@dataclass(frozen=True)
class Cosine(Signal):
    """(1 + cos(h_l, h_{l-1})) / 2: whether the last layer turned the token. A zero state counts as a right angle.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (hidden-state saturation).
    """

    kind: ClassVar[str] = "cosine"
    reads_law: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = ("Schuster et al. 2022, Confident Adaptive Language Modeling",)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer == 0:
            return unknown(view)
        state, before = view.state.float(), view.states[view.layer - 1].float()
        return ((1 + torch.cosine_similarity(state, before, dim=-1)) / 2).clamp(0, 1)


@dataclass(frozen=True)
class Acceleration(Signal):
    """1 / (1 + max(a_l, a_{l-1})), a_l = ‖D_l - D_{l-1}‖ / (‖D_l‖ + ‖D_{l-1}‖), D_l = h_l - h_{l-1}.

    A threshold of 1 / (1 + tau) stops where two accelerations in a row are at most tau: one alone may be a turning
    point. a_l is 0 for equal steps, 1 for opposite ones, so the confidence is at least 1/2 from layer 3 on; before, it
    is 0.

    Paper:
        Pappone et al. 2025, "Two-scale latent dynamics for recurrent-depth transformers".
    """

    kind: ClassVar[str] = "acceleration"
    reads_law: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = (
        "Pappone et al. 2025, Two-scale latent dynamics for recurrent-depth transformers",
    )

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer < 3:
            return unknown(view)
        return 1 / (1 + accelerations(view, 2).amax(0))


def relative_step(view: View) -> Float[Tensor, " rows"]:
    """‖h_l - h_{l-1}‖ / ‖h_{l-1}‖ for l >= 1, in float32; finite for zero states too."""
    before = view.states[view.layer - 1]
    return view.step().float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(_TINY)


def accelerations(view: View, count: int) -> Float[Tensor, "count rows"]:
    """The last ones a_l, as in :class:`Acceleration`, the latest at the end; l must be above their number.

    Steps of length 0, one after another, do not accelerate: 0.
    """
    steps = torch.stack(tuple(view.states[view.layer - 1 - count : view.layer + 1])).float().diff(dim=0)
    sizes = steps.norm(dim=-1)
    return (steps.diff(dim=0).norm(dim=-1) / (sizes[1:] + sizes[:-1]).clamp_min(_TINY)).clamp_max(1)


def unknown(view: View) -> Float[Tensor, " rows"]:
    """The confidence of what cannot be told yet: 0."""
    return torch.zeros(len(view.state), device=view.state.device)
