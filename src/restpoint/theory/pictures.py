"""Pictures of simulations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from restpoint.files import write
from restpoint.theory.simulate import SPECTRA
from restpoint.theory.study import Study

_STRONG, _CENTRE, _PLAIN, _OTHER = "#D55E00", "#222222", "#0072B2", "#E69F00"  # told apart with any colour vision


def draw(study: Study, path: Path) -> None:
    """Draw a study and write the picture, complete or not at all.

    Raises:
        RestpointError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, make = _PICTURES[study.name]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    make(study, figure)
    figure.suptitle(study.title, fontsize=11)
    write(path, lambda temporary: figure.savefig(temporary, dpi=150))


def _phase(study: Study, figure: Any) -> None:
    axes = figure.add_subplot()
    arrays = study.arrays
    order = np.argsort(arrays["betas"])
    shading = "nearest" if len(order) > 1 and len(arrays["times"]) > 1 else "auto"
    mesh = axes.pcolormesh(
        arrays["times"], arrays["betas"][order], arrays["shares"].T[order], vmin=0, vmax=1, shading=shading
    )
    figure.colorbar(mesh, label="share of pairs")
    axes.set_xlabel("time")
    axes.set_ylabel("inverse temperature beta")


def _strip(study: Study, figure: Any) -> None:
    circle, sphere = study.arrays["circle"], study.arrays["sphere"]
    axes = figure.add_subplot(1, 2, 1)
    _angles(axes, study.arrays["times"], circle, _PLAIN, 0.8)
    space = figure.add_subplot(1, 2, 2, projection="3d")
    for path in sphere.transpose(1, 2, 0):
        space.plot(*path, color=_PLAIN, linewidth=0.5, alpha=0.6)
    space.scatter(*sphere[-1].T, color=_STRONG, s=14, label="at the end")
    space.set_box_aspect((1, 1, 1))
    space.legend(frameon=False)


def _causal(study: Study, figure: Any) -> None:
    arrays = study.arrays
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    strong, centres = arrays["strong"], arrays["centres"]
    plain = ~(strong | centres)
    groups = (
        (plain, "#bbbbbb", 0.3, "other particles"),
        (centres & ~strong, _CENTRE, 1.2, "Renyi centres"),
        (strong, _STRONG, 1.8, "strong Renyi centres"),
    )
    for chosen, colour, width, label in groups:
        _angles(left, arrays["times"], arrays["states"][:, chosen], colour, width, label)
    left.legend(loc="upper right", fontsize=8)
    for column, colour, label in ((0, _STRONG, "strong Renyi centres"), (1, _CENTRE, "Renyi centres")):
        right.plot(arrays["times"], arrays["held"][:, column], color=colour, label=label)
    right.set_xlabel("time")
    right.set_ylabel("share of particles nearer than delta")
    right.set_ylim(0, 1.02)
    right.legend(frameon=False, fontsize=8)


def _spectrum(study: Study, figure: Any) -> None:
    for at, (name, states) in enumerate(zip(SPECTRA, study.arrays["states"], strict=True)):
        axes = figure.add_subplot(2, 4, at + 1, projection="3d")
        axes.scatter(*states.T, color=_PLAIN, s=14)
        axes.scatter(*states[0], color=_STRONG, s=30, marker="*")
        for limit in (axes.set_xlim, axes.set_ylim, axes.set_zlim):
            limit(-1, 1)
        axes.set_box_aspect((1, 1, 1))
        axes.set_title(f"V = diag({name})", fontsize=9)


def _mean_field(study: Study, figure: Any) -> None:
    axes = figure.add_subplot()
    counts, distances = np.exp(study.arrays["counts"]), np.exp(study.arrays["distances"])
    axes.loglog(counts, distances, "o-", color=_PLAIN, label="measured")
    axes.loglog(counts, distances[0] * (counts / counts[0]) ** -0.5, "--", color=_CENTRE, label="n to the power -1/2")
    axes.set_xlabel("particles n")
    axes.set_ylabel("Wasserstein distance to the limit (radians)")
    axes.legend(frameon=False)


def _head(study: Study, figure: Any) -> None:
    labels = ("share of merged pairs", "clusters", "effective rank", "length in leading eigenspace of V")
    for column, (axes, label) in enumerate(zip(figure.subplots(2, 2).flat, labels, strict=True)):
        for row, beta in enumerate(study.arrays["betas"]):
            colour = (_PLAIN, _OTHER, _STRONG, _CENTRE)[row % 4]
            axes.plot(study.arrays["times"], study.arrays["measured"][:, column, row], color=colour, label=f"{beta:g}")
        axes.set_xlabel("time")
        axes.set_ylabel(label)
        axes.legend(title="beta", frameon=False, fontsize=8)


def _layers(study: Study, figure: Any) -> None:
    arrays = study.arrays
    (contraction, attraction), (cloud, residual) = figure.subplots(2, 2)
    steps = np.arange(len(arrays["step layer_contraction"]))
    for axes, label, lines in (
        (
            contraction,
            "change of the mean cosine",
            (
                ("layer_contraction", "whole layer"),
                ("attention_contraction", "its attention"),
                ("particle_contraction", "particles"),
            ),
        ),
        (
            attraction,
            "change of the angle to the first token",
            (("to_first", "whole layer"), ("particle_to_first", "particles")),
        ),
        (
            residual,
            "length added, by the state's",
            (("added_by_rest", "MLP"), ("added_by_attention", "attention")),
        ),
    ):
        colours = (_CENTRE, _PLAIN, _STRONG) if len(lines) == 3 else (_CENTRE, _STRONG)
        for (name, title), colour in zip(lines, colours, strict=True):
            axes.plot(steps, arrays[f"step {name}"], "o-", markersize=3, color=colour, label=title)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    for axes in (contraction, attraction):
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    residual.set_yscale("log")
    cloud.plot(arrays["level"], arrays["mean_cosine"], "o-", markersize=3, color=_PLAIN, label="mean cosine")
    cloud.plot(arrays["level"], arrays["log_energy"], "o-", markersize=3, color=_STRONG, label="log energy")
    cloud.set_xlabel("layers run")
    cloud.legend(frameon=False, fontsize=8)


def _angles(axes: Any, times: np.ndarray, states: np.ndarray, colour: str, width: float, label: str = "") -> None:
    """Angles over time, with no line across the picture where a particle passes from pi to -pi."""
    for at, path in enumerate(np.arctan2(states[..., 1], states[..., 0]).T):
        jumps = np.abs(np.diff(path, prepend=path[0])) > np.pi
        axes.plot(
            times,
            np.where(jumps, np.nan, path),
            color=colour,
            linewidth=width,
            label=label if label and at == 0 else "_",
        )
    axes.set_xlabel("time")
    axes.set_ylabel("angle (radians)")
    axes.set_ylim(-np.pi, np.pi)


_PICTURES: dict[str, tuple[tuple[float, float], Callable[[Study, Any], None]]] = {
    "phase": ((7.0, 4.8), _phase),
    "strip": ((11.0, 4.8), _strip),
    "causal": ((12.0, 5.0), _causal),
    "spectrum": ((12.0, 6.4), _spectrum),
    "mean-field": ((6.4, 4.8), _mean_field),
    "head": ((9.0, 7.0), _head),
    "layers": ((10.0, 7.0), _layers),
}
