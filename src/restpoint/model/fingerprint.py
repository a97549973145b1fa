"""What tells one checkpoint from another."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "use_cache", "output_hidden_states")


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """SHA-256 of the model's config, its tokenizer's vocabulary and rows of its unembedding.

    Independent of dtype, device and attention implementation: weights are compared after rounding to bfloat16. A model
    without an unembedding is told by the largest of its matrices.
    """
    digest = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _NOT_THE_MODEL and not key.startswith("_")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    if tokenizer is not None:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    unembedding = model.get_output_embeddings()
    if unembedding is not None:
        weight = unembedding.weight
        assert isinstance(weight, Tensor)
    else:
        weight = max((own for own in model.parameters() if own.ndim == 2), key=lambda own: own.numel())
    rows = torch.linspace(0, weight.shape[0] - 1, 256, device=weight.device).long()
    digest.update(weight.detach()[rows].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()
