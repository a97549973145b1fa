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
from restpoint.model.cache import Address, KeysWrittenError, SlotCache
from restpoint.model.head import Head
from restpoint.model.lookahead import Lookahead, query_axes
from restpoint.model.masks import Layout, MaskKind, Tree, by_slot
from restpoint.model.stack import LayerStack, Prelude

_LOOKAHEAD = 64
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Plan:
    """One pass, prepared: any of its layers can be run, in any number of segments.

    Attributes:
        hidden: h_0 of the pass.
        arguments: keyword arguments of every layer.
        cache: where keys and values go, if anywhere.
        address: which slots are written and shown.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    arguments: list[dict[str, Any]]
    cache: SlotCache | None
    address: Address


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
        self.mask_kinds = self._read_masks()
        self.embedding_scale = self._embedding_scale()
        self._query_axes = self._find_query_axes()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

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
        prelude = self.stack.prelude(ids, positions, cache, self._told_mask(layout))
        self._replace_masks(prelude.arguments, layout, prelude.hidden.dtype)
        return Plan(prelude.hidden, prelude.arguments, cache, _address(layout, rows))

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
        layers = self.stack.layers
        for index in range(start, self.depth if stop is None else stop):
            if index in skip:
                continue
            output = layers[index](state, **plan.arguments[index])
            state = output[0] if isinstance(output, tuple) else output
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
                    self.stack.layers[index](hidden, **plan.arguments[index])
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
            ahead = torch.arange(first, first + _LOOKAHEAD, device=ids.device)[None]
            cache.seen = first
            prelude = self.stack.prelude(torch.zeros_like(ahead), ahead, cache, self._told_mask(None))
            lookahead = cache.lookahead = Lookahead(first, _LOOKAHEAD, prelude.arguments, self._query_axes or [])
        arguments = lookahead.arguments(positions)
        hidden = self.embed(ids)
        self._replace_masks(arguments, layout, hidden.dtype)
        return Plan(hidden, arguments, cache, _address(layout, rows))

    def _told_mask(self, layout: Layout | None) -> Tensor | None:
        """The mask given to the model's own code: a 4-D one is passed through, which saves building it."""
        if all(kind is None for kind in self.mask_kinds):
            return None
        if layout is not None and self._has_position_bias:
            return torch.ones(layout.slots.shape[0], layout.length, dtype=torch.long, device=layout.slots.device)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def _replace_masks(self, arguments: list[dict[str, Any]], layout: Layout, dtype: torch.dtype) -> None:
        built: dict[MaskKind, Tensor | None] = {}
        biases: dict[int, Tensor] = {}
        for kind, keywords in zip(self.mask_kinds, arguments, strict=True):
            if kind is None:
                continue
            native = keywords.get("attention_mask")
            if kind not in built:
                bias = native[:, :, -1:] if kind.biased and native is not None else None
                built[kind] = layout.mask(kind, bias, dtype)
            keywords["attention_mask"] = built[kind]
            alibi = keywords.get("alibi")
            if alibi is not None and (layout.trees is not None or not layout.uniform):
                if id(alibi) not in biases:
                    biases[id(alibi)] = by_slot(alibi, layout.slot_positions())
                keywords["alibi"] = biases[id(alibi)]

    @torch.no_grad()
    def _calibrate(self) -> Head:
        """One small pass of the model itself: what its layers return, and which modules come after them."""
        outputs: list[Any] = []
        tail: list[nn.Module] = []
        raw: list[Tensor] = []
        hooks = [self.stack.layers[-1].register_forward_hook(lambda _m, _a, output: outputs.append(output))]
        for child in self.stack.owner.children():
            hooks.append(child.register_forward_hook(lambda m, _a, _o: tail.append(m) if outputs else None))

        def note_raw(_module: nn.Module, _args: Any, output: Tensor) -> None:
            raw.append(output)

        hooks.append(self.unembedding.register_forward_hook(note_raw))
        ids = torch.arange(1, 6, device=self.device)[None] % self.vocabulary_size
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if not bool(torch.isfinite(logits).all()):
            raise RestpointError("model: its logits are not finite (NaN or infinity); check the weights and the dtype")
        output = outputs[0]
        self.stack.outputs = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if isinstance(output, tuple) else output
        return Head(self.stack, hidden, tail, raw[0] if raw else None, logits)

    @torch.no_grad()
    def _read_masks(self) -> list[MaskKind | None]:
        """The kind of mask that each layer expects, read off the masks that the model builds itself."""
        self._has_position_bias = False
        if "attention_mask" not in self.stack.argument_names:
            return [None] * self.depth
        sizes = [value for key, value in vars(self.config).items() if "window" in key or "chunk" in key]
        past = 3 + max([size for size in sizes if isinstance(size, int)], default=1)
        kinds = self._mask_kinds_after(past)
        if self._mask_kinds_after(past + 1) != kinds:
            raise RestpointError("model: the visible span of a layer changes with position (chunked attention)")
        return kinds

    def _mask_kinds_after(self, past: int) -> list[MaskKind | None]:
        cache = self.cache()
        cache.seen = past
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        told = torch.ones(1, past + 2, dtype=torch.long, device=self.device)
        prelude = self.stack.prelude(ids, torch.zeros_like(ids), cache, told)
        kinds: dict[int, MaskKind | None] = {}
        for keywords in prelude.arguments:
            mask = keywords.get("attention_mask")
            self._has_position_bias |= keywords.get("alibi") is not None
            if id(mask) not in kinds:
                kinds[id(mask)] = None
                if isinstance(mask, Tensor) and mask.ndim == 4:
                    kinds[id(mask)] = MaskKind.read(mask, past)
        return [kinds[id(keywords.get("attention_mask"))] for keywords in prelude.arguments]

    @torch.no_grad()
    def _embedding_scale(self) -> float | None:
        """S where h_0 = s * embedding(ids) to the last bit at every position, else None."""
        ids = torch.arange(2, 7, device=self.device)[None] % self.vocabulary_size
        embedded = self.embedding(ids)
        positions = torch.arange(5, device=self.device)[None]
        seen = [self.stack.prelude(ids, positions + shift, None, None).hidden for shift in (0, 3)]
        if any(hidden.shape != embedded.shape for hidden in seen):
            return None
        norm = float((embedded.float() ** 2).sum())
        ratio = float((seen[0].float() * embedded.float()).sum()) / norm if norm > 0 else 1.0
        rounded = float(torch.tensor(ratio, dtype=self.dtype))
        for scale in (1.0, rounded, round(ratio, 6)):
            if all(torch.equal(embedded * scale, hidden) for hidden in seen):
                return scale
        return None

    @torch.no_grad()
    def _find_query_axes(self) -> list[dict[str, Any]] | None:
        """For each layer argument, the axis that runs over queries; None where arguments cannot be sliced."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        rope_types = {rope.get("rope_type")} | {
            value.get("rope_type") for value in rope.values() if isinstance(value, dict)
        }
        if self.embedding_scale is None or self._has_position_bias or rope_types & _LENGTH_DEPENDENT_ROPE:
            return None
        total = 37
        seen: list[Prelude] = []
        for count in (3, 5):
            cache = self.cache()
            cache.seen = total - count
            ids = torch.zeros(1, count, dtype=torch.long, device=self.device)
            positions = torch.arange(total - count, total, device=self.device)[None]
            seen.append(self.stack.prelude(ids, positions, cache, self._told_mask(None)))
        return query_axes(seen[0].arguments, seen[1].arguments, (3, 5), total)


def _address(layout: Layout, rows: Sequence[int] | None) -> Address:
    if rows is not None:
        return Address(layout.length, slots=layout.slots, rows=torch.tensor(list(rows), device=layout.slots.device))
    if layout.uniform:
        return Address(layout.length, start=layout.length - layout.slots.shape[1])
    return Address(layout.length, slots=layout.slots)
