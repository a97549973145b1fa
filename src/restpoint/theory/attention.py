"""Self-attention as a velocity field of particles, computed in blocks and in the log domain."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.theory.maps import Heads, Maps, at
from restpoint.theory.sphere import project

_BLOCK = 2**19  # scores held at once: 4 MiB, so that a cache can hold them
_LARGEST_EXPONENT = 700.0  # of float64, with room for a sum over particles

Drift = Callable[[Tensor, float], Tensor]
"""A velocity of each particle by itself, such as an MLP's: states and time to a tensor of the states' shape."""


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """dx_k/dt = P_{x_k}[ (1/Z_k) sum over j in S_k of sum over heads of exp(b <Q x_k, K x_j>) V x_j ].

    S_k is all particles (SA) or those up to k (`causal`, CSA); Z_k is the sum of the exponentials, or the number n of
    particles (`normalised=False`, USA); P_x y = y - <x, y> x keeps particles on the unit sphere, and `sphere=False`
    leaves it out. Use it to see what attention alone does to tokens over many layers; what a trained model does
    depends on its MLPs, biases and positions too.

    Scores are held for one head and a block of rows at a time, so memory grows with the states. The softmax
    subtracts each row's largest score, so no beta makes it overflow.

    Raises:
        RestpointError: beta is negative or not finite; `normalised` is False and an exponential would overflow.

    Paper:
        Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, "A mathematical perspective on transformers"; for the causal
        kind Karagodin, Polyanskiy, Rigollet 2024, "Clustering in causal attention masking".
    """

    beta: float | Float64[Tensor, "*batch"]
    """Inverse temperature, >= 0; a tensor that broadcasts against the batch axes of the states."""
    maps: Maps
    """Q, K and V."""
    causal: bool = False
    """Whether a particle sees itself and earlier ones only."""
    normalised: bool = True
    """Whether weights sum to 1 (softmax)."""
    sphere: bool = True
    """Whether particles live on the unit sphere."""
    drift: Drift | None = None
    """Added inside the projection: what an MLP does to each particle."""

    def __post_init__(self) -> None:
        """Refuse what is no inverse temperature."""
        beta = torch.as_tensor(self.beta)
        if not bool((beta.isfinite() & (beta >= 0)).all()):
            wrong = beta[~(beta.isfinite() & (beta >= 0))].flatten()[0]
            raise RestpointError(f"beta is {float(wrong):g}; an inverse temperature is finite and at least 0")

    def velocity(self, states: Float64[Tensor, "*batch n dim"], time: float) -> Float64[Tensor, "*batch n dim"]:
        """dx/dt of all particles at a time.

        Raises:
            RestpointError: the maps are of another size than the states, or an unnormalised exponential overflows.
        """
        force = self.force(states, time)
        return project(states, force) if self.sphere else force

    def force(self, states: Float64[Tensor, "*batch n dim"], time: float) -> Float64[Tensor, "*batch n dim"]:
        """The same before the projection: what a layer adds to its residual stream."""
        heads = at(self.maps, time)
        if heads.dim != states.shape[-1]:
            raise RestpointError(f"maps act on {heads.dim} coordinates, states have {states.shape[-1]}; give one size")
        beta = torch.as_tensor(self.beta, dtype=states.dtype, device=states.device)[..., None, None]
        if torch.broadcast_shapes(beta.shape, states.shape) != states.shape:
            raise RestpointError(
                f"beta has shape {tuple(beta.shape[:-2])} and states a batch of {tuple(states.shape[:-2])}; "
                "expand the states so that every beta has its own"
            )
        total = torch.zeros_like(states) if self.drift is None else self.drift(states, time).clone()
        for query_key, value in zip(heads.query_key, heads.value, strict=True):
            queries = beta * (states @ query_key)
            self._add_head(total, queries, states, states @ value.mT)
        return total

    def _add_head(self, total: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add what one head carries, a block of rows at a time."""
        count = keys.shape[-2]
        rows = max(1, _BLOCK // keys[..., 0].numel())
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            seen = stop if self.causal else count
            scores = queries[..., start:stop, :] @ keys[..., :seen, :].mT
            if self.causal:
                later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=keys.device).triu(1)
                scores[..., start:].masked_fill_(later, -math.inf)
            largest = scores.amax(-1, keepdim=True)
            if self.normalised:
                weights = scores.sub_(largest).exp_()
                carried = weights @ values[..., :seen, :] / weights.sum(-1, keepdim=True)
            else:
                if not bool((largest < _LARGEST_EXPONENT).all()):
                    raise RestpointError(
                        f"beta: exp({float(largest.max()):.3g}) is no float64 number, and without softmax it is a "
                        f"velocity; keep beta <Qx, Ky> below {_LARGEST_EXPONENT:g}, or set normalised=True"
                    )
                carried = scores.exp_() @ values[..., :seen, :] / count
            total[..., start:stop, :] += carried


@dataclass(frozen=True, eq=False)
class Perceptron:
    """W2 act(W1 x + b1): the drift of an MLP with one hidden layer.

    Raises:
        RestpointError: the shapes do not fit together.
    """

    inner: Float64[Tensor, "hidden dim"]
    bias: Float64[Tensor, " hidden"]
    outer: Float64[Tensor, "dim_out hidden_from"]
    activation: Literal["relu", "gelu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        """Refuse maps that do not lead from tokens to tokens."""
        if self.outer.shape != self.inner.mT.shape:
            raise RestpointError(
                f"outer is {tuple(self.outer.shape)}; with an inner map of {tuple(self.inner.shape)} it must be "
                f"{tuple(self.inner.mT.shape)}"
            )
        if self.activation not in ("relu", "gelu", "tanh"):
            raise RestpointError(f"activation is {self.activation!r}; choose relu, gelu or tanh")

    def __call__(self, states: Float64[Tensor, "*batch n dim"], time: float) -> Float64[Tensor, "*batch n dim"]:
        """The drift, which does not depend on the time."""
        act = torch.tanh if self.activation == "tanh" else getattr(torch.nn.functional, self.activation)
        return act(states @ self.inner.mT + self.bias) @ self.outer.mT


def identity_attention(beta: float | Float64[Tensor, "*batch"], dim: int, *, causal: bool = False) -> SelfAttention:
    """The system of most theorems: one head, QᵀK = V = I, softmax weights, on the sphere."""
    device = beta.device if isinstance(beta, Tensor) else None
    return SelfAttention(beta, Heads.identity(dim, device), causal=causal)
