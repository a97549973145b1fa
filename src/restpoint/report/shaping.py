"""Charts of where states are: geometry, clusters, pairs of layers, transport."""

import numpy as np

from restpoint.report.charts import Chart, Heat, Line
from restpoint.report.reading import Reader, shown

LAYER = "layer"

_QUANTITIES = (
    (
        "step",
        "Step size",
        "‖Dₗ‖ (state units)",
        "How far each layer moves a token. Where it falls by a steady factor r < 1, what is still to come is at most "
        "the next step / (1 - r).",
    ),
    (
        "relative_step",
        "Relative step",
        "‖Dₗ‖ / ‖hₗ₋₁‖",
        "The step against the state's length: how much a layer changes of what is there. States grow, so it may fall "
        "where steps do not.",
    ),
    (
        "angle",
        "Turn between steps",
        "cosine of Dₗ and Dₗ₋₁",
        "1 goes straight on, 0 turns square, -1 goes back. Independent steps in many dimensions would show 0.",
    ),
    (
        "state_angle",
        "Turn of the state",
        "cosine of hₗ and hₗ₋₁",
        "Near 1 the layer hardly changes where the state points; early-exit rules read rest from it.",
    ),
    (
        "acceleration",
        "Acceleration",
        "‖Dₗ - Dₗ₋₁‖ (state units)",
        "The change of the step. Two small ones in a row are a sign of rest that step sizes alone do not give.",
    ),
    (
        "curvature",
        "Curvature",
        "curvature (1 / state units)",
        "The change of direction over the length of the step: how sharply the path bends for its pace. A straight "
        "path has 0.",
    ),
    (
        "norm",
        "Length of the state",
        "‖hₗ‖ (state units)",
        "The residual stream adds up, so lengths tend to grow; a few very long states are those of sink tokens.",
    ),
)


def geometry(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """Steps, turns and lengths over depth, and by position in the text."""
    charts = []
    for name, title, unit, caption in _QUANTITIES:
        length = not name.endswith("angle")
        charts.append(
            Chart(name, title, caption, LAYER, unit, lines=_banded(read, name), layers=read.layers, logarithmic=length)
        )
        by_position = read.array(f"{name}.position", 2)
        if by_position is not None:
            shown_as = unit
            if length:  # layers differ far more than positions do
                by_position = by_position / np.nanmean(by_position, 1, keepdims=True)
                shown_as = "over the layer's mean"
            charts.append(
                Chart(
                    f"{name}-by-position",
                    f"{title} by position",
                    "The same mean for tokens early and late in their text. A first column that stands out is the "
                    "first token, where attention sinks.",
                    "position in the text (token)",
                    LAYER,
                    heat=Heat(
                        by_position,
                        read.called(read.depths(len(by_position))),
                        _doubling(by_position.shape[1]),
                        shown_as,
                    ),
                )
            )
    return charts, []


def gathering(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """How near to one another tokens are: ranks, clusters, cosines, energy, what collapse leaves."""
    ranks: list[Line] = []
    for colour, (name, title) in enumerate(
        (("effective_rank", "effective rank"), ("participation_ratio", "participation ratio"))
    ):
        ranks += read.profile(name, title, 2 * colour)
        ranks += read.profile(f"{name}.without_sinks", f"{title} without sinks", 2 * colour + 1)
    clusters = read.profile("clusters.components", "connected components") + read.profile(
        "clusters.rank", "rank of the graph", 1
    )
    betas = read.array("energy.betas", 1)
    energies = read.array("energy", 2)
    energy = []
    if energies is not None:
        names = [f"β = {beta:g}" for beta in betas] if betas is not None else [str(at) for at in range(len(energies))]
        depths = read.depths(energies.shape[1])
        energy = [
            Line(name, depths, row, colour=at) for at, (name, row) in enumerate(zip(names, energies, strict=False))
        ]
    layers = read.layers
    charts = [
        Chart(
            "ranks",
            "Dimension of the cloud",
            "In how many directions the tokens of a text spread: 1 on a line. Sink tokens alone can hide the rest, so "
            "both are drawn.",
            LAYER,
            "dimensions",
            lines=ranks,
            layers=layers,
        ),
        Chart(
            "clusters",
            "Clusters",
            "Groups of tokens that point the same way, counted in two ways. Theory has the number fall with depth.",
            LAYER,
            "clusters in a text",
            lines=clusters,
            layers=layers,
        ),
        Chart(
            "share",
            "Pairs that have met",
            "The share of pairs whose directions are nearly the same; 1 where all tokens have become one.",
            LAYER,
            "share of pairs",
            lines=read.profile("clusters.share", "pairs"),
            layers=layers,
        ),
        Chart(
            "anisotropy",
            "Anisotropy",
            "The mean cosine between tokens. 0 is an even cloud; a high one says that all states share a direction, "
            "which is not yet clustering.",
            LAYER,
            "mean cosine",
            lines=read.profile("anisotropy", "anisotropy"),
            layers=layers,
        ),
        Chart(
            "energy",
            "Interaction energy",
            "Full attention with V = QᵀK = I never lets it decrease (Geshkovski et al.). Where it falls, the layer "
            "does something else than gather tokens.",
            LAYER,
            "E = mean of exp(β cosine) / 2β",
            lines=energy,
            layers=layers,
            logarithmic=all(bool((line.y > 0).all()) for line in energy),
        ),
        Chart(
            "collapse",
            "What rank collapse leaves",
            "How far the tokens are from being all one. Attention alone would drive it to 0 doubly exponentially; "
            "residual streams and MLPs resist (Dong et al.).",
            LAYER,
            "residual (of a text)",
            lines=read.profile("rank_collapse", "residual"),
            layers=layers,
        ),
    ]
    return charts, []


def pairs(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """R² between all layers."""
    r2 = read.array("r2", 2)
    if r2 is None:
        return [], []
    names = read.called(read.depths(len(r2)))
    caption = (
        "How much of the variance of layer j a linear map from layer i explains. A bright last column is what draft "
        "heads without training live on; blocks are stretches of layers that do alike."
    )
    heat = Heat(r2, names, list(names), "R²", (0.0, 1.0))
    return [Chart("r2", "R² from layer i to layer j", caption, "to layer j", "from layer i", heat=heat, wide=True)], []


_CLOUDS = (
    ("raw", "states as they are", "Wasserstein distance (state units)"),
    ("unit", "states divided by their norms", "Wasserstein distance (norms are 1)"),
)


def transport(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """Distance to the last layer and between neighbours, with the layer where it flattens."""
    charts, facts = [], []
    for kind, what, unit in _CLOUDS:
        flat = read.number(f"{kind}.gaussian.flat_from")
        mark = None if flat is None else (flat, "flat from here")
        if flat is not None:
            facts.append((f"Flat from layer, {what}", shown(flat)))
        for name, title, caption in (
            (
                "to_final",
                "Distance to the last layer",
                "It must end at 0; where it is flat before, layers go by without getting nearer. The Gaussian distance "
                "knows means and covariances only and is a lower bound; the sliced one is a mean over lines and so "
                "about the square root of the dimension smaller.",
            ),
            (
                "between",
                "Distance of neighbouring layers",
                "What each layer moves the cloud as a whole: at most the root mean square of the steps, and less where "
                "tokens change places.",
            ),
        ):
            lines = [
                line
                for colour, way in enumerate(("gaussian", "sliced", "sinkhorn"))
                for line in read.profile(f"{kind}.{way}.{name}", "Gaussian" if way == "gaussian" else way, colour)
            ]
            charts.append(
                Chart(
                    f"{kind}-{name.replace('_', '-')}",
                    f"{title}: {what}",
                    caption,
                    LAYER,
                    unit,
                    lines=lines,
                    layers=read.layers,
                    mark=mark,
                )
            )
    return charts, facts


def _banded(read: Reader, name: str) -> list[Line]:
    """Mean with quantile bands, and the median."""
    mean = read.profile(f"{name}.mean", "mean")
    if not mean:
        return read.profile(f"{name}.q50", "median")
    bands = []
    for low, high in (("q05", "q95"), ("q25", "q75")):
        ends = [read.array(f"{name}.{end}", 1) for end in (low, high)]
        if ends[0] is not None and ends[1] is not None and len(ends[0]) == len(ends[1]) == len(mean[0].y):
            bands.append((ends[0], ends[1]))
    line = mean[0]
    return [
        Line("mean", line.x, line.y, tuple(bands)),
        *read.profile(f"{name}.q50", "median", 1),
    ]


def _doubling(count: int) -> list[str]:
    """Bins of positions: 0, 1, 2-3, 4-7, .."""
    starts = [0, *(2**at for at in range(count - 1))]
    return [str(start) if start < 2 else f"{start}-{2 * start - 1}" for start in starts]
