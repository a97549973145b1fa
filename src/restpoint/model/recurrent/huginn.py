"""Public recurrent-depth checkpoints of the Huginn family, read into `RecurrentDepthForCausalLM`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.config import RecurrentDepthConfig

MODEL_TYPE = "huginn_raven"
_PARTS = {"prelude": "prelude", "core_block": "core", "coda": "coda"}
_LAYER = re.compile(r"transformer\.(prelude|core_block|coda)\.(\d+)\.(.+)")
_WHOLE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.adapter.weight": "model.adapter.weight",
    "transformer.adapter.bias": "model.adapter.bias",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_SAME = {
    "attn.proj.weight": "self_attn.o_proj.weight",
    "mlp.proj.weight": "mlp.down_proj.weight",
    **{f"norm_{number}.weight": f"norm_{number}.weight" for number in range(1, 5)},
}


def load_huginn(
    folder: str | Path, dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> RecurrentDepthForCausalLM:
    """Read ``config.json`` and the safetensors files of a folder; nothing of its Python code is run.

    Args:
        folder: as published.
        dtype: of the weights; that of the files if None.
        attention: "sdpa" or "eager".

    Raises:
        RestpointError: a file is missing, or the checkpoint is of another architecture, or its parameters are not
            those that its config says.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach".
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RestpointError(f"folder {str(folder)!r} has no config.json; give the folder of a downloaded checkpoint")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RestpointError(f"folder {str(folder)!r} has no .safetensors files; download the weights in that format")
    config = huginn_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    published: dict[str, Tensor] = {}
    for file in files:
        published.update(load_file(file))
    weights = huginn_weights(published, config)
    return RecurrentDepthForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=weights["model.norm.weight"].dtype if dtype is None else dtype,
        attn_implementation=attention,
    )


def huginn_config(published: Mapping[str, Any]) -> RecurrentDepthConfig:
    """Our settings for those of a published ``config.json``.

    Raises:
        RestpointError: it is of another architecture, or says something that has no counterpart here.
    """
    if published.get("model_type") != MODEL_TYPE:
        raise RestpointError(f"config: model_type is {published.get('model_type')!r}; only {MODEL_TYPE!r} is read here")
    known = {"injection_type": "linear", "block_class_name": "SandwichBlock", "mlp_class_name": "GatedMLP"}
    known |= {"nonlin_name": "SiLU", "test_time_noise": 0, "state_init": "like-init"}
    for name, value in known.items():
        if published.get(name, value) != value:
            raise RestpointError(f"config: {name} is {published[name]!r}; only {value!r} is read here")
    heads = published.get("n_heads", published.get("num_attention_heads"))
    hidden = published.get("n_embd", published.get("hidden_size"))
    if heads is None or hidden is None:
        raise RestpointError("config: n_heads or n_embd is missing; give the published config.json")
    std = (2 / (5 * hidden)) ** 0.5
    initial = {"std": std, "embed_scale": hidden**0.5} | dict(published.get("init_values", {}))
    return RecurrentDepthConfig(
        vocab_size=published["vocab_size"],
        hidden_size=hidden,
        intermediate_size=published["intermediate_size"],
        prelude_layers=published["n_layers_in_prelude"],
        core_layers=published["n_layers_in_recurrent_block"],
        coda_layers=published["n_layers_in_coda"],
        mean_recurrence=published["mean_recurrence"],
        gradient_steps=published.get("mean_backprop_depth", 8),
        # The first state is drawn with the embeddings' deviation and scaled as they are.
        state_init="noise" if initial["std"] > 0 else "zero",
        state_std=initial["std"] * initial["embed_scale"],
        embedding_scale=initial["embed_scale"],
        num_attention_heads=heads,
        num_key_value_heads=published.get("num_key_value_heads", heads),
        qk_bias=published.get("qk_bias", True),
        adapter_bias=published.get("bias", False),
        rms_norm_eps=published.get("norm_eps", 1e-6),
        max_position_embeddings=published["block_size"],
        rope_parameters={"rope_type": "default", "rope_theta": float(published.get("rope_base", 50_000))},
        initializer_range=std,
        tie_word_embeddings=published.get("tie_embeddings", published.get("tie_word_embeddings", True)),
        pad_token_id=published.get("pad_token_id"),
        bos_token_id=published.get("bos_token_id"),
        eos_token_id=published.get("eos_token_id"),
    )


def huginn_weights(published: Mapping[str, Tensor], config: RecurrentDepthConfig) -> dict[str, Tensor]:
    """Our parameters, by our names, of those of a published checkpoint.

    Queries, keys and values come in one matrix, gate and input of the MLP in another. Positions rotate neighbouring
    pairs of a head's entries there and its two halves here, so that rows of queries and keys change places.

    Raises:
        RestpointError: parameters are missing, unknown, or of the wrong shape.
    """
    found: dict[str, Tensor] = {}
    for name, value in published.items():
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            part, number, parameter = layer.groups()
            prefix = f"model.{_PARTS[part]}.{number}."
            found |= {prefix + key: entry for key, entry in _layer(name, parameter, value, config).items()}
        elif name in _WHOLE:
            found[_WHOLE[name]] = value
        elif name == "freqs_cis":
            _check_frequencies(value, config)
        else:
            raise RestpointError(f"weights: {name} has no place in this architecture; give a Huginn checkpoint")
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    with torch.device("meta"):
        expected = {name: value.shape for name, value in RecurrentDepthForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    wrong = sorted(name for name in expected.keys() | found.keys() if _shape(found, name) != expected.get(name))
    if wrong:
        first = wrong[0]
        raise RestpointError(
            f"weights: {first} is {_told(_shape(found, first))} in the files and {_told(expected.get(first))} by the "
            f"config, and {len(wrong) - 1} others differ; give the config.json that belongs to the weights"
        )
    return found


def _layer(name: str, parameter: str, value: Tensor, config: RecurrentDepthConfig) -> dict[str, Tensor]:
    """Parameters of one of our layers from one of theirs."""
    if parameter in _SAME:
        return {_SAME[parameter]: value}
    size = config.head_dim or 0
    queries = config.num_attention_heads * size
    keys = (config.num_key_value_heads or 0) * size
    if parameter == "attn.Wqkv.weight" and value.shape[0] == queries + 2 * keys:
        q, k, v = value.split((queries, keys, keys))
        projections = {"q_proj": _halves(q, size), "k_proj": _halves(k, size), "v_proj": v.contiguous()}
        return {f"self_attn.{key}.weight": entry for key, entry in projections.items()}
    if parameter == "attn.qk_bias" and value.shape[0] == 2:
        biases = (_halves(entry.reshape(-1), size) for entry in value)
        return dict(zip(("self_attn.q_proj.bias", "self_attn.k_proj.bias"), biases, strict=True))
    if parameter == "mlp.fc.weight" and value.shape[0] % 2 == 0:
        gate, up = value.chunk(2)
        return {"mlp.gate_proj.weight": gate.contiguous(), "mlp.up_proj.weight": up.contiguous()}
    raise RestpointError(
        f"weights: {name} of the shape {tuple(value.shape)} has no place in this architecture; give a Huginn checkpoint"
    )


def _halves(rows: Tensor, size: int) -> Tensor:
    """Within each head, the even rows before the odd ones."""
    return rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _check_frequencies(table: Tensor, config: RecurrentDepthConfig) -> None:
    """The checkpoint's cosines and sines at position 1 say which base its positions rotate with."""
    half = (config.head_dim or 0) // 2
    base = (config.rope_parameters or {})["rope_theta"]
    angles = base ** (-torch.arange(half, dtype=torch.float32) / half)
    expected = torch.stack((angles.cos(), angles.sin()), dim=-1)
    if table.ndim != 5 or table.shape[3:] != (half, 2) or table.shape[1] < 2:
        raise RestpointError(f"weights: freqs_cis has the shape {tuple(table.shape)}, which is not that of this config")
    if not torch.allclose(table[0, 1, 0].float().cpu(), expected, atol=1e-2):  # it may have been stored in bfloat16
        raise RestpointError(f"weights: freqs_cis does not follow rope_base {base}; give the config of these weights")


def _shape(found: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return found[name].shape if name in found else None


def _told(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
