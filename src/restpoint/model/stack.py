"""The layer stack inside a Hugging Face causal LM, and what the model itself hands to each layer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from restpoint.errors import RestpointError
from restpoint.model.versions import cache_name


@dataclass(frozen=True)
class Prelude:
    """What the model computes before its first layer.

    Attributes:
        hidden: h_0, the input of the first layer.
        arguments: for each layer, the keyword arguments that the model gives it beside the hidden state.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    arguments: list[dict[str, Any]]


class _Tap:
    """Stands in for one layer while the model's own forward runs: notes the arguments, computes nothing."""

    def __init__(self, stack: "LayerStack", index: int):
        self.stack = stack
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        kwargs.update(zip(stack.argument_names, args, strict=False))
        hidden = kwargs.pop(stack.argument_names[0])
        if self.index == 0:
            if stack.injected is not None:
                hidden = stack.injected
            stack.tapped_hidden = hidden
        stack.tapped_arguments.append(kwargs)
        return hidden if stack.outputs == 0 else (hidden, *(None,) * (stack.outputs - 1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stack.layers[self.index], name)


class LayerStack:
    """The list of layers of a causal LM, found in its module tree.

    The *prelude* runs the model's own backbone with the layer list shadowed, in the owner's instance ``__dict__``, by
    taps that return their input: embeddings, rotary tables and every layer's arguments come from the model's own
    code, no layer runs, and neither weights nor config are touched.

    Args:
        model: a causal LM in evaluation mode.

    Raises:
        RestpointError: the model has no list of transformer layers that could be found.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.owner, self.attribute = _find(model)
        self.layers: list[nn.Module] = list(getattr(self.owner, self.attribute))
        signature = inspect.signature(type(self.layers[0]).forward)
        self.argument_names = list(signature.parameters)[1:]
        self.outputs = 0
        self.backbone: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        accepted = inspect.signature(type(self.backbone).forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.cache_argument = cache_name(type(self.backbone).forward)
        self.injected: Tensor | None = None
        self.tapped_hidden: Tensor | None = None
        self.tapped_arguments: list[dict[str, Any]] = []
        self._tapping = False

    @contextmanager
    def tapped(self, injected: Tensor | None = None) -> Iterator[None]:
        """Shadow the layers by taps; with ``injected``, the first tap returns that instead of its input."""
        if self._tapping:
            raise RestpointError("model: a prelude is already running on it; use one LayeredModel per thread")
        self._tapping = True
        self.injected, self.tapped_hidden, self.tapped_arguments = injected, None, []
        self.owner.__dict__[self.attribute] = [_Tap(self, index) for index in range(len(self.layers))]
        try:
            yield
        finally:
            del self.owner.__dict__[self.attribute]
            self.injected = self.tapped_hidden = None
            self._tapping = False

    @torch.no_grad()
    def prelude(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Prelude:
        """Run the model up to its first layer.

        Args:
            ids: token ids.
            positions: position of each token; None leaves them to the model.
            cache: the cache that the layers will write to, or None for a pass without one.
            mask: what the model is told about visibility; layers' own masks are replaced afterwards.
        """
        keywords: dict[str, Any] = {
            "input_ids": ids,
            self.cache_argument: cache,
            "use_cache": cache is not None,
        }
        if self.takes_positions and positions is not None:
            keywords["position_ids"] = positions
        if mask is not None:
            keywords["attention_mask"] = mask
        with self.tapped():
            self.backbone(**keywords)
            assert self.tapped_hidden is not None
            return Prelude(self.tapped_hidden, self.tapped_arguments)

    @torch.no_grad()
    def injected_logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the model's own code after its last layer, given that layer's output."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self.tapped(injected=hidden):
            return self.model(input_ids=ids, use_cache=False).logits


def _find(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Owner and attribute name of the longest list of transformer layers below the decoder."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    for top in (root, model):
        found = [
            (len(child), owner, name)
            for owner in top.modules()
            for name, child in owner.named_children()
            if isinstance(child, nn.ModuleList)
            and len(child) > 1
            and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
        ]
        if found:
            _, owner, name = max(found, key=lambda entry: entry[0])
            return owner, name
    raise RestpointError(
        f"model: no list of two or more transformer layers found in {type(model).__name__}; "
        "decode it with its own generate(), or pass a decoder-only causal LM"
    )
