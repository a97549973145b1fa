"""What states would say if they were the last: entropy of their law, and its distance from the model's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.tensors import content_hash
from restpoint.trajectory.measure import Measure, Readout, Trajectory
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.transport.variation import total_variation


@dataclass(frozen=True)
class FittedLens:
    """What predictors of one kind expect the rest state to be.

    Attributes:
        predictors: by the layer whose law they give; they may read layers before it, and the token before.
    """

    predictors: Mapping[int, Predictor]

    def __call__(
        self, layer: int, states: Float[Tensor, "depth tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """The rest state of every token; None without a predictor, NaN where it reads a token that is not there."""
        predictor = self.predictors.get(layer)
        if predictor is None:
            return None
        previous = torch.full_like(states[-1], torch.nan)
        previous[1:] = states[-1, :-1]
        return predictor.predict([states[own] for own in predictor.state_layers], previous)

    def to(self, device: torch.device | str) -> "FittedLens":
        """A copy there, in float32 as trajectories are."""
        return FittedLens({layer: own.to(device, torch.float32) for layer, own in self.predictors.items()})

    @property
    def hash(self) -> str:
        """SHA-256 of all that is fitted."""
        return content_hash(
            {
                f"{layer}/{predictor.name}/{name}": value
                for layer, predictor in self.predictors.items()
                for name, value in predictor.state()[1].items()
            }
        )


class Lens(Measure):
    """The law p_l that every layer's state would give, against the last layer's p_L.

    Results for each lens, one value a state h_0 .. h_L (NaN where it has no predictor): ``.entropy`` of p_l and
    ``.kl`` KL(p_L ‖ p_l), in nats; ``.tv``, total variation; ``.agreement``, how often both have the same most probable
    token. The lens ``logit`` takes the state as it is, or, of a block that is iterated, as the model itself would read
    it, were it the last iterate.

    Only one layer's laws of the sampled tokens of one text exist at a time.

    Args:
        readout: final norm and unembedding.
        lenses: of fitted predictors, by name.
        every: one text of so many is looked at.
        tokens: at most so many of its tokens, evenly spaced.

    Raises:
        RestpointError: a lens takes the name ``logit``.

    Paper:
        nostalgebraist 2020, "Interpreting GPT: the logit lens"; Belrose et al. 2023, "Eliciting latent predictions from
        transformers with the tuned lens".
    """

    name: ClassVar[str] = "lens"
    papers: ClassVar[tuple[str, ...]] = (
        "nostalgebraist 2020, Interpreting GPT: the logit lens",
        "Belrose et al. 2023, Eliciting latent predictions from transformers with the tuned lens",
    )

    def __init__(
        self, readout: Readout, lenses: Mapping[str, FittedLens] | None = None, every: int = 4, tokens: int = 64
    ):
        super().__init__()
        if lenses and "logit" in lenses:
            raise RestpointError("lenses: logit is the lens of states as they are; give the other one another name")
        self.readout = readout
        self.lenses = dict(lenses or {})
        self.every = every
        self.tokens = tokens

    @torch.inference_mode()
    def add(self, trajectory: Trajectory) -> None:
        """See :meth:`Measure.add`."""
        if trajectory.index % self.every:
            return
        states, depth = trajectory.states, len(trajectory.states)
        places = evenly_spaced(states.shape[1], self.tokens)
        read = trajectory.read[:, places]
        last = self.readout(read[-1]).float().log_softmax(-1)
        self._add("logit", torch.stack([self._held(rest, last) for rest in read], 1))
        for name, lens in self.lenses.items():
            found = torch.zeros(5, depth, dtype=torch.float64)
            for layer in range(depth):
                rest = lens(layer, states)
                if rest is not None:
                    found[:, layer] = self._held(rest[places], last)
            self._add(name, found)

    def _held(self, rest: Float[Tensor, "tokens hidden"], last: Float[Tensor, "tokens vocabulary"]) -> Tensor:
        """Sums over the tokens that a lens speaks of: their number, and what their laws are beside the model's."""
        known = rest.isfinite().all(-1)
        logs, last = self.readout(rest[known]).float().log_softmax(-1), last[known]
        here, law = logs.exp(), last.exp()
        return torch.stack(
            [
                known.sum().double().cpu(),
                torch.special.entr(here).sum().double().cpu(),
                (law * (last - logs)).nan_to_num(0.0, posinf=torch.inf).sum().double().cpu(),
                total_variation(law, here).sum().double().cpu(),
                (logs.argmax(-1) == last.argmax(-1)).sum().double().cpu(),
            ]
        )

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """See :meth:`Measure.results`."""
        found: dict[str, Tensor] = {}
        for name, (seen, entropy, divergence, variation, agreement) in self.sums.items():
            found[f"{name}.entropy"] = entropy / seen
            found[f"{name}.kl"] = divergence / seen
            found[f"{name}.tv"] = variation / seen
            found[f"{name}.agreement"] = agreement / seen
        return found
