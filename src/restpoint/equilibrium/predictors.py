"""Predictors of the rest state from early states: draft heads without training.

The rest state is whatever the caller fitted as the target: the state after the last layer, before or after
the final norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.features import RandomFeatures
from restpoint.errors import RestpointError

_KINDS: dict[str, type["Predictor"]] = {}


@dataclass(frozen=True, eq=False)
class Predictor(ABC):
    """rest(t) ~ f(states(t), rest(t-1)): one call per drafted token, on the hot path.

    A subclass is a frozen dataclass that names its ``kind``; that registers it for `from_state`.

    Raises:
        RestpointError: ``state_layers`` is empty, has a negative entry or does not ascend.
    """

    kind: ClassVar[str] = ""
    recurrent: ClassVar[bool] = False
    """Whether `predict` needs the previous position's rest state."""

    state_layers: tuple[int, ...]
    """The layers whose states `predict` reads, ascending; 0 is the embedding output."""
    name: str = field(default="", kw_only=True)
    """How reports call it; made from the kind and the exit layer if empty."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        layers = self.state_layers
        if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise RestpointError(f"state_layers is {layers}; name at least one layer, ascending from 0, each once")
        if not self.name:
            object.__setattr__(self, "name", f"{self.kind}@{self.exit_layer}")

    @property
    def exit_layer(self) -> int:
        """E: the last layer that must run before `predict`."""
        return self.state_layers[-1]

    @abstractmethod
    def predict(
        self,
        states: Sequence[Float[Tensor, "*batch hidden"]],
        previous: Float[Tensor, "*batch rest"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "*batch rest"]:
        """Predict the rest state of each row.

        Args:
            states: the states after `state_layers`, in that order.
            previous: the rest state of the position before: the model's own for the first drafted token, the
                prediction for later ones. Read by recurrent predictors only.
            step: 0 for the first drafted token, 1 for the next, and so on.

        Raises:
            RestpointError: a recurrent predictor got no ``previous``.
        """

    @abstractmethod
    def parameters_read(self) -> int:
        """Multiply-adds of one call on one row, for cost reports."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Predictor":
        """A copy on that device and in that dtype."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-able config and contiguous tensors for safetensors; `from_state` reads them."""
        config = {"kind": self.kind, "name": self.name, "state_layers": list(self.state_layers)}
        return config, {name: tensor.contiguous() for name, tensor in self._tensors().items()}

    @staticmethod
    def from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Predictor":
        """The predictor that `state` described, of whichever kind.

        Raises:
            RestpointError: the kind is unknown, or an entry is missing.
        """
        kind = config.get("kind")
        if kind not in _KINDS:
            raise RestpointError(f"unknown predictor kind {kind!r}; known kinds are {', '.join(sorted(_KINDS))}")
        try:
            return _KINDS[kind]._build(config, tensors)
        except KeyError as error:
            raise RestpointError(
                f"the state of a {kind!r} predictor lacks {error.args[0]!r}; pass both halves of state() unchanged"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    @abstractmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Predictor": ...


@dataclass(frozen=True, eq=False)
class IdentityPredictor(Predictor):
    """rest(t) ~ h_E(t): the logit lens. Costs nothing; the baseline of every other predictor.

    Paper:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    kind: ClassVar[str] = "identity"

    def predict(
        self,
        states: Sequence[Float[Tensor, "*batch hidden"]],
        previous: Float[Tensor, "*batch rest"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "*batch hidden"]:
        """The last state itself."""
        return states[-1]

    def parameters_read(self) -> int:
        """None."""
        return 0

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "IdentityPredictor":
        """Itself: it has no tensor."""
        return self

    @classmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "IdentityPredictor":
        return cls(tuple(config["state_layers"]), name=config["name"])


@dataclass(frozen=True, eq=False)
class AffinePredictor(Predictor):
    """rest(t) ~ A [x, relu(x R + b)] + c, x = [states(t)], by ridge regression: the tuned lens in closed form.

    Usually of h_E alone; the earlier layers may be read too. Without features it is affine, with them a kernel machine;
    either way a function of one token's own states, unlike the recurrence.

    Paper:
        Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens"; Din et al.
        2023, "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations".
    """

    kind: ClassVar[str] = "affine"

    affine: AffineMap
    """From [x, features(x)] (or x alone), x the states of `state_layers` side by side, to the rest state."""
    features: RandomFeatures | None = field(default=None, kw_only=True)
    """None for the affine map."""

    def predict(
        self,
        states: Sequence[Float[Tensor, "*batch hidden"]],
        previous: Float[Tensor, "*batch rest"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "*batch rest"]:
        """The image of the states."""
        x = states[0] if len(states) == 1 else torch.cat(tuple(states), -1)
        return self.affine(x if self.features is None else torch.cat((x, self.features(x)), -1))

    def parameters_read(self) -> int:
        """The entries of the matrix, and of the features'."""
        return self.affine.multiplications + (0 if self.features is None else self.features.multiplications)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "AffinePredictor":
        """A copy on that device and in that dtype."""
        features = None if self.features is None else self.features.to(device, dtype)
        return replace(self, affine=self.affine.to(device, dtype), features=features)

    def _tensors(self) -> dict[str, Tensor]:
        own = {"matrix": self.affine.matrix, "offset": self.affine.offset}
        if self.features is not None:
            own |= {"features.weight": self.features.weight, "features.bias": self.features.bias}
        return own

    @classmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "AffinePredictor":
        affine = AffineMap(tensors["matrix"], tensors["offset"]).to()
        features = None
        if "features.weight" in tensors:
            features = RandomFeatures(tensors["features.weight"], tensors["features.bias"]).to()
        return cls(tuple(config["state_layers"]), affine, name=config["name"], features=features)


@dataclass(frozen=True, eq=False)
class MongePredictor(AffinePredictor):
    """rest(t) ~ T(h_E(t)), T the optimal transport of the Gaussian of h_E onto the Gaussian of rest.

    It moves the cloud, not the tokens: it never sees which state goes with which rest state. For analysis and
    comparison; as a drafter ridge is better.
    """

    kind: ClassVar[str] = "monge"


@dataclass(frozen=True, eq=False)
class RestPointRecurrence(Predictor):
    """rest(t) ~ c + x W1 + relu(x R + b) W2, x = [states(t), rest(t-1)]: depth and time in one map.

    Draft j tokens by feeding each prediction to the next call. There is one map per drafted position, because
    later ones read a prediction where the first reads the truth; calls beyond the last map use the last. With
    state_layers = (0,) no layer runs.

    Raises:
        RestpointError: there is no map, or the maps or the features do not fit together.
    """

    kind: ClassVar[str] = "recurrence"
    recurrent: ClassVar[bool] = True

    maps: tuple[AffineMap, ...]
    """One per drafted position, each from [x, features(x)] (or x alone) to the rest state."""
    features: RandomFeatures | None = None
    """Shared by all positions; None for the linear recurrence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.maps:
            raise RestpointError("maps is empty; give one affine map per drafted position, at least one")
        shapes = {tuple(affine.matrix.shape) for affine in self.maps}
        if len(shapes) > 1:
            raise RestpointError(f"maps have different shapes {sorted(shapes)}; fit them all on the same inputs")
        if self.features is not None and sum(self.features.weight.shape) != self.maps[0].matrix.shape[0]:
            raise RestpointError(
                f"maps take {self.maps[0].matrix.shape[0]} inputs but features give "
                f"{tuple(self.features.weight.shape)} inputs and features; fit the maps on [x, features(x)]"
            )

    def predict(
        self,
        states: Sequence[Float[Tensor, "*batch hidden"]],
        previous: Float[Tensor, "*batch rest"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "*batch rest"]:
        """One step of the recurrence; five tensor operations with features, two without."""
        if previous is None:
            raise RestpointError(f"{self.name} is recurrent: pass previous, the rest state of the position before")
        x = torch.cat((*states, previous), -1)
        if self.features is not None:
            x = torch.cat((x, self.features(x)), -1)
        return self.maps[min(step, len(self.maps) - 1)](x)

    def parameters_read(self) -> int:
        """The entries of one position's matrix, and of the features'."""
        return self.maps[0].multiplications + (0 if self.features is None else self.features.multiplications)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RestPointRecurrence":
        """A copy on that device and in that dtype."""
        features = None if self.features is None else self.features.to(device, dtype)
        return replace(self, maps=tuple(affine.to(device, dtype) for affine in self.maps), features=features)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As for every predictor; the config also holds the number of maps and of features."""
        config, tensors = super().state()
        counts = {
            "maps": len(self.maps),
            "features": 0 if self.features is None else self.features.bias.shape[0],
        }
        return config | counts, tensors

    def _tensors(self) -> dict[str, Tensor]:
        tensors = (
            {}
            if self.features is None
            else {"features.weight": self.features.weight, "features.bias": self.features.bias}
        )
        for position, affine in enumerate(self.maps):
            tensors |= {f"maps.{position}.matrix": affine.matrix, f"maps.{position}.offset": affine.offset}
        return tensors

    @classmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RestPointRecurrence":
        positions = range(config["maps"])
        maps = tuple(AffineMap(tensors[f"maps.{i}.matrix"], tensors[f"maps.{i}.offset"]).to() for i in positions)
        features = None
        if config["features"]:
            features = RandomFeatures(tensors["features.weight"], tensors["features.bias"]).to()
        return cls(tuple(config["state_layers"]), maps, features, name=config["name"])
