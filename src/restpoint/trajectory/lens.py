"""What states would say if they were the last: entropy of their law, and its distance from the model's own."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure, Readout, Trajectory
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.transport.variation import total_variation

Predict = Callable[[int, Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens hidden"] | None]
"""The rest state that a lens expects after the state of a layer, or None where it has no map for that layer."""


class Lens(Measure):
    """The law p_l that every layer's state would give, against the last layer's p_L.

    Results for each lens, one value a state h_0 .. h_L (NaN where it has no map): ``.entropy`` of p_l and ``.kl``
    KL(p_L ‖ p_l), in nats; ``.tv``, total variation; ``.agreement``, how often both have the same most probable token.
    The lens ``logit`` takes the state as it is, or, of a block that is iterated, as the model itself would read it,
    were it the last iterate.

    Only one layer's laws of the sampled tokens of one text exist at a time.

    Args:
        readout: final norm and unembedding.
        lenses: further ones by name.
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

    def __init__(self, readout: Readout, lenses: Mapping[str, Predict] | None = None, every: int = 4, tokens: int = 64):
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
        places = evenly_spaced(trajectory.states.shape[1], self.tokens)
        states, read = trajectory.states[:, places], trajectory.read[:, places]
        last = self.readout(read[-1]).float().log_softmax(-1)
        law, best = last.exp(), last.argmax(-1)
        depth = len(states)
        lenses: dict[str, Predict] = {"logit": lambda layer, _states: read[layer], **self.lenses}
        for name, predict in lenses.items():
            found = torch.zeros(5, depth, dtype=torch.float64)
            for layer, own in enumerate(states):
                rest = own if layer == depth - 1 else predict(layer, own)
                if rest is None:
                    continue
                logs = last if layer == depth - 1 else self.readout(rest).float().log_softmax(-1)
                here = logs.exp()
                found[0, layer] = len(own)
                found[1, layer] = torch.special.entr(here).sum()
                found[2, layer] = (law * (last - logs)).nan_to_num(0.0, posinf=torch.inf).sum()
                found[3, layer] = total_variation(law, here).sum()
                found[4, layer] = (logs.argmax(-1) == best).sum()
            self._add(name, found)

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """See :meth:`Measure.results`."""
        found: dict[str, Tensor] = {}
        for name, (seen, entropy, divergence, variation, agreement) in self.sums.items():
            found[f"{name}.entropy"] = entropy / seen
            found[f"{name}.kl"] = divergence / seen
            found[f"{name}.tv"] = variation / seen
            found[f"{name}.agreement"] = agreement / seen
        return found
