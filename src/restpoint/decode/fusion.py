"""One tree from all drafters: what each expects, merged, and as much of it as is worth verifying."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from restpoint.decode.acceptance import Acceptance, Calibration, Estimate
from restpoint.decode.control import Control, Pace, Rest
from restpoint.decode.draft import (
    ROOT,
    Draft,
    Drawn,
    InstantDrafter,
    Speculator,
    SteppedDrafter,
    TokenPath,
    Verified,
)
from restpoint.decode.sampling import Sampler
from restpoint.decode.trie import Trie
from restpoint.decode.verifiers.base import Verifier
from restpoint.transport.couplings import Drawing, draw_siblings
from restpoint.transport.variation import draw

_DRAWN = 0.3  # acceptance of a token drawn from what the other children leave, before any was seen
_BY_CHANCE = -1  # in place of a drafter's index
_NEW = 0.45  # how often a stepped drafter names the next token where no other did, likewise


@dataclass(frozen=True)
class TreeSettings:
    """Limits of the tree.

    Attributes:
        nodes: largest number of drafted nodes in a round.
        fixed: verify exactly so many nodes (as far as drafters name them) instead of choosing the number.
        levels: a fixed number of levels for the stepped drafter instead of choosing it.
        children: tokens that a stepped drafter names after each node.
        width: nodes of one level after which a stepped drafter goes on.
        draws: tokens drawn after each expanded node when tokens are sampled, where the verifier couples several.
        branching: False for a chain: one token after the other.
    """

    nodes: int = 48
    fixed: int | None = None
    levels: int | None = None
    children: int = 8
    width: int = 4
    draws: int = 1
    branching: bool = True


@dataclass
class _Round:
    """What a round is drafted from."""

    path: TokenPath
    room: int
    trie: Trie = field(default_factory=Trie)
    expanded: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    levels: int = 0
    asked: bool = False  # whether drafters were asked at all
    expected: float = 0.0  # nodes of the draft that stand
    resumes: bool = False  # the verification goes on where the stepped drafter's layers ended


@dataclass(frozen=True)
class _Order:
    """Nodes in the order in which they are worth verifying.

    Attributes:
        nodes: of the trie, parents first.
        reaches: probability that each stands.
        least: the first so many are verified in any case.
        exits: layer and states that the target resumes from.
    """

    nodes: list[int]
    reaches: list[float]
    least: int
    exits: tuple[int, Tensor] | None


class Fusion(Speculator):
    """Fuses drafters into one tree a round, under the measured cost of drafting and verifying.

    Instant drafters name their candidates; each candidate's chance is what tokens of that confidence from that drafter
    were worth so far. A stepped drafter then adds the most probable tokens after the nodes that are reached with the
    highest probability, level by level, while the tokens that it is expected to add are worth more than the time it
    takes; when tokens are sampled it also draws one token from what its children leave of its law. The tree that is
    verified holds every drawn node and as many of the others, by probability of being reached, as pay for the pass.

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
        self._how: Drawing = "one" if verifier is None else verifier.drawn
        if verifier is not None and verifier.chains_only:
            self.settings = replace(self.settings, branching=False)
        self.drafters = [*self.instant, *([stepped] if stepped else [])]
        known = calibrations or {}
        self.acceptances = [
            Acceptance(known.get(one.name) or Calibration.guess(one.edges, one.prior)) for one in self.drafters
        ]
        self._drawn = Estimate(_DRAWN)
        self._new = (Estimate(_NEW), Estimate(_NEW))
        self._round = _Round(TokenPath([], None), 0)

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
        self._learn(verified)
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
        self._round = _Round(path, room)
        room = min(room, self.control.costs.largest)
        if self._drafts:
            self._round.asked = True
            for index, drafter in enumerate(self.instant):
                self._round.trie.merge(drafter.candidates(path, room), index, self.acceptances[index])

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
        expected = self._new[levels > 0].mean * sum(self._uncovered(node) for node in round_.frontier)
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
            draws = 1 if self._how == "one" or not self.settings.branching else self.settings.draws
            others = (child for drawn in round_.drawn.values() for child in drawn.nodes)
            must += sum(child not in round_.expanded and child not in frontier for child in others)
            must += draws * len(frontier)
        return must <= (self._limit if self.settings.fixed is None else min(self._limit, self.settings.fixed))

    def _next_frontier(self, nodes: Sequence[int], trees: bool) -> list[int]:
        """The nodes of the next level to go on after."""
        trie, settings = self._round.trie, self.settings
        following = [child for node in nodes for child in trie.children[node + 1].values()]
        if settings.branching and trees:
            return sorted(following, key=self._uncovered, reverse=True)[: settings.width]
        drawn = self._round.drawn.get(nodes[0])
        return list(drawn.nodes) if drawn else sorted(following, key=trie.reach, reverse=True)[:1]

    def _uncovered(self, node: int) -> float:
        """Probability that a node stands and the token after it has not been named yet."""
        trie = self._round.trie
        return trie.reach(node) * (1.0 - trie.covered(node))

    def _law(self, logits: Tensor) -> Tensor:
        """The law after each node of the frontier, by the stepped drafter."""
        if self.sampler.greedy and not self.sampler.by_prefix:
            return torch.softmax(logits.float(), -1)
        return self.sampler.law(logits, lambda: [self._text(node) for node in self._round.frontier])

    def _grow(self, law: Tensor, tokens: list[list[float]], confidences: list[list[float]], trees: bool) -> None:
        """Add the most probable tokens after each node of the frontier, and where tokens are sampled some drawn."""
        round_ = self._round
        trie, nodes, index = round_.trie, round_.frontier, len(self.instant)
        round_.levels += 1
        for node in nodes:
            round_.expanded[node] = len(round_.expanded) - 1  # the root is -1, as drafters number nodes
        acceptance = self.acceptances[index]
        for node, row, own in zip(nodes, tokens, confidences, strict=True):
            depth = trie.depth_after(node)
            for token, confidence in zip(row, own, strict=True):
                if not confidence > 0:  # filtered out, or NaN where processors left nothing
                    break
                trie.add(node, int(token), index, confidence, acceptance.of(depth, confidence))
        if not self.sampler.greedy:
            self._draw(nodes, law)
        round_.frontier = self._next_frontier(nodes, trees)

    def _draw(self, nodes: Sequence[int], law: Tensor) -> None:
        """Draw a token after each node that is worth one, from what its likely children leave of the law."""
        trie, settings = self._round.trie, self.settings
        worth = self.pace.worth * self.control.node_time
        chosen: list[int] = []
        rests: list[Tensor] = []
        for row, node in enumerate(nodes):
            if settings.fixed is None and trie.reach(node) * self._drawn.mean <= worth:
                continue
            rest = law[row]
            if settings.branching:
                likely = [token for token, child in trie.children[node + 1].items() if trie.reaches[child] > worth]
                rest = rest.index_fill(0, torch.tensor(likely, dtype=torch.long, device=law.device), 0.0)
            elif trie.covered(node) > max(self._drawn.mean, 0.5):
                continue
            chosen.append(node)
            rests.append(rest)
        if not chosen:
            return
        weights = torch.stack(rests).nan_to_num()
        masses = weights.sum(-1)
        count = 1 if self._how == "one" or not settings.branching else settings.draws
        if count == 1:
            drawn = draw(weights, self.sampler.uniforms(len(chosen)))[:, None].tolist()
        else:
            drawn = [draw_siblings(row, count, self._how, self.sampler.uniforms(count)) for row in weights]
        laws = weights / masses[:, None]
        for node, law_of_rest, tokens, mass in zip(chosen, laws, drawn, masses.tolist(), strict=True):
            if mass > 0:
                nodes = tuple(trie.add(node, token, _BY_CHANCE, 0.0, self._drawn.mean) for token in tokens)
                self._round.drawn[node] = Drawn(law_of_rest, nodes)

    def _text(self, node: int) -> list[int]:
        """The whole text up to a node."""
        trie, tokens = self._round.trie, list[int]()
        while node != ROOT:
            tokens.append(trie.tokens[node])
            node = trie.parents[node]
        return [*self._round.path.tokens, *reversed(tokens)]

    # --- what is verified ------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return min(self.settings.nodes, self.control.costs.largest)

    def _order(self) -> "_Order":
        """The nodes worth verifying; parents come first, and before all others the nodes whose first layers ran."""
        trie, settings = self._round.trie, self.settings
        exits = self.stepped.exits() if self.stepped is not None and self._round.resumes else None
        first = [node for node in self._round.expanded if node != ROOT] if exits else []
        bound = self._with_ancestors(
            [*first, *(child for drawn in self._round.drawn.values() for child in drawn.nodes)]
        )
        reaches = trie.exclusive_reaches() if settings.branching else trie.reaches
        if settings.branching:
            others = sorted(set(range(len(trie))) - bound, key=lambda node: (-reaches[node], node))
        else:
            others = [node for node in self._best_chain(bound) if node not in bound]
        nodes = [*first, *sorted(bound - set(first)), *others]
        if settings.fixed is None:
            nodes = nodes[: max(self._limit, len(bound))]
            return _Order(nodes, [reaches[node] for node in nodes], len(bound), exits)
        nodes = nodes[: max(min(settings.fixed, self.control.costs.largest), len(bound))]
        return _Order(nodes, [1.0] * len(nodes), len(nodes), exits)

    def _with_ancestors(self, nodes: Sequence[int]) -> set[int]:
        found: set[int] = set()
        for node in nodes:
            while node != ROOT and node not in found:
                found.add(node)
                node = self._round.trie.parents[node]
        return found

    def _best_chain(self, bound: set[int]) -> list[int]:
        """The path from the root, through all bound nodes, with the largest sum of reaches."""
        trie = self._round.trie
        values = list(trie.reaches)
        for node in reversed(range(len(trie))):
            values[node] += max((values[child] for child in trie.children[node + 1].values()), default=0.0)
        chain, node = list[int](), ROOT
        while children := list(trie.children[node + 1].values()):
            node = max(children, key=lambda child: (child in bound, values[child]))
            chain.append(node)
        return chain

    def _draft(self, order: "_Order", width: int) -> Draft:
        """The first nodes of the order, renumbered."""
        trie, nodes = self._round.trie, order.nodes[:width]
        self._round.expected = sum(order.reaches[:width], 0.0)
        place = {node: index for index, node in enumerate(nodes)}
        place[ROOT] = ROOT
        layer, states = order.exits or (0, None)
        return Draft(
            tokens=[trie.tokens[node] for node in nodes],
            parents=[place[trie.parents[node]] for node in nodes],
            drawn={
                place[node]: Drawn(drawn.law, tuple(place[child] for child in drawn.nodes))
                for node, drawn in self._round.drawn.items()
            },
            exit_layer=layer,
            exits=states,
        )

    # --- what is learnt --------------------------------------------------------------------------------------------

    def _learn(self, verified: Verified) -> None:
        """Hold all that was named after tokens that stood against the tokens that came."""
        trie, round_ = self._round.trie, self._round
        node, seen = ROOT, [False, False]
        for token in verified.new_tokens:
            depth = trie.depth_after(node)
            came = trie.children[node + 1].get(token)
            for child in trie.children[node + 1].values():
                for drafter, confidence in trie.offers[child]:
                    if drafter != _BY_CHANCE:
                        self.acceptances[drafter].add(depth, confidence, child == came)
            if node in round_.drawn:
                self._drawn.add(float(came in round_.drawn[node].nodes))
            if node in round_.expanded:
                seen[depth > 0] = True
                by = [] if came is None else [drafter for drafter, _ in trie.offers[came]]
                if not any(0 <= drafter < len(self.instant) for drafter in by):
                    self._new[depth > 0].add(float(bool(by)))
            if came is None:
                break
            node = came
        for estimate, was_seen in zip(self._new, seen, strict=True):
            if not was_seen:
                estimate.fade()


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
