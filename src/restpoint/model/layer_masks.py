"""The masks of a model's layers: what each expects, read off those that the model builds, and what it is given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.masks import Layout, MaskKind, by_slot
from restpoint.model.stack import LayerStack


class LayerMasks:
    """What the layers of a model are given to tell who sees whom.

    Args:
        stack: the layers.
        config: of the language model.
        cache: makes an empty cache.
        device: where tokens go.

    Attributes:
        kinds: the kind of mask that each layer expects; None where it takes none.
        position_bias: whether layers are given a bias by position beside their masks (ALiBi).

    Raises:
        RestpointError: what a layer sees changes with the position, or is neither all before nor a window.
    """

    def __init__(
        self, stack: LayerStack, config: PreTrainedConfig, cache: Callable[[], SlotCache], device: torch.device
    ):
        self.stack = stack
        self.device = device
        self.position_bias = False
        self.kinds = self._read(config, cache)

    def told(self, layout: Layout | None) -> Tensor | None:
        """The mask given to the model's own code: a 4-D one is passed through, which saves building it."""
        if all(kind is None for kind in self.kinds):
            return None
        if layout is not None and self.position_bias:
            return torch.ones(layout.slots.shape[0], layout.length, dtype=torch.long, device=layout.slots.device)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def replace(self, arguments: list[dict[str, Any]], layout: Layout, dtype: torch.dtype) -> None:
        """Put the masks of a pass into its layers' arguments."""
        built: dict[MaskKind, Tensor | None] = {}
        biases: dict[int, Tensor] = {}
        for kind, keywords in zip(self.kinds, arguments, strict=True):
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
    def _read(self, config: PreTrainedConfig, cache: Callable[[], SlotCache]) -> list[MaskKind | None]:
        """The kind of mask that each layer expects, read off the masks that the model builds itself."""
        if "attention_mask" not in self.stack.argument_names:
            return [None] * len(self.stack.layers)
        sizes = [value for key, value in vars(config).items() if "window" in key or "chunk" in key]
        past = 3 + max([size for size in sizes if isinstance(size, int)], default=1)
        kinds = self._kinds_after(past, cache())
        if self._kinds_after(past + 1, cache()) != kinds:
            raise RestpointError("model: the visible span of a layer changes with position (chunked attention)")
        return kinds

    def _kinds_after(self, past: int, cache: SlotCache) -> list[MaskKind | None]:
        cache.seen = past
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        told = torch.ones(1, past + 2, dtype=torch.long, device=self.device)
        prelude = self.stack.prelude(ids, torch.zeros_like(ids), cache, told)
        kinds: dict[int, MaskKind | None] = {}
        for keywords in prelude.arguments:
            mask = keywords.get("attention_mask")
            self.position_bias |= keywords.get("alibi") is not None
            if id(mask) not in kinds:
                kinds[id(mask)] = None
                if isinstance(mask, Tensor) and mask.ndim == 4:
                    kinds[id(mask)] = MaskKind.read(mask, past)
        return [kinds[id(keywords.get("attention_mask"))] for keywords in prelude.arguments]
