"""At which layer to exit for drafts and how many tokens to draft, chosen from what each layer would have drafted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True)
class ExitCosts:
    """What drafting costs, in any one unit.

    Attributes:
        draft: for every exit layer, drafting one token: its layers, predictor and head.
        verify: verifying (exit layer, number of drafted tokens), with the pending one; 0 drafted is a plain pass.
    """

    draft: Mapping[int, float]
    verify: Callable[[int, int], float]


@dataclass(frozen=True)
class ExitChoice:
    """How exit layers are compared. What was seen of them is kept in an :class:`ExitRecord`.

    Attributes:
        layers: the exit layers to choose from.
        longest: the most tokens to draft.
        least: the fewest tokens to draft; 1 where something else decides whether to draft at all.
        decay: weight of each verified position compared to the next one; 0.95 remembers about 20 of them.
        prior: acceptance that each layer is first taken to have.
        prior_weight: number of positions that this counts for; it fades as others come.

    Raises:
        RestpointError: a value is out of range.
    """

    layers: tuple[int, ...]
    longest: int = 8
    least: int = 0
    decay: float = 0.95
    prior: float = 0.5
    prior_weight: float = 2.0

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise RestpointError(f"layers={self.layers}: name at least one exit layer, each once, from 0")
        if self.longest < 1:
            raise RestpointError(f"longest={self.longest} drafts nothing; give at least 1")
        if not 0 <= self.least <= self.longest:
            raise RestpointError(f"least={self.least} must be between 0 and longest={self.longest}")
        if not 0 < self.decay <= 1:
            raise RestpointError(f"decay={self.decay} must be above 0 and at most 1")
        if not 0 <= self.prior <= 1 or self.prior_weight <= 0:
            raise RestpointError(
                f"prior={self.prior}, prior_weight={self.prior_weight}: give a rate in [0, 1] and a positive weight"
            )

    def init(self) -> "ExitRecord":
        """A record in which nothing has been seen."""
        return ExitRecord(
            self,
            hits=dict.fromkeys(self.layers, self.prior * self.prior_weight),
            weights=dict.fromkeys(self.layers, self.prior_weight),
        )


@dataclass
class ExitRecord:
    """Decayed acceptance of every exit layer, and the choice that follows from it.

    With a_E = (decayed hits) / (decayed positions), tokens for the cost of a round are::

        TPL(E, d) = (1 + sum_{i=1..d} a_E^i) / (d c_draft(E) + c_verify(E, d))

    and the layer and length with the most are chosen; d = 0 is plain decoding. Hits are *shadow* hits: after a
    verification the states of every layer are there at every verified position, so it can be seen what each layer would
    have drafted, not only the one that did (:func:`shadow_hits`).

    When to use: the best layer differs between texts, and states of the layers can be kept while verifying. When not:
    confidences tell tokens apart within a round; then choose the layer here, and when to stop by :class:`StopThreshold`
    or a calibrated rule.

    Attributes:
        choice: how layers are compared.
        hits: for each layer, the decayed number of positions at which it was right.
        weights: for each layer, the decayed number of positions.

    Paper:
        Entezari Zarch et al. 2025, "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding".
    """

    choice: ExitChoice
    hits: dict[int, float]
    weights: dict[int, float]

    def observe(self, hits: Mapping[int, Sequence[bool]]) -> None:
        """Take in what a verification showed.

        Args:
            hits: for some or all layers, whether each would have drafted the token that stood, oldest position first.

        Raises:
            RestpointError: a layer is not among those to choose from.
        """
        decay = self.choice.decay
        for layer, seen in hits.items():
            if layer not in self.hits:
                raise RestpointError(f"hits: layer {layer} is not one of {self.choice.layers}; add it to layers")
            for hit in seen:
                self.hits[layer] = decay * self.hits[layer] + hit
                self.weights[layer] = decay * self.weights[layer] + 1

    def acceptance(self, layer: int) -> float:
        """The share of drafts of a layer that stand, as far as has been seen."""
        return self.hits[layer] / self.weights[layer]

    def tokens(self, layer: int, drafted: int) -> float:
        """Expected tokens of a round, 1 + sum_i a^i."""
        rate = self.acceptance(layer)
        return sum(rate**depth for depth in range(drafted + 1))

    def choose(self, costs: ExitCosts) -> tuple[int, int]:
        """The exit layer and the number of tokens to draft with the most tokens for the cost.

        Of equal choices the shorter draft is taken, then the layer named first. With 0 tokens the layer does not count.
        """
        best, most = (self.choice.layers[0], 0), 0.0
        if self.choice.least == 0:
            most = 1 / costs.verify(*best)
        for drafted in range(max(1, self.choice.least), self.choice.longest + 1):
            for layer in self.choice.layers:
                cost = drafted * costs.draft[layer] + costs.verify(layer, drafted)
                if self.tokens(layer, drafted) / cost > most:
                    best, most = (layer, drafted), self.tokens(layer, drafted) / cost
        return best


def shadow_hits(
    states: Mapping[int, Float[Tensor, "1 positions hidden"]],
    chosen: Sequence[int],
    logits: Callable[[int, Float[Tensor, "1 positions hidden"]], Float[Tensor, "1 positions vocab"]],
    named: int = 1,
) -> dict[int, list[bool]]:
    """For every exit layer, whether its own draft would have been, or have held, the token that stood.

    Args:
        states: for every exit layer, its input states at the verified positions: the pending token and the nodes that
            stood.
        chosen: the token that stood after each.
        logits: what an exit layer makes of its states: a predictor and the head, or the head alone (logit lens).
        named: tokens that are drafted after each: 1 for a chain, several for a tree.
    """
    stood = torch.tensor(list(chosen))[:, None]
    drafted = {layer: logits(layer, kept)[0].topk(named).indices.cpu() for layer, kept in states.items()}
    return {layer: (tokens == stood).any(1).tolist() for layer, tokens in drafted.items()}


@dataclass
class StopThreshold:
    """The confidence below which drafting stops: midway between those of drafts that stood and of those that fell.

    A second early exit: beside the layers after the exit layer, tokens after an unsure one are saved. It moves with the
    text, as both means are decayed. Where tokens are drawn at random, the confidence must be one of the law (its
    largest probability), not of the token drawn: whether a token is proposed may not depend on its value.

    Attributes:
        stood: decayed mean confidence of accepted drafts.
        fell: decayed mean confidence of rejected drafts.
        decay: weight of what was seen before, at each further draft.

    Paper:
        Liu et al. 2024, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (a fixed threshold);
        Entezari Zarch et al. 2025, "DEL" (the moving one).
    """

    stood: float = 0.9
    fell: float = 0.3
    decay: float = 0.95

    @property
    def value(self) -> float:
        """The threshold."""
        return (self.stood + self.fell) / 2

    def stops(self, confidence: float) -> bool:
        """Whether a draft this sure should be the last to be considered, and not be proposed."""
        return confidence < self.value

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """Take in a drafted chain, of which the first ``accepted`` tokens stood and the next fell, if there is one."""
        for confidence in confidences[:accepted]:
            self.stood = self.decay * self.stood + (1 - self.decay) * confidence
        for confidence in confidences[accepted : accepted + 1]:
            self.fell = self.decay * self.fell + (1 - self.decay) * confidence
