"""Signals: how sure it is, at a candidate layer, that the token has come to rest.

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
        """The signal that `state` described, of whichever kind.

        Raises:
            RestpointError: the kind is unknown.
        """
        kind = config.get("kind")
        if kind not in _KINDS:
            raise RestpointError(f"signal: {kind!r} is unknown; known are {', '.join(sorted(_KINDS))}")
        return _KINDS[kind].build(config, tensors)

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Signal":
        """From what `state` gave."""
        return cls()


@dataclass(frozen=True)
class MaxProbability(Signal):
    """max_v p_l(v), the largest probability of the law read at layer l.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (softmax response).
    """

    kind: ClassVar[str] = "max-p"
    papers: ClassVar[tuple[str, ...]] = ("Schuster et al. 2022, Confident Adaptive Language Modeling",)

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        return view.top_two[:, 0]


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
            return torch.zeros(len(view.state), device=view.state.device)
        before = view.states[view.layer - 1]
        return 1 / (1 + view.step().float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12))
