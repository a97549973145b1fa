"""What a fit makes of neighbouring layers: predictors that carry the way through the first layers on to the end."""

from collections.abc import Callable

from restpoint.equilibrium.dynamic_modes import ModeSettings, fit_dynamic_modes
from restpoint.equilibrium.extrapolation import fit_extrapolation
from restpoint.equilibrium.predictors import Predictor
from restpoint.equilibrium.streaming import FitProgress, FitSettings, Score, Stream

_WINDOW = 5
"""Layers that are read up to the exit, which makes extrapolation one of order 3."""
_LEAST = 3
_REGULARISATIONS = (1e-4, 1e-2, 1e-1, 1.0, 10.0)
"""Strong ones among them: layers are no linear sequence, and the weak ones follow its noise."""

Job = Callable[[Callable[[FitProgress], None]], Predictor]


def layers_before(exit_layer: int) -> tuple[int, ...]:
    """The layers up to an exit that extrapolation reads; none where there are too few."""
    layers = tuple(range(max(0, exit_layer - _WINDOW + 1), exit_layer + 1))
    return layers if len(layers) >= _LEAST else ()


def extrapolations(
    stream: Stream, held_out: Stream, exit_layer: int, depth: int, settings: FitSettings, score: Score
) -> dict[str, Job]:
    """How to come by each extrapolation from an exit layer, by its name."""
    layers = layers_before(exit_layer)
    if not layers:
        return {}
    chosen = FitSettings(strengths=_REGULARISATIONS, chunk_rows=settings.chunk_rows)

    def mixed(mixing: float) -> Job:
        return lambda progress: (
            fit_extrapolation(held_out, layers, chosen, mixing=mixing, score=score, progress=progress).predictor
        )

    def modes(progress: Callable[[FitProgress], None]) -> Predictor:
        return fit_dynamic_modes(
            stream, held_out, layers, depth - exit_layer, settings, modes=ModeSettings(), score=score, progress=progress
        ).predictor

    return {f"rre@{exit_layer}": mixed(0.0), f"anderson@{exit_layer}": mixed(1.0), f"dmd@{exit_layer}": modes}
