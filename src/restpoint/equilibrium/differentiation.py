"""Gradients of a fixed point by the implicit function theorem, in memory that does not depend on the iterations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.solvers.driver import Map, require_settings, solve
from restpoint.equilibrium.solvers.method import Method
from restpoint.equilibrium.solvers.solution import Solution
from restpoint.errors import RestpointError


@dataclass(frozen=True)
class Adjoint:
    """How the backward pass solves u = Jᵀ u + g; the fields are arguments of `solve`.

    Raises:
        RestpointError: one of them is out of range.
    """

    method: Method = field(default_factory=Anderson)
    tolerance: float = 1e-4
    max_steps: int = 50
    check_every: int | None = None

    def __post_init__(self) -> None:
        require_settings(self.tolerance, self.max_steps, self.check_every)


def implicit(
    f: Map,
    fixed_point: Float[Tensor, "*rows dim"],
    *,
    gradient: Literal["implicit", "one_step"] = "implicit",
    adjoint: Adjoint | None = None,
    report: Callable[[Solution], None] | None = None,
) -> Float[Tensor, "*rows dim"]:
    """z* as a differentiable function of everything that f reads: dz* = (I - J)^-1 df, J the Jacobian of f at z*.

        solution = solve(f, start)
        z = implicit(f, solution.value)

    f is evaluated once with a graph, whatever `solve` took to get there; its graph is all that is kept. The backward
    pass gets g = dloss/dz, solves u = Jᵀ u + g with products by Jᵀ, and sends u on through that one evaluation to the
    module's parameters and inputs that f captures: nothing has to be listed. Where no gradient is recorded, this is
    one more evaluation of f.

    The gradient is that of the fixed point which f has now: random parts of f, such as dropout, must draw the same in
    `solve` and here. Second derivatives are refused: u would be taken for a constant.

    Args:
        f: the map, of start's shape; rows may be coupled, J is that of all of them.
        fixed_point: z*; a detached solution of f(z) = z. Errors in it become errors of the gradient of the same order.
        gradient: "implicit", or "one_step" for u = g: (I - J)^-1 is taken as I, which costs no solve, is off by the
            order of |J|, and still descends where f contracts well (the Jacobian-free or phantom gradient).
        adjoint: method, tolerance and steps of the backward solve; defaults of `Adjoint` if None.
        report: called with the backward `Solution`, whose status says if it converged; where it did not, the best
            point that it found is used.

    Returns:
        f(z*), equal to z* within the tolerance of its solve.

    Raises:
        RestpointError: ``gradient`` is neither of the two, f changes the shape, or, from the backward pass, it is run
            with ``create_graph``.

    Paper:
        Bai, Kolter, Koltun 2019, "Deep equilibrium models"; Fung et al. 2022, "JFB: Jacobian-free backpropagation for
        implicit networks"; Geng et al. 2021, "On training implicit models" (phantom gradients).
    """
    if gradient not in ("implicit", "one_step"):
        raise RestpointError(f"gradient is {gradient!r}; use 'implicit' or 'one_step'")
    leaf = fixed_point.detach().clone().requires_grad_(gradient == "implicit" and torch.is_grad_enabled())
    image = f(leaf)
    if image.shape != leaf.shape:
        raise RestpointError(f"f maps {tuple(leaf.shape)} to {tuple(image.shape)}; it must keep the shape")
    if not leaf.requires_grad:
        return image
    return _Attach.apply(image, leaf, adjoint or Adjoint(), report)


class _Attach(torch.autograd.Function):
    """The identity on f(z*), whose gradient is the adjoint fixed point."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, leaf: Tensor, adjoint: Adjoint, report: Callable | None) -> Tensor:
        ctx.image, ctx.leaf, ctx.adjoint, ctx.report = image, leaf, adjoint, report
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        # Autograd would take u for a constant and give a wrong second derivative without a word.
        if torch.is_grad_enabled():
            raise RestpointError(
                "create_graph is set, but implicit has no second derivative; leave it out, or use gradient='one_step'"
            )
        scale = gradient.abs().amax()
        # A gradient scaler wants to see what overflowed; there is nothing to solve where there is no gradient.
        if not bool(scale.isfinite()) or not bool(scale):
            return gradient, None, None, None
        gradient = gradient / scale  # the equation is linear, and squares of tiny gradients would underflow

        def transposed(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(ctx.image, ctx.leaf, u, retain_graph=True, materialize_grads=True)
            return product + gradient

        how: Adjoint = ctx.adjoint
        solution = solve(
            transposed,
            gradient,
            how.method,
            tolerance=how.tolerance,
            max_steps=how.max_steps,
            check_every=how.check_every,
        )
        if ctx.report is not None:
            ctx.report(solution)
        return solution.value * scale, None, None, None
