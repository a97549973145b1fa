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
                    read.called(read.depths(histogram.shape[1])),
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
                    read.called(read.depths(len(received))),
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
    """What the bounds allow, what was seen, and how often the estimate held."""
    tightness = read.profile("tightness.q50", "median", first=0)
    ends = [read.array(f"tightness.{end}", 1) for end in ("q10", "q90")]
    if tightness and ends[0] is not None and ends[1] is not None:
        line = tightness[0]
        tightness = [Line("median", line.x, line.y, ((ends[0], ends[1]),))]
    charts = [
        Chart(
            "variation",
            "Total variation and its bound",
            "The bound must lie above; the gap is how loose it is. TV(softmax a, softmax b) ≤ tanh(osc(a - b) / 4).",
            LAYER,
            "total variation",
            lines=read.profile("variation", "measured", 0, 0) + read.profile("variation.bound", "bound", 1, 0),
            layers=read.layers,
        ),
        Chart(
            "tightness",
            "How tight the bound is",
            "Total variation over its bound, median and the middle four fifths of the tokens; 1 is tight.",
            LAYER,
            "total variation / bound",
            lines=tightness,
            layers=read.layers,
        ),
        Chart(
            "contraction",
            "Distance still to go, if steps went on to shrink",
            "Where a step is shorter than the one before, their ratio r estimates the way left as step / (1 - r). That "
            "is no bound: the second line is how often the true way was no longer.",
            LAYER,
            "share of tokens",
            lines=read.profile("contraction.share", "steps shrink", 0, 1)
            + read.profile("contraction.holds", "estimate not below the distance", 1, 1),
            layers=read.layers,
        ),
        Chart(
            "estimate",
            "Estimate over distance",
            "Geometric mean over tokens whose steps shrink; below 1 the estimate promises too much.",
            LAYER,
            "estimate / distance",
            lines=read.profile("contraction.geometric_ratio", "ratio", 0, 1),
            layers=read.layers,
        ),
        Chart(
            "tokens",
            "Moving the law between tokens",
            "Least cost of moving a layer's law to the model's own, when a token costs its distance to another "
            "between embeddings: it lies between the two lines.",
            LAYER,
            "distance of embeddings",
            lines=read.profile("transport.lower", "at least", 0, 0) + read.profile("transport.upper", "at most", 1, 0),
            layers=read.layers,
        ),
    ]
    violations = read.array("violations", 1)
    facts = [] if violations is None else [("Tokens above the softmax bound", shown(float(violations.sum())))]
    return charts, facts


def tasks(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """How well a probe tells which rank a layer is at work on, and what an injection does."""
    charts = []
    confusion = read.array("probe.confusion", 2)
    if confusion is not None:
        names = [str(task) for task in range(1, len(confusion) + 1)]
        shares = confusion / confusion.sum(1, keepdims=True).clip(1)
        charts.append(
            Chart(
                "confusion",
                "What the probe takes states for",
                "Of the states at work on a rank (row), the share that the probe takes for each rank: on the diagonal "
                "it is right. Examples are balanced at every layer, so depth alone tells it nothing.",
                "rank found",
                "rank at work",
                heat=Heat(shares, names, list(names), "share of states", (0.0, 1.0)),
            )
        )
    facts = []
    for name, title in (
        ("probe.accuracy", "accuracy of the probe on texts that it has not seen"),
        ("probe.control", "accuracy with shuffled labels"),
        ("probe.chance", "accuracy of guessing"),
    ):
        folds = read.array(name, 1) if name != "probe.chance" else None
        value = read.number(name) if folds is None else float(folds.mean())
        if value is not None:
            facts.append((title, shown(value)))
    for name, title in (
        ("switching.switched", "injected states of the second rank that switch the output at once"),
        ("switching.control.switched", "injected states of the first rank that do"),
    ):
        value = read.number(name)
        if value is not None:
            facts.append((title, shown(value)))
    return charts, facts
