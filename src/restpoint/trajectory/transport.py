"""How far the cloud of a text's tokens still has to travel at each layer."""

from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure, Trajectory
from restpoint.trajectory.observables import directions
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.transport.divergence import sinkhorn_within, squared_distances
from restpoint.transport.gaussian import Gaussian, wasserstein2_squared, wasserstein2_squared_samples
from restpoint.transport.sinkhorn import sinkhorn
from restpoint.transport.sliced import between_quantiles, quantiles, random_projections

_FLAT = 0.05
_TOLERANCE = 1e-4  # of marginals; the entropic value is off by its square


class Transport(Measure):
    """Optimal transport from each layer's cloud to the final one, W2(X_l, X_L), and between neighbours.

    The cloud X_l is the states h_l(t) of one text's tokens, each of the same weight. Three distances are taken, all as
    square roots, in units of the states: "gaussian", between the normal laws of the clouds' moments, which is at most
    W2; "sliced", over random lines; and, where asked for, "sinkhorn", the square root of the debiased entropic cost.
    Each for the states as they are ("raw") and for states divided by their norms ("unit"). A token whose state is zero
    somewhere has no direction there and is left out.

    Results are named ``{raw, unit}.{gaussian, sliced, sinkhorn}.`` and

    * ``to_final`` (depth): mean over texts of W2(X_l, X_L); zero at the last layer.
    * ``between`` (depth - 1): mean of W2(X_l, X_{l+1}). These add up to at least ``to_final`` of layer 0, and to just
      that if the cloud travels straight.
    * ``to_final.relative``, ``between.relative``: the same, each text's divided by the spread of its final cloud, the
      square root of the trace of its covariance; so 1 is as far as tokens typically lie from their own centre. A text
      whose final cloud is a point counts as 0.
    * each of the four with ``.std``, the standard deviation over texts.
    * ``flat_from``: where the profile of transport has flattened, the first layer from which on the mean of
      ``to_final.relative`` stays below 5 % of its value at h_0. The last layer, where it is 0, if none before it is.
    * ``unconverged``, for "sinkhorn" alone: problems that ran out of iterations.

    ``texts`` is how many were measured. Clouds of fewer tokens than dimensions lie in a subspace: values of texts of
    different lengths are not quite comparable, least of all the relative ones.

    Args:
        every: texts whose index is a multiple of this are measured.
        tokens: at most so many evenly spaced tokens of a text.
        projections: random lines.
        regularisation: of "sinkhorn", as a share of the mean squared distance within the final cloud; None leaves it
            out, since it costs far more than the others.
        iterations: of each Sinkhorn problem at most.
        seed: of the lines, which depend on it and on the states' size only: texts, layers and models of one size are
            compared along the same ones.

    Raises:
        RestpointError: a number is out of range, or a state is not finite.

    Paper:
        Dowson, Landau 1982; Rabin et al. 2011; Feydy et al. 2019.
    """

    name: ClassVar[str] = "transport"
    papers: ClassVar[tuple[str, ...]] = (
        "Dowson, Landau 1982, The Frechet distance between multivariate normal distributions",
        "Rabin, Peyre, Delon, Bernot 2011, Wasserstein barycenter and its application to texture mixing",
        "Feydy et al. 2019, Interpolating between optimal transport and MMD using Sinkhorn divergences",
    )

    def __init__(
        self,
        every: int = 4,
        tokens: int = 128,
        projections: int = 64,
        regularisation: float | None = None,
        iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("every", every, 1),
            ("tokens", tokens, 2),
            ("projections", projections, 1),
            ("iterations", iterations, 1),
        ):
            if value < least:
                raise RestpointError(f"{argument} is {value}; give at least {least}")
        if regularisation is not None and not regularisation > 0:
            raise RestpointError(f"regularisation is {regularisation}; give a positive share such as 0.05, or None")
        self.every = every
        self.tokens = tokens
        self.projections = projections
        self.regularisation = regularisation
        self.iterations = iterations
        self.seed = seed

    @torch.no_grad()
    def add(self, trajectory: Trajectory) -> None:
        if trajectory.index % self.every:
            return
        states = trajectory.states
        states = states[:, evenly_spaced(states.shape[1], self.tokens).to(states.device)].double()
        if not bool(states.isfinite().all()):
            raise RestpointError(f"states: those of text {trajectory.index} are not all finite; leave the text out")
        pointing = (states != 0).any(-1)
        pointed = states[:, pointing[pointing.any(-1)].all(0)]
        if pointed.shape[1] < 2:
            return
        self._add("texts", torch.ones((), dtype=torch.int64))
        for kind, clouds in (("raw", states), ("unit", _units(pointed))):
            final = clouds[-1]
            spread = (final - final.mean(0)).square().sum(-1).mean().sqrt()
            for distance, (to_final, between) in self._distances(kind, clouds, spread).items():
                for what, values in (("to_final", to_final), ("between", between)):
                    relative = torch.where(spread > 0, values / spread, 0.0)
                    for name, each in ((what, values), (f"{what}.relative", relative)):
                        self._add(f"{kind}.{distance}.{name}", each)
                        self._add(f"{kind}.{distance}.{name}.squares", each.square())

    def _distances(self, kind: str, clouds: Tensor, spread: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = {"gaussian": _gaussian(clouds), "sliced": self._sliced(clouds)}
        if self.regularisation is not None:
            found["sinkhorn"] = self._sinkhorn(kind, clouds, spread, self.regularisation)
        return {
            name: (torch.cat([to_final, to_final.new_zeros(1)]).clamp_min(0).sqrt(), between.clamp_min(0).sqrt())
            for name, (to_final, between) in found.items()
        }

    def _sliced(self, clouds: Tensor) -> tuple[Tensor, Tensor]:
        dim = clouds.shape[-1]
        lines = random_projections(dim, self.projections, torch.Generator().manual_seed(self.seed))
        along = quantiles(clouds, lines)
        return between_quantiles(along[:-1], along[-1:]), between_quantiles(along[:-1], along[1:])

    def _sinkhorn(self, kind: str, clouds: Tensor, spread: Tensor, share: float) -> tuple[Tensor, Tensor]:
        # The mean squared distance of two points of a cloud is twice its squared spread.
        strength = 2 * share * float(spread) ** 2
        self._add(f"{kind}.sinkhorn.unconverged", torch.zeros((), dtype=torch.int64))
        if not strength > 0:
            nothing = clouds.new_zeros(len(clouds) - 1)
            return nothing, nothing
        # Not `sinkhorn_divergence` of the pairs: each cloud's transport to itself is needed once, not in every pair.
        source, target = _pairs(clouds)
        limits = {"max_iterations": self.iterations, "tolerance": _TOLERANCE}
        within = sinkhorn_within(squared_distances(clouds, clouds), strength, **limits)
        between = sinkhorn(squared_distances(source, target), strength, **limits)
        self._add(f"{kind}.sinkhorn.unconverged", (~torch.cat([within.converged, between.converged])).sum())
        first, second = _pairs(within.entropic_value)
        return _parted(between.entropic_value - (first + second) / 2)

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        if not self.sums:
            return {"texts": torch.zeros((), dtype=torch.float64)}
        texts = self.sums["texts"].double()
        found: dict[str, Tensor] = {"texts": texts}
        for name, total in self.sums.items():
            if name.endswith("unconverged"):
                found[name] = total.double()
            elif f"{name}.squares" in self.sums:
                mean, square = total / texts, self.sums[f"{name}.squares"] / texts
                variance = square - mean.square()
                # What is left of equal values is rounding, which a square root would make large.
                found[name] = mean
                found[f"{name}.std"] = torch.where(variance > 1e-14 * square, variance, 0.0).sqrt()
                if name.endswith("to_final.relative"):
                    found[name.replace("to_final.relative", "flat_from")] = _flat_from(mean)
        return found


def _units(states: Float[Tensor, "depth tokens dim"]) -> Float[Tensor, "depth tokens dim"]:
    """Directions; a cloud of zeros alone, which a loop may begin with, stays where it is."""
    there = (states != 0).any(-1).any(-1)
    units = torch.zeros_like(states)
    units[there] = directions(states[there])
    return units


def _gaussian(clouds: Tensor) -> tuple[Tensor, Tensor]:
    if clouds.shape[1] < clouds.shape[2]:
        return _parted(wasserstein2_squared_samples(*_pairs(clouds)))
    moments = Gaussian.from_samples(clouds)
    (mean_a, mean_b), (covariance_a, covariance_b) = _pairs(moments.mean), _pairs(moments.covariance)
    return _parted(wasserstein2_squared(Gaussian(mean_a, covariance_a), Gaussian(mean_b, covariance_b)))


def _pairs(along: Tensor) -> tuple[Tensor, Tensor]:
    """Everything that is compared, in one batch: h_0 .. h_{L-1} with h_L, then h_0 .. h_{L-2} with their neighbours."""
    final = along[-1:].expand(len(along) - 1, *along.shape[1:])
    return torch.cat([along[:-1], along[:-2]]), torch.cat([final, along[1:-1]])


def _parted(values: Tensor) -> tuple[Tensor, Tensor]:
    layers = (len(values) + 1) // 2
    return values[:layers], torch.cat([values[layers:], values[layers - 1 : layers]])


def _flat_from(profile: Float64[Tensor, " depth"]) -> Float64[Tensor, ""]:
    """The first layer from which on the profile stays below 5 % of its value at layer 0."""
    above = (profile >= _FLAT * profile[0]) & (profile > 0)
    layers = torch.arange(1, len(profile) + 1)
    return torch.where(above, layers, 0).amax().double()
