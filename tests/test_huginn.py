"""A checkpoint written with the published names, against a recomputation by the published definitions."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from restpoint.errors import RestpointError
from restpoint.model.load import load
from restpoint.model.recurrent.huginn import huginn_config, huginn_weights, load_huginn

HIDDEN, HEADS, INNER, VOCABULARY, LENGTH, BASE = 24, 3, 40, 50, 32, 50_000
SIZE, HALF = HIDDEN // HEADS, HIDDEN // HEADS // 2
PUBLISHED = {
    "model_type": "huginn_raven",
    "n_embd": HIDDEN,
    "n_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "intermediate_size": INNER,
    "block_size": LENGTH,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 6,
    "mean_backprop_depth": 3,
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
    "norm_eps": 1e-6,
    "rope_base": BASE,
    "injection_type": "linear",
    "state_init": "like-init",
    "init_values": {"std": math.sqrt(2 / (5 * HIDDEN)), "embed_scale": math.sqrt(HIDDEN)},
    "eos_token_id": 7,
}


def angles():
    return torch.outer(torch.arange(LENGTH), 1 / BASE ** (torch.arange(0, SIZE, 2) / SIZE))


def published_weights():
    """Random parameters in the published names and shapes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer.wte.weight": (VOCABULARY, HIDDEN), "transformer.adapter.weight": (HIDDEN, 2 * HIDDEN)}
    layers = [("prelude", 2), ("core_block", 4), ("coda", 2)]
    for prefix in [f"transformer.{part}.{number}." for part, count in layers for number in range(count)]:
        shapes |= {
            prefix + "attn.Wqkv.weight": (3 * HIDDEN, HIDDEN),
            prefix + "attn.proj.weight": (HIDDEN, HIDDEN),
            prefix + "attn.qk_bias": (2, 1, HEADS, SIZE),
            prefix + "mlp.fc.weight": (2 * INNER, HIDDEN),
            prefix + "mlp.proj.weight": (HIDDEN, INNER),
        }
        shapes |= {f"{prefix}norm_{number}.weight": (HIDDEN,) for number in range(1, 5)}
    shapes["transformer.ln_f.weight"] = (HIDDEN,)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in weights:
        if "norm_" in name or "ln_f" in name:
            weights[name] += 1
    weights["transformer.adapter.weight"][:, :HIDDEN] *= 0.2  # so that rounding does not grow along the steps
    weights["freqs_cis"] = torch.stack((angles().cos(), angles().sin()), dim=-1)[None, :, None]
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    return weights


class Published:
    """The published forward pass, one text: neighbouring entries of a head turn together, as one complex number."""

    def __init__(self, weights):
        self.weights = {name: value.double() for name, value in weights.items()}

    def norm(self, name, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weights[name]

    def layer(self, prefix, x):
        w = lambda name: self.weights[prefix + name]  # noqa: E731
        entered = self.norm(prefix + "norm_1.weight", x)
        q, k, v = (entered @ part.T for part in w("attn.Wqkv.weight").split(HIDDEN))
        q, k = (
            self.turn(heads.view(-1, HEADS, SIZE) + bias) for heads, bias in zip((q, k), w("attn.qk_bias"), strict=True)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(SIZE)
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        law = scores.masked_fill(hidden, -math.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", law, v.view(-1, HEADS, SIZE)).reshape(-1, HIDDEN)
        x = self.norm(prefix + "norm_2.weight", attended @ w("attn.proj.weight").T + x)
        gate, up = (self.norm(prefix + "norm_3.weight", x) @ w("mlp.fc.weight").T).split(INNER, dim=-1)
        return self.norm(prefix + "norm_4.weight", (gate * gate.sigmoid() * up) @ w("mlp.proj.weight").T + x)

    def turn(self, heads):
        turned = torch.view_as_complex(heads.reshape(*heads.shape[:-1], HALF, 2).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles()), angles())[: len(heads), None]
        return torch.view_as_real(turned).flatten(2)

    def logits(self, ids, state, steps):
        e = self.weights["transformer.wte.weight"][ids] * math.sqrt(HIDDEN)
        for number in range(2):
            e = self.layer(f"transformer.prelude.{number}.", e)
        for _ in range(steps):
            state = torch.cat((state, e), -1) @ self.weights["transformer.adapter.weight"].T
            for number in range(4):
                state = self.layer(f"transformer.core_block.{number}.", state)
        x = self.norm("transformer.ln_f.weight", state)
        for number in range(2):
            x = self.layer(f"transformer.coda.{number}.", x)
        return self.norm("transformer.ln_f.weight", x) @ self.weights["lm_head.weight"].T


def write(folder, weights, **changes):
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    names = sorted(weights)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")


def test_a_published_folder_loads_by_its_name_without_its_code(tmp_path, reference):
    weights = published_weights()
    write(tmp_path, weights, auto_map={"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"})
    (tmp_path / "raven_modeling_minimal.py").write_text("raise SystemExit('this code was run')")
    reference.tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    assert loaded.model.model.embed_tokens.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded.model(ids).logits, load_huginn(tmp_path)(ids).logits)
    with pytest.raises(RestpointError, match="device_map: a Huginn checkpoint goes to one device"):
        load(str(tmp_path), device_map="auto")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_published_checkpoint_gives_the_published_logits(tmp_path, attention):
    weights = published_weights()
    write(tmp_path, weights)
    model = load_huginn(tmp_path, attention=attention)
    ids = torch.randint(VOCABULARY, (2, 12))
    with torch.no_grad():
        for steps in (1, 5):
            output = model(ids, num_steps=steps, output_states=True)
            for row in range(2):
                expected = Published(weights).logits(ids[row], output.states[0][row].double(), steps)
                torch.testing.assert_close(output.logits[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert not model.training
    assert model.config.mean_recurrence == 6
    assert model.config.gradient_steps == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # the first state: cut off at three deviations, and scaled as the embeddings are
    assert model.config.state_std == pytest.approx(math.sqrt(2 / 5))


def test_what_was_loaded_can_be_saved_and_generates(tmp_path):
    write(tmp_path, published_weights())
    model = load_huginn(tmp_path, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = torch.randint(VOCABULARY, (1, 5))
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] <= 9


def test_an_untied_head_is_its_own(tmp_path):
    weights = published_weights() | {"lm_head.weight": torch.randn(VOCABULARY, HIDDEN)}
    write(tmp_path, weights, tie_embeddings=False)
    torch.testing.assert_close(load_huginn(tmp_path).lm_head.weight.detach(), weights["lm_head.weight"])


def test_checkpoints_that_are_refused(tmp_path):
    with pytest.raises(RestpointError, match=r"has no config\.json"):
        load_huginn(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with pytest.raises(RestpointError, match=r"has no \.safetensors files"):
        load_huginn(tmp_path)
    config, weights = huginn_config(PUBLISHED), published_weights()
    for changes, message in (
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"injection_type": "add"}, "injection_type is 'add'"),
        ({"test_time_noise": 0.1}, "test_time_noise is 0.1"),
    ):
        with pytest.raises(RestpointError, match=message):
            huginn_config(PUBLISHED | changes)
    without = {name: value for name, value in weights.items() if name != "transformer.coda.1.norm_3.weight"}
    with pytest.raises(RestpointError, match=r"model\.coda\.1\.norm_3\.weight is missing in the files and \(24,\)"):
        huginn_weights(without, config)
    with pytest.raises(RestpointError, match=r"transformer\.h\.0 has no place"):
        huginn_weights(weights | {"transformer.h.0": torch.zeros(1)}, config)
    with pytest.raises(RestpointError, match=r"Wqkv\.weight of the shape"):
        huginn_weights(weights | {"transformer.prelude.0.attn.Wqkv.weight": torch.zeros(5, HIDDEN)}, config)
    with pytest.raises(RestpointError, match="does not follow rope_base"):
        huginn_weights(weights, huginn_config(PUBLISHED | {"rope_base": 100.0}))
    with pytest.raises(RestpointError, match="freqs_cis has the shape"):
        huginn_weights(weights | {"freqs_cis": torch.zeros(2, 3)}, config)
