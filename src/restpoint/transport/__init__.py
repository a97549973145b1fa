"""Distances and couplings between distributions: pure tensors, no model."""

from restpoint.transport.gaussian import (
    Gaussian,
    MongeMap,
    monge_map,
    wasserstein2_squared,
    wasserstein2_squared_samples,
)
from restpoint.transport.variation import (
    Coupling,
    acceptance,
    accepts,
    draw,
    maximal_coupling,
    residual,
    total_variation,
)

__all__ = [
    "Coupling",
    "Gaussian",
    "MongeMap",
    "acceptance",
    "accepts",
    "draw",
    "maximal_coupling",
    "monge_map",
    "residual",
    "total_variation",
    "wasserstein2_squared",
    "wasserstein2_squared_samples",
]
