"""Charts of what states say: lenses, saturation, sinks, bounds on how far a prediction may still move."""

import numpy as np

from restpoint.report.charts import Chart, Heat, Line
from restpoint.report.reading import Reader, shown
from restpoint.report.shaping import LAYER

_LENSES = (
    (
        "agreement",
        "Agreement with the model",
        "share of tokens",
        "How often the lens names the model's own most probable token. From the layer where it is high, computing on "
        "changes little, which is what early exit and drafting use.",
    ),
    (
        "tv",
        "Total variation",
        "total variation",
        "1 - TV is the chance that speculative sampling accepts a draft from that layer.",
    ),
    ("kl", "Kullback-Leibler divergence", "KL (nats)", "Information about the model's prediction still to come."),
    (
        "entropy",
        "Entropy of the prediction",
        "entropy (nats)",
        "How undecided the lens is. It may be sure and wrong: compare with the agreement.",
    ),
)


def lens(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """Entropy, divergence and agreement of every lens over depth."""
    charts = []
    for quantity, title, unit, caption in _LENSES:
        names = [name.removesuffix(f".{quantity}") for name in read.names() if name.endswith(f".{quantity}")]
        names.sort(key=lambda name: (name != "logit", name))
        lines = []
        for colour, name in enumerate(names):
            lines += read.profile(f"{name}.{quantity}", f"{name} lens", colour)
        charts.append(Chart(quantity, title, caption, LAYER, unit, lines=lines, layers=read.layers))
    return charts, []


def saturation(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """The layer at which each rank settles, and whether they settle in order."""
    charts = []
    mean = read.array("layer.mean", 1)
    if mean is not None:
        ranks = np.arange(1, len(mean) + 1, dtype=float)
        charts.append(
            Chart(
                "order",
                "Mean saturation layer of each rank",
                "A rising line says that the first rank settles first, then the second, and so on: the order that "
                "Lioubashevski et al. report for trained transformers.",
                "rank of the token in the prediction",
                LAYER,
                lines=[Line("mean", ranks, mean)],
                layers=read.layers,
                upright=True,
            )
        )
    histogram = read.array("layer.histogram", 2)
    if histogram is not None:
        charts.append(
            Chart(
                "histogram",
                "Where each rank settles",
                "Tokens counted by the layer at which the rank settled. Look for mass that moves to the right from one "
                "rank to the next.",
                LAYER,
                "rank",
                heat=Heat(
                    histogram,
                    [str(rank) for rank in range(1, len(histogram) + 1)],
                    [f"{layer:.0f}" for layer in read.depths(histogram.shape[1])],
                    "tokens",
                ),
            )
        )
    facts = []
    for name, title in (
        ("tau", "Kendall's tau of the order (1: in order, ties count against)"),
        ("tau.null", "tau expected of shuffled ranks"),
        ("tau.p", "p-value by permutation"),
    ):
        value = read.number(name)
        if value is not None:
            facts.append((title, shown(value)))
    return charts, facts


def sinks(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """Attention that the first token gets, and what goes with it."""
    charts = []
    received = read.array("received.first", 2)
    if received is not None:
        charts.append(
            Chart(
                "received",
                "Attention to the first token",
                "A bright cell is a head that rests on the first token when it has nothing to do. Even attention over "
                "a long text would give nearly 0.",
                "head",
                LAYER,
                heat=Heat(
                    received,
                    [f"{layer:.0f}" for layer in read.depths(len(received))],
                    [str(head) for head in range(received.shape[1])],
                    "mean attention weight",
                    (0.0, 1.0),
                ),
                wide=True,
            )
        )
    for name, title, unit, caption in (
        (
            "sink_rate",
            "Sink rate",
            "share of heads",
            "The share of heads whose attention to the first token passes the threshold (Gu et al.). It depends on the "
            "length of the texts.",
        ),
        (
            "value_drain",
            "Value drain",
            "‖v‖ of the sink / median of the text",
            "Values of sinks are small, so attention that goes there writes next to nothing. Below 1 is drained.",
        ),
        (
            "peaks",
            "Massive activations",
            "entries per text",
            "Entries of the states beyond all measure (over 100 and over 1000 times the median); they sit on the sinks "
            "and come and go within a layer or two.",
        ),
    ):
        charts.append(
            Chart(name, title, caption, LAYER, unit, lines=read.profile(name, title.lower()), layers=read.layers)
        )
    return charts, []


def bounds(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """What the bounds allow, what was seen, and how often they held."""
    charts = [
        Chart(
            "tv",
            "Total variation and its bound",
            "The bound must lie above; the gap is how loose it is. TV(softmax a, softmax b) ≤ tanh(osc(a - b) / 4).",
            LAYER,
            "total variation",
            lines=read.profile("tv.mean", "measured") + read.profile("bound.mean", "bound", 1),
            layers=read.layers,
        ),
        Chart(
            "holds",
            "How often they hold",
            "A bound holds always, so its line must lie at 1. An estimate that takes steps to contract at a steady "
            "rate is none, and may fail: this is how often it does not.",
            LAYER,
            "share of tokens",
            lines=read.profile("bound.holds", "bound") + read.profile("estimate.holds", "estimate", 1),
            layers=read.layers,
        ),
        Chart(
            "ratio",
            "How loose the estimate is",
            "Estimated over true distance to the last layer; below 1 it promised too much.",
            LAYER,
            "estimate / distance",
            lines=read.profile("estimate.ratio", "ratio"),
            layers=read.layers,
        ),
    ]
    return charts, []
