"""Coming to rest in meaning: the cost of carrying one next-token law into the one after it."""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.exits import Below, Iterate, Memory
from restpoint.equilibrium.solvers.method import require
from restpoint.transport.tokens import top_transport


@dataclass(frozen=True, kw_only=True, eq=False)
class TransportStep(Below):
    """W1(p_{k-1}, p_k) < threshold: moving mass from token i to j costs |e_i - e_j|, in units of the embeddings.

    Each law is cut down to its ``support`` most probable tokens and scaled to sum to one; the cost between these is
    exact, that between the whole laws may be more or less. Unlike `Divergence` it forgives a law that still moves
    between near synonyms. One linear programme a row and step, on the CPU, besides what logits cost: where steps are
    cheap it costs more than it saves. The earliest stop is at step 2.

    Raises:
        RestpointError: the threshold is negative, or the support below 1.

    Paper:
        Villani 2009, "Optimal Transport: Old and New".
    """

    papers: ClassVar[tuple[str, ...]] = ("Villani 2009, Optimal Transport: Old and New",)

    embeddings: Float[Tensor, "vocabulary dim"] = field(repr=False)
    """One row for each token, of the embedding or the unembedding."""
    support: int = 8
    """Tokens of each law that are looked at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("support", self.support, self.support >= 1, "at least 1: tokens of each law")

    def measure(self, memory: Memory, iterate: Iterate) -> Float[Tensor, " rows"] | None:
        log_law = iterate.logits().float().log_softmax(-1)
        before, memory.last = memory.last, log_law
        return None if before is None else top_transport(before, log_law, self.embeddings, self.support).float()
