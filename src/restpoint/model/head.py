"""From the last layer's output to logits: found at load, checked against the model's own logits."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from restpoint.errors import RestpointError
from restpoint.memory_order import for_one_row
from restpoint.model.stack import LayerStack


class Head:
    """The modules after the stack, and the unembedding with what follows it.

    ``logits = after(unembedding(rest_state(h_L)))``, where the *rest state* is what the modules after the stack (final
    norm, output projection) make of h_L: the vector that the unembedding reads.

    Where these pieces cannot reproduce the model's logits, ``direct`` is False and logits come by injection: the
    model's own forward with h_L in place of its layers' output. That is exact for every family, and slower.

    Args:
        stack: the model's layer stack.
        hidden: an h_L, as calibration input.
        tail: modules that the model ran after its last layer, in order.
        raw: output of the unembedding in that pass.
        logits: the model's logits in that pass.
    """

    def __init__(self, stack: LayerStack, hidden: Tensor, tail: list[nn.Module], raw: Tensor | None, logits: Tensor):
        self.stack = stack
        self.unembedding = stack.model.get_output_embeddings()
        self.tail = [module for module in tail if module is not self.unembedding]
        self.after: Callable[[Tensor], Tensor] | None = None
        self.direct = False
        if raw is None or not isinstance(self.unembedding, nn.Linear):
            return
        scale = float(logits.float().abs().max()) + 1.0
        tolerance = 4 * torch.finfo(logits.dtype).eps * scale
        config = stack.model.config.get_text_config(decoder=True)
        self.after = min(
            _candidates(config), key=lambda after: float((after(raw).float() - logits.float()).abs().max())
        )
        with torch.no_grad():
            difference = (self._direct(hidden).float() - logits.float()).abs().max()
        self.direct = bool(difference <= tolerance)

    @classmethod
    def find(cls, stack: LayerStack, ids: Int[Tensor, "1 seq"]) -> "Head":
        """One small pass of the model itself: what its layers return, and which modules come after them.

        Raises:
            RestpointError: its logits are not finite.
        """
        outputs: list[Any] = []
        tail: list[nn.Module] = []
        raw: list[Tensor] = []
        hooks = [stack.layers[-1].register_forward_hook(lambda _m, _a, output: outputs.append(output))]
        for child in stack.owner.children():
            hooks.append(child.register_forward_hook(lambda m, _a, _o: tail.append(m) if outputs else None))

        def note_raw(_module: nn.Module, _args: Any, output: Tensor) -> None:
            raw.append(output)

        unembedding: Any = stack.model.get_output_embeddings()
        hooks.append(unembedding.register_forward_hook(note_raw))
        try:
            logits = stack.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        require_finite(logits)
        output = outputs[0]
        stack.outputs = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if isinstance(output, tuple) else output
        return cls(stack, hidden, tail, raw[0] if raw else None, logits)

    def rest_state(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch rest"]:
        """What the unembedding reads: the final norm (and projection) of h_L."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden

    def unembed(
        self, rest: Float[Tensor, "*batch rest"], weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Float[Tensor, "*batch vocab"]:
        """Logits of rest states, over the whole vocabulary or over the rows in ``weight`` (see :meth:`rows`)."""
        assert self.after is not None
        assert isinstance(self.unembedding, nn.Linear)
        if weight is None:
            return self.after(self.unembedding(rest.to(self.unembedding.weight.dtype)))
        return self.after(nn.functional.linear(rest.to(weight.device, weight.dtype), weight, bias))

    @torch.no_grad()
    def rows(
        self, tokens: Int[Tensor, " tokens"] | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """A copy of the unembedding's weight and bias: of some tokens only, or in another dtype.

        It lies in memory as one row's product is fastest.
        """
        assert isinstance(self.unembedding, nn.Linear)
        weight, bias = self.unembedding.weight, self.unembedding.bias
        index = slice(None) if tokens is None else tokens.to(weight.device)
        weight = for_one_row(weight[index].to(dtype).t()).t()
        return weight, None if bias is None else bias[index].to(dtype).contiguous()

    def logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Next-token logits of states after the last layer."""
        return self._direct(hidden) if self.direct else self.stack.injected_logits(hidden)

    def _direct(self, hidden: Tensor) -> Tensor:
        return self.unembed(self.rest_state(hidden))


def require_finite(logits: Tensor) -> None:
    """Refuse a model that gives no numbers."""
    if not bool(torch.isfinite(logits).all()):
        raise RestpointError("model: its logits are not finite (NaN or infinity); check the weights and the dtype")


def _candidates(config: Any) -> list[Callable[[Tensor], Tensor]]:
    """What families do to raw logits, from config values; which one holds is decided numerically."""
    candidates: list[Callable[[Tensor], Tensor]] = [lambda raw: raw]
    if cap := getattr(config, "final_logit_softcapping", None):
        candidates.append(lambda raw: torch.tanh(raw / cap) * cap)
    if divisor := getattr(config, "logits_scaling", None):
        candidates.append(lambda raw: raw / divisor)
    if factor := getattr(config, "logit_scale", None):
        candidates.append(lambda raw: raw * factor)
    return candidates
