"""The attention of whole texts, as measures take it."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from restpoint.errors import RestpointError
from restpoint.model.attention_taps import LayerAttention, observing_attention
from restpoint.trajectory.measure import Attention


def stack_attention(observed: Sequence[LayerAttention]) -> list[Attention]:
    """Put what the layers of one pass handed over together, one `Attention` for each sequence of the batch.

    Layers are ordered by their numbers; those without attention are not among them.

    Raises:
        RestpointError: nothing was observed, one layer was observed twice, or layers differ in heads or positions.
    """
    layers = sorted(observed, key=lambda seen: seen.layer)
    if not layers:
        raise RestpointError("observed: no attention ran while it was observed; run the model within the context")
    numbers = [seen.layer for seen in layers]
    if len(set(numbers)) < len(numbers):
        raise RestpointError("observed: a layer ran more than once; stack the observations of one pass at a time")
    if len({seen.received.shape for seen in layers}) > 1:
        raise RestpointError("observed: layers differ in heads or positions and make no table; compare them singly")
    received = torch.stack([seen.received for seen in layers], 1)
    entropy = torch.stack([seen.entropy for seen in layers], 1)
    norms = torch.stack([seen.value_norms for seen in layers], 1)
    return [Attention(*parts) for parts in zip(received, entropy, norms, strict=True)]


@torch.no_grad()
def attention_of(model: PreTrainedModel, ids: Int[Tensor, "batch seq"]) -> list[Attention]:
    """Read texts of one length with a model and return each one's attention.

    Raises:
        RestpointError: the model's attention cannot be observed.
    """
    observed: list[LayerAttention] = []
    with observing_attention(model, observed.append):
        model.base_model(input_ids=ids, use_cache=False)
    return stack_attention(observed)
