"""The states between the layers of any Hugging Face model, seen while its own forward runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from restpoint.errors import RestpointError


@dataclass(frozen=True)
class Loop:
    """Where among the states h_0 .. h_L of a model the iterates of one block stand.

    Attributes:
        first: of s_0.
        last: of s_r.
        stride: states from one iterate to the next; above 1 where the layers inside an iteration are recorded too.
    """

    first: int
    last: int
    stride: int = 1

    def iterates(self) -> list[int]:
        """Of s_0, s_1 .. s_r."""
        return list(range(self.first, self.last + 1, self.stride))


class WatchedLayers:
    """One stack of layers of a model: of a decoder, an encoder, a vision transformer, a state-space model, a loop.

    Nothing is changed: hooks note what enters the first layer and what leaves each. A layer that is called several
    times in a pass, as in models that loop, gives a state at every call.

    Args:
        model: any model of ``transformers``, in evaluation mode.
        part: which stack, by a piece of its path in the model (``encoder``, ``decoder``); the decoder's if left out, or
            else the longest.
        path: the exact path of the list of layers, for models whose list is not found.

    Attributes:
        path: of the list of layers.
        layers: its members.
        depths: names of the states h_0 .. h_L, where a number does not say what they are.
        loop: where the states of a block that is iterated stand, if the model has one.

    Raises:
        RestpointError: the model is in training mode, or there is no such list.
    """

    def __init__(self, model: PreTrainedModel, part: str = "", path: str = ""):
        if model.training:
            raise RestpointError("model: it is in training mode, so dropout would make results random; call eval()")
        self.model = model
        self.path = path or _choose(model, part)
        self.layers = _list_at(model, self.path)
        self.depths: list[str] = []
        self.loop: Loop | None = None

    @property
    def length(self) -> int:
        """L: a pass gives L + 1 states."""
        return len(self.layers)

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """A list that gains h_0, h_1, .. h_L, each (batch, tokens, hidden), as a forward runs inside."""
        states: list[Tensor] = []

        def entering(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not states:
                states.append(arguments[0] if arguments else keywords["hidden_states"])

        def leaving(_layer: nn.Module, _arguments: Any, output: Any) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        hooks = [self.layers[0].register_forward_pre_hook(entering, with_kwargs=True)]
        hooks += [layer.register_forward_hook(leaving) for layer in self.layers]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def stacked(self, states: list[Tensor], row: int) -> Tensor:
        """States of one row of a pass, one behind the other: (depth, tokens, hidden) in float32.

        Row by row, because blocks of all rows would be so large that memory is fetched anew for every one of them.

        Raises:
            RestpointError: no layer ran, or states change their shape on the way.
        """
        if len(states) < 2:
            raise RestpointError(f"path: no layer of {self.path} ran in the model's forward; name the stack that does")
        shapes = {tuple(state.shape) for state in states}
        if len(shapes) > 1:
            raise RestpointError(
                f"path: states change shape on their way through {self.path} ({sorted(shapes)}); "
                "name one stage by its path"
            )
        return torch.stack([state[row].float() for state in states])

    def finished(self, states: Float[Tensor, "depth tokens hidden"]) -> Float[Tensor, "depth tokens hidden"]:
        """What the final norm and the unembedding would be given, were each state of a text the last: that state."""
        return states


def stacks(model: PreTrainedModel) -> dict[str, int]:
    """Paths of the lists of layers in a model, with their lengths."""
    return {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    }


def _choose(model: PreTrainedModel, part: str) -> str:
    found = stacks(model)
    told = ", ".join(found) or "none"
    named = {name: length for name, length in found.items() if part in name}
    if not named:
        kind = type(model).__name__
        if part:
            raise RestpointError(f"part: no list of layers in {kind} is of a {part!r}; there are: {told}")
        raise RestpointError(
            f"path: no list of two or more transformer layers found in {kind}; "
            "give the path of one, such as encoder.layer"
        )
    decoders = {name: length for name, length in named.items() if "decoder" in name and len(named) > 1}
    return max(decoders or named, key=lambda name: named[name])


def _list_at(model: PreTrainedModel, path: str) -> list[nn.Module]:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        told = ", ".join(stacks(model)) or "none that could be found"
        raise RestpointError(f"path: {type(model).__name__} has nothing at {path}; lists of layers: {told}") from error
    if not isinstance(found, nn.ModuleList) or len(found) < 2:
        raise RestpointError(f"path: {path} is no list of two or more layers but a {type(found).__name__}")
    return list(found)
