"""All layers at once: the states of a stack as one system of equations, solved by sweeps over its whole depth."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.slopes import Slopes
from restpoint.equilibrium.solvers.method import Method, require
from restpoint.errors import RestpointError

Layer = Callable[[Float[Tensor, "*rows dim"]], Float[Tensor, "*rows dim"]]
"""f_l, residual connection included: the state before a layer to the state after it."""


@dataclass(frozen=True, eq=False)
class Swept:
    """The states after one sweep.

    Attributes:
        states: h_1 .. h_L.
        residual: max over layers of |f_l(h_{l-1}) - h_l| / |f_l(h_{l-1})| of the states *before* the sweep; inf where
            it was not finite.
        exact: so many first layers have the values of the plain pass, whatever the start was.
        layer_calls: layers evaluated by this sweep.
    """

    states: Float[Tensor, "layers *rows dim"]
    residual: Float[Tensor, "*rows"]
    exact: int
    layer_calls: int


@dataclass(frozen=True, eq=False)
class DepthSolution:
    """What :func:`solve_depth` found.

    Attributes:
        states: h_1 .. h_L.
        residual: of the last sweep, see :class:`Swept`.
        sweeps: sweeps made.
        layer_calls: layers evaluated by all of them; the plain pass evaluates L.
        converged: whether every row's residual met the tolerance, or L sweeps made the states exact.
    """

    states: Float[Tensor, "layers *rows dim"]
    residual: Float[Tensor, "*rows"]
    sweeps: int
    layer_calls: int
    converged: bool


def sweep_depth(
    layers: Sequence[Layer],
    first: Float[Tensor, "*rows dim"],
    start: Float[Tensor, "layers *rows dim"] | None = None,
    slopes: Slopes | None = None,
    method: Method | None = None,
) -> Iterator[Swept]:
    """Newton's method on h_l - f_l(h_{l-1}) = 0, l = 1 .. L, for all layers at once, with the Jacobians J_l given.

    One sweep evaluates every layer at the states of the sweep before, which no layer has to wait for, and then solves
    the linearised system by one pass over the depth that calls no layer,

        h_l <- f_l(h_{l-1}) + J_l (new h_{l-1} - h_{l-1}),        new h_0 = h_0.

    J_l = I is identity-Newton: with f_l = id + F_l it is the prefix sum h_l <- h_0 + sum_{m <= l} F_m(h_{m-1}). J_l = 0
    is Jacobi (Picard) iteration, h_l <- f_l(h_{l-1}). The true Jacobians give Newton's method, which solves a stack of
    affine layers in one sweep.

    **After k sweeps the first k layers are exact**, whatever the start, the slopes and the method: h_1 = f_1(h_0)
    at once, and where h_{l-1} is exact and changes no more, the second term vanishes. So exact layers are not evaluated
    again: L sweeps make L (L + 1) / 2 calls and end with the plain pass's states. That also mends states that were not
    finite on the way.

    When to use: layers run in parallel, on devices that each hold some of them, or their weights are read once for
    very many rows. When not: at batch 1 on one device, where a sweep reads as many weights as the plain pass, which
    needs one.

    Args:
        layers: f_1 .. f_L. They may keep state of their own (a cache), as long as a call overwrites what the
            call before it left.
        first: h_0.
        start: first h_1 .. h_L; h_0 for all of them if None.
        slopes: J_l; the identity if None.
        method: extrapolates from sweep to sweep (`Anderson`, `Broyden`), every row on its own; None takes each sweep's
            states as they are.

    Yields:
        A :class:`Swept` after every sweep, L of them if they are all asked for.

    Raises:
        RestpointError: there is no layer, start or slopes do not fit, or a layer changes the shape.

    Paper:
        Danieli et al. 2023, "DeepPCR: Parallelizing Sequential Operations in Neural Networks"; Lim et al. 2024,
        "Parallelizing non-linear sequential models over the sequence length" (DEER); Gonzalez et al. 2024, "Towards
        Scalable and Stable Parallelization of Nonlinear RNNs" (quasi-DEER: diagonal J); Song et al. 2021,
        "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving" (Jacobi).
    """
    depth = len(layers)
    if not depth:
        raise RestpointError("layers: there is none; give at least one")
    if slopes is None:
        slopes = Slopes.identity(depth, first)
    slopes.check(depth, first.shape[-1])
    states = first.expand(depth, *first.shape).clone() if start is None else start.clone()
    if states.shape != (depth, *first.shape):
        raise RestpointError(
            f"start has shape {tuple(states.shape)}; give a state of shape {tuple(first.shape)} for each of the "
            f"{depth} layers"
        )
    extrapolation = None if method is None else _Extrapolation(method, states)
    for exact in range(depth):
        images = [_evaluate(layers[layer], layer, _before(first, states, layer)) for layer in range(exact, depth)]
        swept = states.clone()
        for layer, image in enumerate(images, exact):
            move = _before(first, swept, layer) - _before(first, states, layer)
            swept[layer] = image if layer == exact else image + slopes.apply(layer, move)
        residual = _residual(torch.stack(images), states[exact:])
        if extrapolation is not None:
            proposed = extrapolation.step(states, swept)
            proposed[: exact + 1] = swept[: exact + 1]
            swept = proposed
        states = swept
        yield Swept(states, residual, exact + 1, depth - exact)


def solve_depth(
    layers: Sequence[Layer],
    first: Float[Tensor, "*rows dim"],
    start: Float[Tensor, "layers *rows dim"] | None = None,
    slopes: Slopes | None = None,
    method: Method | None = None,
    *,
    tolerance: float = 1e-4,
    max_sweeps: int | None = None,
) -> DepthSolution:
    """:func:`sweep_depth` until every row's residual is within tolerance, or so many sweeps.

    The residual is that of the states before a sweep, so the states returned are one sweep better.

    Args:
        layers: see :func:`sweep_depth`; so are first, start, slopes and method.
        first: h_0.
        start: first h_1 .. h_L.
        slopes: J_l.
        method: extrapolation.
        tolerance: relative residual of every layer, without a unit; 0 goes on until ``max_sweeps``.
        max_sweeps: sweeps at most; L, which are exact, if None.

    Raises:
        RestpointError: an argument is out of range or does not fit.
    """
    require("tolerance", tolerance, 0 <= tolerance < math.inf, "finite and not negative, such as 1e-4")
    require("max_sweeps", max_sweeps, max_sweeps is None or max_sweeps >= 1, "at least 1, or None")
    calls, limit = 0, min(len(layers), max_sweeps or len(layers))
    with torch.no_grad():
        for number, swept in enumerate(sweep_depth(layers, first, start, slopes, method), 1):
            calls += swept.layer_calls
            met = bool((swept.residual <= tolerance).all()) or swept.exact == len(layers)
            if met or number == limit:
                return DepthSolution(swept.states, swept.residual, number, calls, met)
    raise RestpointError("layers: there is none; give at least one")


def images_of(
    layers: Sequence[Layer], first: Float[Tensor, "*rows dim"], guess: Float[Tensor, "layers *rows dim"]
) -> Float[Tensor, "layers *rows dim"]:
    """f_1(h_0), f_2(g_1) .. f_L(g_{L-1}): what :class:`~restpoint.equilibrium.slopes.SlopeFit` is told of a guess."""
    return torch.stack([layer(state) for layer, state in zip(layers, (first, *guess[:-1]), strict=True)])


def _before(first: Tensor, states: Tensor, layer: int) -> Tensor:
    """The state that a layer is given."""
    return states[layer - 1] if layer else first


def _evaluate(layer: Layer, index: int, state: Tensor) -> Tensor:
    image = layer(state)
    if image.shape != state.shape:
        raise RestpointError(
            f"layers: number {index} maps {tuple(state.shape)} to {tuple(image.shape)}; it must keep the shape"
        )
    return image


def _residual(images: Float[Tensor, "layers *rows dim"], states: Float[Tensor, "layers *rows dim"]) -> Tensor:
    sizes = images.norm(dim=-1)
    relative = (images - states).norm(dim=-1) / (sizes + torch.finfo(sizes.dtype).tiny)
    return torch.where(relative.isfinite(), relative, math.inf).amax(0)


class _Extrapolation:
    """A method of the solvers over the stacked states of each row."""

    def __init__(self, method: Method, states: Float[Tensor, "layers *rows dim"]) -> None:
        self.method = method
        self.history = method.init(self._flat(states))

    def step(self, states: Tensor, swept: Tensor) -> Tensor:
        """The next states from those before a sweep and those after; the sweep's own where they are not finite."""
        value, image = self._flat(states), self._flat(swept)
        finite = (value.isfinite() & image.isfinite()).all(-1)
        usable = finite.unsqueeze(-1)
        value, difference = torch.where(usable, value, 0), torch.where(usable, image - value, 0)
        proposed = self.method.step(self.history, value, difference, ~finite)
        proposed = torch.where(usable & proposed.isfinite().all(-1, keepdim=True), proposed, image)
        rows = proposed.view(-1, states.shape[0], states.shape[-1])
        return rows.movedim(1, 0).reshape(states.shape).to(states.dtype).clone()

    def _flat(self, states: Tensor) -> Float[Tensor, "rows stacked"]:
        depth, dim = states.shape[0], states.shape[-1]
        rows = states.reshape(depth, -1, dim).movedim(0, 1)
        return rows.reshape(rows.shape[0], depth * dim).to(torch.promote_types(states.dtype, torch.float32))
