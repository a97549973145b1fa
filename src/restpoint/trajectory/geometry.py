"""The measure of geometry: how tokens move through the layers, and what cloud they form in each."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from restpoint.trajectory import observables
from restpoint.trajectory.histogram import Scale
from restpoint.trajectory.kinematics import MOTIONS, ORDERS, kinematics
from restpoint.trajectory.measure import Measure, Trajectory
from restpoint.trajectory.sampling import evenly_spaced

_COSINE = Scale(-1.0, 1.0, 1000)
_LENGTH = Scale(1e-6, 1e6, 2400, logarithmic=True)
_KINDS = {
    "lengths": (_LENGTH, tuple(name for name in MOTIONS if not name.endswith("angle"))),
    "cosines": (_COSINE, tuple(name for name in MOTIONS if name.endswith("angle"))),
}
"""Quantities of motion that share a scale, and so are added up together."""
_MASSIVE = 10.0
_MOST = 128


class Geometry(Measure):
    """Steps, angles, accelerations, curvature and norms of every token; clouds of a sample of texts.

    Results, one value a layer: for each of :data:`MOTIONS` ``.mean``, ``.std``, quantiles ``.q05`` to ``.q95``, and
    ``.position`` by the token's place in its text (0, 1, 2-3, 4-7, ..), the last two of every second text. For the
    clouds of the states h_0 .. h_L:

    * ``anisotropy``: the mean cosine of two tokens of the corpus, (‖sum u‖² - n) / (n (n - 1)) with u = h / ‖h‖; n
      are those that are not 0.
    * ``effective_rank`` and ``participation_ratio`` of the covariance over all sampled tokens, and
      ``.without_sinks``: without first tokens and those whose norm somewhere exceeds ten medians of their text. Left
      out above 2048 dimensions, whose covariances would take gigabytes.
    * within a text, of at most 128 evenly spaced tokens: ``clusters.components``, ``clusters.rank``,
      ``clusters.share``: of the graph that joins tokens with cosine above 1 - tau; ``energy`` by inverse temperature;
      ``rank_collapse``: sqrt(‖R‖_1 ‖R‖_inf) with R = X - 1 x̄ᵀ, over the same of X; each the mean over sampled texts.

    Args:
        every: one text of so many is looked at for covariances, and one of twice as many for clusters.
        tau: tokens nearer than this are joined.
        betas: inverse temperatures of the energy.

    Paper:
        Roy, Vetterli 2007 (effective rank); Dong, Cordonnier, Loukas 2021, "Attention is not all you need" (rank
        collapse); Geshkovski et al. 2023, "A mathematical perspective on transformers" (clusters, energy).
    """

    name: ClassVar[str] = "geometry"
    papers: ClassVar[tuple[str, ...]] = (
        "Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality",
        "Dong, Cordonnier, Loukas 2021, Attention is not all you need: pure attention loses rank doubly exponentially",
        "Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, A mathematical perspective on transformers",
        "Ethayarajh 2019, How contextual are contextualized word representations?",
        "Hosseini, Fedorenko 2023, Large language models implicitly learn to straighten neural sentence trajectories",
    )

    def __init__(self, every: int = 8, tau: float = 0.1, betas: tuple[float, ...] = (1.0, 4.0)):
        super().__init__()
        self.every = every
        self.tau = tau
        self.betas = betas

    def add(self, trajectory: Trajectory) -> None:
        """See :meth:`Measure.add`."""
        states = trajectory.states
        motions = kinematics(states)
        for kind, (scale, names) in _KINDS.items():
            rows = torch.cat([motions[name] for name in names])
            self._add_motions(kind, rows, scale if trajectory.index % 2 == 0 else None)
        norms = motions["norm"]
        inverse = 1 / norms.clamp_min(torch.finfo(states.dtype).tiny)
        self._add("tokens", torch.tensor(states.shape[1]))
        self._add("directed", (norms > 0).sum(-1))
        self._add("directions", (inverse.unsqueeze(1) @ states).squeeze(1))
        if trajectory.index % self.every == 0 and states.shape[2] <= 2048:
            self._add_covariance(states, _sinks(norms))
        if trajectory.index % (2 * self.every) == 0:
            self._add_clouds(states)

    def _add_motions(self, kind: str, values: Float[Tensor, "rows tokens"], spread: Scale | None) -> None:
        """Add all quantities of a kind at once, one under the other: calls cost more than sums."""
        known = values.isfinite()
        kept = values.double().where(known, 0.0)
        self._add(f"{kind}.seen", known.sum(-1))
        self._add(f"{kind}.sum", kept.sum(-1))
        self._add(f"{kind}.squares", kept.square().sum(-1))
        if spread is None:
            return
        self._add(f"{kind}.histogram", spread.count(values))
        places = torch.arange(values.shape[1])
        bins = torch.where(places > 0, places.clamp_min(1).log2().floor().long() + 1, 0)
        empty = torch.zeros(len(values), 22, dtype=torch.float64)  # room for texts of a million tokens
        self._add(f"{kind}.places", empty.index_add(1, bins, kept.cpu()))
        self._add(f"{kind}.places_seen", empty.index_add(1, bins, known.double().cpu()))

    def _add_covariance(self, states: Float[Tensor, "depth tokens hidden"], sinks: Bool[Tensor, " tokens"]) -> None:
        for name, cloud in (("cloud", states), ("sinks", states[:, sinks])):
            self._add(f"{name}.count", torch.tensor(cloud.shape[1]))
            self._add(f"{name}.first", cloud.double().sum(1))
            self._add(f"{name}.second", cloud.mT @ cloud)

    def _add_clouds(self, states: Float[Tensor, "depth tokens hidden"]) -> None:
        states = states[:, evenly_spaced(states.shape[1], _MOST)]
        there = (states != 0).any(-1).any(-1)  # a loop may begin with zeros alone, which are no cloud
        states = states[:, _directed(states[there])]
        if states.shape[1] < 2:
            return
        states, depth = states[there], len(states)

        def placed(values: Tensor) -> Tensor:
            """Not a number where there is no cloud."""
            if bool(there.all()):
                return values
            whole = torch.full((*values.shape[:-1], depth), torch.nan, dtype=torch.float64)
            whole[..., there.cpu()] = values.double().cpu()
            return whole

        self._add("texts", torch.tensor(1))
        cosines = observables.cosines(states.double())
        adjacent = observables.adjacency(cosines, self.tau)
        self._add("clusters.components", placed(observables.component_count(adjacent)))
        self._add("clusters.rank", placed(observables.adjacency_rank(adjacent)))
        self._add("clusters.share", placed(observables.adjacent_share(adjacent)))
        energies = [observables.log_energy_of_pairs(cosines, beta).exp() for beta in self.betas]
        self._add("energy", placed(torch.stack(energies)))
        self._add("rank_collapse", placed(rank_collapse(states)))

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """See :meth:`Measure.results`."""
        found: dict[str, Tensor] = {}
        for kind, (scale, names) in _KINDS.items():
            found |= self._motions(kind, scale, names)
        tokens = self.sums["directed"].double()
        pairs = (tokens * (tokens - 1)).clamp_min(1)
        cosines = (self.sums["directions"].square().sum(-1) - tokens) / pairs
        found["anisotropy"] = cosines.masked_fill(tokens == 0, torch.nan)
        if "cloud.count" in self.sums:
            found |= self._ranks()
        if "texts" in self.sums:
            texts = self.sums["texts"].double()
            for name in ("clusters.components", "clusters.rank", "clusters.share", "energy", "rank_collapse"):
                found[name] = self.sums[name].double() / texts
            found["energy.betas"] = torch.tensor(self.betas, dtype=torch.float64)
        return found

    def _motions(self, kind: str, scale: Scale, names: tuple[str, ...]) -> dict[str, Tensor]:
        seen = self.sums[f"{kind}.seen"].double()
        mean = self.sums[f"{kind}.sum"] / seen
        variance = (self.sums[f"{kind}.squares"] / seen - mean.square()).clamp_min(0)
        whole = {"mean": mean, "std": variance.sqrt()}
        if f"{kind}.histogram" in self.sums:
            places_seen = self.sums[f"{kind}.places_seen"]
            used = int(places_seen.sum(0).nonzero().max()) + 1 if bool(places_seen.any()) else 1
            whole |= scale.named_quantiles(self.sums[f"{kind}.histogram"])
            whole["position"] = (self.sums[f"{kind}.places"] / places_seen)[:, :used]
        lengths = [len(self.sums["directed"]) - ORDERS[name] for name in names]
        return {
            f"{name}.{label}": rows
            for label, values in whole.items()
            for name, rows in zip(names, values.split(lengths), strict=True)
        }

    def _ranks(self) -> dict[str, Tensor]:
        found = {}
        sums = {part: {key: self.sums[f"{part}.{key}"] for key in ("count", "first", "second")} for part in _PARTS}
        without = {key: sums["cloud"][key] - sums["sinks"][key] for key in sums["cloud"]}
        for suffix, own in (("", sums["cloud"]), (".without_sinks", without)):
            count = own["count"].double()
            if count < 2:
                continue
            mean = own["first"] / count
            covariance = own["second"] / count - mean[:, :, None] * mean[:, None, :]
            shares = torch.linalg.eigvalsh(covariance).clamp_min(0)
            shares = shares / shares.sum(-1, keepdim=True)
            found[f"effective_rank{suffix}"] = torch.special.entr(shares).sum(-1).exp()
            found[f"participation_ratio{suffix}"] = 1 / shares.square().sum(-1)
        return found


_PARTS = ("cloud", "sinks")


def rank_collapse(states: Float[Tensor, "*batch tokens hidden"]) -> Float[Tensor, "*batch"]:
    """How far a text is from one vector repeated: sqrt(‖R‖_1 ‖R‖_inf) / sqrt(‖X‖_1 ‖X‖_inf), R = X - 1 x̄ᵀ.

    0 where all tokens coincide. ‖.‖_1 and ‖.‖_inf are the largest column and row sums of absolute values; the mean
    takes the place of the minimising vector, for which these norms have no closed form.

    Paper:
        Dong, Cordonnier, Loukas 2021, "Attention is not all you need", whose residual this is.
    """

    def size(matrix: Tensor) -> Tensor:
        rows = matrix.abs()
        return (rows.sum(-1).amax(-1) * rows.sum(-2).amax(-1)).sqrt()

    return size(states - states.mean(-2, keepdim=True)) / size(states)


def _sinks(norms: Float[Tensor, "depth tokens"]) -> Bool[Tensor, " tokens"]:
    """The first token, and those whose norm somewhere exceeds ten medians."""
    sinks = (norms > _MASSIVE * norms.median(-1, keepdim=True).values).any(0)
    sinks[0] = True
    return sinks


def _directed(states: Float[Tensor, "depth tokens hidden"]) -> Bool[Tensor, " tokens"]:
    """Tokens that are nowhere the zero vector, which has no direction."""
    return (states != 0).any(-1).all(0)
