"""Where sweeps over the depth start from: guesses of h_1 .. h_L that run no layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.gram import GramAccumulator
from restpoint.equilibrium.ridge import solve_ridge


def start_from_first(first: Float[Tensor, "*rows dim"], depth: int) -> Float[Tensor, "layers *rows dim"]:
    """h_l = h_0: no layer does anything."""
    return first.expand(depth, *first.shape).clone()


def start_from_previous(
    first: Float[Tensor, "*rows dim"], previous: Float[Tensor, "levels *rows dim"]
) -> Float[Tensor, "layers *rows dim"]:
    """h_l(t) = h_0(t) + [h_l(t-1) - h_0(t-1)]: every layer does what it did to the token before.

    Args:
        first: h_0(t).
        previous: h_0 .. h_L of t-1.
    """
    return first + (previous[1:] - previous[:1])


@dataclass(frozen=True, eq=False)
class FittedStart:
    """h_l(t) = [h_0(t), h_l(t-1)] A_l + c_l: one ridge map for each layer, in closed form.

    Attributes:
        maps: A_l and c_l of every layer.
    """

    maps: tuple[AffineMap, ...]

    def __call__(
        self, first: Float[Tensor, "*rows dim"], previous: Float[Tensor, "levels *rows dim"]
    ) -> Float[Tensor, "layers *rows dim"]:
        """The guess; arguments as :func:`start_from_previous`."""
        given = zip(self.maps, previous[1:], strict=True)
        return torch.stack([own(torch.cat((first, before), -1)) for own, before in given])

    @property
    def entries(self) -> int:
        """Numbers that one guess reads."""
        return sum(own.multiplications for own in self.maps)


class StartFit:
    """Streams states of consecutive tokens into a :class:`FittedStart`.

    Args:
        depth: layers.
        dim: channels.
    """

    def __init__(self, depth: int, dim: int) -> None:
        self.grams = [GramAccumulator(2 * dim, dim) for _ in range(depth)]

    def update(self, states: Float[Tensor, "levels tokens dim"]) -> None:
        """Take in h_0 .. h_L of one text's consecutive tokens."""
        for gram, level in zip(self.grams, states[1:], strict=True):
            gram.update(torch.cat((states[0, 1:], level[:-1]), -1), level[1:])

    def fit(self, strength: float = 1e-4, dtype: torch.dtype = torch.float32) -> FittedStart:
        """The maps.

        Args:
            strength: ridge penalty relative to the mean variance of the inputs.
            dtype: of the maps.

        Raises:
            RestpointError: nothing was taken in.
        """
        return FittedStart(tuple(solve_ridge(gram, strength).to(dtype=dtype) for gram in self.grams))
