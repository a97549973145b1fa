import pytest
import torch
from transformers import AutoModelForCausalLM

from looped import TINY, equilibrium, pieces, tokens
from restpoint.equilibrium.exits import RelativeStep
from restpoint.errors import RestpointError
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM, recurrent_states
from restpoint.model.recurrent.config import DeepEquilibriumConfig, RecurrentDepthConfig
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM

CLOSE = {"rtol": 1e-7, "atol": 1e-7}


def unrolled(model):
    """The same weights, iterated plainly from zeros."""
    names = set(RecurrentDepthConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    settings = {name: value for name, value in model.config.to_dict().items() if name in names}
    plain = RecurrentDepthForCausalLM(RecurrentDepthConfig(**settings)).double().eval()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
@torch.no_grad()
def test_the_fixed_point_is_where_plain_iteration_ends(solver):
    model, ids = equilibrium(solver=solver), tokens()
    output = model(ids, output_states=True)
    assert bool(model.model.solution.converged.all())
    plain = unrolled(model)
    expected = plain(ids, num_steps=60)
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(output.states[-1], recurrent_states(plain, ids, 60)[-1], **CLOSE)
    assert not bool(output.states[0].any())
    assert not torch.allclose(plain(ids, num_steps=2).logits, expected.logits, atol=1e-3)


@torch.no_grad()
def test_what_ran_is_counted():
    model, ids = equilibrium(), tokens()
    calls = []
    hook = model.model.core[0].register_forward_hook(lambda _m, given, _o: calls.append(given[0].shape[0]))
    output = model(ids)
    hook.remove()
    assert output.computed == 11 * sum(calls)
    assert output.steps.shape == (3, 11)
    assert int(output.steps[:, 0].sum()) == sum(calls)
    assert len({int(step) for step in output.steps[:, 0]}) > 1  # texts stop by themselves, and are left out


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 1, 5, 2)])
def test_a_text_in_pieces_gives_the_logits_of_the_whole(sizes):
    model, ids = equilibrium(), tokens()
    cache = model.new_cache(capacity=4)
    found = torch.cat([model(part, cache=cache).logits for part in pieces(ids, sizes)], 1)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, **CLOSE)
    assert cache.layers[1].keys.shape[0] == 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    """Not even how near to its fixed point a text comes before it stops: padding counts in no residual."""
    model, ids = equilibrium(tolerance=1e-2), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    text = ids[1, 4:] if side == "left" else ids[1, :7]
    found, alone = model(ids, attention_mask=mask), model(text[None])
    torch.testing.assert_close(found.logits[1][mask[1].bool()], alone.logits[0], **CLOSE)
    assert int(found.steps[1, 0]) == int(alone.steps[0, 0])


def test_generate_save_and_load(tmp_path):
    model, ids = equilibrium(), tokens(2, 6)
    cached, plain = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(again, DeepEquilibriumForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)


# --- gradients ---


def gradients(model, ids, **arguments):
    model.zero_grad()
    logits = model(ids, **arguments).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def test_the_implicit_gradient_is_that_of_the_unrolled_iteration():
    model, ids = equilibrium(adjoint_tolerance=1e-10, adjoint_max_steps=200), tokens()
    plain = unrolled(model)
    expected = gradients(plain, ids, num_steps=100, gradient_steps=100)
    found = gradients(model, ids)
    assert bool(model.model.adjoint_solution.converged.all())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    cheap = gradients(equilibrium(gradient="one_step"), ids)
    name = "model.adapter.weight"
    assert not torch.allclose(cheap[name], found[name], rtol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(cheap[name].flatten(), found[name].flatten(), dim=0)
    assert float(cosine) > 0.7


def test_memory_does_not_grow_with_the_evaluations():
    ids = tokens()

    def kept(**settings):
        model, size = equilibrium(**settings), 0

        def note(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(ids, labels=ids)
        return size, int(output.steps.max())

    few, many = kept(tolerance=0.5), kept(tolerance=1e-11)
    assert many[1] > 3 * few[1]
    assert many[0] == few[0]


def test_it_learns():
    torch.manual_seed(0)
    model, ids = (
        equilibrium(dtype=torch.float32, tolerance=1e-3, max_steps=20, initializer_range=None).train(),
        tokens(4),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"solver": "newton"}, "solver is 'newton'"), ({"gradient": "none"}, "gradient is 'none'")],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(RestpointError, match=message):
        DeepEquilibriumConfig(**{**TINY, **settings})


@torch.no_grad()
def test_calls_that_are_refused():
    model, ids = equilibrium(), tokens()
    with pytest.raises(RestpointError, match="exits: a solver stops by its tolerance"):
        model(ids, exits=RelativeStep())
    with pytest.raises(RestpointError, match="num_steps is 0"):
        model(ids, num_steps=0)
    model(ids, num_steps=2)
    assert not bool(model.model.solution.converged.any())
