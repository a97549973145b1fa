"""Charts as plotly takes them, and scenes as the page's script does: plain data, rounded to what an eye can tell."""

import math
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from restpoint.report.charts import PALETTE, Chart, Heat, Line, Trail
from restpoint.trajectory.scenes import Scene

_DIGITS = 5
_BANDS = ("1f", "33")
_CELLS = 20
_FEW = 8
_TICKS = 16
_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def figure(chart: Chart) -> dict[str, Any]:
    """``data`` and ``layout`` of a chart; colours of paper, grid and text are the page's."""
    layout: dict[str, Any] = {"xaxis": {"title": {"text": chart.x}}, "yaxis": {"title": {"text": chart.y}}}
    if chart.heat is not None:
        layout["xaxis"] |= {"type": "category", "nticks": 12}
        layout["yaxis"] |= {"type": "category", "nticks": 12}
        return {"data": [_heat(chart.heat)], "layout": layout}
    if chart.trails:
        layout["showlegend"] = False
        layout["yaxis"] |= {"scaleanchor": "x"}
        shown = [_trail(trail, number == 0) for number, trail in enumerate(chart.trails)]
        return {"data": shown, "layout": layout}
    if chart.logarithmic:
        layout["yaxis"] |= {"type": "log", "nticks": 6}
    places = [float(place) for line in chart.lines for place in line.x]
    if max(places) - min(places) < _FEW and all(place.is_integer() for place in places):
        layout["xaxis"]["dtick"] = 1
    if chart.ticks:
        every = -(-len(chart.ticks) // _TICKS)
        named = {"tickvals": list(range(0, len(chart.ticks), every)), "ticktext": list(chart.ticks[::every])}
        if not chart.upright:  # the same room for all, so that the last name is not cut off
            named |= {"tickangle": -35, "range": [-0.5, len(chart.ticks) - 0.5]}
        layout["yaxis" if chart.upright else "xaxis"] |= named
    layout["showlegend"] = sum(not line.second for line in chart.lines) > 1
    if chart.mark is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"dash": "dot", "width": 1.5, "color": PALETTE[5]},
            }
            | {"x0": chart.mark[0], "x1": chart.mark[0]}
        ]
        layout["annotations"] = [
            {"x": chart.mark[0], "y": 1, "yref": "paper", "text": chart.mark[1], "showarrow": False}
            | {"xanchor": "right", "yanchor": "top", "xshift": -4}
        ]
    return {"data": [trace for line in chart.lines for trace in _line(line, chart)], "layout": layout}


def scene(found: Scene) -> dict[str, Any]:
    """What the page shows of a scene: words are numbers of ``words``, since most of them recur."""
    words: dict[str, int] = {}
    predicted = [[words.setdefault(visible(word), len(words)) for word in row] for row in found.predicted]
    return {
        "text": whole(found.text),
        "domain": whole(found.domain),
        "tokens": [visible(token) for token in found.tokens],
        "plane": rounded(found.plane[..., :2]),
        "norms": rounded(found.norms),
        "predicted": predicted,
        "words": list(words),
        "probability": rounded(found.probability, 3),
        "entropy": rounded(found.entropy, 3),
        "settled": found.settled.tolist(),
    }


def rounded(values: np.ndarray | Tensor, digits: int = _DIGITS) -> list[Any]:
    """Nested lists with that many significant digits; None where a number is not finite."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [_rounded(value, digits) for value in array.tolist()]


def visible(token: str) -> str:
    """A token with its white space to be seen, and cut where it is very long."""
    token = "".join(_SIGNS.get(sign, sign) for sign in whole(token))
    inner = token.strip(" ")
    before, after = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
    token = "·" * before + inner + "·" * after if inner else "·" * len(token)
    return token if len(token) <= _CELLS else token[: _CELLS - 1] + "…"


def whole(text: str) -> str:
    """Text that UTF-8 can write: halves of a character, as some tokens are, become replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _rounded(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def _line(line: Line, chart: Chart) -> list[dict[str, Any]]:
    colour = PALETTE[line.colour % len(PALETTE)]
    x = rounded(line.x)
    traces: list[dict[str, Any]] = []
    for (low, high), alpha in zip(line.bands, _BANDS, strict=False):
        edge = {"type": "scatter", "mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
        edge |= {"x": x, "showlegend": False}
        traces += [
            edge | {"y": rounded(low)},
            edge | {"y": rounded(high), "fill": "tonexty", "fillcolor": colour + alpha},
        ]
    drawn = {"type": "scatter", "mode": "lines", "name": line.name, "x": x, "y": rounded(line.y)}
    if line.scattered:
        drawn["mode"] = "lines+markers"
    style = {"color": colour, "width": 1.6 if line.second else 2.2, "dash": "dash" if line.second else "solid"}
    drawn |= {"showlegend": not line.second}  # the caption says what is dashed
    hover = "%{x}: %{y:.4g}"
    if chart.ticks and not chart.upright:
        drawn["text"] = [chart.ticks[int(place)] for place in line.x]
        hover = "%{text}: %{y:.4g}"
    return [*traces, drawn | {"line": style, "hovertemplate": hover}]


def _trail(trail: Trail, scale: bool) -> dict[str, Any]:
    """A way, with the token's name where it begins; one of all shows the scale of colours."""
    name = escape(visible(trail.name), quote=False)  # plotly reads a little HTML in labels
    marker = {"size": 6, "color": trail.steps.tolist(), "colorscale": "Viridis", "showscale": scale}
    marker |= {"colorbar": {"title": {"text": "step", "side": "right", "font": {"size": 11}}, "thickness": 12}}
    drawn = {"type": "scatter", "mode": "lines+markers+text", "x": rounded(trail.x), "y": rounded(trail.y)}
    drawn |= {"line": {"width": 1, "color": PALETTE[5]}, "marker": marker, "name": name}
    drawn |= {"text": [name] + [""] * (len(trail.x) - 1), "textposition": "top center", "textfont": {"size": 11}}
    drawn |= {"hovertemplate": "%{fullData.name}: step %{marker.color}<extra></extra>", "cliponaxis": False}
    return drawn


def _heat(heat: Heat) -> dict[str, Any]:
    drawn: dict[str, Any] = {"type": "heatmap", "x": heat.columns, "y": heat.rows, "z": rounded(heat.values)}
    drawn |= {
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": heat.unit, "side": "right", "font": {"size": 11}}, "thickness": 12},
    }
    drawn["hovertemplate"] = "x %{x}, y %{y}: %{z:.4g}<extra></extra>"
    if heat.limits is not None:
        drawn |= {"zmin": heat.limits[0], "zmax": heat.limits[1]}
    return drawn
