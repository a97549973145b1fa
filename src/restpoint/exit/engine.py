"""Decoding that stops early: tokens leave the stack where a rule says so, and are caught up with when they are needed.

A token that left after layer e has keys and values in layers below e only. The next token that goes beyond e needs the
others, so it takes those that wait there along: one pass over several tokens costs little more than over one, and what
later tokens see is exact. Tokens that nobody follows never run the rest: that is what is saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.decode.target import LayeredTarget, Scored
from restpoint.errors import RestpointError
from restpoint.exit.rules import Rule
from restpoint.exit.signals import Signal
from restpoint.exit.view import Readout, View
from restpoint.model.layered import LayeredModel
from restpoint.model.plan import Plan


@dataclass
class _Waiting:
    """Tokens of one row that stopped after the same layer, in the order of the text."""

    tokens: list[int]
    states: Float[Tensor, "tokens hidden"]


@dataclass
class _Row:
    """One text: how many new tokens it has, and those that wait, by layer. Deeper ones come earlier in the text."""

    emitted: int = 1
    waiting: dict[int, _Waiting] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """Rows that go through layers together. Each has a block: tokens that are caught up with, and the new one.

    Attributes:
        rows: of the cache.
        blocks: tokens of each row; shorter blocks are filled up behind the new token, where nothing looks.
        plan: of the pass over these blocks.
        state: after the layers that have run.
        levels: h_0 .. of the new tokens.
        view: of them at the candidate layer before.
    """

    rows: list[int]
    blocks: list[list[int]]
    plan: Plan
    state: Float[Tensor, "rows block hidden"]
    levels: list[Float[Tensor, "rows hidden"]]
    view: View | None = None

    def newest(self, states: Float[Tensor, "rows block hidden"]) -> Float[Tensor, "rows hidden"]:
        """Of each row that of the new token."""
        if states.shape[1] == 1 or len(self.blocks) == 1:  # nothing is filled up
            return states[:, -1]
        last = torch.tensor([len(block) - 1 for block in self.blocks], device=states.device)
        return states[torch.arange(len(last), device=states.device), last]


class ExitTarget(LayeredTarget):
    """A model whose tokens stop where a rule says so. It takes no drafts; each pass emits one token of every row.

    The law that is emitted at an exit is the readout's there. Prompts run in full. With exact catch-up the states of
    every token that is run deep are those of the full model on the same text, to rounding.

    Args:
        layered: the model.
        rule: where tokens stop.
        readout: how states are read at an exit.
        signal: the confidence that the rule names, where it names one.

    Raises:
        RestpointError: the rule does not fit the model.
    """

    def __init__(self, layered: LayeredModel, rule: Rule, readout: Readout, signal: Signal | None = None):
        rule.check(layered.depth)
        super().__init__(layered)
        self.rule = rule
        self.readout = readout
        self.signal = signal
        self.skip = rule.skipped(layered.depth)
        self._whole = layered.depth - len(self.skip)
        self._candidates = rule.candidates(layered.depth)
        self._rows: list[_Row] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """See :meth:`Target.prefill`."""
        self._rows = [_Row() for _ in prompts]
        return [replace(scored, depth=self._whole) for scored in super().prefill(prompts)]

    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """See :meth:`Target.score`; drafts must be empty."""
        if any(draft.tokens for draft in drafts):
            raise RestpointError("drafter: a text that exits early takes no drafts; decode it with drafter=None")
        plan = self.layered.plan(self._ids([[token] for token in pending]), self.cache)
        group = _Group(
            list(range(len(pending))), [[token] for token in pending], plan, plan.hidden, [plan.hidden[:, 0]]
        )
        scored: dict[int, Scored] = {}
        self._descend(group, 0, 0, scored)
        return [scored[row] for row in range(len(pending))]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """See :meth:`Target.keep`."""
        self.cache.commit([1] * len(nodes))
        for row in self._rows:
            row.emitted += 1

    def retain(self, rows: Sequence[int]) -> None:
        """See :meth:`Target.retain`."""
        super().retain(rows)
        self._rows = [self._rows[row] for row in rows]

    def _descend(self, group: _Group, done: int, number: int, scored: dict[int, Scored]) -> None:
        """Run a group from layer ``done`` to the candidate of that number; let go who stops, go on with the others."""
        layered = self.layered
        if number == len(self._candidates):
            rest = group.newest(layered.run(group.plan, done, hidden=group.state, skip=self.skip))
            logits = layered.logits(rest[:, None])
            scored |= {row: Scored(own, None, self._whole) for row, own in zip(group.rows, logits, strict=True)}
            return
        layer = self._candidates[number]
        kept: list[Tensor] = []
        state = layered.run(group.plan, done, layer, group.state, keep=kept)
        levels = [*group.levels, *(group.newest(one) for one in kept)]
        view = View(layer, levels, self.readout, group.view)
        group = replace(group, state=state, levels=levels, view=view)
        stops = self.rule.stops(view, [self._rows[row].emitted for row in group.rows], self.signal)
        leaving = [place for place, stop in enumerate(stops.tolist()) if stop]
        for place in leaving:
            if self.rule.catch_up == "exact":
                self._hold(group, place, layer)
            scored[group.rows[place]] = Scored(self.readout.over_all(view.logits[place : place + 1]), None, layer)
        if leaving and self.rule.catch_up == "propagated":
            self._propagate(group, leaving, layer)
        if len(leaving) == len(group.rows):
            return
        staying = sorted(set(range(len(group.rows))) - set(leaving))
        for going in self._gather(group, staying, layer):
            self._descend(going, layer, number + 1, scored)

    def _hold(self, group: _Group, place: int, layer: int) -> None:
        """Let a row's block wait here."""
        block = group.blocks[place]
        states = group.state[place, : len(block)]
        waiting = self._rows[group.rows[place]].waiting
        if layer in waiting:
            before = waiting[layer]
            block, states = [*before.tokens, *block], torch.cat([before.states, states])
        waiting[layer] = _Waiting(list(block), states)

    def _gather(self, group: _Group, staying: list[int], layer: int) -> list[_Group]:
        """Those who go on, with those who waited here; as one group, or as several where blocks cannot be filled up."""
        rows = [group.rows[place] for place in staying]
        waited = [self._rows[row].waiting.pop(layer, None) for row in rows]
        if len(staying) == len(group.rows) and all(held is None for held in waited):
            return [group]
        blocks = [
            [*(() if held is None else held.tokens), *group.blocks[place]]
            for place, held in zip(staying, waited, strict=True)
        ]
        states = [
            group.state[place, : len(group.blocks[place])]
            if held is None
            else torch.cat([held.states, group.state[place, : len(group.blocks[place])]])
            for place, held in zip(staying, waited, strict=True)
        ]
        together = [list(range(len(rows)))]
        if self.layered.embedding_scale is None:  # filled up, a row could end beyond a table of positions
            sizes = sorted({len(block) for block in blocks})
            together = [[place for place in together[0] if len(blocks[place]) == size] for size in sizes]
        view = group.view
        assert view is not None
        everyone = len(staying) == len(group.rows)
        chosen = torch.tensor(staying, device=group.state.device)
        groups = []
        for places in together:
            picked = chosen[places]
            whole = everyone and len(places) == len(rows)
            groups.append(
                _Group(
                    [rows[place] for place in places],
                    [blocks[place] for place in places],
                    self._plan([rows[place] for place in places], [blocks[place] for place in places]),
                    torch.nn.utils.rnn.pad_sequence([states[place] for place in places], batch_first=True),
                    group.levels if whole else [level[picked] for level in group.levels],
                    view if whole else view.select(picked),
                )
            )
        return groups

    def _propagate(self, group: _Group, leaving: list[int], layer: int) -> None:
        """Give the layers from here on keys and values made of the states that rows stop at."""
        plan = self._plan([group.rows[place] for place in leaving], [group.blocks[place] for place in leaving])
        self.layered.write_keys(plan, layer, group.state[leaving])

    def _plan(self, rows: list[int], blocks: list[list[int]]) -> Plan:
        """A pass over blocks that end with each row's new token."""
        longest = max(len(block) for block in blocks)
        ids = self._ids([[*block, *[0] * (longest - len(block))] for block in blocks])
        return self.layered.plan(ids, self.cache, offset=[1 - len(block) for block in blocks], rows=rows)
