"""The rest radius: how far, at most, a token's logits are still from where they will rest; learned, not tuned."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.recorded import blocks_of
from restpoint.exit.signals import RelativeStep, Signal, unknown
from restpoint.exit.view import Readout, View

Keeps = Literal["law", "token"]
_EDGES_EVERY = 5
"""Every so many-th text gives the edges of the bins; the others, which the edges do not depend on, the radii."""


@dataclass(frozen=True, eq=False)
class RestRadius(Signal):
    """margin / (margin + 2 r): above 1/2 exactly where the lead of the top logit is more than twice the rest radius r.

    With the readout's logits ẑ at layer l and the full model's z_L, let d = osc(z_L - ẑ) / 2, osc x = max x - min x:
    the distance in the largest coordinate, up to a constant, which no law depends on; so never above
    max_v |z_L(v) - ẑ(v)|. Where d <= r,

    * a margin above 2 r cannot be overtaken: z_L(first) - z_L(v) >= margin - osc(z_L - ẑ) > 0, the top token stays;
    * TV(softmax ẑ, softmax z_L) <= tanh(r / 2).

    Often the token is all that must stay. ``keeps`` "token" takes d = max_v [(z_L - ẑ)(v) - (z_L - ẑ)(first)] / 2, by
    how much the others gain upon the first: smaller, with the first of the two consequences and not the second.

    r is the conformal quantile of d at level 1 - alpha, in the layer and bin of the token: P(d <= r) >= 1 - alpha for a
    token drawn from a new text exchangeable with those of the fit, in each bin. That is over the draw of all of them
    together, and for a layer that is fixed beforehand; not for the tokens that a rule chose to stop. 0 where r is
    infinite, at other layers, and without a margin.

    Paper:
        Vovk, Gammerman, Shafer 2005, "Algorithmic Learning in a Random World" (conformal and Mondrian prediction);
        Cohen, Fausti 2023, "Hyperbolic contractivity and the Hilbert metric on probability measures" (the bound on
        TV).
    """

    kind: ClassVar[str] = "rest-radius"
    papers: ClassVar[tuple[str, ...]] = (
        "Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a Random World",
        "Cohen, Fausti 2023, Hyperbolic contractivity and the Hilbert metric on probability measures",
    )

    layers: tuple[int, ...]
    """Candidate layers, ascending."""
    edges: Float[Tensor, "layers inner"]
    """Between bins of the cheap signal's confidence, ascending."""
    radii: Float[Tensor, "layers bins"]
    """r, in units of logits; inf in bins with too few texts to tell."""
    alpha: float
    """The share of texts in which the radius may be exceeded."""
    binned_by: Signal
    """The cheap signal."""
    keeps: Keeps = "law"
    """What does not change, or by a bounded amount, within the radius."""

    def radius(self, view: View) -> Float[Tensor, " rows"]:
        """The rest radius of each token; inf at layers that were not fitted."""
        if view.layer not in self.layers:
            return torch.full_like(unknown(view), torch.inf)
        place = self.layers.index(view.layer)
        edges, radii = self.edges[place].to(view.state.device), self.radii[place].to(view.state.device)
        return radii[torch.bucketize(self.binned_by.confidence(view).contiguous(), edges)]

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer not in self.layers:
            return unknown(view)
        first, second = view.lead[0].unbind(-1)
        margin = first - second
        # A radius of 0 and no margin: nothing is known of which of two tokens it is.
        return margin / (margin + 2 * self.radius(view)).clamp_min(torch.finfo(margin.dtype).tiny)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Signal.state`; the cheap signal's tensors have names that begin with its own."""
        config, tensors = self.binned_by.state()
        own = {"kind": self.kind, "layers": list(self.layers), "alpha": self.alpha, "keeps": self.keeps}
        given = {f"binned_by.{name}": tensor for name, tensor in tensors.items()}
        return own | {"binned_by": config}, {"edges": self.edges.contiguous(), "radii": self.radii.contiguous()} | given

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RestRadius":
        """From what `state` gave."""
        prefix = "binned_by."
        given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        binned_by = Signal.from_state(config["binned_by"], given)
        return cls(
            tuple(config["layers"]), tensors["edges"], tensors["radii"], config["alpha"], binned_by, config["keeps"]
        )


@dataclass(frozen=True, eq=False)
class RadiusFit:
    """Fitted radii, and on how much."""

    signal: RestRadius
    counts: Int[Tensor, "layers bins"]
    """Texts whose token fell into each bin."""


@torch.no_grad()
def fit_radius(
    sequences: Iterable[Float[Tensor, "tokens levels hidden"]],
    layers: tuple[int, ...],
    readout: Readout,
    *,
    alpha: float = 0.1,
    bins: int = 8,
    binned_by: Signal | None = None,
    keeps: Keeps = "law",
    seed: int = 0,
) -> RadiusFit:
    """Fit the rest radius of each layer and bin, from one token of each text: tokens of one text are not exchangeable.

    Every fifth text gives none: all its tokens give the quantiles between the bins instead. A bin needs 1 / alpha - 1
    texts for a finite radius, so bins times that in all, and a quarter more.

    Args:
        sequences: of each text the states h_0 .. h_L of tokens such as will be met; none that the readout was fitted
            on, or its error is underrated. Texts are read one by one.
        layers: candidate layers, ascending.
        readout: which will be used.
        alpha: share of texts in which the radius may be exceeded.
        bins: of the cheap signal, with about as many tokens each.
        binned_by: the cheap signal, not fitted on these texts; the relative step if None.
        keeps: what is to stay: the law, up to a bound, or the top token only.
        seed: of the tokens drawn.

    Raises:
        RestpointError: alpha, bins or keeps is not possible, or layers or states do not fit the model.
    """
    if not 0 < alpha < 1:
        raise RestpointError(f"alpha is {alpha}; give a share between 0 and 1, such as 0.1")
    if bins < 1:
        raise RestpointError(f"bins is {bins}; give at least 1")
    if keeps not in ("law", "token"):
        raise RestpointError(f"keeps is {keeps!r}; choose law or token")
    if readout.vocabulary is not None:
        raise RestpointError(
            "readout: a token that an exit does not emit could come to lead; read the whole vocabulary"
        )
    distance = rest_distance if keeps == "law" else overtaking_distance
    binned_by = binned_by or RelativeStep()
    generator = torch.Generator().manual_seed(seed)
    known: list[list[Tensor]] = [[] for _ in layers]
    cheap: list[list[Tensor]] = [[] for _ in layers]
    distances: list[list[Tensor]] = [[] for _ in layers]
    for index, views, rest in blocks_of(_drawn(sequences, generator), layers, readout):
        final = None if index % _EDGES_EVERY == 0 else readout.logits(rest)
        for place, view in enumerate(views):
            confidence = binned_by.confidence(view).double().cpu()
            if final is None:
                known[place].append(confidence)
            else:
                cheap[place].append(confidence)
                distances[place].append(distance(view.logits, final).double().cpu())
    inner = torch.arange(1, bins, dtype=torch.float64) / bins
    edges = torch.stack([torch.cat(each).quantile(inner) for each in known]).float()
    radii, counts = [], []
    for place in range(len(layers)):
        values = torch.cat([torch.empty(0, dtype=torch.float64), *distances[place]])
        places = torch.cat([torch.empty(0, dtype=torch.float64), *cheap[place]]).float()
        bin_of = torch.bucketize(places, edges[place])
        radii.append(torch.stack([conformal_quantile(values[bin_of == each], alpha) for each in range(bins)]))
        counts.append(torch.bincount(bin_of, minlength=bins))
    signal = RestRadius(layers, edges, _upwards(torch.stack(radii)), alpha, binned_by, keeps)
    return RadiusFit(signal, torch.stack(counts))


def conformal_quantile(values: Float64[Tensor, " count"], alpha: float) -> Float64[Tensor, ""]:
    """The k-th smallest of n values, k = n + 1 - floor(alpha (n + 1)); inf where k > n.

    One more value, exchangeable with these, is at most that with probability at least 1 - alpha.

    Paper:
        Vovk, Gammerman, Shafer 2005, "Algorithmic Learning in a Random World".
    """
    count = len(values)
    rank = count + 1 - int(alpha * (count + 1))
    if rank > count:
        return torch.tensor(torch.inf, dtype=torch.float64)
    return values.kthvalue(rank).values


def rest_distance(
    predicted: Float[Tensor, "*batch vocab"], final: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Half of osc(z_L - ẑ): the largest difference of two logits of one token, when the best constant is taken off."""
    low, high = (final - predicted).aminmax(dim=-1)
    return (high - low) / 2


def overtaking_distance(
    predicted: Float[Tensor, "*batch vocab"], final: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Half of the most that a logit gains upon the one that was predicted as the top: never above `rest_distance`."""
    gained = final - predicted
    own = gained.gather(-1, predicted.argmax(-1, keepdim=True)).squeeze(-1)
    return (gained.amax(-1) - own) / 2


def _drawn(
    sequences: Iterable[Float[Tensor, "tokens levels hidden"]], generator: torch.Generator
) -> Iterable[Float[Tensor, "some levels hidden"]]:
    """All tokens of the texts that give edges, and one of each other text."""
    for index, sequence in enumerate(sequences):
        if index % _EDGES_EVERY == 0:
            yield sequence
        else:
            token = int(torch.randint(len(sequence), (), generator=generator))
            yield sequence[token : token + 1]


def _upwards(radii: Float64[Tensor, "layers bins"]) -> Float[Tensor, "layers bins"]:
    """In float32 and never smaller."""
    rounded = radii.float()
    return torch.where(rounded.double() < radii, rounded.nextafter(torch.full_like(rounded, torch.inf)), rounded)
