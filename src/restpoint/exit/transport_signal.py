"""A signal that weighs a change of token by how far apart the tokens are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.predictors import IdentityPredictor
from restpoint.errors import RestpointError
from restpoint.exit.signals import Signal, unknown
from restpoint.exit.view import View
from restpoint.transport.tokens import top_transport


@dataclass(frozen=True)
class TransportCost(Signal):
    """1 / (1 + W1(p_l, p')): what it costs to carry the law that is read into the one that is predicted.

    p_l is the readout's law and p' that of `second_law`, each on its ``support`` most probable tokens and scaled to sum
    to one; moving mass from token i to j costs the distance of their unembeddings. Unlike `Disagreement` it forgives
    two laws that differ in near synonyms. It takes one small linear programme for each token, exactly solved.

    Raises:
        RestpointError: the support is below 1, or the model's unembedding cannot be read.

    Paper:
        Villani 2009, "Optimal Transport: Old and New".
    """

    kind: ClassVar[str] = "transport"
    papers: ClassVar[tuple[str, ...]] = ("Villani 2009, Optimal Transport: Old and New",)

    support: int = 8
    """Tokens of each law that are looked at."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.support < 1:
            raise RestpointError(f"support is {self.support}; keep at least one token")

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        other = second_law(view)
        if other is None:
            return unknown(view)
        unembedding = view.readout.layered.head.unembedding
        weight = getattr(unembedding, "weight", None)
        if not isinstance(weight, Tensor):
            raise RestpointError("signal: this model has no unembedding to measure distances by; take another signal")
        if view.readout.vocabulary is not None:
            weight = weight[view.readout.vocabulary]
        return 1 / (1 + top_transport(view.log_law, other, weight, self.support).float())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Signal.state`."""
        return {"kind": self.kind, "support": self.support}, {}

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "TransportCost":
        """From what `state` gave."""
        return cls(config["support"])


def second_law(view: View) -> Float[Tensor, "rows vocab"] | None:
    """The logarithm of another law of the same token, to hold against the readout's.

    It is the logit lens's at this layer, which costs the model's head once more; where the readout is the lens itself,
    the readout's at the candidate layer before. None where that is missing too.
    """
    if not isinstance(view.readout.predictor(view.layer), IdentityPredictor):
        return view.readout.logits(view.state).log_softmax(-1)
    return None if view.earlier is None else view.earlier.log_law
