"""A model to be surveyed, of any kind, and its twin with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.model.attention_taps import observing_attention
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.measure import Readout


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

    def layered(self) -> LayeredModel | None:
        """The model layer by layer with its head; None where it is no causal LM whose head can be found and checked."""
        if self.model.get_output_embeddings() is None or not self.model.can_generate():
            return None
        try:
            return LayeredModel(self.model)
        except RestpointError:
            return None

    def attention_refused(self) -> str:
        """Why the model's attention cannot be observed; empty where it can, for texts."""
        if self.tokenizer is None:
            return "only texts are read for it"
        try:
            with observing_attention(self.model, lambda _layer: None):
                return ""
        except RestpointError as error:
            return str(error).removeprefix("model: ").partition(";")[0]


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
