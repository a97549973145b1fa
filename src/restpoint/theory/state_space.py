"""The token dynamics of a selective state-space layer, in the interface of attention's particles."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn import functional

from restpoint.errors import RestpointError
from restpoint.theory.sphere import project

_BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class SelectiveStateSpace:
    """dx_k/dt = sum over j <= k of <S_C x_k, S_B x_j> exp(-a sum over j < i <= k of D(x_i)) D(x_j) x_j.

    D(x) = softplus(S_D x + bias) is the step size of each channel, a > 0 its decay rate (A = -a I); products with D
    and exp are channel by channel. Every particle sees earlier ones only, as in a causal attention whose weights need
    not sum to 1 and fade with the steps in between. In one dimension mu = S_C S_B decides: mu < 0 makes every
    particle converge to 0 like 1/sqrt(t); mu > 0 makes them diverge, in finite time where S_D x > 0 and slowly,
    like log t, where S_D x < 0.

    Raises:
        RestpointError: shapes do not fit together, or a decay rate is not positive.

    Paper:
        Vo, Pham, Tran, Nguyen 2024, "Demystifying the token dynamics of deep selective state space models";
        Gu, Dao 2023, "Mamba".
    """

    input_map: Float64[Tensor, "state dim"]
    """S_B."""
    output_map: Float64[Tensor, "state dim"]
    """S_C."""
    step_map: Float64[Tensor, "dim dim_from"]
    """S_D."""
    step_bias: Float64[Tensor, " dim"]
    """Bias of the step size."""
    decay: Float64[Tensor, " dim"]
    """a for each channel, > 0."""
    sphere: bool = False
    """Whether particles are kept on the unit sphere."""

    def __post_init__(self) -> None:
        """Refuse what is no selective state-space layer."""
        if self.step_map.shape[0] != self.step_map.shape[1]:
            raise RestpointError(f"step_map is {tuple(self.step_map.shape)}; it must be square, dim x dim")
        if not bool((self.decay > 0).all()):
            raise RestpointError("decay: a rate is not positive, so memory would grow; give rates above 0")

    def velocity(self, states: Float64[Tensor, "*batch n dim"], time: float) -> Float64[Tensor, "*batch n dim"]:
        """dx/dt of all particles; the layer does not change with time."""
        force = self.force(states, time)
        return project(states, force) if self.sphere else force

    def force(self, states: Float64[Tensor, "*batch n dim"], time: float) -> Float64[Tensor, "*batch n dim"]:
        """What the layer adds to its residual stream; fading is held for a block of rows at a time.

        Raises:
            RestpointError: the states have another number of coordinates than the maps.
        """
        if states.shape[-1] != self.input_map.shape[-1]:
            raise RestpointError(
                f"maps act on {self.input_map.shape[-1]} coordinates, states have {states.shape[-1]}; give one size"
            )
        steps = functional.softplus(states @ self.step_map.mT + self.step_bias)
        clock = (self.decay * steps).cumsum(-2)
        inputs, outputs, given = states @ self.input_map.mT, states @ self.output_map.mT, steps * states
        count = states.shape[-2]
        rows = max(1, _BLOCK // states.numel())
        blocks = []
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            scores = (outputs[..., start:stop, :] @ inputs[..., :stop, :].mT).tril(start)
            fading = (clock[..., None, :stop, :] - clock[..., start:stop, None, :]).clamp_max(0).exp()
            blocks.append(torch.einsum("...kj,...kjd,...jd->...kd", scores, fading, given[..., :stop, :]))
        return torch.cat(blocks, -2)
