"""Tiny random models of many families, with weights large enough that context matters."""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_SHORT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_WINDOW = 5

FAMILIES: dict[str, hf.PreTrainedConfig] = {
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, **_SHORT),
    "gpt_neox": hf.GPTNeoXConfig(**{**_COMMON, "initializer_range": 0.5}),
    "opt": hf.OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        init_std=0.4,
        **{key: value for key, value in _SHORT.items() if key != "initializer_range"},
    ),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, **_SHORT),
    "falcon_rope": hf.FalconConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=False, **_SHORT),
    "falcon_alibi": hf.FalconConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True, **_SHORT),
    "llama": hf.LlamaConfig(**_COMMON),
    "mistral": hf.MistralConfig(**_COMMON, sliding_window=_WINDOW),
    "qwen2": hf.Qwen2Config(**_COMMON),
    "qwen3": hf.Qwen3Config(**_COMMON, head_dim=8),
    "gemma2": hf.Gemma2Config(**_COMMON, head_dim=8, sliding_window=_WINDOW),
    "gemma3": hf.Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=_WINDOW),
    "phi3": hf.Phi3Config(**_COMMON),
    "olmo2": hf.Olmo2Config(**_COMMON),
    "mixtral": hf.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": hf.GptOssConfig(
        **_COMMON,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granite": hf.GraniteConfig(**_COMMON, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere2": hf.Cohere2Config(**_COMMON, sliding_window=_WINDOW, logit_scale=0.25),
    "mamba": hf.MambaConfig(hidden_size=32, num_hidden_layers=4, state_size=8, **_SHORT),
    "gpt_neo": hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=128,
        window_size=_WINDOW,
        **_SHORT,
    ),
    "mpt": hf.MptConfig(d_model=32, n_layers=4, n_heads=4, max_seq_len=128, **_SHORT),
}
EAGER_ONLY = {"bloom", "gemma2", "gpt_oss", "mamba", "gpt_neo", "mpt"}
REFUSED: dict[str, set[str]] = {
    "mamba": {"cached", "resume", "rollback", "tree", "ragged"},
    "gpt_neo": {"tree", "ragged"},
    "mpt": {"tree"},
}


def build(family: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, the same at every call."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention)
    return model.to(dtype).eval()


def variants() -> list[Any]:
    """Every family with the attention implementations and dtypes that it runs with."""
    found = []
    for family in FAMILIES:
        for attention in ("eager",) if family in EAGER_ONLY else ("eager", "sdpa"):
            for dtype in (torch.float32, torch.bfloat16):
                if family == "mamba" and dtype == torch.bfloat16:
                    continue  # transformers' own reference implementation mixes dtypes there and raises
                name = f"{family}-{attention}-{str(dtype).removeprefix('torch.')}"
                found.append(pytest.param(family, attention, dtype, id=name))
    return found
