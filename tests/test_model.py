"""Partial depth on many families, against the models' own code."""

import copy

import pytest
import torch

from families import FAMILIES, REFUSED, VOCABULARY, build, variants
from restpoint.errors import RestpointError
from restpoint.model.check import Capabilities, check
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import MaskKind, Tree


@pytest.fixture(scope="module")
def random_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.*")  # the families' own chatter
@pytest.mark.parametrize(("family", "attention", "dtype"), variants())
def test_capabilities_of_every_family(family: str, attention: str, dtype: torch.dtype) -> None:
    model = build(family, attention, dtype)
    before = copy.deepcopy(model.config.to_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    capabilities = check(LayeredModel(model))
    assert set(capabilities.refused()) == REFUSED.get(family, set()), capabilities.refused()
    for _name, capability in capabilities.table():
        if capability.supported:
            assert capability.difference is not None
            assert capability.difference <= capability.tolerance
        else:
            assert capability.reason
    assert model.config.to_dict() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_states_are_the_models_own(family: str, random_ids: torch.Tensor) -> None:
    """Against ``output_hidden_states``, whose last entry is after the final norm and therefore left out."""
    model = build(family)
    layered = LayeredModel(model)
    plan = layered.plan(random_ids)
    states = [plan.hidden]
    hidden = layered.run(plan, keep=states)
    output = model(random_ids, output_hidden_states=True, use_cache=False)
    for own, native in zip(states[:-1], output.hidden_states[:-1], strict=True):
        torch.testing.assert_close(own, native, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layered.logits(hidden), output.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "gpt_neo", "falcon_alibi"])
def test_cached_blocks_beyond_the_window(family: str, random_ids: torch.Tensor) -> None:
    """Blocks of every size over a text of several windows, with rejected tokens between them."""
    model = build(family)
    layered = LayeredModel(model)
    expected = model(random_ids, use_cache=False).logits
    cache = layered.cache(capacity=8)
    start, seen = 0, []
    for count in (7, 1, 2, 5, 1, 3, 4, 1):
        wrong = (random_ids[:, start : start + count] + 1) % VOCABULARY
        layered.run(layered.plan(wrong, cache))
        seen.append(layered.logits(layered.run(layered.plan(random_ids[:, start : start + count], cache))))
        cache.commit([count])
        start += count
    torch.testing.assert_close(torch.cat(seen, 1), expected, atol=2e-5, rtol=1e-4)


def test_mask_kinds_are_read_off_the_model() -> None:
    gemma = LayeredModel(build("gemma3"))
    windows = [kind.window for kind in gemma.mask_kinds if kind is not None]
    types = FAMILIES["gemma3"].layer_types
    assert windows == [5 if kind == "sliding_attention" else None for kind in types]
    falcon = LayeredModel(build("falcon_alibi"))
    assert all(kind == MaskKind("additive", None, biased=True) for kind in falcon.mask_kinds)
    assert all(kind is None for kind in LayeredModel(build("mamba")).mask_kinds)


def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a mask that lets a query see rejected or future slots refuses capabilities."""
    from restpoint.model import masks

    layered = LayeredModel(build("llama", "sdpa"))
    honest = check(layered)
    assert not honest.refused()

    def sees_everything(self: masks.Layout, window: int | None) -> torch.Tensor:
        return torch.ones(*self.slots.shape, self.length, dtype=torch.bool)

    monkeypatch.setattr(masks.Layout, "visible", sees_everything)
    refused = check(layered).refused()
    assert {"cached", "resume", "rollback", "tree", "ragged"} <= set(refused)
    assert "differs" in refused["tree"]


def test_lookahead_gives_the_same_as_a_fresh_prelude(random_ids: torch.Tensor) -> None:
    layered = LayeredModel(build("qwen3", "sdpa"))
    assert layered.plans_ahead
    sliced, fresh = layered.cache(), layered.cache()
    for start, count in ((0, 6), (6, 1), (7, 4), (11, 1)):
        block = random_ids[:, start : start + count]
        ahead = layered.plan(block, sliced)
        layered._query_axes, kept = None, layered._query_axes
        native = layered.plan(block, fresh)
        layered._query_axes = kept
        assert torch.equal(ahead.hidden, native.hidden)
        for own, other in zip(ahead.arguments, native.arguments, strict=True):
            assert own.keys() == other.keys()
            assert all(
                torch.equal(a, b) for a, b in zip(own["position_embeddings"], other["position_embeddings"], strict=True)
            )
        assert torch.equal(layered.run(ahead), layered.run(native))
        sliced.commit([count])
        fresh.commit([count])


def test_lookahead_is_refused_where_arguments_depend_on_the_past() -> None:
    for family in ("bloom", "falcon_alibi", "gpt2", "opt"):
        assert not LayeredModel(build(family)).plans_ahead
    config = copy.deepcopy(FAMILIES["llama"])
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    import transformers

    assert not LayeredModel(transformers.LlamaForCausalLM(config).eval()).plans_ahead


def test_work_is_counted_where_layers_run(random_ids: torch.Tensor) -> None:
    model = build("llama")
    layered = LayeredModel(model)
    calls = [0] * layered.depth
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    layered.work.layer_calls = layered.work.token_layers = 0
    plan = layered.plan(random_ids[:, :3])
    hidden = layered.run(plan, stop=2)
    layered.run(plan, start=2, hidden=hidden, skip={3})
    assert calls == [1, 1, 1, 0]
    assert layered.work.layer_calls == 3
    assert layered.work.token_layers == 9


def test_tree_of_kept_path(random_ids: torch.Tensor) -> None:
    tree = Tree((-1, 0, 0, 2))
    assert tree.depths() == [0, 1, 1, 2]
    assert tree.ancestors().tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]


def test_cache_grows_and_keeps(random_ids: torch.Tensor) -> None:
    model = build("llama")
    layered = LayeredModel(model)
    cache = layered.cache(capacity=4)
    for token in random_ids[0]:
        hidden = layered.run(layered.plan(token.view(1, 1), cache))
        cache.commit([1])
    assert cache.capacity >= 24
    expected = model(random_ids).logits[:, -1:]
    torch.testing.assert_close(layered.logits(hidden), expected, atol=1e-5, rtol=1e-5)


def test_head_by_injection_agrees(random_ids: torch.Tensor) -> None:
    layered = LayeredModel(build("gemma2"))
    assert layered.head.direct
    hidden = layered.run(layered.plan(random_ids))
    direct = layered.logits(hidden)
    layered.head.direct = False
    torch.testing.assert_close(layered.logits(hidden), direct, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([3, 90, 17])
    weight, bias = layered.head.rows(rows)
    cut = layered.head.unembed(layered.head.rest_state(hidden), weight, bias)
    torch.testing.assert_close(cut, direct[..., rows], atol=1e-5, rtol=1e-5)


def test_errors_name_the_argument() -> None:
    model = build("llama")
    with pytest.raises(RestpointError, match=r"training mode.*eval\(\)"):
        LayeredModel(model.train())
    broken = build("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RestpointError, match="not finite"):
        LayeredModel(broken)
    layered = LayeredModel(build("llama"))
    with (
        layered.stack.tapped(),
        pytest.raises(RestpointError, match="one LayeredModel per thread"),
        layered.stack.tapped(),
    ):
        pass
    assert layered.stack.attribute not in layered.stack.owner.__dict__


def test_capability_table_lists_every_check() -> None:
    names = [name for name, _ in check(LayeredModel(build("llama"))).table()]
    assert names == list(Capabilities.__dataclass_fields__)
