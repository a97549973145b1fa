"""Sliced Wasserstein distances between clouds: transport along random lines, where sorting solves it.

Each cloud is projected and sorted once, whatever it is compared with; leading axes are a batch of clouds, so all layers
of a model go through in one call.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError


def random_projections(
    dim: int, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "dim count"]:
    """Directions drawn uniformly from the unit sphere, one a column, on the generator's device.

    Raises:
        RestpointError: there is no dimension or no direction.
    """
    if dim < 1 or count < 1:
        raise RestpointError(f"count is {count} for {dim} dimensions; draw at least one direction in at least one")
    device = torch.device("cpu") if generator is None else generator.device
    drawn = torch.randn(dim, count, dtype=torch.float64, device=device, generator=generator)
    return (drawn / drawn.norm(dim=0)).to(dtype)


def sliced_wasserstein2_squared(
    a: Float[Tensor, "*batch rows_a dim"],
    b: Float[Tensor, "*batch rows_b dim"],
    projections: int | Float[Tensor, "lines_dim count"] = 64,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    """SW2(a, b)^2 = mean over directions u of W2(<u, a>, <u, b>)^2, in squared units of the states.

    Every row has the same weight. It is at most W2^2 / dim on average over uniform directions, costs a sort, and sees
    more than two moments. For many comparisons of the same clouds call `quantiles` once on each and `between_quantiles`
    on pairs.

    Args:
        a: clouds of points.
        b: clouds in the same space; as many clouds, with any number of rows.
        projections: unit directions as columns, or how many to draw. Draw them once for distances that are compared.
        generator: source of the directions where only their number is given.

    Returns:
        One number for each pair of clouds, in the clouds' dtype.

    Raises:
        RestpointError: a cloud has no row, or the directions have another dimension than the points.

    Paper:
        Rabin, Peyre, Delon, Bernot 2011, "Wasserstein barycenter and its application to texture mixing"; Bonneel et
        al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    if isinstance(projections, int):
        projections = random_projections(a.shape[-1], projections, generator, a.dtype).to(a.device)
    return between_quantiles(quantiles(a, projections), quantiles(b, projections))


def quantiles(
    points: Float[Tensor, "*batch rows dim"], projections: Float[Tensor, "lines_dim count"]
) -> Float[Tensor, "*batch count rows"]:
    """<u, x> for every direction u, in increasing order over the rows x: the quantile functions of the projections.

    Raises:
        RestpointError: a cloud has no row, or the directions have another dimension than the points.
    """
    if points.shape[-2] == 0:
        raise RestpointError("points: a cloud holds no row; pass at least one point per cloud")
    if points.shape[-1] != projections.shape[0]:
        raise RestpointError(
            f"projections: they have {projections.shape[0]} dimensions and the points {points.shape[-1]}; "
            "draw them for the points' dimension"
        )
    along = (points @ projections.to(points)).mT.contiguous()
    if along.device.type == "cpu" and along.dtype in (torch.float32, torch.float64) and not along.requires_grad:
        # Values only, without the order: NumPy's sort is vectorised, and several times faster than torch's.
        return torch.from_numpy(np.sort(along.numpy(), axis=-1))
    return along.sort(dim=-1).values


def between_quantiles(
    a: Float[Tensor, "*#batch count rows_a"], b: Float[Tensor, "*#batch count rows_b"]
) -> Float[Tensor, "*#batch"]:
    """Mean over directions of the integral of (F_a^-1(s) - F_b^-1(s))^2 over s in [0, 1].

    Both quantile functions are steps of equal width, so the integral is a finite sum: over the rows where there are
    equally many, else over the at most rows_a + rows_b - 1 pieces on which both are constant.
    """
    rows_a, rows_b = a.shape[-1], b.shape[-1]
    if rows_a == rows_b:
        return (a - b).square().mean((-2, -1))
    # In units of 1 / (rows_a rows_b) all jumps are at whole numbers, so no jump is missed by rounding.
    jumps = torch.cat(
        [
            torch.arange(rows_a + 1, device=a.device) * rows_b,
            torch.arange(rows_b + 1, device=a.device) * rows_a,
        ]
    ).unique()
    starts, widths = jumps[:-1], jumps.diff().to(a.dtype) / (rows_a * rows_b)
    apart = a[..., starts // rows_b] - b[..., starts // rows_a]
    return (apart.square() * widths).sum(-1).mean(-1)
