"""Checkpoints that load and are no causal language model, or not all of one."""

from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from restpoint.errors import RestpointError
from restpoint.model.explain import NO_TOKENIZER

_LANGUAGE_MODEL_HEADS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")


def require_causal(name: str, config: PreTrainedConfig) -> None:
    """Refuse by the config alone, before any weights are fetched."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    written = config.architectures or []
    kind = f"{config.model_type}, {', '.join(written) or type(config).__name__}"
    advice = "restpoint needs a decoder-only causal language model: give another model"
    if getattr(config, "is_encoder_decoder", False):
        raise RestpointError(f"model {name!r} is an encoder-decoder ({kind}); {advice}")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if any(head == expected.__name__ or head.endswith(_LANGUAGE_MODEL_HEADS) for head in written):
            return
        # Left are other heads and the bare stack, which is fine for a decoder if its weights are complete.
        bare = all(head.endswith("Model") for head in written)
        if bare and getattr(config, "is_decoder", None) is not False:
            return
    raise RestpointError(f"model {name!r} is not a causal language model ({kind}); {advice}")


def require_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse the empty tokenizer that transformers makes up for a checkpoint without one."""
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:
        raise RestpointError(f"model {name!r} {NO_TOKENIZER}")


def require_complete(name: str, config: PreTrainedConfig, missing: set[str], causal: bool) -> None:
    """Refuse random weights, but for a pooler: a bare stack is built with one, and its layers do not need it."""
    wanted = missing if causal else {weight for weight in missing if "pooler" not in weight}
    if wanted:
        some = ", ".join(sorted(wanted)[:3]) + (", .." if len(wanted) > 3 else "")
        what, remedy = (
            ("a causal language model", "give a complete checkpoint with its language-model head")
            if causal
            else ("its layers", "give a complete checkpoint")
        )
        raise RestpointError(
            f"model {name!r} ({config.model_type}) lacks {len(wanted)} weights of {what} ({some}): {remedy}"
        )


@torch.inference_mode()
def require_blind_to_the_future(name: str, model: PreTrainedModel) -> None:
    """Refuse a stack whose earlier tokens see later ones; a GPT-NeoX says `is_decoder: false` and is fine."""
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise RestpointError(
            f"model {name!r} is not a causal language model ({model.config.model_type}: earlier tokens"
            " see later ones): give another model, or set is_decoder in its config.json"
        )
