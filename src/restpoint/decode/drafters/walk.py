"""A model that walks a draft tree, level by level, through some or all of its layers."""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree


class LayeredWalk:
    """States of the pending token and of drafted nodes, each run once, in the uncommitted slots of a cache.

    Slot ``length`` holds the pending token and slot ``length + 1 + i`` node i, so a pass over the same tree in the same
    order finds the keys of every layer that ran here, and overwrites the others. As long as the nodes are a chain
    they need no tree mask, which is the cheaper pass and the only one that some families can do.

    Use it for any drafter that runs layers of a model: a model of its own, the first layers of the target, or some of
    the target's layers. Nothing is committed but what :meth:`start` is given before the pending token and what
    :meth:`keep` is told.

    Args:
        layered: the model whose layers run.
        cache: gives the cache to write to, asked anew in every round, since a target replaces its own.
        stop: layer to stop before; None for the whole depth.
        skip: layers that are left out. It may be replaced between rounds.
        reads: further layers whose input states are kept, beside that of ``stop``; 0 is h_0.
        trees: whether the model can see a tree (``check(layered).tree``); else only chains are taken.

    Raises:
        RestpointError: ``stop`` or one of ``reads`` is no layer of the model; from :meth:`extend`, a tree is drafted on
            a model that can only see chains.
    """

    def __init__(
        self,
        layered: LayeredModel,
        cache: Callable[[], SlotCache],
        *,
        stop: int | None = None,
        skip: Collection[int] = (),
        reads: Collection[int] = (),
        trees: bool = True,
    ):
        self.layered = layered
        self.stop = layered.depth if stop is None else stop
        self.skip = skip
        self.trees = trees
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self._cache = cache
        self._reads = {*reads, self.stop}
        self._states: dict[int, list[Tensor]] = {}
        self._is_chain = True
        if wrong := sorted(layer for layer in self._reads if not 0 <= layer <= self.stop <= layered.depth):
            raise RestpointError(
                f"stop, reads: layer {wrong[0]} is not between 0 and {min(self.stop, layered.depth)}, "
                "where the walk through this model ends; choose one that is"
            )

    @property
    def cache(self) -> SlotCache:
        """Where keys and values are written."""
        return self._cache()

    def read(self, layers: Collection[int]) -> None:
        """From the next round on, keep the input states of these layers, beside that of ``stop``."""
        self._reads = {*layers, self.stop}

    def start(self, token: int, before: Sequence[int] = ()) -> Float[Tensor, "1 1 hidden"]:
        """Forget the nodes, run the pending token and return its state.

        Args:
            token: the pending token; it follows the cache, or ``before``.
            before: tokens before it that the cache lacks; they run in the same pass and are committed. Only for a
                walk through the whole depth on a cache of its own.
        """
        self.parents, self.tokens, self._is_chain = [], [], True
        self._states = {layer: [] for layer in self._reads}
        last = self._run([*before, token], 0, None, len(before))
        if before:
            self.cache.commit([len(before)])
        return last

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "1 added hidden"]:
        """Run further nodes, numbered on from those before, and return their states.

        Args:
            parents: for each node an earlier one, or ``ROOT`` for the pending token.
            tokens: the token of each.
        """
        written = len(self.tokens) + 1
        chain = self._is_chain and list(parents) == list(range(written - 2, written - 2 + len(parents)))
        if not (chain or self.trees):
            raise RestpointError(
                "drafter: this model family cannot see a tree of drafted tokens, and a node was drafted beside or "
                "before the last one; draft chains (one node after another)"
            )
        self._is_chain = chain
        self.parents.extend(parents)
        self.tokens.extend(tokens)
        tree = None if chain else Tree((-1, *(parent + 1 for parent in self.parents)))
        return self._run(tokens, written, tree)

    def states(self, layer: int | None = None) -> Float[Tensor, "1 ran hidden"]:
        """Input states of a kept layer (None: of ``stop``), of the pending token and then of every node."""
        kept = self._states[self.stop if layer is None else layer]
        return kept[0] if len(kept) == 1 else torch.cat(kept, 1)

    def newest(self, layer: int) -> Float[Tensor, "1 added hidden"]:
        """Input states of a kept layer, of the nodes that ran last."""
        return self._states[layer][-1]

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """The nodes on the path of these tokens after the pending one, as far as they were drafted."""
        path: list[int] = []
        for token in tokens:
            parent = path[-1] if path else ROOT
            edges = enumerate(zip(self.parents, self.tokens, strict=True))
            found = next((node for node, edge in edges if edge == (parent, token)), None)
            if found is None:
                break
            path.append(found)
        return path

    def keep(self, nodes: Sequence[int]) -> None:
        """Commit the pending token and a path of nodes; for a walk through the whole depth on a cache of its own."""
        self.cache.keep(0, [0, *(node + 1 for node in nodes)])

    def _run(self, tokens: Sequence[int], offset: int, tree: Tree | None, first: int = 0) -> Tensor:
        """Run tokens from one layer to be kept to the next, and keep the states of those from number ``first`` on."""
        layered = self.layered
        ids = torch.tensor([list(tokens)], device=layered.device)
        if self.stop == 0 and layered.embedding_scale is not None:
            state = layered.embed(ids)[:, first:]
            self._states[0].append(state)
            return state
        plan = layered.plan(ids, self.cache, offset=offset, tree=tree)
        state, done = plan.hidden, 0
        for layer in sorted(self._reads):
            state = layered.run(plan, done, layer, state, skip=self.skip)
            self._states[layer].append(state[:, first:])
            done = layer
        return state[:, first:]
