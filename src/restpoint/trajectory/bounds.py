"""How far each layer's next-token law is from the last one's, and what the geometry of logits and steps says of it."""

from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure, Readout, Trajectory
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.transport.bounds import contraction_estimate, softmax_variation_bound
from restpoint.transport.tokens import nearest_distances, token_transport
from restpoint.transport.variation import total_variation

_ROUNDING = 1e-5
_QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


class Bounds(Measure):
    """Does the softmax bound hold and how loose is it; how good is the estimate of the distance still to go.

    With p_l = softmax z_l the law that the head reads from h_l, for layers l < L and a sample of tokens:

    * ``variation``, ``variation.bound`` (depth - 1): mean TV(p_l, p_L), and mean tanh(osc(z_l - z_L) / 4).
    * ``violations`` (depth - 1): tokens whose TV is above the bound by more than 10^-5. It is a theorem: zero, or the
      logits are not what the laws were made of.
    * ``tightness`` (depth - 1): mean of TV / bound over tokens whose bound is not 0, and its quantiles ``.q10``,
      ``.q50``, ``.q90``, read from a histogram, so within one of its bins of equal width on [0, 1]. 1 is tight.
    * ``contraction.share``, ``.holds``, ``.ratio``, ``.geometric_ratio`` (depth - 2), for layers 1 .. L-1: with steps
      s_l = |h_l - h_{l-1}| and the rate r = s_{l+1} / s_l of the last two seen at layer l + 1, the share of tokens with
      r < 1; the share *of those* for which the estimate s_{l+1} / (1 - r) is at least |h_L - h_l|; and the arithmetic
      and the geometric mean of estimate / |h_L - h_l|. The former is swayed by rates just below 1. It is an estimate,
      never a bound: later steps may grow again. At layer L-1 nothing is to be estimated, s_L being the distance. Tokens
      at rest, whose distance is 0, are not counted. NaN where no token has r < 1.
    * ``transport.lower``, ``transport.upper`` (depth - 1), with embeddings: mean bounds on the cost of moving p_l to
      p_L between embeddings, and ``transport.covered``, the mean share of the moved mass for which it is exact.
    * ``texts``, ``tokens``: how many.

    The logits of the last and of one other layer are held at a time, for the sampled tokens of one text.

    Args:
        readout: the head, from states (before the final norm) to logits; they must be finite.
        embeddings: unembedding or embedding of each token, for transport between laws; None leaves that out. Distances
            of nearest neighbours are found once, in vocabulary^2 hidden multiplications.
        every: texts whose index is a multiple of this are measured.
        tokens: at most so many evenly spaced tokens of a text.
        bins: of the histogram.
        support: tokens on each side between which transport is solved exactly.

    Raises:
        RestpointError: a number is out of range, or logits are not finite.

    Paper:
        Cohen, Fausti 2023, "Hyperbolic contractivity and the Hilbert metric on probability measures".
    """

    name: ClassVar[str] = "bounds"
    papers: ClassVar[tuple[str, ...]] = (
        "Cohen, Fausti 2023, Hyperbolic contractivity and the Hilbert metric on probability measures",
        "Villani 2009, Optimal Transport: Old and New",
    )

    def __init__(
        self,
        readout: Readout,
        embeddings: Float[Tensor, "vocab hidden"] | None = None,
        every: int = 4,
        tokens: int = 16,
        bins: int = 200,
        support: int = 32,
    ) -> None:
        super().__init__()
        numbers = {"every": every, "tokens": tokens, "bins": bins, "support": support}
        for argument, value in numbers.items():
            if value < 1:
                raise RestpointError(f"{argument} is {value}; give at least 1")
        self.readout = readout
        self.embeddings = None if embeddings is None else embeddings.detach()
        self.every = every
        self.tokens = tokens
        self.bins = bins
        self.support = support
        self._nearest: Tensor | None = None

    @torch.no_grad()
    def add(self, trajectory: Trajectory) -> None:
        if trajectory.index % self.every:
            return
        states = trajectory.states
        places = evenly_spaced(states.shape[1], self.tokens).to(states.device)
        states = states[:, places]
        self._add_laws(trajectory.read[:, places])
        self._add_contraction(states.double())
        self._add("texts", torch.ones((), dtype=torch.int64))
        self._add("tokens", torch.tensor(states.shape[1]))

    def _add_laws(self, states: Float[Tensor, "depth tokens hidden"]) -> None:
        rest = self._logits(states[-1])
        law = rest.softmax(-1)
        found: dict[str, list[Tensor]] = {}
        for state in states[:-1]:
            logits = self._logits(state)
            own = logits.softmax(-1)
            variation, bound = total_variation(own, law), softmax_variation_bound(logits, rest)
            tightness = (variation / bound)[bound > 0].clamp(0, 1)
            row = {
                "variation": variation.sum(),
                "variation.bound": bound.sum(),
                "violations": (variation > bound + _ROUNDING).sum(),
                "tightness": tightness.sum(),
                "tightness.histogram": _histogram(tightness, self.bins),
            }
            if self.embeddings is not None:
                row |= self._transport(own, law, self.embeddings)
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            self._add(name, torch.stack(values))

    def _logits(self, states: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "tokens vocab"]:
        logits = self.readout(states).double()
        if not bool(logits.isfinite().all()):
            raise RestpointError("readout: a logit is not finite; give the head without a mask of tokens")
        return logits

    def _transport(self, p: Tensor, q: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        if self._nearest is None:
            self._nearest = nearest_distances(embeddings)
        found = token_transport(p, q, embeddings, support=self.support, nearest=self._nearest)
        return {
            "transport.lower": found.lower.sum(),
            "transport.upper": found.upper.sum(),
            "transport.covered": found.covered.sum(),
        }

    def _add_contraction(self, states: Float64[Tensor, "depth tokens hidden"]) -> None:
        steps = states.diff(dim=0).norm(dim=-1)
        distance = (states[-1] - states[1:-1]).norm(dim=-1)
        last, step = steps[:-1], steps[1:]
        moving = distance > 0
        shrinks = moving & (step < last)
        estimate = contraction_estimate(step, torch.where(shrinks, step / last, 1.0))
        ratio = torch.where(shrinks, estimate / distance, 1.0)
        self._add("contraction.moving", moving.sum(-1))
        self._add("contraction.shrinks", shrinks.sum(-1))
        self._add("contraction.above", (shrinks & (estimate >= distance)).sum(-1))
        self._add("contraction.ratio", torch.where(shrinks, ratio, 0.0).sum(-1))
        # A step of exactly 0 estimates 0, which has no logarithm: the smallest number stands for it.
        self._add("contraction.log_ratio", ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log().sum(-1))

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        if not self.sums:
            return dict.fromkeys(("texts", "tokens"), torch.zeros((), dtype=torch.float64))
        sums = {name: value.double() for name, value in self.sums.items()}
        tokens, shrinks = sums["tokens"], sums["contraction.shrinks"]
        histogram = sums["tightness.histogram"]
        found = {name: sums[name] for name in ("texts", "tokens", "violations")}
        for name in ("variation", "variation.bound", "transport.lower", "transport.upper", "transport.covered"):
            if name in sums:
                found[name] = sums[name] / tokens
        found["tightness"] = sums["tightness"] / histogram.sum(-1)
        for name, share in _QUANTILES.items():
            found[f"tightness.{name}"] = _quantile(histogram, share)
        found["contraction.share"] = shrinks / sums["contraction.moving"]
        found["contraction.holds"] = sums["contraction.above"] / shrinks
        found["contraction.ratio"] = sums["contraction.ratio"] / shrinks
        found["contraction.geometric_ratio"] = (sums["contraction.log_ratio"] / shrinks).exp()
        return found


def _histogram(values: Float64[Tensor, " values"], bins: int) -> Tensor:
    return torch.bincount((values * bins).long().clamp_max(bins - 1), minlength=bins)


def _quantile(histogram: Float64[Tensor, "layers bins"], share: float) -> Float64[Tensor, " layers"]:
    """Where so large a share of the counts lies below, even within a bin; NaN without counts."""
    bins = histogram.shape[-1]
    cumulative = histogram.cumsum(-1)
    aim = share * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, aim).clamp_max(bins - 1)
    count = histogram.gather(-1, place)
    into = (aim - cumulative.gather(-1, place) + count) / count
    return ((place + into) / bins).squeeze(-1)
