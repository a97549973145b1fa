"""Choices that sweeps allow: which signal saves most at equal disagreement, and at which layers to look at all."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.bootstrap import Estimate, estimates, resampled_shares
from restpoint.exit.costs import ExitCosts
from restpoint.exit.rules import ThresholdRule
from restpoint.exit.sweep import NEVER, Curve, sweep, thresholds_of
from restpoint.exit.traces import Traces

_THRESHOLDS = 64


@dataclass(frozen=True)
class Comparison:
    """What a curve saves where at most so many tokens differ; plain decoding where no setting keeps to that.

    Attributes:
        name: of the curve.
        disagreement: largest share of tokens that may differ.
        setting: of the curve, that sees the fewest layers; None where none keeps to the share.
        layers_saved: per token, of the model's depth.
        difference: of layers saved to those of the reference, in pairs; None for the reference itself.
        speed: largest expected rate over plain decoding among settings that keep to the share, 1 where none is faster;
            None without costs.
    """

    name: str
    disagreement: float
    setting: float | None
    layers_saved: Estimate
    difference: Estimate | None = None
    speed: Estimate | None = None


@dataclass(frozen=True)
class LayerChoice:
    """Where to look, and from which confidence on to stop.

    Attributes:
        signal: its name.
        layers: candidate layers; empty where plain decoding is fastest.
        threshold: see `ThresholdRule`.
        speed: expected rate over plain decoding.
        layers_seen: layers behind the law of a token.
        disagreement: share of tokens that differ.
    """

    signal: str
    layers: tuple[int, ...]
    threshold: float
    speed: float
    layers_seen: float
    disagreement: float

    @property
    def rule(self) -> ThresholdRule | None:
        """As it is decoded with; None for plain decoding."""
        return ThresholdRule(self.signal, self.threshold, self.layers) if self.layers else None


def compare(
    curves: Mapping[str, Curve],
    disagreements: Sequence[float] = (0.01, 0.03, 0.05),
    reference: str = "max-p",
    seed: int = 0,
) -> list[Comparison]:
    """Layers that curves save at equal disagreement, with 95% intervals of each and of the difference to a reference.

    Every bootstrap sample chooses its own setting, the same samples serve all curves: so an interval covers the choice
    of the setting, but not that a setting chosen here is used on other text. For a guarantee see risk control.

    Args:
        curves: by name, all of the same traces.
        disagreements: largest shares of tokens that may differ.
        reference: name of the curve that the others are compared with.
        seed: of the resampling.

    Returns:
        For each disagreement in turn, one row for each curve.

    Raises:
        RestpointError: the reference is missing, or curves rest on different numbers of sequences.
    """
    if reference not in curves:
        raise RestpointError(f"reference: {reference!r} is no curve; choose one of {', '.join(curves)}")
    if len({curve.sequences for curve in curves.values()}) > 1:
        raise RestpointError("curves: they rest on different numbers of sequences; sweep the same traces")
    count = curves[reference].sequences
    # The first column is the data itself, the others are its resamples.
    shares = torch.cat([torch.full((count, 1), 1 / count, dtype=torch.float64), resampled_shares(count, seed)], 1)
    means = {name: (curve.disagreement @ shares, curve.layers_seen @ shares) for name, curve in curves.items()}
    seconds = {name: curve.seconds @ shares for name, curve in curves.items() if curve.seconds is not None}
    found: list[Comparison] = []
    for most in disagreements:
        least = {name: _least(*own, most, float(curves[name].depth)) for name, own in means.items()}
        for name, curve in curves.items():
            wrong, seen = means[name]
            saved = curve.depth - least[name]
            kept = _kept(wrong[:, 0], most)
            setting = curve.settings[int(torch.where(kept, seen[:, 0], torch.inf).argmin())] if kept.any() else None
            row = Comparison(name, most, setting, _estimate(saved, count))
            if name != reference:
                row = replace(row, difference=_estimate(least[reference] - least[name], count))
            plain = curve.plain_seconds
            if plain is not None:
                fastest = _least(wrong, seconds[name], most, plain).clamp_max(plain)
                row = replace(row, speed=_estimate(plain / fastest, count))
            found.append(row)
    return found


def choose_layers(
    traces: Traces,
    costs: ExitCosts,
    signal: str,
    epsilon: float,
    count: int = 2,
    thresholds: int = _THRESHOLDS,
) -> LayerChoice:
    """The subset of recorded layers, and its threshold, with the best expected speed at disagreement <= epsilon.

    Every look costs, so fewer candidate layers may be faster than all. All subsets are tried, each at thresholds of
    its own. A signal that compares with the candidate layer before was recorded for these very layers: of them, only
    the first ones without a gap can be told.

    Args:
        traces: of all layers that may be chosen.
        costs: of looking and running.
        signal: its name.
        epsilon: largest share of tokens that may differ on this text; on other text it may be exceeded.
        count: largest number of layers.
        thresholds: quantiles tried for each subset.

    Raises:
        RestpointError: the signal was not recorded or not measured, count is below 1, or epsilon is outside [0, 1].
    """
    if count < 1:
        raise RestpointError(f"count is {count}; choose at least 1 layer")
    if not 0 <= epsilon <= 1:
        raise RestpointError(f"epsilon is {epsilon}; give a share of tokens between 0 and 1")
    best = LayerChoice(signal, (), NEVER, 1.0, float(traces.depth), 0.0)
    for size in range(1, min(count, len(traces.layers)) + 1):
        for places in itertools.combinations(range(len(traces.layers)), size):
            if signal in traces.comparing and places != tuple(range(size)):
                continue
            some = _only(traces, places, signal)
            settings = _faithful(some, signal, thresholds_of(some.confidence(signal), thresholds), epsilon)
            curve = sweep(some, signal, costs, settings)
            assert curve.seconds is not None
            assert curve.plain_seconds is not None
            wrong = curve.disagreement.mean(-1)
            seconds = curve.seconds.mean(-1)
            at = int(seconds.argmin())
            speed = curve.plain_seconds / float(seconds[at])
            if speed > best.speed:
                seen = float(curve.layers_seen[at].mean())
                best = LayerChoice(signal, curve.layers, curve.settings[at], speed, seen, float(wrong[at]))
    return best


def _only(traces: Traces, places: Sequence[int], signal: str) -> Traces:
    """Traces of some of the layers and one signal."""
    chosen = list(places)
    return replace(
        traces,
        layers=tuple(traces.layers[place] for place in chosen),
        confidences={signal: traces.confidence(signal)[..., chosen]},
        agrees=traces.agrees[..., chosen],
        log_probability=traces.log_probability[..., chosen],
    )


def _faithful(traces: Traces, signal: str, settings: Sequence[float], most: float) -> list[float]:
    """Thresholds at which at most a share of tokens differs: by counting, which costs less than to run through texts.

    Exits at a layer are those between the highest confidence before it and the highest up to it.
    """
    asked = torch.tensor(settings, dtype=torch.float64)
    edges = torch.searchsorted(asked, traces.confidence(signal).cummax(-1).values.double(), right=True)
    begins = torch.nn.functional.pad(edges[..., :-1], (1, 0))
    changes = torch.zeros(len(settings) + 1, dtype=torch.float64)
    for places, sign in ((begins, 1.0), (edges, -1.0)):
        wrong = places[~traces.agrees]
        changes.index_add_(0, wrong, torch.full(wrong.shape, sign, dtype=torch.float64))
    kept = _kept(changes.cumsum(0)[:-1] / traces.tokens.numel(), most)
    return [setting for setting, keeps in zip(settings, kept.tolist(), strict=True) if keeps]


def _kept(disagreement: Tensor, most: float) -> Tensor:
    """Where a share is kept to; means of counts are compared, which rounding must not decide."""
    return disagreement <= most + 1e-12


def _least(
    wrong: Float64[Tensor, "points samples"], values: Float64[Tensor, "points samples"], most: float, otherwise: float
) -> Float64[Tensor, " samples"]:
    """The least value among settings that keep to a share, in every sample."""
    least = torch.where(_kept(wrong, most), values, torch.inf).amin(0)
    return torch.where(least.isinf(), otherwise, least)


def _estimate(samples: Float64[Tensor, " samples"], sequences: int) -> Estimate:
    """Of the data in the first column and its resamples in the others."""
    return estimates(samples[:1], samples[None, 1:], sequences)[0]
