"""One tree from all drafters: what each expects, merged, and as much of it as is worth verifying."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from restpoint.decode.acceptance import Acceptance, Calibration
from restpoint.decode.control import Control, Pace, Rest
from restpoint.decode.draft import Draft, InstantDrafter, Speculator, SteppedDrafter, TokenPath, Verified
from restpoint.decode.drawing import ChildDrawing
from restpoint.decode.order import Order, draft_first, order_nodes
from restpoint.decode.outcomes import Outcomes
from restpoint.decode.sampling import Sampler
from restpoint.decode.tree import RoundTree, TreeSettings
from restpoint.decode.trie import Trie
from restpoint.decode.verifiers.base import Verifier


class Fusion(Speculator):
    """Fuses drafters into one tree a round, under the measured cost of drafting and verifying.

    Instant drafters name their candidates; each candidate's chance is what tokens of that confidence from that drafter
    were worth so far, and what all drafters claim together is corrected by what such claims were worth. A stepped
    drafter then adds the most probable tokens after the nodes that are reached with the highest probability, level by
    level, while the tokens that it is expected to add are worth more than the time it takes; when tokens are sampled it
    also draws one token from what its children leave of its law. The tree that is verified holds every drawn node and
    as many of the others, by probability of being reached, as pay for the pass.

    Exact: nodes chosen without chance may depend on anything drafted, since the verification emits each token by the
    target's law whatever stands in the tree; a drawn token is always verified, whatever it turns out to be.

    Args:
        instant: drafters that name candidates at once.
        stepped: a drafter with a law after every node; None for none.
        sampler: processors and random numbers, shared with the verification.
        control: what rounds cost; the texts of a batch have one in common.
        calibrations: acceptance by confidence of drafters, by name; a drafter without one starts from a guess.
        settings: limits of the tree.
        verifier: how drawn tokens will be verified, which says how they must be drawn; token-wise if None.

    Paper:
        Xiong et al. 2024, "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure"; Chen et al. 2024,
        "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding"; Huang et al. 2024, "SpecDec++".
    """

    def __init__(
        self,
        instant: Sequence[InstantDrafter],
        stepped: SteppedDrafter | None,
        sampler: Sampler,
        control: Control,
        calibrations: Mapping[str, Calibration] | None = None,
        settings: TreeSettings | None = None,
        verifier: Verifier | None = None,
    ):
        self.instant = tuple(instant)
        self.stepped = stepped
        self.sampler = sampler
        self.control = control
        self.pace = Pace()
        self._rest = Rest()
        self.settings = settings or TreeSettings()
        if verifier is not None and verifier.chains_only:
            self.settings = replace(self.settings, branching=False)
        self._drawing = ChildDrawing(sampler, self.settings, "one" if verifier is None else verifier.drawn)
        self.drafters = [*self.instant, *([stepped] if stepped else [])]
        known = calibrations or {}
        self._outcomes = Outcomes(
            [Acceptance(known.get(one.name) or Calibration.guess(one.edges, one.prior)) for one in self.drafters],
            len(self.instant),
        )
        self._round = RoundTree(TokenPath([], None), 0)

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Speculator.begin`."""
        for drafter in self.drafters:
            drafter.begin(prompt)

    @property
    def group(self) -> object:
        """See :attr:`Speculator.group`."""
        return self.control

    def propose(self, path: TokenPath, room: int) -> Draft:
        """See :meth:`Speculator.propose`."""
        return self.propose_together([self], [path], [room])[0]

    @classmethod
    def propose_together(
        cls, speculators: Sequence[Speculator], paths: Sequence[TokenPath], rooms: Sequence[int]
    ) -> list[Draft]:
        """See :meth:`Speculator.propose_together`: levels of all rows at once, and trees of one size at most."""
        fusions = [one for one in speculators if isinstance(one, Fusion)]
        control = fusions[0].control
        control.begin(len(fusions))
        for one, path, room in zip(fusions, paths, rooms, strict=True):
            one._begin_round(path, room)
        _step(fusions, control)
        orders = [one._order() for one in fusions]
        needed = [one._time_needed for one in fusions]
        gains = [
            [reach / one.pace.worth * time * len(fusions) / sum(needed) for reach in order.reaches]
            for one, order, time in zip(fusions, orders, needed, strict=True)
        ]
        width = control.width(gains, max(order.least for order in orders))
        drafts = [one._draft(order, width) for one, order in zip(fusions, orders, strict=True)]
        deepest = max(fusions, key=lambda one: one._round.levels)
        name = deepest.stepped.cost_name if deepest.stepped is not None else ""
        if any(one._round.asked for one in fusions):
            control.spend(max(len(draft.tokens) for draft in drafts), name, deepest._round.levels)
        return drafts

    def observe(self, path: TokenPath, verified: Verified) -> None:
        """See :meth:`Speculator.observe`."""
        self._outcomes.learn(self._round, verified)
        for drafter in self.drafters:
            if self._round.asked or drafter.needs_every_round:
                drafter.learn(path, verified)
        self.control.observe(self._round.expected, len(verified.nodes))
        if self._round.asked:
            self.pace.add(len(verified.nodes) + 1.0, self.control.time)
        if self._rest.after(self.pace.rate):
            self.pace = Pace()

    # --- a stepped drafter's levels --------------------------------------------------------------------------------

    def _begin_round(self, path: TokenPath, room: int) -> None:
        """Forget the last round and ask the instant drafters."""
        self._round = RoundTree(path, room, Trie(self._outcomes.correction))
        room = min(room, self.control.costs.largest)
        if self._drafts:
            self._round.asked = True
            for index, drafter in enumerate(self.instant):
                self._round.trie.merge(drafter.candidates(path, room), index, self._outcomes.acceptances[index])

    @property
    def _time_needed(self) -> float:
        """How long the text still takes, at its rate."""
        return (self._round.room + 1) / self.pace.worth

    @property
    def _drafts(self) -> bool:
        settings = self.settings
        rests = settings.fixed is None and settings.levels is None and self._rest.left > 0
        return self._round.room >= 1 and settings.fixed != 0 and not rests

    def _level_gain(self) -> float:
        """The time that another level is expected to save beyond what its nodes cost; infinite where asked for."""
        round_, drafter, levels = self._round, self.stepped, self._round.levels
        if drafter is None or not (
            self._drafts and round_.frontier and levels < min(round_.room, self.control.costs.largest) and self._fits()
        ):
            return 0.0
        if self.settings.levels is not None:
            return float("inf") if levels < self.settings.levels else 0.0
        if self._falls_short(drafter):
            return float("inf")
        if not drafter.goes_on(levels):
            return 0.0
        expected = self._outcomes.new[levels > 0].mean * sum(round_.uncovered(node) for node in round_.frontier)
        gains = sorted((reach / self.pace.worth for reach in round_.trie.reaches), reverse=True)
        return expected / self.pace.worth - self.control.time_of_more(gains[: self._limit], len(round_.frontier))

    def _falls_short(self, drafter: SteppedDrafter) -> bool:
        """Whether fewer nodes were named than were asked for, whatever they cost."""
        fixed = self.settings.fixed
        if fixed is None:
            return False
        chain = not (self.settings.branching and drafter.trees)
        return (self._round.levels if chain else len(self._round.trie)) < fixed

    def _fits(self) -> bool:
        """Whether all that must be verified after another level has room: drawn nodes, and those whose layers ran."""
        round_, frontier = self._round, self._round.frontier
        nodes = len(round_.expanded) + len(frontier) - 1  # the root is no node
        if nodes > self._limit:
            return False
        must = nodes if round_.resumes or not self.sampler.greedy else 0
        if not self.sampler.greedy:
            others = (child for drawn in round_.drawn.values() for child in drawn.nodes)
            must += sum(child not in round_.expanded and child not in frontier for child in others)
            must += self._drawing.count * len(frontier)
        return must <= (self._limit if self.settings.fixed is None else min(self._limit, self.settings.fixed))

    def _next_frontier(self, nodes: Sequence[int], trees: bool) -> list[int]:
        """The nodes of the next level to go on after."""
        trie, settings = self._round.trie, self.settings
        following = [child for node in nodes for child in trie.children[node + 1].values()]
        if settings.branching and trees:
            return sorted(following, key=self._round.uncovered, reverse=True)[: settings.width]
        drawn = self._round.drawn.get(nodes[0])
        return list(drawn.nodes) if drawn else sorted(following, key=trie.reach, reverse=True)[:1]

    def _law(self, logits: Tensor) -> Tensor:
        """The law after each node of the frontier, by the stepped drafter."""
        if self.sampler.greedy and not self.sampler.by_prefix:
            return torch.softmax(logits.float(), -1)
        return self.sampler.law(logits, lambda: [self._round.text(node) for node in self._round.frontier])

    def _grow(self, law: Tensor, tokens: list[list[float]], confidences: list[list[float]], trees: bool) -> None:
        """Add the most probable tokens after each node of the frontier, and where tokens are sampled some drawn."""
        round_ = self._round
        trie, nodes, index = round_.trie, round_.frontier, len(self.instant)
        round_.levels += 1
        for node in nodes:
            round_.expanded[node] = len(round_.expanded) - 1  # the root is -1, as drafters number nodes
        acceptance = self._outcomes.acceptances[index]
        for node, row, own in zip(nodes, tokens, confidences, strict=True):
            depth = trie.depth_after(node)
            for token, confidence in zip(row, own, strict=True):
                if not confidence > 0:  # filtered out, or NaN where processors left nothing
                    break
                trie.add(node, int(token), index, confidence, acceptance.of(depth, confidence))
        if not self.sampler.greedy:
            worth = self.pace.worth * self.control.node_time
            self._drawing.draw(round_, nodes, law, worth, self._outcomes.drawn.mean)
        round_.frontier = self._next_frontier(nodes, trees)

    # --- what is verified ------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return self.settings.limit(self.control.costs.largest)

    def _order(self) -> Order:
        """The nodes worth verifying."""
        exits = self.stepped.exits() if self.stepped is not None and self._round.resumes else None
        return order_nodes(self._round, self.settings, self.control.costs.largest, exits)

    def _draft(self, order: Order, width: int) -> Draft:
        """The first nodes of the order."""
        self._round.expected = sum(order.reaches[:width], 0.0)
        return draft_first(self._round, order, width)


def _step(fusions: Sequence[Fusion], control: Control) -> None:
    """Let the stepped drafters of a batch add their children, level by level, while that pays."""
    while True:
        gains = {index: one._level_gain() for index, one in enumerate(fusions)}
        going = [one for index, one in enumerate(fusions) if gains[index] > 0]
        drafters = [one.stepped for one in going if one.stepped is not None]
        if not going:
            return
        levels = going[0]._round.levels
        time = control.level_time(drafters[0].cost_name, levels)
        if sum(gain for gain in gains.values() if gain > 0) <= len(fusions) * time:
            return
        kind = type(drafters[0])
        if levels == 0:
            logits = kind.start_together(drafters, [one._round.path for one in going])
        else:
            rounds = [one._round for one in going]
            above = [[own.expanded[own.trie.parents[node]] for node in own.frontier] for own in rounds]
            logits = kind.extend_together(
                drafters, above, [[own.trie.tokens[node] for node in own.frontier] for own in rounds]
            )
        laws = [one._law(own) for one, own in zip(going, logits, strict=True)]
        every = laws[0] if len(laws) == 1 else torch.cat(laws)
        best = every.topk(min(going[0].settings.children, every.shape[1]))
        tokens, confidences = torch.stack([best.indices.double(), best.values.double()]).tolist()
        for one, drafter, law in zip(going, drafters, laws, strict=True):
            if levels == 0:
                one._round.resumes = drafter.exits() is not None
            count = len(law)
            one._grow(law, tokens[:count], confidences[:count], drafter.trees)
            del tokens[:count], confidences[:count]
