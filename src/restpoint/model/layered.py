"""A causal LM, one layer at a time, without a line of its modelling code."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from restpoint.errors import RestpointError
from restpoint.model.cache import KeysWrittenError, SlotCache
from restpoint.model.embedding import find_scale
from restpoint.model.head import Head
from restpoint.model.layer_masks import LayerMasks
from restpoint.model.lookahead import Lookahead, query_axes, rope_depends_on_length
from restpoint.model.masks import Layout, MaskKind, Tree
from restpoint.model.plan import Plan, address_of
from restpoint.model.stack import LayerStack, Prelude

_LOOKAHEAD = 64


@dataclass
class Work:
    """What the layers really did: the count is made where they run.

    Attributes:
        layer_calls: layers run, however many tokens each saw.
        token_layers: layers run, summed over tokens.
    """

    layer_calls: int = 0
    token_layers: int = 0


class LayeredModel:
    """Plan a pass, run any of its layers, read logits at any depth.

    ``plan`` asks the model's own code for everything that layers are given; ``run`` calls the layers; ``logits``
    applies what comes after them. Together they give ``model(ids).logits`` to rounding, and make partial depth,
    resumption at a later layer, skipped layers, rejected drafts, trees and ragged rows possible on one checkpoint.

    What a family can do is established numerically by :func:`restpoint.model.check.check`, not by its name.

    Args:
        model: a causal LM from ``transformers``, in evaluation mode. It is not changed.

    Attributes:
        work: layers run.
        forward_arguments: what else the model's own forward is given.
        refusal: why the model can only be decoded by its own forward, where that is known beforehand; else empty.

    Raises:
        RestpointError: no layer list is found, or its logits are not finite, or its masks follow no known rule.
    """

    refusal: str = ""

    def __init__(self, model: PreTrainedModel):
        if model.training:
            raise RestpointError("model: it is in training mode, so dropout would make results random; call eval()")
        self.model = model
        self.stack = self._take_apart(model)
        self.depth = len(self.stack.layers)
        self.config = model.config.get_text_config(decoder=True)
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.device: torch.device = self.embedding.weight.device
        self.dtype: torch.dtype = model.dtype
        self.work = Work()
        self.forward_arguments: dict[str, Any] = {}
        unembedding = model.get_output_embeddings()
        if unembedding is None:
            raise RestpointError(f"model: {type(model).__name__} has no output embeddings; pass a causal LM")
        self.unembedding = cast(nn.Linear, unembedding)
        self.vocabulary_size = int(self.unembedding.weight.shape[0])
        self.head = self._calibrate()
        self._masks = LayerMasks(self.stack, self.config, self.cache, self.device)
        self.embedding_scale = find_scale(self.stack, self.embedding, self.vocabulary_size)
        depends = self.embedding_scale is None or self._masks.position_bias or rope_depends_on_length(self.config)
        self._query_axes = None if depends else self.argument_axes()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def mask_kinds(self) -> list[MaskKind | None]:
        """The kind of mask that each layer expects; None where it takes none."""
        return self._masks.kinds

    @property
    def plans_ahead(self) -> bool:
        """Whether layer arguments of future positions can be prepared at once and sliced."""
        return self._query_axes is not None

    def cache(self, batch: int = 1, capacity: int = 256) -> SlotCache:
        """An empty cache for ``batch`` rows."""
        return SlotCache(self.depth, batch, capacity)

    @torch.no_grad()
    def plan(
        self,
        ids: Int[Tensor, "batch seq"],
        cache: SlotCache | None = None,
        *,
        offset: int | Sequence[int] = 0,
        tree: Tree | Sequence[Tree] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Plan:
        """Prepare a pass over new tokens.

        Args:
            ids: the tokens, appended to each row of the cache; rows may have different lengths.
            cache: earlier keys and values; None for a pass over the whole sequence that keeps nothing.
            offset: tokens already written after the cache's lengths but not committed (a draft in progress); negative
                where the pass begins with tokens that are committed and lack some of the layers. One for all rows, or
                one for each.
            tree: the tokens are the nodes of this tree from number ``offset`` on, and its first node follows each
                row's last token; or one such tree for each row.
            rows: the rows of the cache that take part, ascending, and whose ``ids`` these are; all if None.
        """
        batch, count = ids.shape
        chosen = range(batch) if rows is None else rows
        offsets = [offset] * batch if isinstance(offset, int) else list(offset)
        bases = [0] * batch
        if cache is not None:
            bases = [cache.lengths[row] + own for row, own in zip(chosen, offsets, strict=True)]
            if len(chosen) == cache.batch:
                rows = None
        uniform = all(base == bases[0] for base in bases)
        trees = (tree,) * batch if isinstance(tree, Tree) else None if tree is None else tuple(tree)
        if cache is not None:
            cache.reserve(max(bases) + count)
        start = torch.tensor(bases, device=ids.device)[:, None]
        slots = start + torch.arange(count, device=ids.device)
        positions = slots
        if trees is not None:
            first = offsets[0]
            depths = [own.depths()[first:] for own in trees]
            positions = start - first + torch.tensor(depths, device=ids.device)
        layout = Layout(slots, positions, max(bases) + count, uniform, trees)
        if cache is not None and uniform and self.plans_ahead and max(offsets[0], 0) + count <= _LOOKAHEAD:
            if trees is None:
                return self._plan_ahead(ids, cache, layout, range(bases[0], bases[0] + count), rows)
            if batch == 1:
                return self._plan_ahead(ids, cache, layout, positions[0].tolist(), rows)
        if cache is not None:
            cache.seen = max(bases)
        prelude = self.stack.prelude(ids, positions, cache, self._masks.told(layout))
        self._masks.replace(prelude.arguments, layout, prelude.hidden.dtype)
        return Plan(prelude.hidden, prelude.arguments, cache, address_of(layout, rows))

    @torch.no_grad()
    def run(
        self,
        plan: Plan,
        start: int = 0,
        stop: int | None = None,
        hidden: Float[Tensor, "batch seq hidden"] | None = None,
        *,
        skip: Collection[int] = (),
        keep: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Run layers ``start .. stop-1`` of a plan and return the state after the last of them.

        Args:
            plan: the prepared pass.
            start: first layer to run.
            stop: layer to stop before; None for the whole depth.
            hidden: state before layer ``start``; None for h_0.
            skip: layers that are left out.
            keep: a list that receives the state after every layer that is run.
        """
        state = plan.hidden if hidden is None else hidden
        if plan.cache is not None:
            plan.cache.address = plan.address
        tokens = state.shape[0] * state.shape[1]
        for index in range(start, self.depth if stop is None else stop):
            if index in skip:
                continue
            state = self._layer(plan, index, state)
            self.work.layer_calls += 1
            self.work.token_layers += tokens
            if keep is not None:
                keep.append(state)
        return state

    @torch.no_grad()
    def write_keys(self, plan: Plan, start: int, hidden: Float[Tensor, "batch seq hidden"]) -> None:
        """Write the keys and values that layers from ``start`` on make of one and the same state; run no more of them.

        Each layer is left as soon as it has handed its keys and values to the cache, before it attends to anything,
        so this costs norms and projections, and is not counted as layers run.

        Args:
            plan: of the tokens, with a cache.
            start: first layer.
            hidden: the state that all of these layers are given.
        """
        if plan.cache is None:
            raise RestpointError("plan: it has no cache to write keys to; plan the pass with one")
        plan.cache.address = plan.address
        plan.cache.only_write = True
        try:
            for index in range(start, self.depth):
                with suppress(KeysWrittenError):
                    self._layer(plan, index, hidden)
        finally:
            plan.cache.only_write = False

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Next-token logits read from states after any layer; after the last one, the model's own."""
        return self.head.logits(hidden)

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "batch seq"], start: int = 0) -> Float[Tensor, "batch seq hidden"]:
        """h_0 of tokens at consecutive positions from ``start`` on; no layer is run."""
        if self.embedding_scale is not None:
            embedded = self.embedding(ids)
            return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale
        positions = start + torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return self.stack.prelude(ids, positions, None, None).hidden

    @torch.no_grad()
    def prelude_at(self, start: int, count: int, cache: SlotCache | None = None) -> Prelude:
        """What layers are given at so many consecutive positions; its masks and h_0 are those of no pass.

        Args:
            start: first position; all before it are taken to be filled.
            count: number of positions.
            cache: the cache that layers will write to; an empty one if None.
        """
        cache = self.cache() if cache is None else cache
        cache.seen = start
        positions = torch.arange(start, start + count, device=self.device)[None]
        return self.stack.prelude(torch.zeros_like(positions), positions, cache, self._masks.told(None))

    def argument_axes(self) -> list[dict[str, Any]] | None:
        """For each layer argument, the axis that runs over queries; None where it depends on more than positions."""
        total, counts = 37, (3, 5)
        first, second = (self.prelude_at(total - count, count).arguments for count in counts)
        return query_axes(first, second, counts, total)

    @torch.no_grad()
    def without_some(self, ids: Int[Tensor, "batch seq"]) -> tuple[frozenset[int], Float[Tensor, "batch seq vocab"]]:
        """Some layers, and logits by the model's own forward in which these pass their inputs through."""
        skip = frozenset(range(self.depth // 2, self.depth // 2 + max(1, self.depth // 4)))

        def pass_through(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden = args[0] if args else kwargs[self.stack.argument_names[0]]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks = [self.stack.layers[index].register_forward_hook(pass_through, with_kwargs=True) for index in skip]
        try:
            return skip, self.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()

    def layers_run(self, output: Any) -> int:
        """Layers that a pass of the model itself has run, by its output."""
        return self.depth

    def _layer(self, plan: Plan, index: int, state: Tensor) -> Tensor:
        """The state after a layer."""
        output = self.stack.layers[index](state, **plan.arguments[index])
        return output[0] if isinstance(output, tuple) else output

    def _take_apart(self, model: PreTrainedModel) -> LayerStack:
        """Where its layers are."""
        return LayerStack(model)

    def _plan_ahead(
        self, ids: Tensor, cache: SlotCache, layout: Layout, positions: Sequence[int], rows: Sequence[int] | None
    ) -> Plan:
        """A plan whose layer arguments are taken from those of the next positions, prepared once for many passes."""
        lookahead = cache.lookahead
        if lookahead is None or not lookahead.covers(positions):
            first = min(*cache.lengths, *positions)
            prelude = self.prelude_at(first, _LOOKAHEAD, cache)
            lookahead = cache.lookahead = Lookahead(first, _LOOKAHEAD, prelude.arguments, self._query_axes or [])
        arguments = lookahead.arguments(positions)
        hidden = self.embed(ids)
        self._masks.replace(arguments, layout, hidden.dtype)
        return Plan(hidden, arguments, cache, address_of(layout, rows))

    @torch.no_grad()
    def _calibrate(self) -> Head:
        """What comes after the last layer, by one small pass of the model itself."""
        return Head.find(self.stack, self._some_ids)

    @property
    def _some_ids(self) -> Int[Tensor, "1 seq"]:
        """Tokens to calibrate on."""
        return torch.arange(1, 6, device=self.device)[None] % self.vocabulary_size
