"""How fast a map contracts near a point: the spectral radius of its Jacobian."""

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.solvers.driver import Map
from restpoint.equilibrium.solvers.method import require
from restpoint.errors import RestpointError


def spectral_radius(
    f: Map,
    z: Float[Tensor, "*rows dim"],
    *,
    iterations: int = 40,
    window: int | None = None,
    per_row: bool = True,
    seed: int = 0,
) -> Float[Tensor, "..."]:
    """The spectral radius rho = max |lambda| of the Jacobian J of f at z, by power iteration.

    At a fixed point it says how `Picard` ends: the error shrinks by rho a step if rho < 1, and the point repels if
    rho > 1, though `Anderson` and `Broyden` may still reach it. It is no bound on a single step (that is the spectral
    norm, which is larger where J is not normal), and away from a fixed point it is a hint only.

    The estimate is the geometric mean of the growth factors |Jᵀ v| / |v| over the last ``window`` iterations: with a
    complex pair of largest eigenvalues the single factors swing forever, their mean settles. It is off by the
    order of 1 / window, to either side, and by more where the eigenvalues that follow are nearly as large or J is far
    from normal; doubling the iterations shows by how much. The random start misses the leading direction with
    probability zero.

    Products are by the transpose, which has the same eigenvalues: they need one evaluation of f and an ordinary
    backward pass for each iteration, where products by J would need forward-mode or second derivatives, which fused
    attention does not have.

    Args:
        f: the map, of z's shape.
        z: where; best a fixed point.
        iterations: products by Jᵀ.
        window: how many of the last growth factors are averaged, from 1 to iterations; half of them if None.
        per_row: an estimate for each row, right only if f maps each row on its own (J is then block-diagonal);
            otherwise one for the whole map.
        seed: of the random start.

    Returns:
        rho for each row, or one number without an axis.

    Raises:
        RestpointError: iterations or window is out of range, f changes the shape, or does not depend on z.

    Paper:
        Mises, Pollaczek-Geiringer 1929; Bai, Koltun, Kolter 2021, "Stabilizing equilibrium models by Jacobian
        regularization".
    """
    require("iterations", iterations, iterations >= 1, "at least 1, such as 40")
    window = (iterations + 1) // 2 if window is None else window
    require("window", window, 1 <= window <= iterations, f"from 1 to iterations, which is {iterations}")
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        image = f(leaf)
    if image.shape != leaf.shape:
        raise RestpointError(f"f maps {tuple(leaf.shape)} to {tuple(image.shape)}; it must keep the shape")
    if not image.requires_grad:
        raise RestpointError("f gives a result without a graph; it must be differentiable in z (no no_grad, no detach)")
    axes = -1 if per_row else tuple(range(z.dim()))
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(z.shape, generator=generator).to(leaf)
    growth = torch.zeros((), dtype=torch.float64, device=z.device)
    tiny = torch.finfo(leaf.dtype).tiny
    vector = vector / vector.norm(dim=axes, keepdim=True)
    for iteration in range(iterations):
        (vector,) = torch.autograd.grad(image, leaf, vector, retain_graph=True, allow_unused=True)
        if vector is None:
            raise RestpointError("f does not depend on z; its Jacobian is zero")
        factor = vector.norm(dim=axes, keepdim=True)
        vector = vector / factor.clamp_min(tiny)
        if iteration >= iterations - window:
            growth = growth + factor.double().log()
    radius = (growth / window).exp().to(leaf.dtype)
    return radius.squeeze(-1) if per_row else radius.squeeze()
