"""The states of a model that iterates a block, from embeddings to coda, seen while its own forward runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from restpoint.errors import RestpointError
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.config import DeepEquilibriumConfig
from restpoint.model.recurrent.layers import Pass
from restpoint.model.versions import causal_mask
from restpoint.model.watch import Loop, WatchedLayers


class WatchedRecurrence(WatchedLayers):
    """All of a recurrent-depth model as one stack: embeddings, prelude, s_0, s_1 .. s_r, coda; r is the config's mean.

    h_0 are the embeddings and h_P = e leaves the prelude. Then come the iterates as they leave the core, before any
    norm, and what leaves the layers of the coda, whose input norm(s_r) is none of the states. From e to s_0 no layer
    runs: s_0 does not depend on the text. A `DeepEquilibriumForCausalLM` has two iterates, the first state and
    the fixed point.

    Args:
        model: a recurrent-depth or a deep equilibrium model, in evaluation mode.
        inner_layers: whether what leaves each layer inside an iteration is a state of its own; the last is s_k.

    Raises:
        RestpointError: the model is in training mode, or it is solved and the layers inside are asked for.
    """

    def __init__(self, model: RecurrentDepthForCausalLM, inner_layers: bool = False):
        if model.training:
            raise RestpointError("model: it is in training mode, so s_0 and r would be random; call eval()")
        self.model = model
        self.inner = model.model
        self.path = "prelude, core, coda"
        self.layers: list[nn.Module] = [*self.inner.prelude, *self.inner.core, *self.inner.coda]
        config = model.config
        solved = isinstance(config, DeepEquilibriumConfig)
        if solved and inner_layers:
            raise RestpointError(
                "inner_layers: the core of this model is solved, not iterated: there are no layers of a step; "
                "leave the option out"
            )
        self.stride = config.core_layers if inner_layers else 1
        steps = 1 if solved else config.mean_recurrence
        first = config.prelude_layers + 1
        self.loop = Loop(first, first + steps * self.stride, self.stride)
        self.depths = [
            "embedding",
            *(f"prelude {number}" for number in range(1, first)),
            "first state" if solved else "step 0",
            *(_step(number, self.stride, solved) for number in range(1, steps * self.stride + 1)),
            *(f"coda {number}" for number in range(1, config.coda_layers + 1)),
        ]

    @property
    def length(self) -> int:
        """L: a pass gives L + 1 states."""
        return len(self.depths) - 1

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """A list that holds h_0, h_1, .. h_L, each (batch, tokens, hidden), when a forward has run inside."""
        states: list[Tensor] = []
        before: list[Tensor] = []  # h_0 .. e
        inside: list[Tensor] = []
        after: list[Tensor] = []
        inner, width = self.inner, self.model.config.hidden_size

        def asking(_model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return arguments, keywords | {"output_states": True}

        def entering(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            before.append(arguments[0])

        def adapting(_adapter: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not before:  # without a prelude, e are the embeddings
                before.append(arguments[0][..., width:])

        def leaving(_model: nn.Module, _arguments: Any, output: Any) -> None:
            iterates = list(output.states)
            states.extend([*before, *(iterates if self.stride == 1 else [iterates[0], *inside]), *after])

        hooks = [
            inner.register_forward_pre_hook(asking, with_kwargs=True),
            inner.register_forward_hook(leaving),
            inner.adapter.register_forward_pre_hook(adapting),
            *(layer.register_forward_hook(_keeping(before)) for layer in inner.prelude),
            *(layer.register_forward_hook(_keeping(after)) for layer in inner.coda),
        ]
        if len(inner.prelude):
            hooks.append(inner.prelude[0].register_forward_pre_hook(entering))
        if self.stride > 1:
            hooks += [layer.register_forward_hook(_keeping(inside)) for layer in inner.core]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def finished(self, states: Float[Tensor, "depth tokens hidden"]) -> Float[Tensor, "depth tokens hidden"]:
        """What the final norm and the unembedding would be given, were the states of a text those of the last step.

        An iterate goes the model's own way, through the norm and the coda: what a coda makes of s_r is h_L, and
        so what its own states come to. Those of the prelude are left as they are, as in any other model.
        """
        assert self.loop is not None
        first, last = self.loop.first, self.loop.last
        looped = states[first : last + 1].to(self.inner.adapter.weight)
        positions = torch.arange(states.shape[1], device=looped.device)[None]
        mask = causal_mask(self.model.config, looped, None, None, positions)
        passing = Pass(self.inner.rotary_emb(looped, positions), mask, None)
        hidden = self.inner.norm(looped)
        for layer in self.inner.coda:
            hidden = layer(hidden, passing)
        rest = states[-1:].expand(len(states) - last - 1, -1, -1)
        return torch.cat([states[:first], hidden.to(states), rest])


def _keeping(kept: list[Tensor]) -> Any:
    """A hook that keeps what leaves a layer."""
    return lambda _layer, _arguments, output: kept.append(output)


def _step(number: int, stride: int, solved: bool) -> str:
    if solved:
        return "fixed point"
    whole, part = divmod(number, stride)
    return f"step {whole}" if part == 0 else f"step {whole + 1}, layer {part}"
