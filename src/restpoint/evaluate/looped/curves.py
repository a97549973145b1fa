"""Curves of step counts against perplexity, and what ways of stopping need at one perplexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.evaluate.looped.passes import Passed
from restpoint.exit.bootstrap import Estimate, estimates, resampled_shares


@dataclass(frozen=True)
class LoopPoint:
    """One setting, means over texts with 95% intervals.

    Attributes:
        setting: threshold, hits, or number of steps.
        steps: core steps per token.
        increase: of perplexity over that of the full count, a share: exp(mean loss - mean loss at the full count) - 1.
        perplexity: itself.
        disagreement: share of tokens whose most probable next one is not the full count's.
    """

    setting: float
    steps: Estimate
    increase: Estimate
    perplexity: Estimate
    disagreement: Estimate


@dataclass(frozen=True, eq=False)
class LoopCurve:
    """What one way of stopping gives at each of its settings, for each text.

    Attributes:
        name: of the criterion, or of the way.
        full: steps of the full count.
        settings: see `LoopPoint`; the full count is not among them unless a setting is.
        steps: mean over the text's tokens.
        loss: likewise, nats.
        full_loss: at the full count.
        disagreement: share of the text's tokens.
    """

    name: str
    full: int
    settings: tuple[float, ...]
    steps: Float64[Tensor, "points texts"]
    loss: Float64[Tensor, "points texts"]
    full_loss: Float64[Tensor, " texts"]
    disagreement: Float64[Tensor, "points texts"]

    @classmethod
    def of(cls, name: str, full: Passed, count: int, passed: Mapping[float, Passed]) -> "LoopCurve":
        """From a pass at each setting."""
        ordered = dict(sorted(passed.items()))
        steps, loss, differs = (
            torch.stack(rows)
            for rows in zip(*((o.mean_steps(), o.mean_loss(), o.differs(full)) for o in ordered.values()), strict=True)
        )
        return cls(name, count, tuple(ordered), steps, loss, full.mean_loss(), differs)

    @property
    def texts(self) -> int:
        """How many it rests on."""
        return self.full_loss.shape[0]

    def increase(self, shares: Float64[Tensor, "texts samples"]) -> Float64[Tensor, "points samples"]:
        """By what share perplexity is above the full count's, on each sample of texts."""
        return torch.expm1((self.loss - self.full_loss) @ shares)

    def points(self, seed: int = 0) -> list[LoopPoint]:
        """Means over texts, with 95% percentile bootstrap intervals over them; increases are paired."""
        whole, samples = _whole(self.texts), resampled_shares(self.texts, seed)

        def column(values: Float64[Tensor, "points texts"]) -> list[Estimate]:
            return estimates((values @ whole)[:, 0], values @ samples, self.texts)

        increases = estimates(self.increase(whole)[:, 0], self.increase(samples), self.texts)
        perplexities = estimates((self.loss @ whole).exp()[:, 0], (self.loss @ samples).exp(), self.texts)
        rows = zip(self.settings, column(self.steps), increases, perplexities, column(self.disagreement), strict=True)
        return [LoopPoint(*row) for row in rows]

    def matched(self, increase: float, shares: Float64[Tensor, "texts samples"]) -> Float64[Tensor, " samples"]:
        """Steps per token at which perplexity is so much above the full count's, on each sample of texts.

        Points are taken from the most steps to the fewest, beginning with the full count, which increases nothing; it
        is where the straight line between the last point that keeps to the increase and the next one crosses it. A
        curve that comes back below later on has not earned it. One that never crosses gives its fewest steps.
        """
        steps, rises = self.steps @ shares, self.increase(shares)
        order = steps.argsort(0, descending=True)
        steps = torch.cat([torch.full_like(steps[:1], self.full), steps.gather(0, order)])
        rises = torch.cat([torch.zeros_like(rises[:1]), rises.gather(0, order)])
        beyond = rises > increase
        crossed = beyond.any(0)
        after = beyond.int().argmax(0).clamp_min(1)[None]
        (low, high), (many, few) = ((of.gather(0, after - 1)[0], of.gather(0, after)[0]) for of in (rises, steps))
        share = (increase - low) / torch.where(crossed, high - low, 1)
        return torch.where(crossed, many + share * (few - many), steps[-1])

    def kept(self, increase: float) -> float | None:
        """The setting with the fewest steps of those that keep to the increase; None if none does."""
        whole = _whole(self.texts)
        rises, steps = self.increase(whole)[:, 0], (self.steps @ whole)[:, 0]
        if not bool((rises <= increase).any()):
            return None
        return self.settings[int(torch.where(rises <= increase, steps, torch.inf).argmin())]


@dataclass(frozen=True)
class Matched:
    """Steps that a curve needs where perplexity may rise by so much.

    Attributes:
        name: of the curve.
        steps: per token.
        fewer: share of the reference's steps that it does without, 1 - steps / reference; None for the reference.
        setting: fewest steps of those settings that keep to the increase; None if none does.
    """

    name: str
    steps: Estimate
    fewer: Estimate | None
    setting: float | None


def compare_at(curves: Sequence[LoopCurve], increase: float, reference: str, seed: int = 0) -> list[Matched]:
    """Every curve at one rise of perplexity, with 95% intervals; the same resamples of texts serve all of them.

    Raises:
        RestpointError: the reference is missing, or curves rest on different numbers of texts.
    """
    known = {curve.name: curve for curve in curves}
    if reference not in known:
        raise RestpointError(f"reference: {reference!r} is no curve; choose one of {', '.join(known)}")
    if len({curve.texts for curve in curves}) > 1:
        raise RestpointError("curves: they rest on different numbers of texts; measure them on the same")
    count = curves[0].texts
    shares = torch.cat([_whole(count), resampled_shares(count, seed)], 1)
    steps = {name: curve.matched(increase, shares) for name, curve in known.items()}
    found = []
    for name, curve in known.items():
        fewer = None if name == reference else _estimate(1 - steps[name] / steps[reference], count)
        found.append(Matched(name, _estimate(steps[name], count), fewer, curve.kept(increase)))
    return found


def _whole(texts: int) -> Float64[Tensor, "texts 1"]:
    return torch.full((texts, 1), 1 / texts, dtype=torch.float64)


def _estimate(values: Float64[Tensor, " samples"], texts: int) -> Estimate:
    """The first sample is the data itself, the others are its resamples."""
    return estimates(values[:1], values[None, 1:], texts)[0]
