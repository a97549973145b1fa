"""What attention does in a layer, against the model's own patterns; sinks, against texts made by hand."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import VOCABULARY, build
from restpoint.errors import RestpointError
from restpoint.model import attention_taps
from restpoint.model.attention_taps import LayerAttention, observing_attention
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.attention import attention_of, stack_attention
from restpoint.trajectory.measure import Attention, Trajectory
from restpoint.trajectory.sinks import Sinks, repeated_token_check, residual_peaks, sink_rate

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "mistral", "gpt_oss", "opt", "gpt_neox"]


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return BertModel(config).eval()


def some_ids(batch: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def expected(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and entropy from the whole pattern of the eager implementation."""
    pattern = torch.stack(model(input_ids=ids, output_attentions=True).attentions, 1).double()
    received = torch.zeros(pattern.shape[:-1], dtype=torch.float64)
    for key in range(pattern.shape[-1]):
        seeing = pattern[..., key] > 0  # what is masked has weight exactly 0
        received[..., key] = (pattern[..., key] * seeing).sum(-1) / seeing.sum(-1)
    entropy = -(pattern * pattern.clamp_min(1e-300).log()).sum(-1).mean(-1)
    return received, entropy


@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
@torch.no_grad()
def test_received_is_that_of_the_eager_pattern(family: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_taps, "_BLOCK", block)
    model = bert() if family == "bert" else build(family)
    ids = some_ids()
    found = attention_of(model, ids)
    received, entropy = expected(model, ids)
    for row in range(2):
        torch.testing.assert_close(found[row].received.double(), received[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[row].entropy.double(), entropy[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
@torch.no_grad()
def test_outputs_are_those_of_the_eager_implementation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_taps, "_BLOCK", 1000)
    model = bert() if family == "bert" else build(family)
    ids = some_ids()
    plain = model(input_ids=ids)[0]
    with observing_attention(model, lambda _seen: None):
        observed = model(input_ids=ids)[0]
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_windows_are_seen_by_the_queries_in_them_only() -> None:
    """In a window of five, uniform weights give a position that five queries see the mean of what these give."""
    model = build("mistral")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    received = attention_of(model, some_ids())[0].received
    weights = [[1 / min(query + 1, 5) for query in range(key, min(key + 5, 14))] for key in range(14)]
    means = torch.tensor([sum(row) / len(row) for row in weights])
    torch.testing.assert_close(received, means.expand_as(received), rtol=0, atol=1e-6)


@torch.no_grad()
def test_value_norms_are_those_of_each_heads_group() -> None:
    model = build("llama")
    ids = some_ids(batch=1)
    values: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: values.append(out))
    found = attention_of(model, ids)[0].value_norms[1]
    hook.remove()
    norms = values[0][0].view(14, 2, 8).norm(dim=-1).T  # four heads in two groups
    torch.testing.assert_close(found, norms[[0, 0, 1, 1]])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_single_layers_are_observed_whatever_masks_they_are_given(family: str, implementation: str) -> None:
    """A layered pass builds the masks of the model's own implementation, and runs part of the layers."""
    layered = LayeredModel(build(family, implementation))
    ids = some_ids(batch=1)
    whole = attention_of(layered.model, ids)[0]
    observed: list[LayerAttention] = []
    plan = layered.plan(ids)
    plain = layered.run(plan)
    with observing_attention(layered.model, observed.append):
        half = layered.run(plan, 0, 2)
        assert [seen.layer for seen in observed] == [0, 1]
        torch.testing.assert_close(layered.run(plan, 2, hidden=half), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stack_attention(observed)[0].received, whole.received, rtol=0, atol=1e-5)


@torch.no_grad()
def test_everything_is_as_before_also_after_an_error() -> None:
    model = build("llama", "sdpa")
    names = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    plain = model(input_ids=some_ids())[0]

    def fail(_seen: LayerAttention) -> None:
        raise ValueError("the sink is full")

    with pytest.raises(ValueError, match="the sink is full"), observing_attention(model, fail):
        model(input_ids=some_ids())
    assert model.config._attn_implementation == "sdpa"
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == names
    assert torch.equal(model(input_ids=some_ids())[0], plain)


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt_neo", "falcon_rope"])
def test_families_beside_the_interface_are_refused_by_name(family: str) -> None:
    model = build(family)
    with pytest.raises(RestpointError, match=f"^model: the attention of {type(model).__name__}"):
        attention_of(model, some_ids())
    assert model.config._attn_implementation == "eager"


def test_stacking_refuses_what_is_no_single_pass() -> None:
    seen = LayerAttention(0, torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 2, 3))
    with pytest.raises(RestpointError, match=r"^observed: no attention ran"):
        stack_attention([])
    with pytest.raises(RestpointError, match=r"^observed: a layer ran more than once"):
        stack_attention([seen, seen])
    other = LayerAttention(1, torch.ones(1, 4, 3), torch.ones(1, 4), torch.ones(1, 4, 3))
    with pytest.raises(RestpointError, match=r"^observed: layers differ"):
        stack_attention([seen, other])
    later = LayerAttention(1, 2 * seen.received, seen.entropy, seen.value_norms)
    assert stack_attention([later, seen])[0].received[:, 0, 0].tolist() == [1, 2]


# --- sinks ---


def text(
    index: int, length: int = 64, layers: int = 3, heads: int = 4, domain: str = "code", ids: bool = True
) -> Trajectory:
    generator = torch.Generator().manual_seed(index)
    received = torch.rand(layers, heads, length, generator=generator) * 0.6
    norms = torch.rand(layers, heads, length, generator=generator) + 0.5
    entropy = torch.rand(layers, heads, generator=generator)
    states = torch.randn(layers + 1, length, 10, generator=generator)
    states[2:, index % length, 3] = 5000.0
    tokens = torch.randint(0, 20, (length,), generator=generator) if ids else None
    return Trajectory(states, index, tokens, domain, Attention(received, entropy, norms))


def test_measures_match_the_definitions() -> None:
    texts = [text(index) for index in range(5)]
    measure = Sinks(vocabulary=20)
    for trajectory in texts:
        measure.add(trajectory)
    found = measure.results()
    received = torch.stack([trajectory.attention.received for trajectory in texts]).double()
    norms = torch.stack([trajectory.attention.value_norms for trajectory in texts]).double()
    torch.testing.assert_close(found["received.first"], received[..., 0].mean(0))
    torch.testing.assert_close(found["sink_rate"], (received[..., 0] > 0.3).double().mean((0, 2)))
    torch.testing.assert_close(found["dormant.code"], (received[..., 0] > 0.5).double().mean(0))
    lower_median = norms.sort(-1).values[..., 31]
    torch.testing.assert_close(found["value_drain"], (norms[..., 0] / lower_median).mean((0, 2)))
    dispersed, sinks, seen = torch.zeros(3, dtype=torch.float64), [0] * 20, [0] * 20
    for trajectory in texts:
        for position in range(1, 49):  # 48 is the last one that 16 queries see
            layers = [bool((trajectory.attention.received[layer, :, position] > 0.3).any()) for layer in range(3)]
            dispersed += torch.tensor(layers) / 5
            seen[int(trajectory.ids[position])] += 1
            sinks[int(trajectory.ids[position])] += any(layers)
    torch.testing.assert_close(found["dispersed"], dispersed)
    assert len(found["dispersed.ids"]) == 16
    for token, count, rate in zip(
        found["dispersed.ids"].long(), found["dispersed.counts"], found["dispersed.rates"], strict=True
    ):
        assert (sinks[token], sinks[token] / seen[token]) == (count, rate)
    assert found["dispersed.counts"].tolist() == sorted(sinks, reverse=True)[:16]


def test_peaks_are_found_where_they_were_put() -> None:
    texts = [text(index) for index in (0, 7)]
    measure = Sinks()
    for trajectory in texts:
        measure.add(trajectory)
    found = measure.results()
    assert found["peaks"].tolist() == [0, 0, 1, 1]
    assert found["peaks.positions"].nonzero().tolist() == [[2, 0], [2, 7], [3, 0], [3, 7]]
    assert found["peaks.dimensions"].nonzero().tolist() == [[2, 3], [3, 3]]
    assert found["massive"] == 1
    weight = (texts[0].attention.received[..., 0] + texts[1].attention.received[..., 7]).mean(-1) / 2
    torch.testing.assert_close(found["massive.received"], weight.double())
    assert float(found["magnitude"][2]) > 1000 > float(found["magnitude"][0])


def test_a_peak_must_be_large_in_both_ways() -> None:
    states = torch.full((4, 9), 0.1)
    states[0, 0] = -101.0  # 1010 times the median
    states[1, 1] = 99.0
    assert residual_peaks(states).nonzero().tolist() == [[0, 0]]
    assert not residual_peaks(states * 0.9).any()
    assert residual_peaks(torch.stack([states, states + 1])).nonzero().tolist() == [[0, 0, 0]]


def test_other_lengths_are_passed_over_and_counted() -> None:
    measure = Sinks()
    measure.add(text(0, length=63))
    assert measure.results() == {"skipped": 1}
    measure.add(text(1, length=65))
    measure.add(text(2))
    assert (measure.results()["skipped"], measure.results()["texts"]) == (2, 1)
    assert Sinks().results() == {}


def test_domains_are_told_apart() -> None:
    measure = Sinks()
    texts = [text(0), text(1, domain="prose"), text(2, domain="prose", ids=False)]
    for trajectory in texts:
        measure.add(trajectory)
    found = measure.results()
    dormant = [(trajectory.attention.received[..., 0] > 0.5).double() for trajectory in texts]
    torch.testing.assert_close(found["dormant.code"], dormant[0])
    torch.testing.assert_close(found["dormant.prose"], (dormant[1] + dormant[2]) / 2)


def test_halves_merge_to_one_pass() -> None:
    whole, first, second = (Sinks(vocabulary=20) for _ in range(3))
    for index in range(8):
        trajectory = text(index, length=64 if index % 3 else 60, domain="prose" if index < 5 else "code")
        whole.add(trajectory)
        (first if index < 5 else second).add(trajectory)
    first.merge(second)
    assert first.results().keys() == whole.results().keys()
    for name, value in whole.results().items():
        torch.testing.assert_close(first.results()[name], value, rtol=1e-10, atol=1e-10)


def test_arguments_are_refused_by_name() -> None:
    with pytest.raises(RestpointError, match=r"^length is 1"):
        Sinks(length=1)
    with pytest.raises(RestpointError, match=r"^threshold is 30"):
        Sinks(threshold=30.0)
    with pytest.raises(RestpointError, match=r"^vocabulary is -1"):
        Sinks(vocabulary=-1)
    with pytest.raises(RestpointError, match=r"^vocabulary is 5 and a text has the id"):
        Sinks(vocabulary=5).add(text(0))
    with pytest.raises(RestpointError, match=r"^trajectory: it has no attention"):
        Sinks().add(Trajectory(torch.ones(2, 64, 3), 0))
    with pytest.raises(RestpointError, match=r"^token is 96"):
        repeated_token_check(build("llama"), token=VOCABULARY)


# --- one token, repeated ---


def test_repeated_token_is_uniform_where_scores_know_no_positions() -> None:
    model = build("llama")
    model.model.rotary_emb.inv_freq.zero_()
    found = repeated_token_check(model, token=7)
    harmonic = math.fsum(1 / count for count in range(1, 65))
    assert found.uniform == pytest.approx(harmonic / 64) == pytest.approx(0.0741, abs=5e-5)
    torch.testing.assert_close(found.received_first, torch.full((4, 4), found.uniform), rtol=0, atol=1e-5)
    assert found.sink_rate.tolist() == [0] * 4


def test_repeated_token_under_rotations_leaves_all_states_equal() -> None:
    found = repeated_token_check(build("llama"), token=7)
    assert float(found.spread.max()) < 1e-4
    # Rotations favour some distances over others: single heads are not uniform.
    assert float((found.received_first - found.uniform).abs().max()) > 0.01


def test_embedded_positions_tell_the_first_position_apart() -> None:
    assert float(repeated_token_check(build("gpt2"), token=7).spread.min()) > 0.1


def test_bundled_model_has_no_sink_in_a_repeated_token(reference) -> None:
    found = repeated_token_check(reference.model, token=500)
    assert float(found.spread.max()) < 1e-4
    assert found.sink_rate.tolist() == [0] * 16
    assert float(found.received_first.mean()) == pytest.approx(found.uniform, abs=0.02)


def test_sink_rate() -> None:
    received = torch.tensor([[0.2, 0.31], [0.3, 0.9], [0.4, 0.0], [0.5, 0.0]])
    assert sink_rate(received).tolist() == [0.5, 0.5]
    assert sink_rate(received, 0.45).tolist() == [0.25, 0.25]
