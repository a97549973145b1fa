"""The maps of attention heads: given once, drawn at random, one for each layer, or a function of time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class Heads:
    """QᵀK and V of every head: head h scores <Q_h x, K_h y> = xᵀ (QᵀK)_h y and carries V_h y, summed over heads.

    Raises:
        RestpointError: a map is not square, or the two differ in heads or size.
    """

    query_key: Float64[Tensor, "heads *batch dim dim_in"]
    """(QᵀK)_h: queries along the last axis but one, keys along the last; batch axes broadcast against the states'."""
    value: Float64[Tensor, "heads_of_v *batch_of_v dim_out dim_from"]
    """V_h, the output map of a multi-head layer included; batch axes likewise."""

    def __post_init__(self) -> None:
        """Refuse what is no map from tokens to tokens."""
        for name, maps in (("query_key", self.query_key), ("value", self.value)):
            if maps.shape[-1] != maps.shape[-2]:
                raise RestpointError(
                    f"{name} is {maps.shape[-2]} x {maps.shape[-1]}; it must be square: give the product that acts on "
                    "tokens, QᵀK or the output map times V"
                )
        if any(self.query_key.shape[axis] != self.value.shape[axis] for axis in (0, -1)):
            raise RestpointError(
                f"query_key has shape {tuple(self.query_key.shape)} and value {tuple(self.value.shape)}; "
                "give as many heads of the same size to both"
            )

    @property
    def dim(self) -> int:
        """Coordinates of a token."""
        return self.value.shape[-1]

    def to(self, device: torch.device | str) -> "Heads":
        """The same maps on a device."""
        return Heads(self.query_key.to(device), self.value.to(device))

    @classmethod
    def identity(cls, dim: int, device: torch.device | str | None = None) -> "Heads":
        """One head with QᵀK = V = I, the case that most theorems are about."""
        one = torch.eye(_positive(dim), dtype=torch.float64, device=device)[None]
        return cls(one, one)

    @classmethod
    def of(
        cls,
        query: Float64[Tensor, "heads inner dim"],
        key: Float64[Tensor, "heads inner dim"],
        value: Float64[Tensor, "heads_of_v dim_out dim_from"],
    ) -> "Heads":
        """From Q, K and V."""
        return cls(query.mT @ key, value)

    @classmethod
    def random(
        cls, dim: int, generator: torch.Generator, heads: int = 1, value: Float64[Tensor, "dim dim"] | None = None
    ) -> "Heads":
        """Q and K with independent normal entries of variance 1/dim, and V alike, or as it is given (then / heads)."""
        shape = (heads, _positive(dim), dim)

        def draw() -> Tensor:
            normal = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
            return normal / math.sqrt(dim)

        query, key = draw(), draw()
        return cls.of(query, key, draw() if value is None else value.expand(shape) / heads)


Maps = Heads | Callable[[float], Heads]
"""Constant maps, or a function of time."""


def at(maps: Maps, time: float) -> Heads:
    """The maps at a time."""
    return maps if isinstance(maps, Heads) else maps(time)


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """Other maps in every layer: those of layer floor(t / duration) at time t, and the last one's afterwards.

    A step of an integrator should not straddle two layers: choose it so that it divides the duration.

    Raises:
        RestpointError: there is no layer, or the duration is not positive.
    """

    layers: Sequence[Heads]
    duration: float = 1.0
    """Time that each layer lasts."""

    def __post_init__(self) -> None:
        """Refuse what names no layer at any time."""
        if not self.layers:
            raise RestpointError("layers is empty; give the maps of one layer at least")
        if not self.duration > 0:
            raise RestpointError(f"duration is {self.duration}; give a positive time for each layer")

    def __call__(self, time: float) -> Heads:
        """The layer's maps at a time; rounding in ``time`` does not make it the layer before."""
        return self.layers[max(0, min(int(time / self.duration + 1e-9), len(self.layers) - 1))]


def _positive(dim: int) -> int:
    if dim < 1:
        raise RestpointError(f"dim is {dim}; tokens need at least one coordinate")
    return dim
