"""One page of an atlas: charts to move through, and all that is needed to read them. It needs no network."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from restpoint.errors import RestpointError
from restpoint.files import write
from restpoint.report.figures import figure, scene, whole
from restpoint.report.reading import Reader, shown
from restpoint.report.sections import Section, label, sections
from restpoint.trajectory.atlas import Atlas, Subject


def write_report(atlas: Atlas, path: Path, compare: Atlas | None = None) -> Path:
    """Write a page that shows an atlas, complete or not at all; a measure that it lacks has no section.

    plotly's script is in the page, which therefore is 5 MB large and can be sent by itself: it asks for nothing, and
    its own policy forbids it to.

    Args:
        atlas: what was measured.
        path: of the HTML file.
        compare: another atlas, drawn dashed into every profile: the same model with random weights, or another model.
            Where depths differ, profiles are over relative depth.

    Returns:
        The page.

    Raises:
        RestpointError: plotly or jinja2 is not installed, or the page cannot be written.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RestpointError(
            f"report: {error.name} is not installed; install it with: pip install 'restpoint[report]'"
        ) from error
    made = sections(atlas, compare)
    environment = Environment(
        loader=PackageLoader("restpoint.report", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        subject=atlas.subject,
        model=_subject(atlas.subject),
        other={} if compare is None else _subject(compare.subject),
        compare=None if compare is None else compare.subject,
        dashed=None if compare is None else label(atlas.subject, compare.subject),
        figures=_telling(atlas),
        sections=made,
        scenes=[whole(found.text) for found in atlas.scenes],
        corpus=_plain(atlas.corpus),
        conditions=_plain(atlas.conditions),
        papers=_papers(atlas),
        data=_json(
            {
                "charts": _figures(made),
                "scenes": [scene(found) for found in atlas.scenes],
                "depths": atlas.subject.depths,
            }
        ),
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=get_plotlyjs(),
    )
    write(path, lambda temporary: temporary.write_text(whole(page), encoding="utf-8"))
    return path


def _figures(made: list[Section]) -> dict[str, Any]:
    """Every chart by its anchor."""
    return {f"{section.name}-{chart.name}": figure(chart) for section in made for chart in section.charts}


def _json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return files("restpoint.report").joinpath(name).read_text(encoding="utf-8")


def _subject(subject: Subject) -> dict[str, str]:
    return {
        "Model": whole(subject.model),
        "Family": subject.family,
        "Part": subject.part,
        "States" if subject.depths else "Layers": _depth(subject),
        "State size": f"{subject.hidden:,}",
        "Vocabulary": f"{subject.vocabulary:,}" if subject.vocabulary else "none",
        "Parameters": f"{subject.parameters:,}",
        "Run in": subject.dtype,
        "Weights": "random" if subject.untrained else "trained",
        "Fingerprint": subject.fingerprint,
    }


def _depth(subject: Subject) -> str:
    states = f"{subject.layers + 1} states"
    return f"{states}: {', '.join(subject.depths)}" if subject.depths else f"{subject.layers} ({states})"


def _telling(atlas: Atlas) -> list[tuple[str, str]]:
    """The line of figures at the top: (figure, what it is)."""
    layers = atlas.subject.layers
    word = "layer"
    found = [
        (shown(float(layers + 1)), "states") if atlas.subject.depths else (shown(float(layers)), "layers"),
        (_short(atlas.subject.parameters), "parameters"),
    ]
    if isinstance(tokens := atlas.corpus.get("tokens"), int):
        found.append((_short(tokens), "tokens read"))
    agreement = _of(atlas, "lens").array("logit.agreement", 1)
    if agreement is not None and (agreement >= 0.5).any():
        found.append(
            (
                atlas.subject.depth(int((agreement >= 0.5).argmax())),
                "where the logit lens is right half the time first"
                if atlas.subject.depths
                else "first layer at which the logit lens is right half the time",
            )
        )
    settled = _of(atlas, "saturation").array("layer.mean", 1)
    if settled is not None:
        loop, where = atlas.subject.loop, float(settled[0])
        if loop is not None:
            where, word = (where - loop.first) / loop.stride, "step"
        found.append((shown(round(where, 1)), f"mean {word} where the first rank settles"))
    tau = _of(atlas, "saturation").number("tau")
    if tau is not None:
        found.append((f"{tau:.2f}", "Kendall's tau of the order in which ranks settle"))
    rate = _of(atlas, "sinks").array("sink_rate", 1)
    if rate is not None:
        found.append((f"{100 * float(rate.max()):.0f} %", "heads on the first token, in the layer with most"))
    flat = _of(atlas, "transport").number("flat_from")
    if flat is not None:
        found.append((shown(flat), "layer from which the transport profile is flat"))
    return found


def _of(atlas: Atlas, measure: str) -> Reader:
    return Reader(atlas.results.get(measure, {}), atlas.subject.layers)


def _short(count: int) -> str:
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return str(count)


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text."""
    return {whole(str(name)): whole(_text(value)) for name, value in values.items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return shown(float(value))


def _papers(atlas: Atlas) -> list[tuple[str, Sequence[str]]]:
    """Papers of the measures that were taken."""
    return [(measure, atlas.papers[measure]) for measure in atlas.results if atlas.papers.get(measure)]
