"""Drafts from the target's own first layers; from which of them, and how far, is chosen anew in every round."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.costs import Costs
from restpoint.decode.draft import SteppedDrafter, TokenPath, Verified
from restpoint.decode.drafters.exit import DraftHead, ExitDrafter
from restpoint.decode.drafters.exit_choice import ExitChoice, ExitCosts, StopThreshold, shadow_hits
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError


class DynamicExitDrafter(SteppedDrafter):
    """Holds several predictors of one model and drafts with the one that would have been worth most lately.

    With E(n) the exit layer of predictor n and a_n the decayed share of verified tokens that it would have drafted::

        (n, d) = argmax (1 + a_n + .. + a_n^d) / (d c_draft(n) + c_verify(E(n), d))

    is drafted with for at most d levels; d = 0 drafts nothing (see ``least``). All a_n are learnt in every round,
    whoever drafted: every kept token has passed by all layers, so each predictor is asked what it would have drafted
    along them (:func:`shadow_states`), for the cost of a head over (predictors x kept tokens) rows a round. Within a
    round, drafting also stops after a law whose largest probability is below a threshold that moves with the text. The
    caller makes :meth:`on_kept` the target's watcher.

    When to use: texts of changing kind on a deep model, whose layers saturate at different depths. When not: one
    predictor is best everywhere, as where a predictor that runs no layer is nearly as good as the others; naming it
    saves the shadow drafts. Costs are the caller's: a wrong one makes a wrong choice, never a wrong token.

    Args:
        target: the model that verifies; its cache is shared, and one predictor writes to it in a round.
        predictors: to choose from, with names of their own; of equal worth the one named first is taken.
        costs: gives the measured costs with one entry of ``draft`` for every predictor; asked when a text begins.
        vocabulary: tokens that may be drafted; None for all.
        trees: whether the target can verify trees.
        name: what tables call it.
        named: tokens that are named after each node. A predictor counts as right where the token that came is among
            them, and a level as so many tokens to verify: 1 for chains, which is the paper's rule.
        least: the fewest levels to choose; 1 leaves it to the caller's costs, which know single tokens' confidences,
            whether to draft at all.
        longest: the most levels to draft.
        decay: weight of each verified position, and of each confidence, compared to the next one.

    Attributes:
        ways: one drafter for each predictor.
        record: what was seen of them in this text.
        threshold: the confidence below which drafting stops.

    Raises:
        RestpointError: there are fewer than two predictors, two have one name, a number is out of range, or as for
            :class:`ExitDrafter`.

    Paper:
        Entezari Zarch et al. 2025, "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding";
        Liu et al. 2024, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting", for the second exit.
    """

    def __init__(
        self,
        target: LayeredTarget,
        predictors: Sequence[Predictor],
        costs: Callable[[], Costs],
        vocabulary: Tensor | None = None,
        *,
        trees: bool = True,
        name: str = "dynamic-exit",
        named: int = 1,
        least: int = 0,
        longest: int = 8,
        decay: float = 0.95,
    ):
        names = [predictor.name for predictor in predictors]
        if len(names) < 2 or len(set(names)) < len(names):
            raise RestpointError(f"predictors: {names} leave no choice; give at least two, each with a name of its own")
        if not 1 <= named <= target.layered.vocabulary_size:
            raise RestpointError(f"named={named}: give the number of tokens named after each node, at least 1")
        self.name = name
        self._named = named
        self.trees = trees
        self.layered = target.layered
        self._head = DraftHead(target.layered, vocabulary)
        self.ways = tuple(ExitDrafter(target, one, trees=trees, head=self._head) for one in predictors)
        self._levels = sorted({layer for one in predictors for layer in one.state_layers})
        for way in self.ways:
            way.walk.read([layer for layer in self._levels if layer <= way.predictor.exit_layer])
        self._choice = ExitChoice(tuple(range(len(names))), longest=longest, least=least, decay=decay)
        self._measured = costs
        self._costs: ExitCosts | None = None
        self._chosen = 0, longest
        self._forget()

    @property
    def in_use(self) -> ExitDrafter:
        """The drafter of this round, or of the next one between rounds."""
        return self.ways[self._chosen[0]]

    @property
    def length(self) -> int:
        """The most levels that it drafts in this round; 0 for none."""
        return self._chosen[1]

    @property
    def cost_name(self) -> str:
        """See :attr:`SteppedDrafter.cost_name`."""
        return self.in_use.name

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Drafter.begin`: nothing is known of a new text."""
        self._forget()
        self._costs = self._exit_costs(self._measured())
        self._chosen = self.record.choose(self._costs)

    def goes_on(self, levels: int) -> bool:
        """See :meth:`SteppedDrafter.goes_on`: not beyond the chosen length, nor after laws that are all unsure."""
        return levels < self.length and not (levels > 0 and self.threshold.stops(self._surest))

    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """See :meth:`SteppedDrafter.start`."""
        self._laws = []
        return self._seen(self.in_use.start(path))

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """See :meth:`SteppedDrafter.extend`."""
        return self._seen(self.in_use.extend(parents, tokens))

    def exits(self) -> tuple[int, Tensor] | None:
        """See :meth:`SteppedDrafter.exits`."""
        return self.in_use.exits()

    def learn(self, path: TokenPath, verified: Verified) -> None:
        """Move the threshold by the laws along the tokens that stood; :meth:`on_kept` learns the rest."""
        self._came, self._before = verified.new_tokens, path.rest
        self._ran = [0, *(node + 1 for node in self.in_use.walk.follow(self._came))] if self._laws else []
        for place, token in zip(self._ran, self._came, strict=False):
            confidence, best = self._laws[place]
            self.threshold.observe([confidence], int(best == token))
        self._laws = []

    def on_kept(self, kept: Kept) -> None:
        """Ask every predictor what it would have drafted after each kept token, and choose for the next round."""
        if not self._came:  # it was not asked in this round
            return
        states = {level: self._whole(level, kept)[None] for level in self._levels}
        before = None if self._before is None else self._before.to(self._head.dtype)
        rests = [shadow_states(way.predictor, states, before, self._head.dtype) for way in self.ways]
        laws = self._head.logits(torch.cat(rests, 1)).split(len(self._came))
        drafted = dict(enumerate(rests))
        self.record.observe(shadow_hits(drafted, self._came, lambda number, _: laws[number][None], self._named))
        self._came = []
        if self._costs is not None:
            self._chosen = self.record.choose(self._costs)

    def _forget(self) -> None:
        self.record = self._choice.init()
        self.threshold = StopThreshold(decay=self._choice.decay)
        self._laws: list[tuple[float, int]] = []
        self._surest = 1.0
        self._came: list[int] = []
        self._before: Tensor | None = None
        self._ran: list[int] = []

    def _seen(self, logits: Tensor) -> Tensor:
        """Note of every law its largest probability, and whose it is."""
        best = logits.max(-1)
        confidences = (best.values.float() - logits.float().logsumexp(-1)).exp().tolist()
        self._laws.extend(zip(confidences, best.indices.tolist(), strict=True))
        self._surest = max(confidences)
        return logits

    def _whole(self, level: int, kept: Kept) -> Float[Tensor, "kept hidden"]:
        """A level of all kept tokens: what the draft ran before the exit layer, the target did not run again."""
        given = kept.states[level]
        if len(given) == len(self._came):
            return given
        return torch.cat([self.in_use.walk.states(level)[0, self._ran], given])

    def _exit_costs(self, costs: Costs) -> ExitCosts:
        """Measured costs, layers below the exit being run for one token only: the last, which was not drafted from."""
        firsts = [costs.draft[way.name][0] - costs.draft[way.name][1] for way in self.ways]
        shares = [way.predictor.exit_layer / self.layered.depth for way in self.ways]

        def verify(number: int, drafted: int) -> float:
            plain, block = costs.verify[0], costs.verify[min(self._named * drafted, costs.largest)]
            if drafted == 0:
                return plain
            return firsts[number] + shares[number] * plain + (1 - shares[number]) * block

        return ExitCosts({number: costs.draft[way.name][1] for number, way in enumerate(self.ways)}, verify)


def shadow_states(
    predictor: Predictor,
    states: Mapping[int, Float[Tensor, "1 positions hidden"]],
    before: Float[Tensor, "1 1 rest"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "1 positions rest"]:
    """The rest states that a predictor would have drafted from, had it drafted the tokens that stood.

    A recurrent predictor gets the true rest state at the first position and its own prediction at the later ones, as in
    drafting; any other is asked for all positions at once.

    Args:
        predictor: who would have drafted.
        states: for every level that it reads, the states of consecutive tokens, the pending one first.
        before: the rest state of the token before the pending one.
        dtype: what it computes in.
    """
    inputs = [states[layer].to(dtype) for layer in predictor.state_layers]
    if not predictor.recurrent:
        return predictor.predict(inputs)
    found: list[Tensor] = []
    for step in range(inputs[0].shape[1]):
        before = predictor.predict([level[:, step : step + 1] for level in inputs], before, step)
        found.append(before)
    return torch.cat(found, 1)
