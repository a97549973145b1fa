"""Charts of two scales: steps within blocks, the drift across them, and the paths of iterates."""

from collections.abc import Sequence

import numpy as np

from restpoint.report.charts import Chart, Line, Trail
from restpoint.report.reading import Reader, shown
from restpoint.report.shaping import LAYER
from restpoint.trajectory.scenes import Scene

_NEAR = 0.05
_SMALL = 0.03
_TOKENS = 6

_STEPS = (
    (
        "step",
        "Step size within blocks",
        "‖Dₖ‖ (state units)",
        "How far each step of a block moves a token. In a loop that comes to rest it falls by a steady factor.",
    ),
    (
        "relative_step",
        "Relative step within blocks",
        "‖Dₖ‖ / ‖xₖ₋₁‖",
        "The step against the length of the state. Below 0.03 is one of the rules by which models that iterate stop.",
    ),
    (
        "angle",
        "Turn between successive steps",
        "cosine of Dₖ and Dₖ₋₁",
        "0 turns square, as in a spiral with many turns; 1 goes straight on, -1 goes back and forth. Steps that are "
        "lost in rounding have no direction and are left out.",
    ),
    (
        "acceleration",
        "Acceleration within blocks",
        "‖Dₖ - Dₖ₋₁‖ (state units)",
        "The change of the step. Two small ones in a row are the exit rule of Pappone et al.",
    ),
    (
        "remaining",
        "Way still to go within the block",
        "‖xₖ - xₙ‖ / ‖xₙ - x₀‖",
        "The distance from the block's last state over that of its first. It ends at 0 by definition; where it is "
        "near 0 long before, the rest of the steps hardly moves the token.",
    ),
)

_BLOCKS = (
    (
        "drift_ratio",
        "Drift ratio",
        "first move of the block / mean step before",
        "The move from the last state of the block before to the first that this block adds, over the mean step within "
        "the block before. Two scales are told apart where it is far above 1.",
    ),
    (
        "straightness",
        "Straightness",
        "net way / length of path",
        "1 is a straight line, 0 a closed loop; a block of one step is straight.",
    ),
    (
        "step_ratio",
        "Step against drift",
        "mean step within / drift across",
        "The mean step within a block over the way from the last state of the block before to its own last state: far "
        "below 1 where many small steps make one large drift.",
    ),
)


def two_scale(read: Reader) -> tuple[list[Chart], list[tuple[str, str]]]:
    """Steps by block over depth, ratios over blocks, and where a loop comes to rest."""
    first, last = read.array("blocks.first", 1), read.array("blocks.last", 1)
    if first is None or last is None:
        return [], []
    names = [" to ".join(read.called(ends)) for ends in zip(first, last, strict=True)]
    ends = [(int(low), int(high)) for low, high in zip(first, last, strict=True)]
    charts = [
        Chart(
            name.replace("_", "-"),
            title,
            caption,
            LAYER,
            unit,
            lines=[
                line
                for colour, (block, (low, high)) in enumerate(zip(names, ends, strict=True))
                if name != "remaining" or high > low + 1  # nothing is left after a single step
                for line in _line(read, name, block, np.arange(low + 1, high + 1), colour)
            ],
            layers=read.layers,
            logarithmic=name in ("step", "relative_step", "acceleration"),
        )
        for name, title, unit, caption in _STEPS
    ]
    longer = np.flatnonzero(last > first + 1)  # a single step is straight, and all of the way
    charts += [
        Chart(
            name.replace("_", "-"),
            title,
            caption,
            "block (its first and last state)",
            unit,
            lines=_line(read, f"blocks.{name}", "median", np.arange(len(names)), 0),
            ticks=tuple(names),
        )
        for name, title, unit, caption in _BLOCKS
        if len(longer) > 1
    ]
    return charts, _facts(read, names, longer.tolist())


def paths(scenes: Sequence[Scene]) -> list[Chart]:
    """Of every scene of a model that iterates, the ways of a few tokens."""
    charts = []
    for number, scene in enumerate(scenes, 1):
        if scene.path is None:
            continue
        plane = scene.path.detach().cpu().double().numpy()
        steps = np.arange(1, len(plane) + 1)
        chosen = np.unique(np.linspace(0, plane.shape[1] - 1, min(_TOKENS, plane.shape[1])).round().astype(int))
        charts.append(
            Chart(
                f"path-{number}",
                f"Paths of iterates, sentence {number}",
                "s₁ .. sᵣ of a few tokens, each seen from its own last iterate, in the plane in which the sentence's "
                "iterates are farthest from theirs. A path that curls about the centre spirals in; a straight one "
                "contracts without turning.",
                "first principal direction (state units)",
                "second principal direction (state units)",
                trails=[Trail(scene.tokens[at], plane[:, at, 0], plane[:, at, 1], steps) for at in chosen],
            )
        )
    return charts


def _line(read: Reader, name: str, label: str, places: np.ndarray, colour: int) -> list[Line]:
    """The median with quantile bands at some places, or the mean where there are no quantiles."""
    middle = read.array(f"{name}.q50", 1)
    middle = read.array(f"{name}.mean", 1) if middle is None else middle
    if middle is None:
        return []
    y = middle if name.startswith("blocks.") else middle[places]
    if not np.isfinite(y).any():
        return []
    kept = np.isfinite(y)
    bands = []
    for ends in (("q05", "q95"), ("q25", "q75")):
        low, high = (read.array(f"{name}.{end}", 1) for end in ends)
        if low is not None and high is not None:
            low, high = (own if name.startswith("blocks.") else own[places] for own in (low, high))
            bands.append((low[kept], high[kept]))
    return [Line(label, places[kept].astype(float), y[kept], tuple(bands) if kept.sum() > 1 else (), colour=colour)]


def _facts(read: Reader, names: list[str], longer: list[int]) -> list[tuple[str, str]]:
    """Means of every block, ratios of those of several steps, and the steps at which a loop comes to rest."""
    facts = []
    everywhere, later = list(range(len(names))), list(range(1, len(names)))
    for name, what, chosen in (
        ("drift_ratio", "Drift ratio", later),
        ("straightness", "Straightness", longer),
        ("step_ratio", "Step against drift", longer),
        ("across", "Drift", everywhere),
    ):
        values = read.array(f"blocks.{name}.mean", 1)
        if values is not None:
            facts += [(f"{what}, {names[block]}", shown(float(values[block]))) for block in chosen]
    if read.loop is None:
        return facts
    steps = read.loop.iterates()[1:]
    for name, limit, what in (
        ("relative_step", _SMALL, f"Mean relative step below {_SMALL}"),
        ("remaining", _NEAR, f"Mean way still to go below {_NEAR}"),
    ):
        values = read.array(f"{name}.mean", 1)
        if values is not None:
            below = values[steps] < limit
            settled = len(below) - int(np.cumprod(below[::-1]).sum())  # from there on at every step
            told = f"from {read.called([steps[settled]])[0]}" if settled < len(steps) else "at no step"
            facts.append((what, told))
    return facts
