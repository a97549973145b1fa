"""The sections of the report: for every measure, which charts show it and what there is to see in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from restpoint.report.attending import bounds, lens, saturation, sinks, tasks
from restpoint.report.charts import Chart, beside
from restpoint.report.reading import Reader
from restpoint.report.scales import paths, two_scale
from restpoint.report.shaping import LAYER, gathering, geometry, pairs, transport
from restpoint.trajectory.atlas import Atlas, Subject


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report.

    Attributes:
        name: for links and files.
        title: the heading.
        lead: what is measured.
        charts: in order.
        facts: single numbers, by name.
        rest: results that no chart shows: a name and its numbers.
    """

    name: str
    title: str
    lead: str
    charts: list[Chart]
    facts: list[tuple[str, str]]
    rest: list[tuple[str, list[str]]]


Found = tuple[list[Chart], list[tuple[str, str]]]

_KNOWN: dict[str, list[tuple[str, str, str, Callable[[Reader], Found]]]] = {
    "geometry": [
        (
            "geometry",
            "Steps, turns and lengths",
            "hₗ is the state of a token after layer l, Dₗ = hₗ - hₗ₋₁ the step of layer l. Lines are means over "
            "tokens; the bands hold the middle half and the middle nine tenths of them.",
            geometry,
        ),
        (
            "clusters",
            "Clusters, energy and rank",
            "How near to one another the tokens of one text are. Interacting-particle theory has them gather into few "
            "clusters as depth grows, and one in the end.",
            gathering,
        ),
    ],
    "two-scale": [
        (
            "two-scale",
            "Two scales: steps within, drift across",
            "A block has the states x₀ .. xₙ and the steps Dₖ = xₖ - xₖ₋₁: a stretch of layers, or the iterates of a "
            "loop. Lines are medians over tokens; the bands hold the middle half and the middle nine tenths of them.",
            two_scale,
        ),
    ],
    "pairs": [
        ("pairs", "Layers that a linear map joins", "One least-squares map for each pair of layers.", pairs),
    ],
    "lens": [
        (
            "lens",
            "What each layer would predict",
            "A lens reads a state as if it were the last: the logit lens by the final norm and the unembedding, a "
            "fitted lens through a map to the last layer first.",
            lens,
        ),
    ],
    "saturation": [
        (
            "saturation",
            "The order in which ranks settle",
            "Rank i saturates at the first layer from which the token at that very rank is the last layer's at every "
            "later one.",
            saturation,
        ),
    ],
    "tasks": [
        (
            "tasks",
            "The rank that a layer is at work on",
            "Between the layers where ranks i - 1 and i settle, a state is at work on rank i. A linear probe reads "
            "that from the state alone, and a state that is put elsewhere takes its rank along.",
            tasks,
        ),
    ],
    "sinks": [
        ("sinks", "Attention sinks", "Tokens that attention goes to whatever they say, most of all the first.", sinks),
    ],
    "transport": [
        (
            "transport",
            "Distance still to go",
            "Each layer's states are a cloud; optimal transport is the least mean squared way from one to another.",
            transport,
        ),
    ],
    "bounds": [
        (
            "bounds",
            "Bounds put to the test",
            "Total variation between a layer's prediction and the model's, beside what the softmax bound allows.",
            bounds,
        ),
    ],
}


def sections(atlas: Atlas, compare: Atlas | None = None) -> list[Section]:
    """The sections that the atlas has measurements for; results without a chart are listed in the last of a measure.

    Args:
        atlas: what was measured.
        compare: drawn dashed into every profile.
    """
    made = []
    unknown = [measure for measure in atlas.results if measure not in _KNOWN]
    for measure in [*(known for known in _KNOWN if known in atlas.results), *unknown]:
        made += _of_measure(measure, atlas, compare)
    return made


def label(subject: Subject, compare: Subject) -> str:
    """What the second atlas is called beside the first."""
    if compare.untrained and not subject.untrained:
        return "random weights"
    if compare.model != subject.model:
        return compare.model
    return compare.part if compare.part != subject.part else "the other atlas"


def _reader(results: Mapping[str, Tensor], subject: Subject) -> Reader:
    return Reader(results, subject.layers, subject.depths, subject.loop)


def _named(charts: Sequence[Chart], subject: Subject) -> list[Chart]:
    """With names at the axes that depth is on, where states have names."""
    if not subject.depths:
        return list(charts)
    named = []
    for chart in charts:
        if chart.lines and chart.layers and LAYER in (chart.x, chart.y):
            chart = replace(chart, ticks=tuple(subject.depths))
        x, y = ("depth" if title == LAYER else title for title in (chart.x, chart.y))
        named.append(replace(chart, x=x, y=y))
    return named


def _of_measure(measure: str, atlas: Atlas, compare: Atlas | None) -> list[Section]:
    results: Mapping[str, Tensor] = atlas.results[measure]
    reader = _reader(results, atlas.subject)
    made = []
    for name, title, lead, build in _KNOWN.get(measure, []):
        charts, facts = build(reader)
        charts = [chart for chart in charts if chart]
        if compare is not None and measure in compare.results:
            subjects = atlas.subject, compare.subject
            others, _ = build(_reader(compare.results[measure], compare.subject))
            charts = beside(_named(charts, atlas.subject), _named(others, compare.subject), label(*subjects))
        if name == "two-scale":
            charts += paths(atlas.scenes)
        charts = _named(charts, atlas.subject)
        if charts or facts:
            made.append(Section(name, title, lead, charts, facts, []))
    rest = reader.rest()
    if rest and made:
        made[-1].rest.extend(rest)
    elif rest:
        title = measure.replace("_", " ").capitalize()
        made.append(Section(measure, title, "Measurements that have no chart here.", [], [], rest))
    return made
