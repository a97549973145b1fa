"""Distances and couplings between distributions: pure tensors, no model."""

from restpoint.transport.bounds import contraction_estimate, softmax_variation_bound
from restpoint.transport.divergence import (
    SinkhornDivergence,
    sinkhorn_divergence,
    sinkhorn_within,
    squared_distances,
)
from restpoint.transport.gaussian import (
    Gaussian,
    MongeMap,
    monge_map,
    wasserstein2_squared,
    wasserstein2_squared_samples,
)
from restpoint.transport.sinkhorn import SinkhornResult
from restpoint.transport.sliced import between_quantiles, quantiles, random_projections, sliced_wasserstein2_squared
from restpoint.transport.tokens import TokenTransport, nearest_distances, token_transport
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
    "SinkhornDivergence",
    "SinkhornResult",
    "TokenTransport",
    "acceptance",
    "accepts",
    "between_quantiles",
    "contraction_estimate",
    "draw",
    "maximal_coupling",
    "monge_map",
    "nearest_distances",
    "quantiles",
    "random_projections",
    "residual",
    "sinkhorn_divergence",
    "sinkhorn_within",
    "sliced_wasserstein2_squared",
    "softmax_variation_bound",
    "squared_distances",
    "token_transport",
    "total_variation",
    "wasserstein2_squared",
    "wasserstein2_squared_samples",
]
