"""One tree from all drafters: what each expects, merged, and as much of it as is worth verifying."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from restpoint.decode.acceptance import Acceptance, Calibration, Estimate
from restpoint.decode.control import Pace, best_count
from restpoint.decode.costs import Costs
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
from restpoint.decode.target import NO_DRAFT
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
    """What a round was drafted from, for learning."""

    trie: Trie = field(default_factory=Trie)
    expanded: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)
    levels: int = 0
    resumes: bool = False  # the verification goes on where the stepped drafter's layers ended


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
        costs: measured seconds.
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
        costs: Costs,
        calibrations: Mapping[str, Calibration] | None = None,
        settings: TreeSettings | None = None,
        verifier: Verifier | None = None,
    ):
        self.instant = tuple(instant)
        self.stepped = stepped
        self.sampler = sampler
        self.costs = costs
        self.settings = settings or TreeSettings()
        self._how: Drawing = "one" if verifier is None else verifier.drawn
        if verifier is not None and verifier.chains_only:
            self.settings = replace(self.settings, branching=False)
        self.drafters = [*self.instant, *([stepped] if stepped else [])]
        known = calibrations or {}
        self.acceptances = [
            Acceptance(known.get(one.name) or Calibration.guess(one.edges, one.prior)) for one in self.drafters
        ]
        self.pace = Pace.plain(costs.verify[0])
        self._drawn = Estimate(_DRAWN)
        self._new = (Estimate(_NEW), Estimate(_NEW))
        self._round = _Round()

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Speculator.begin`."""
        for drafter in self.drafters:
            drafter.begin(prompt)

    def propose(self, path: TokenPath, room: int) -> Draft:
        """See :meth:`Speculator.propose`."""
        round_ = self._round = _Round()
        room = min(room, self.costs.largest)
        if room < 1 or self.settings.fixed == 0:
            return NO_DRAFT
        for index, drafter in enumerate(self.instant):
            round_.trie.merge(drafter.candidates(path, room), index, self.acceptances[index])
        if self.stepped is not None:
            self._step(self.stepped, path, room)
        return self._choose()

    def observe(self, path: TokenPath, verified: Verified) -> None:
        """See :meth:`Speculator.observe`."""
        self._learn(verified)
        for drafter in self.drafters:
            drafter.learn(path, verified)
        seconds = self.costs.verify[len(verified.draft.tokens)]
        if self.stepped is not None:
            seconds += self.costs.drafting(self.stepped.cost_name, self._round.levels)
        self.pace.add(len(verified.nodes) + 1.0, seconds)

    # --- a stepped drafter's levels --------------------------------------------------------------------------------

    def _step(self, drafter: SteppedDrafter, path: TokenPath, room: int) -> None:
        """Let a drafter add its children, level by level, while that pays."""
        trie, round_ = self._round.trie, self._round
        frontier = [ROOT]
        while frontier and round_.levels < room and self._pays(drafter, frontier):
            if round_.levels == 0:
                logits = drafter.start(path)
                round_.resumes = drafter.exits() is not None
            else:
                above = [round_.expanded[trie.parents[node]] for node in frontier]
                logits = drafter.extend(above, [trie.tokens[node] for node in frontier])
            round_.levels += 1
            for node in frontier:
                round_.expanded[node] = len(round_.expanded) - 1  # the root is -1, as drafters number nodes
            self._name(path, frontier, logits)
            frontier = self._frontier(frontier, drafter.trees)

    def _pays(self, drafter: SteppedDrafter, frontier: Sequence[int]) -> bool:
        """Whether a level after these nodes is expected to be worth its time, and has room."""
        levels = self._round.levels
        if not self._fits(frontier):
            return False
        if self.settings.levels is not None:
            return levels < self.settings.levels
        if self._falls_short(drafter):
            return True
        if not drafter.goes_on(levels):
            return False
        expected = self._new[levels > 0].mean * sum(self._uncovered(node) for node in frontier)
        name = drafter.cost_name
        seconds = self.costs.drafting(name, levels + 1) - self.costs.drafting(name, levels)
        return expected > self.pace.rate * (seconds + self._node_seconds)

    def _falls_short(self, drafter: SteppedDrafter) -> bool:
        """Whether fewer nodes were named than were asked for, whatever they cost."""
        fixed = self.settings.fixed
        if fixed is None:
            return False
        chain = not (self.settings.branching and drafter.trees)
        return (self._round.levels if chain else len(self._round.trie)) < fixed

    def _fits(self, frontier: Sequence[int]) -> bool:
        """Whether all that must be verified after another level has room: drawn nodes, and those whose layers ran."""
        round_ = self._round
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

    def _frontier(self, nodes: Sequence[int], trees: bool) -> list[int]:
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

    def _name(self, path: TokenPath, nodes: Sequence[int], logits: Tensor) -> None:
        """Add the most probable tokens after each node, and where tokens are sampled some drawn from the rest."""
        trie, index = self._round.trie, len(self.instant)
        if self.sampler.greedy and not self.sampler.by_prefix:
            law = torch.softmax(logits.float(), -1)
        else:
            law = self.sampler.law(logits, lambda: [self._text(path, node) for node in nodes])
        best = law.topk(min(self.settings.children, law.shape[1]))
        tokens, confidences = torch.stack([best.indices.double(), best.values.double()]).tolist()
        acceptance = self.acceptances[index]
        for node, row, own in zip(nodes, tokens, confidences, strict=True):
            depth = trie.depth_after(node)
            for token, confidence in zip(row, own, strict=True):
                if not confidence > 0:  # filtered out, or NaN where processors left nothing
                    break
                trie.add(node, int(token), index, confidence, acceptance.of(depth, confidence))
        if not self.sampler.greedy:
            self._draw(nodes, law)

    def _draw(self, nodes: Sequence[int], law: Tensor) -> None:
        """Draw a token after each node that is worth one, from what its likely children leave of the law."""
        trie, settings = self._round.trie, self.settings
        worth = self.pace.rate * self._node_seconds
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

    def _text(self, path: TokenPath, node: int) -> list[int]:
        """The whole text up to a node."""
        trie, tokens = self._round.trie, list[int]()
        while node != ROOT:
            tokens.append(trie.tokens[node])
            node = trie.parents[node]
        return [*path.tokens, *reversed(tokens)]

    # --- what is verified ------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return min(self.settings.nodes, self.costs.largest)

    @property
    def _node_seconds(self) -> float:
        """What another node costs in the pass, on average."""
        count = min(16, self.costs.largest)
        return (self.costs.verify[count] - self.costs.verify[0]) / count

    def _choose(self) -> Draft:
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
        order = [*first, *sorted(bound - set(first)), *others]
        if settings.fixed is not None:
            count = max(min(settings.fixed, len(order), self.costs.largest), len(bound))
        else:
            chosen = [reaches[node] for node in order[: self._limit]]
            count = best_count(chosen, self.costs.verify, self.pace.rate, len(bound))
        return self._draft(order[:count], exits)

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

    def _draft(self, nodes: Sequence[int], exits: tuple[int, Tensor] | None) -> Draft:
        """These nodes of the trie, renumbered."""
        trie = self._round.trie
        place = {node: index for index, node in enumerate(nodes)}
        place[ROOT] = ROOT
        layer, states = exits or (0, None)
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
