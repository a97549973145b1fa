"""The model whose law is kept: read prompts, score drafts, keep what stands. A batch of texts, or one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree

NO_DRAFT = Draft()
_FEW = 16


@dataclass(frozen=True)
class Scored:
    """The target's view of a block: its last prompt token, or the pending token and the drafted nodes.

    Attributes:
        logits: one row for each token of the block.
        rest: h_L of each token of the block; None where the target cannot tell.
        depth: layers behind these logits; None for all of the model's.
    """

    logits: Float[Tensor, "block vocab"]
    rest: Float[Tensor, "1 block hidden"] | None
    depth: int | None = None


@dataclass(frozen=True)
class Kept:
    """What a round saw of the tokens that it kept: the pending one and the drafted nodes that stood.

    Attributes:
        states: for every level h_0 .. h_L, (kept, hidden). Where verification resumed at a layer, levels below it have
            only the tokens that the draft had not run: the last of those kept, perhaps none.
    """

    states: tuple[Tensor, ...]

    @property
    def last(self) -> Float[Tensor, "levels hidden"] | None:
        """States of the last token kept; None where the draft ran its first layers."""
        if any(not len(level) for level in self.states):
            return None
        return torch.stack([level[-1] for level in self.states])


class Target(ABC):
    """A causal LM that is being decoded, with its cache."""

    def __init__(self, layered: LayeredModel):
        self.layered = layered

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """Start new texts: run their prompts, forget what was before. Only the last token of each is scored."""

    @abstractmethod
    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """Run the pending and the drafted tokens of every row in one pass."""

    @abstractmethod
    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep, for every row, its pending token and the path of drafted nodes that stood."""

    @abstractmethod
    def retain(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""


class LayeredTarget(Target):
    """A model on its slot cache: drafts are verified in one pass, rejected ones cost nothing to forget.

    Attributes:
        cache: keys and values of the texts.
        watcher: given after every round the states of the tokens that were kept, where one text is decoded; None for
            nobody.
        widths: numbers of tokens that passes are filled up to, ascending; empty where they are as long as they must be.
        skip: layers that no token runs.
    """

    widths: tuple[int, ...] = ()
    skip: frozenset[int] = frozenset()

    def __init__(self, layered: LayeredModel):
        super().__init__(layered)
        self.cache: SlotCache = self._new_cache(1, 1)
        self.watcher: Callable[[Kept], None] | None = None
        self._watched: list[
            tuple[int, Tensor]
        ] = []  # of each level, the first place of the block, and states from it on

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """See :meth:`Target.prefill`. Prompts of about the same length are read in one pass."""
        longest = max(len(prompt) for prompt in prompts)
        rests: dict[int, Tensor] = {}
        caches: list[SlotCache] = []
        for rows in _of_like_length(prompts):
            cache = self._new_cache(len(rows), longest)
            rests |= zip(rows, self._read([prompts[row] for row in rows], cache), strict=True)
            caches.append(cache)
        self.cache = caches[0]
        if len(prompts) > 1:
            self.cache = SlotCache.join(caches)
            self.cache.retain([list(rests).index(row) for row in range(len(prompts))])
        logits = self.layered.logits(torch.cat([rests[row] for row in range(len(prompts))]))
        return [Scored(logits[row], rests[row]) for row in range(len(prompts))]

    def _read(self, prompts: Sequence[Sequence[int]], cache: SlotCache) -> list[Float[Tensor, "1 1 hidden"]]:
        """Run prompts, the shorter filled up behind their end, where nothing looks; h_L of the last token of each."""
        longest = max(len(prompt) for prompt in prompts)
        ids = self._ids([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        states = self.layered.run(self.layered.plan(ids, cache), skip=self.skip)
        cache.commit([len(prompt) for prompt in prompts])
        return [states[row : row + 1, len(prompt) - 1 : len(prompt)] for row, prompt in enumerate(prompts)]

    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """See :meth:`Target.score`. Resumes at the draft's exit layer, where it has one (one row only)."""
        layered, cache = self.layered, self.cache
        count = 1 + max(len(draft.tokens) for draft in drafts)
        blocks = [[token, *draft.tokens] for token, draft in zip(pending, drafts, strict=True)]
        ids = self._ids([block + [0] * (count - len(block)) for block in blocks])
        # What fills a row up, as a chain, would stand at positions that a table of positions may not have.
        beyond = layered.embedding_scale is None and any(len(block) < count for block in blocks)
        chains = not beyond and all(draft.is_chain for draft in drafts)
        trees = None if chains else [tree_of(draft, count) for draft in drafts]
        plan = layered.plan(ids, cache, tree=trees)
        watched = None if self.watcher is None or len(drafts) > 1 else list[Tensor]()
        if len(drafts) == 1 and (exits := drafts[0].exits) is not None:
            layer, ran = drafts[0].exit_layer, exits.shape[1]
            lower = [plan.hidden[:, ran:], *[exits[:, :0]] * (layer - 1)]
            if ran < count:
                rest_of_it = layered.plan(ids[:, ran:], cache, offset=ran, tree=trees)
                lower = [rest_of_it.hidden]
                exits = torch.cat([exits, layered.run(rest_of_it, stop=layer, keep=lower)], 1)
            states = layered.run(plan, layer, hidden=exits, keep=watched)
            self._watched = [(ran, level) for level in lower[:layer]]
            self._watched += [(0, level) for level in (exits, *(watched or []))]
        else:
            states = layered.run(plan, keep=watched)
            self._watched = [(0, level) for level in (plan.hidden, *(watched or []))]
        logits = layered.logits(states)
        sizes = [len(block) for block in blocks]
        return [Scored(logits[row, :size], states[row : row + 1, :size]) for row, size in enumerate(sizes)]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """See :meth:`Target.keep`."""
        for row, path in enumerate(nodes):
            self.cache.keep(row, [0, *(node + 1 for node in path)])
        if self.watcher is not None and len(self._watched) > self.layered.depth:
            places = [0, *(node + 1 for node in nodes[0])]
            kept = [level[0, [at - first for at in places if at >= first]] for first, level in self._watched]
            self.watcher(Kept(tuple(kept)))

    def retain(self, rows: Sequence[int]) -> None:
        """See :meth:`Target.retain`."""
        self.cache.retain(rows)

    def _new_cache(self, rows: int, longest: int) -> SlotCache:
        """An empty cache for prompts of up to so many tokens."""
        return self.layered.cache(rows, capacity=max(256, 2 * longest))

    def _ids(self, tokens: list[list[int]]) -> Tensor:
        return torch.tensor(tokens, device=self.layered.device)


class NativeTarget(Target):
    """A model on its own cache, by its own forward: for families whose cache cannot roll back.

    One text at a time, no drafts.
    """

    def __init__(self, layered: LayeredModel):
        super().__init__(layered)
        self.past: dict[str, Any] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """See :meth:`Target.prefill`."""
        if len(prompts) > 1:
            raise RestpointError("prompts: this model family is decoded one text at a time; give them one by one")
        self.past = self._fresh()
        return [self._step(prompts[0])]

    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """See :meth:`Target.score`; the draft must be empty."""
        if drafts[0].tokens:
            raise RestpointError("drafter: this model family cannot verify drafts; decode it plainly (drafter=None)")
        return [self._step(pending)]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Nothing to do: its cache keeps every token it has seen."""

    def retain(self, rows: Sequence[int]) -> None:
        """Nothing to do: there is one row."""

    def _fresh(self) -> dict[str, Any]:
        """What the first pass of a text is given of earlier ones."""
        return {}

    def _step(self, tokens: Sequence[int]) -> Scored:
        stack = self.layered.stack
        ids = torch.tensor([list(tokens)], device=self.layered.device)
        output = stack.model(input_ids=ids, use_cache=True, **self.layered.forward_arguments, **self.past)
        self.past = {stack.cache_argument: getattr(output, stack.cache_argument)}
        layers = self.layered.layers_run(output)
        self.layered.work.layer_calls += layers
        self.layered.work.token_layers += layers * len(tokens)
        return Scored(output.logits[0, -1:], None)


def _of_like_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows in groups, the longest prompts first; in each the shortest has at least two thirds of the longest's tokens.

    A few tokens more cost less than another pass, so short prompts stay together.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    groups = [[order[0]]]
    for row in order[1:]:
        longest = len(prompts[groups[-1][0]])
        if longest - len(prompts[row]) <= max(longest / 3, _FEW):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def tree_of(draft: Draft, count: int) -> Tree:
    """The pending token as the root, drafted nodes below it; what fills a row up hangs from the root."""
    return Tree((-1, *(parent + 1 for parent in draft.parents), *[0] * (count - 1 - len(draft.tokens))))
