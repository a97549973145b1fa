"""Jacobians of layers as a sweep over the depth uses them: zero, the identity, a gain or a matrix; and their fit."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.gram import GramAccumulator
from restpoint.equilibrium.ridge import solve_ridge
from restpoint.errors import RestpointError

KINDS = ("scaled", "diagonal", "dense")


@dataclass(frozen=True, eq=False)
class Slopes:
    """J_l of every layer, applied to rows: d -> g_l d, d -> g_l * d (by channel), or d -> d M_l.

    Attributes:
        value: (layers), (layers, dim) or (layers, dim, dim); in the last, M_l is the Jacobian's transpose, as rows
            are multiplied from the left.
    """

    value: Float[Tensor, "layers *dims"]

    def __post_init__(self) -> None:
        if not 1 <= self.value.ndim <= 3:
            raise RestpointError(
                f"value has shape {tuple(self.value.shape)}; give one number, one row or one matrix for each layer"
            )

    @classmethod
    def identity(cls, depth: int, like: Tensor) -> "Slopes":
        """J = I: identity-Newton."""
        return cls(torch.ones(depth, dtype=like.dtype, device=like.device))

    @classmethod
    def zero(cls, depth: int, like: Tensor) -> "Slopes":
        """J = 0: Jacobi iteration."""
        return cls(torch.zeros(depth, dtype=like.dtype, device=like.device))

    @property
    def entries(self) -> int:
        """Numbers that one sweep reads of them; the identity and zero included as one for each layer."""
        return self.value.numel()

    def apply(self, layer: int, move: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """J_l d of every row."""
        slope = self.value[layer]
        return move @ slope if slope.ndim == 2 else move * slope

    def check(self, depth: int, dim: int) -> None:
        """Refuse slopes of another stack.

        Raises:
            RestpointError: the number of layers, or of channels, is another.
        """
        if self.value.shape[0] != depth or any(size != dim for size in self.value.shape[1:]):
            raise RestpointError(
                f"slopes: they have shape {tuple(self.value.shape)}; these {depth} layers of {dim} channels take "
                f"({depth},), ({depth}, {dim}) or ({depth}, {dim}, {dim})"
            )


class SlopeFit:
    """Least squares for J_l over pairs (d, e): a change d of a layer's input, and the change e of its output it makes.

        J_l = argmin E |e - J d|^2 + r E|d|^2 / dim |J|^2,        d = h_{l-1} - g_{l-1},  e = h_l - f_l(g_{l-1})

    with h the states of the plain pass and g those that the first sweep starts from. That is the chord that the sweep
    has to bridge, not the tangent at either end. There is no offset: a state that does not change must stay exact.

    Args:
        depth: layers.
        dim: channels.
        kind: ``scaled`` (one gain for each layer), ``diagonal`` (one for each channel) or ``dense``.

    Raises:
        RestpointError: the kind is unknown; nothing was taken in.
    """

    def __init__(self, depth: int, dim: int, kind: str = "diagonal") -> None:
        if kind not in KINDS:
            raise RestpointError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
        self.kind = kind
        self.products = torch.zeros(depth, dim, dtype=torch.float64)
        self.squares = torch.zeros(depth, dim, dtype=torch.float64)
        self.grams = [GramAccumulator(dim, dim) for _ in range(depth if kind == "dense" else 0)]

    def update(
        self,
        states: Float[Tensor, "levels rows dim"],
        guess: Float[Tensor, "layers rows dim"],
        images: Float[Tensor, "layers rows dim"],
    ) -> None:
        """Take in rows.

        Args:
            states: h_0 .. h_L of the plain pass.
            guess: g_1 .. g_L that a sweep starts from.
            images: f_1(h_0), f_2(g_1) .. f_L(g_{L-1}).
        """
        inputs = torch.cat((torch.zeros_like(states[:1]), states[1:-1] - guess[:-1]))
        outputs = states[1:] - images
        self.products += (inputs.double() * outputs.double()).sum(1).cpu()
        self.squares += inputs.double().square().sum(1).cpu()
        for gram, d, e in zip(self.grams, inputs, outputs, strict=False):
            gram.update(torch.cat((d, -d)), torch.cat((e, -e)))  # with both signs the fit has no offset

    def fit(self, strength: float = 1e-3, dtype: torch.dtype = torch.float32) -> Slopes:
        """The slopes; those of the first layer, whose input is never wrong, are 0.

        Args:
            strength: r of dense slopes, relative to the mean square of the changes; the others take none.
            dtype: of the slopes.
        """
        if not bool(self.squares.any()):
            raise RestpointError("fit: no changed row was taken in; update it with at least one")
        if self.kind == "dense":
            matrices = [torch.zeros(gram.inputs, gram.outputs, dtype=torch.float64) for gram in self.grams[:1]]
            matrices += [solve_ridge(gram, strength).matrix for gram in self.grams[1:]]
            return Slopes(torch.stack(matrices).to(dtype))
        products, squares = self.products, self.squares
        if self.kind == "scaled":
            products, squares = products.sum(1), squares.sum(1)
        return Slopes(torch.where(squares > 0, products / torch.where(squares > 0, squares, 1), 0).to(dtype))
