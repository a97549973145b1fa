"""Layers beside their heads as particles: against transformers' own states, and models of which the answer is known."""

import math

import pytest
import torch

from families import build
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.confront import Confrontation, confront
from restpoint.trajectory.observables import cosines

IDS = torch.tensor([[5, 17, 33, 60, 8, 21, 40, 3]])


def mean_cosine(cloud: torch.Tensor) -> float:
    every = cosines(cloud)
    return float(every[~torch.eye(len(every), dtype=torch.bool)].mean())


def bare(family: str) -> LayeredModel:
    """A model whose attention is its content part alone: no rotation, no MLP, no bias."""
    model = build(family)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.zero_()
        for name, weight in model.named_parameters():
            if "down_proj" in name or (name.endswith("bias") and "layers" in name):
                weight.zero_()
    return LayeredModel(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_levels_are_the_models_own(family: str) -> None:
    model = build(family)
    layered = LayeredModel(model)
    found = confront(layered, [IDS, IDS[:, :5]])
    assert (found.texts, found.tokens) == (2, 13)
    assert len(found.levels) == layered.depth + 1 == len(found.steps) + 1
    with torch.no_grad():
        hidden = [model(ids, output_hidden_states=True).hidden_states for ids in (IDS, IDS[:, :5])]
    for level in found.levels[:-1]:
        clouds = [states[level.level][0, 1:].double() for states in hidden]
        assert level.mean_cosine == pytest.approx(sum(map(mean_cosine, clouds)) / 2, abs=1e-5)
        assert level.norm == pytest.approx(sum(float(cloud.norm(dim=-1).mean()) for cloud in clouds) / 2, rel=1e-5)
    for step, before, after in zip(found.steps, found.levels, found.levels[1:], strict=False):
        assert step.layer_contraction == pytest.approx(after.mean_cosine - before.mean_cosine, abs=1e-9)
        assert step.to_first == pytest.approx(after.to_first - before.to_first, abs=1e-9)


def test_particles_are_the_layers_where_nothing_else_is() -> None:
    """Without rotation and MLP a layer is its heads as particles, up to the rounding of float32."""
    found = confront(bare("llama"), [IDS])
    for step in found.steps:
        assert step.particle_contraction == pytest.approx(step.attention_contraction, abs=1e-4)
        assert step.particle_contraction == pytest.approx(step.layer_contraction, abs=1e-4)
        assert step.particle_to_first == pytest.approx(step.to_first, abs=1e-4)
        assert step.alignment == pytest.approx(1.0, abs=1e-4)
        assert step.added_by_rest < 1e-4 < step.added_by_attention
    assert found.agreeing == (4, 4)
    whole = confront(LayeredModel(build("llama")), [IDS])
    assert all(step.added_by_rest > 1e-3 for step in whole.steps)
    assert any((step.alignment or 1.0) < 0.999 for step in whole.steps)


def test_identity_values_draw_tokens_together() -> None:
    """With O V = I and even attention a layer adds the mean of the tokens so far: the energy rises, angles shrink."""
    layered = bare("llama")
    with torch.no_grad():
        for layer in layered.stack.layers:
            attention = layer.self_attn
            attention.q_proj.weight.zero_()
            heads, inner = attention.config.num_attention_heads, attention.head_dim
            groups = attention.config.num_key_value_heads
            values = torch.randn(groups, inner, attention.v_proj.weight.shape[1])
            attention.v_proj.weight.copy_(values.flatten(0, 1))
            shared = values.repeat_interleave(heads // groups, 0).flatten(0, 1)
            attention.o_proj.weight.copy_(torch.linalg.pinv(shared.double()).float())
    found = confront(layered, [IDS])
    assert found.violations == ()
    assert all(step.layer_contraction > 0 for step in found.steps)
    assert all((step.particle_contraction or 0) > 0 > step.to_first for step in found.steps)


def test_heads_that_cannot_be_read_are_named() -> None:
    found = confront(LayeredModel(build("gpt_neo")), [IDS])
    assert all(step.particle_contraction is None and step.alignment is None for step in found.steps)
    assert found.agreeing == (0, 0)
    assert any("scaled" in reason for reason in found.left_out)
    assert all(math.isfinite(step.attention_contraction) for step in found.steps)


def test_violations_are_where_the_energy_falls() -> None:
    found = confront(LayeredModel(build("llama")), [IDS])
    energies = [level.log_energy for level in found.levels]
    assert found.violations == tuple(layer for layer in range(4) if energies[layer + 1] < energies[layer])
    assert isinstance(found, Confrontation)


@pytest.mark.parametrize(
    ("texts", "beta", "says"),
    [([], 1.0, "there is none"), ([IDS[:, :2]], 1.0, "at least 3 tokens"), ([IDS], -1.0, "positive inverse")],
)
def test_bad_input(texts: list[torch.Tensor], beta: float, says: str) -> None:
    with pytest.raises(RestpointError, match=says):
        confront(LayeredModel(build("llama")), texts, beta=beta)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(RestpointError, match="no self-attention"):
        confront(LayeredModel(build("mamba")), [IDS])
