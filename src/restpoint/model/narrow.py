"""Run a model's own code with other matrix products and attention, without touching its weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from restpoint.errors import RestpointError
from restpoint.model import kernels

_NAME = "restpoint_narrow"
_MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_KNOWN_TENSORS = {"position_ids", "cache_position"}


class NarrowProducts:
    """Packed copies of a model's linear weights, and the modes that put them in the place of the originals.

    Products that read one input one after the other (queries, keys and values; gate and up) become one product over
    all their outputs.

    Args:
        model: its parameters are copied, not changed.
    """

    def __init__(self, model: PreTrainedModel):
        kernels.load()
        self.model = model
        self._owned = {id(parameter) for parameter in model.parameters()}
        self._groups: list[_Group] = []
        self._place: dict[int, tuple[_Group, int]] = {}

    @property
    def bytes(self) -> int:
        """Memory that the packed copies take."""
        return sum(group.packed.numel() * group.packed.element_size() for group in self._groups)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the products of one pass, then pack their weights."""
        recorder = _Recorder(self._owned)
        with recorder, narrow_attention(self.model):
            yield
        runs: list[list[_Product]] = []
        placed: set[int] = set()
        for product in recorder.products:
            if id(product.parameter) in placed:
                continue
            placed.add(id(product.parameter))
            if runs and runs[-1][0].reads_with(product):
                runs[-1].append(product)
            else:
                runs.append([product])
        self._groups = [_Group(run) for run in runs]
        self._place = {
            id(product.parameter): (group, index)
            for group in self._groups
            for index, product in enumerate(group.products)
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute with the packed weights and the kernels."""
        with _Replacer(self._place), narrow_attention(self.model):
            yield


@contextmanager
def narrow_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's layers call the kernels for attention, through the interface that transformers has for it."""
    AttentionInterface.register(_NAME, _attend)
    configs: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What layers call; a tensor whose part in attention is not known (a sink, a bias) is refused."""
    for name, given in others.items():
        if isinstance(given, Tensor) and name not in _KNOWN_TENSORS:
            raise RestpointError(f"compile: attention with {name} cannot be compiled: leave compile out")
    shown = attention_mask[:, 0]
    if shown.dtype != torch.bool:
        shown = shown > torch.finfo(shown.dtype).min / 2
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return kernels.attention(query, key, value, shown, scale, float(softcap or 0.0)), None


class _Product:
    """One linear map as a pass calls it."""

    def __init__(self, x: Tensor, parameter: Tensor, weight: Tensor, bias: Tensor | None):
        self.x = x
        self.parameter = parameter
        self.weight = weight
        self.bias = bias

    def reads_with(self, other: "_Product") -> bool:
        """Whether both read the same input and can be one product."""
        return self.x is other.x and (self.bias is None) == (other.bias is None)


class _Group:
    """Linear maps of one input, packed as one."""

    def __init__(self, products: list[_Product]):
        self.packed = kernels.pack(torch.cat([product.weight.detach() for product in products]))
        self.bias = (
            torch.cat([p.bias.detach() for p in products if p.bias is not None])
            if products[0].bias is not None
            else None
        )
        self.sizes = [product.weight.shape[0] for product in products]
        self.products = products
        for product in products:
            product.x = product.weight = torch.empty(0)  # the parameter stays, so that its identity does


class _Linears(TorchFunctionMode, ABC):
    """Sees every linear map whose weight is a parameter of the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs:
            found = self.product(args[0], args[1], args[1], args[2] if len(args) > 2 else None)
        elif func is torch.addmm and not kwargs:
            bias, x, weight = args
            found = self.product(x, weight, weight.t(), bias) if isinstance(weight, Tensor) else None
        elif func in _MATRIX_PRODUCTS and not kwargs and len(args) == 2:
            found = self.transposed(*args)
        else:
            found = None
        return func(*args, **kwargs) if found is None else found

    def transposed(self, x: Any, other: Any) -> Tensor | None:
        """``x @ weight.T``, as some families write it: the second factor is a view of the parameter."""
        base = other._base if isinstance(other, Tensor) else None
        if base is None or base.ndim != 2 or other.shape != base.shape[::-1] or other.stride() != base.stride()[::-1]:
            return None
        return self.product(x, base, base, None)

    @abstractmethod
    def product(self, x: Tensor, parameter: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product computed otherwise, or None to leave it as it is."""


class _Recorder(_Linears):
    def __init__(self, owned: set[int]):
        super().__init__()
        self.owned = owned
        self.products: list[_Product] = []

    def product(self, x: Tensor, parameter: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if id(parameter) in self.owned and kernels.packs(weight) and x.dtype == weight.dtype:
            self.products.append(_Product(x, parameter, weight, bias))


class _Replacer(_Linears):
    def __init__(self, place: dict[int, tuple[_Group, int]]):
        super().__init__()
        self.place = place
        self.x: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    def product(self, x: Tensor, parameter: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        found = self.place.get(id(parameter))
        if found is None:
            return None
        group, index = found
        if index == 0:
            whole = kernels.linear(x, group.packed, group.bias, sum(group.sizes))
            self.x = x
            self.parts = dict(enumerate(whole.split(group.sizes, -1))) if len(group.sizes) > 1 else {0: whole}
        elif x is not self.x or index not in self.parts:
            raise RestpointError(
                "compile: the model's products come in another order from pass to pass: leave compile out"
            )
        return self.parts.pop(index)
