"""What attention does in every layer while a model reads, summed over queries as it goes.

The pattern of all heads of a layer is heads x tokens x tokens numbers; nothing here holds it. Queries are taken in
blocks, each block is given to the family's own eager function, and only sums over queries are kept.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from restpoint.errors import RestpointError

_BLOCK = 1 << 22
"""Attention weights held at a time: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """What one layer's attention did in one pass, for every sequence of the batch.

    Attributes:
        layer: number of the layer, from 0.
        received: mean over the queries that see a position of the weight that they give it; 0 where none sees it.
        entropy: of each query's weights in nats, averaged over queries. Where a family lets a learnt sink take a part
            of the weight, that part is left out of both, as it is from the family's own attention weights.
        value_norms: ‖v_k‖ of the values that each head reads; heads of one group read the same.
    """

    layer: int
    received: Float[Tensor, "batch heads keys"]
    entropy: Float[Tensor, "batch heads"]
    value_norms: Float[Tensor, "batch heads keys"]


@contextmanager
def observing_attention(model: PreTrainedModel, sink: Callable[[LayerAttention], None]) -> Iterator[None]:
    """Within the context, every attention layer that runs hands over what its attention did.

    The model computes what its eager attention computes: the family's own function is called on blocks of queries, so
    scaling, soft caps, windows, learnt sinks and grouped heads are its own. Afterwards, and after an error, the model
    is as before. Sequences must fill the batch: a padded query would count as one.

    Args:
        model: any model whose attention goes through transformers' attention interface; whole passes and single
            layers of it are both observed.
        sink: called once for each attention layer and pass, in the order in which they run.

    Raises:
        RestpointError: the model has no attention, or computes it in a way that cannot be observed.
    """
    _require_interface(model)
    name = f"restpoint_observed_{uuid4().hex}"
    configs: dict[int, Any] = {}  # by identity: layers share theirs, and parts of one model may have their own
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS.register(name, _Observer(sink))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def _require_interface(model: PreTrainedModel) -> None:
    if not any(_eager_function(module) for module in model.modules()) or not model._can_set_attn_implementation():
        raise RestpointError(
            f"model: the attention of {type(model).__name__} cannot be observed, since it does not go through "
            "transformers' attention interface; leave out the measures of attention"
        )


def _eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The eager attention that stands in the same file as an attention module."""
    if "Attention" not in type(module).__name__:
        return None
    return getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)


class _Observer:
    """An attention function of transformers' interface."""

    def __init__(self, sink: Callable[[LayerAttention], None]):
        self.sink = sink
        self.seen: dict[nn.Module, int] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        eager = _eager_function(module)
        if eager is None:
            raise RestpointError(
                f"model: {type(module).__name__} has no eager attention beside it and cannot be observed; "
                "leave out the measures of attention"
            )
        batch, heads, queries = query.shape[:3]
        keys = key.shape[2]
        mask = _additive_mask(module, attention_mask, queries, keys, query)
        received = torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
        viewers = torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
        entropy = torch.zeros(batch, heads, dtype=torch.float32, device=query.device)
        outputs = []
        block = max(1, _BLOCK // (batch * heads * keys))
        for start in range(0, queries, block):
            rows = slice(start, min(start + block, queries))
            part = None if mask is None else mask[:, :, rows]
            biases = {name: _rows(given, rows, queries, keys) for name, given in kwargs.items()}
            output, weights = eager(module, query[:, :, rows], key, value, part, *args, **biases)
            outputs.append(output)
            weights = weights.float()
            received += weights.sum(2)
            entropy += torch.special.entr(weights).sum((2, 3))
            viewers += _visible(part).sum(2) if part is not None else rows.stop - rows.start
        norms = value.float().norm(dim=-1).repeat_interleave(heads // value.shape[1], 1)
        self.sink(LayerAttention(self._number(module), received / viewers.clamp_min(1), entropy / queries, norms))
        return torch.cat(outputs, 1), None

    def _number(self, module: nn.Module) -> int:
        """The layer's own number; in families without, the order in which layers first ran."""
        own = getattr(module, "layer_idx", None)
        return own if isinstance(own, int) else self.seen.setdefault(module, len(self.seen))


def _additive_mask(module: nn.Module, mask: Tensor | None, queries: int, keys: int, query: Tensor) -> Tensor | None:
    """The mask as the eager functions take it, from that of any implementation."""
    if mask is None:
        # As transformers' other implementations read it: no mask in a causal layer means the causal one.
        if queries == 1 or queries != keys or not getattr(module, "is_causal", False):
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    return mask[..., :keys].expand(-1, -1, queries, -1)


def _visible(mask: Float[Tensor, "*rest keys"]) -> Bool[Tensor, "*rest keys"]:
    return mask > torch.finfo(mask.dtype).min / 2


def _rows(given: Any, rows: slice, queries: int, keys: int) -> Any:
    """Those rows of a keyword that is a table of queries and keys; every other one as it is."""
    if isinstance(given, Tensor) and given.ndim == 4 and given.shape[-2:] == (queries, keys):
        return given[..., rows, :]
    return given
