"""A model to be surveyed, of any kind, and its twin with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.model.attention_taps import observing_attention
from restpoint.model.layered import LayeredModel
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.watch import WatchedRecurrence
from restpoint.model.watch import WatchedLayers
from restpoint.trajectory.measure import Readout
from restpoint.trajectory.options import SurveyOptions


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A model to be surveyed.

    Attributes:
        name: of the checkpoint.
        model: any model of ``transformers``.
        tokenizer: None where it reads no text.
        untrained: whether its weights are random.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    untrained: bool = False

    @property
    def iterates(self) -> bool:
        """Whether the model iterates one block of layers."""
        return isinstance(self.model, RecurrentDepthForCausalLM)

    @property
    def hidden_size(self) -> int:
        """Of the states, by the config; 0 where it does not say."""
        return int(getattr(self.model.config.get_text_config(), "hidden_size", 0))

    def layered(self) -> LayeredModel | None:
        """The model layer by layer with its head; None where it is no causal LM whose head can be found and checked."""
        if self.model.get_output_embeddings() is None or not self.model.can_generate():
            return None
        if self.iterates:  # its layers do not run once, one after another
            return None
        try:
            return LayeredModel(self.model)
        except RestpointError:
            return None

    def watched(self, options: SurveyOptions) -> WatchedLayers:
        """The stack whose states are measured: all of a model that iterates a block, unless one list is named.

        Raises:
            RestpointError: there is no such list, or layers inside an iteration are asked for where there is none.
        """
        if isinstance(self.model, RecurrentDepthForCausalLM) and not (options.part or options.layers):
            return WatchedRecurrence(self.model, options.inner_layers)
        if options.inner_layers:
            raise RestpointError(
                "inner_layers: only a model that iterates a block, watched as a whole, has layers inside an iteration; "
                "leave the option out"
            )
        return WatchedLayers(self.model, options.part or "", options.layers or "")

    def head(self) -> "Head | None":
        """Final norm and unembedding; None where there is none that could be found and checked."""
        if isinstance(self.model, RecurrentDepthForCausalLM):
            model, weight = self.model, self.model.lm_head.weight
            return Head(lambda states: model.lm_head(model.model.norm(states.to(weight))), weight.detach())
        layered = self.layered()
        return None if layered is None else Head(layered_readout(layered), layered.unembedding.weight.detach())

    def attention_refused(self) -> str:
        """Why the model's attention cannot be observed; empty where it can, for texts."""
        if self.iterates:
            return "a layer of the core attends once at every step, and the steps of a layer make no table of layers"
        if self.tokenizer is None:
            return "only texts are read for it"
        try:
            with observing_attention(self.model, lambda _layer: None):
                return ""
        except RestpointError as error:
            return str(error).removeprefix("model: ").partition(";")[0]


@dataclass(frozen=True, eq=False)
class Head:
    """What turns states into logits.

    Attributes:
        readout: final norm and unembedding.
        weight: of the unembedding.
    """

    readout: Readout
    weight: Float[Tensor, "vocabulary width"]


def layered_readout(layered: LayeredModel) -> Readout:
    """Logits of any layer's states, by the final norm and the unembedding."""
    return lambda states: layered.logits(states[None].to(layered.dtype))[0]


def untrained_twin(subject: Surveyed, seed: int = 0) -> Surveyed:
    """The same architecture with random weights, as the model's own code initialises them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind: Any = type(subject.model)
        model = kind(subject.model.config)
    model = model.to(dtype=subject.model.dtype, device=subject.model.device).eval().requires_grad_(False)
    return Surveyed(subject.name, model, subject.tokenizer, untrained=True)
