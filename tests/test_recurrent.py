import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from looped import TINY, VOCABULARY, Slow, pieces, recurrent, tokens
from restpoint.equilibrium.exits import Acceleration, ArgmaxStability, Divergence, RelativeStep
from restpoint.errors import RestpointError
from restpoint.model.recurrent.backbone import draw_steps
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM, recurrent_states
from restpoint.model.recurrent.config import RecurrentDepthConfig
from restpoint.model.watch import WatchedLayers

CHUNKS = [(11,), (1,) * 11, (3, 1, 5, 2), (10, 1)]
# Rotary tables are computed in float32 whatever the dtype, and a random core blows up their rounding.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 1e-8, "atol": 1e-8}


@torch.no_grad()
def chunked(model, ids, sizes, **arguments):
    cache = model.new_cache(capacity=4, **({"budget": arguments.pop("budget")} if "budget" in arguments else {}))
    outputs = [model(part, cache=cache, **arguments) for part in pieces(ids, sizes)]
    logits, steps = (torch.cat([getattr(output, name) for output in outputs], 1) for name in ("logits", "steps"))
    return logits, steps, sum(output.computed for output in outputs), cache


# --- the model and its cache ---


@torch.no_grad()
def test_logits_are_those_of_the_definition_token_by_token():
    model, ids = recurrent(embedding_scale=3.0, qk_bias=True, adapter_bias=True), tokens(1)
    for layer in model.model.core:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    expected, _ = Slow(model, 5).run(ids[0])
    torch.testing.assert_close(model(ids).logits[0], expected, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", CHUNKS)
def test_a_text_in_pieces_gives_the_logits_of_the_whole(attention, sizes):
    """Eager attention takes its softmax in float32, so there the core contracts, lest it blow up rounding."""
    sdpa = attention == "sdpa"
    model, ids = recurrent(attention, gain=1.0 if sdpa else 0.3), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False)
    assert expected.cache is None
    logits, steps, computed, cache = chunked(model, ids, sizes)
    torch.testing.assert_close(logits, expected.logits, **(EXACT if sdpa else CLOSE))
    assert cache.get_seq_length() == 11
    assert bool((steps == 5).all())
    assert computed == expected.computed == 5 * 3 * 11


def test_a_text_in_pieces_gives_the_logits_of_the_whole_in_float32():
    model, ids = recurrent(dtype=torch.float32, initializer_range=0.1), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(chunked(model, ids, (3, 1, 5, 2))[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_implementations_agree():
    ids = tokens()
    sdpa, eager = (recurrent(name, torch.float32, gain=0.2)(ids).logits for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_do_not_see_each_other():
    model, ids = recurrent(), tokens()
    together = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exits", [None, RelativeStep(threshold=0.3)])
@torch.no_grad()
def test_padding_changes_nothing(side, attention, exits):
    # Eager attention of transformers computes in float32, and its mask overflows in what is wider.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    close = EXACT if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-4}
    model, ids = recurrent(attention, dtype, gain=0.2), tokens(2)
    mask = torch.ones_like(ids)
    gap = slice(0, 4) if side == "left" else slice(7, 11)
    text = ids[1, 4:] if side == "left" else ids[1, :7]
    mask[1, gap] = 0
    output = model(ids, attention_mask=mask, exits=exits)
    alone = model(text[None], exits=exits)
    torch.testing.assert_close(output.logits[1][mask[1].bool()], alone.logits[0], **close)
    if exits is not None:
        assert torch.equal(output.steps[1][mask[1].bool()], alone.steps[0])
        assert bool((output.steps[1][~mask[1].bool()] == 0).all())
    # and the next token, read from the cache
    nxt = torch.tensor([[5], [5]])
    grown = model(nxt, attention_mask=torch.cat((mask, nxt * 0 + 1), 1), cache=output.cache, exits=exits)
    if side == "left":
        expected = model(nxt[1:], cache=alone.cache, exits=exits)
        torch.testing.assert_close(grown.logits[1], expected.logits[0], **close)


def test_save_and_load(tmp_path):
    model, ids = recurrent(tie_word_embeddings=False, qk_bias=True), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(again, RecurrentDepthForCausalLM)
    for name in TINY:
        assert getattr(again.config, name) == getattr(model.config, name)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **EXACT)


def test_tied_embeddings_are_tied_after_loading(tmp_path):
    recurrent().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_with_and_without_cache(search):
    model, ids = recurrent(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_steps": 3, **search}
    cached = model.generate(ids, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
    if search["num_beams"] == 1:
        with torch.no_grad():
            for position in range(6, cached.shape[1]):
                told = torch.ones_like(cached[:, :position])
                told[1, :3] = 0
                best = model(cached[:, :position], attention_mask=told, num_steps=3).logits[:, -1].argmax(-1)
                ended = (cached[:, 6:position] == 2).any(1)
                assert torch.equal(best[~ended], cached[~ended, position])


def test_generate_stops_tokens_by_themselves():
    model, ids, exits = recurrent(gain=0.2), tokens(2, 6), RelativeStep(threshold=0.3)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, exits=exits, cache=model.new_cache())
    logits, _ = Slow(model, 5, lambda states, _: relative(states) < 0.3).run(found[0])
    ends = (found[0, 6:] == 2).nonzero()
    last = 6 + int(ends[0]) if len(ends) else found.shape[1] - 1
    assert torch.equal(logits[5:last].argmax(-1), found[0, 6 : last + 1])


@torch.no_grad()
def test_the_number_of_steps_is_an_argument():
    model, ids = recurrent(), tokens()
    states = recurrent_states(model, ids, 6)
    assert states.shape == (7, 3, 11, 32)
    torch.testing.assert_close(recurrent_states(model, ids, 3), states[:4], **EXACT)
    continued = model(ids, num_steps=2, initial_state=states[4], output_states=True)
    torch.testing.assert_close(continued.states[-1], states[6], **EXACT)
    torch.testing.assert_close(continued.logits, model(ids, num_steps=6).logits, **EXACT)
    assert not torch.allclose(model(ids, num_steps=5).logits, model(ids, num_steps=6).logits)


@torch.no_grad()
def test_iterates_are_what_watched_layers_see():
    model, ids = recurrent(), tokens()
    with WatchedLayers(model, path="model.core").watch() as seen:
        model(ids, use_cache=False, num_steps=4)
    assert len(seen) == 1 + 2 * 4
    torch.testing.assert_close(torch.stack(seen[2::2]), recurrent_states(model, ids, 4)[1:], rtol=0, atol=0)


@torch.no_grad()
def test_the_cache_forgets_selects_and_repeats():
    model, ids = recurrent(), tokens()
    cache = model.new_cache(capacity=4)
    model(ids[:, :7], cache=cache)
    model(ids[:, :4], cache=cache)  # a rejected draft
    cache.crop(-4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = ids[[2, 2, 0, 0]]
    torch.testing.assert_close(model(rows[:, 7:], cache=cache).logits, model(rows).logits[:, 7:], **EXACT)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    cache.reset()
    torch.testing.assert_close(model(rows, cache=cache).logits, model(rows).logits, **EXACT)


@torch.no_grad()
def test_passes_of_different_depths_share_the_latest_step():
    """Deep after shallow: step k of the later tokens sees the last step of the earlier ones."""
    model, ids = recurrent(), tokens(1)
    cache = model.new_cache()
    model(ids[:, :6], cache=cache, num_steps=2)
    found = model(ids[:, 6:], cache=cache, num_steps=5).logits[0]
    reference = Slow(model, 5, lambda states, _: len(reference.ran) <= 6 and len(states) == 3)
    expected, ran = reference.run(ids[0])
    assert ran.tolist() == [2] * 6 + [5] * 5
    torch.testing.assert_close(found, expected[6:], **CLOSE)


# --- the first state ---


@torch.no_grad()
def test_the_first_state_depends_on_the_position_alone():
    model = recurrent(state_std=0.7, hidden_size=64)
    first = model(tokens(1, 100), num_steps=1, output_states=True).states[0]
    other = model(tokens(3, 100, seed=1), num_steps=1, output_states=True).states[0]
    assert torch.equal(other, first.expand(3, -1, -1))
    assert float(first.abs().max()) <= 3 * 0.7
    assert float(first.std()) == pytest.approx(0.7 * 0.9866, rel=0.03)  # 0.9866: cut off at three deviations
    assert float(torch.corrcoef(first[0]).fill_diagonal_(0).abs().max()) < 0.7  # positions are independent
    seeded = recurrent(state_seed=1)(tokens(1), num_steps=1, output_states=True).states[0]
    assert not torch.allclose(seeded, recurrent()(tokens(1), num_steps=1, output_states=True).states[0])
    zero = recurrent(state_init="zero")(tokens(1), num_steps=1, output_states=True).states[0]
    assert not bool(zero.any())


@torch.no_grad()
def test_training_draws_the_state_and_the_depth_anew():
    model, ids = recurrent().train(), tokens()
    outputs = [model(ids, output_states=True, use_cache=False) for _ in range(20)]
    assert len({int(output.steps[0, 0]) for output in outputs}) > 3
    assert not torch.allclose(outputs[0].states[0], outputs[1].states[0])


def test_the_law_of_the_training_depth():
    drawn = torch.tensor([draw_steps(12.0, 0.5) for _ in range(8000)]).double()
    mean, variance = 12.0, 12.0 + 144 * (math.exp(0.25) - 1)
    assert float(drawn.min()) >= 1
    assert float(drawn.mean()) == pytest.approx(mean + 1, abs=4 * math.sqrt(variance / 8000))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.15)


# --- gradients ---


def test_gradients_are_those_of_the_last_steps_only():
    model, ids = recurrent(mean_recurrence=6, gain=0.2), tokens()
    states = recurrent_states(model, ids)

    def gradients(**arguments):
        model.zero_grad()
        model(ids, labels=ids, **arguments).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    truncated = gradients(num_steps=6, gradient_steps=2)
    expected = gradients(num_steps=2, gradient_steps=2, initial_state=states[4])
    for name, value in expected.items():
        torch.testing.assert_close(truncated[name], value, **EXACT)
    whole = gradients(num_steps=6, gradient_steps=6)
    assert not torch.allclose(whole["model.adapter.weight"], truncated["model.adapter.weight"])
    # the whole gradient, against a difference quotient
    weight, entry = model.model.adapter.weight, (3, 5)
    with torch.no_grad():
        losses = []
        for shift in (1e-6, -2e-6):
            weight[entry] += shift
            logits = model(ids, num_steps=6).logits[:, :-1]  # the loss of transformers is one in float32
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    slope = (losses[0] - losses[1]) / 2e-6
    assert float(slope) == pytest.approx(float(whole["model.adapter.weight"][entry]), rel=1e-4)


def test_gradient_checkpointing_changes_nothing():
    model, ids = recurrent().train(), tokens()
    arguments = {"num_steps": 3, "initial_state": recurrent_states(recurrent(), ids, 1)[0]}
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, **arguments).loss.backward()
        found.append(model.model.adapter.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_it_learns():
    torch.manual_seed(0)
    model, ids = recurrent(dtype=torch.float32, initializer_range=None).train(), tokens(4, 12)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.3)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# --- exits of single tokens ---


def relative(states):
    return float((states[-1] - states[-2]).norm() / states[-1].norm())


def accelerating(states):
    """Acceleration below 3 at each of the last two steps."""
    moves = [after - before for before, after in pairwise(states)]
    sizes = [float((b - a).norm()) for a, b in pairwise(moves)]
    return len(sizes) >= 2 and max(sizes[-2:]) < 3.0


def divergence(predicted):
    if len(predicted) < 2:
        return math.inf
    before, now = (entry.log_softmax(-1) for entry in predicted[-2:])
    return float((before.exp() * (before - now)).sum())


STATE_CRITERIA = [
    (RelativeStep(threshold=0.3), lambda states, _: relative(states) < 0.3),
    (Acceleration(threshold=3.0), lambda states, _: accelerating(states)),
]
LOGIT_CRITERIA = [
    (Divergence(threshold=0.05), lambda _, predicted: divergence(predicted) < 0.05),
    (
        ArgmaxStability(hits=2),
        lambda _, predicted: len(predicted) > 2 and len({int(p.argmax()) for p in predicted[-3:]}) == 1,
    ),
]


@pytest.mark.parametrize("sizes", [(11,), (1,) * 11])
def test_with_a_threshold_that_is_never_met_it_is_the_plain_model(sizes):
    model, ids = recurrent(), tokens()
    logits, steps, computed, _ = chunked(model, ids, sizes, exits=RelativeStep(threshold=0.0))
    with torch.no_grad():
        assert torch.allclose(logits, model(ids).logits, **EXACT)
    assert bool((steps == 5).all())
    assert computed == 5 * 3 * 11


@pytest.mark.parametrize("sizes", CHUNKS)
@pytest.mark.parametrize(("exits", "rule"), STATE_CRITERIA, ids=["relative", "acceleration"])
def test_tokens_stop_by_themselves_and_later_ones_see_their_latest_step(sizes, exits, rule):
    model, ids = recurrent(mean_recurrence=7, gain=0.2), tokens()
    logits, steps, _, _ = chunked(model, ids, sizes, exits=exits)
    assert len(steps.unique()) > 1
    for row in range(3):
        expected, ran = Slow(model, 7, rule).run(ids[row])
        assert torch.equal(steps[row], ran)
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize(("exits", "rule"), LOGIT_CRITERIA, ids=["divergence", "argmax"])
def test_criteria_that_read_logits(exits, rule):
    model, ids = recurrent(mean_recurrence=7, gain=0.2), tokens()
    logits, steps, _, _ = chunked(model, ids, (1,) * 11, exits=exits)
    assert len(steps.unique()) > 1
    for row in range(3):
        expected, ran = Slow(model, 7, rule).run(ids[row])
        assert torch.equal(steps[row], ran)
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize("sizes", [(11,), (1,) * 11])
def test_the_core_is_given_what_is_counted_and_stopped_rows_are_left_out(sizes):
    model, ids = recurrent(mean_recurrence=7, gain=0.2), tokens()
    seen = []
    hook = model.model.core[0].register_forward_hook(lambda _m, arguments, _o: seen.append(arguments[0].shape[:2]))
    _, steps, computed, _ = chunked(model, ids, sizes, exits=RelativeStep(threshold=0.3))
    hook.remove()
    assert sum(rows * columns for rows, columns in seen) == computed
    if len(sizes) == 11:
        assert computed == int(steps.sum())
        assert len(seen) == int(steps.amax(0).sum())
    else:
        assert int(steps.sum()) < computed < 7 * 3 * 11


# --- a bounded number of stored steps ---


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
@pytest.mark.parametrize("exits", [False, True])
def test_a_budget_of_steps_stores_them_in_turn(budget, exits):
    model, ids = recurrent(mean_recurrence=7, gain=0.2), tokens()
    rule = (lambda states, _: relative(states) < 0.3) if exits else None
    logits, steps, _, cache = chunked(
        model, ids, (1,) * 11, budget=budget, exits=RelativeStep(threshold=0.3) if exits else None
    )
    assert cache.layers[1].keys.shape[:3] == (budget, 3, 2)
    for row in range(3):
        expected, ran = Slow(model, 7, rule, budget).run(ids[row])
        assert torch.equal(steps[row], ran)
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [(11,), (4, 7)])
def test_a_budget_holds_within_a_pass_of_many_tokens(budget, sizes):
    """A stopped token's latest step must not be written over by the steps of its neighbours."""
    model, ids = recurrent(mean_recurrence=7, gain=0.2), tokens()
    logits, steps, _, _ = chunked(model, ids, sizes, exits=RelativeStep(threshold=0.3), budget=budget)
    assert len(steps.unique()) > 1
    for row in range(3):
        reference = Slow(model, 7, lambda states, _: relative(states) < 0.3, budget)
        expected = torch.cat([reference.run_together(part) for part in ids[row].split(list(sizes))])
        assert torch.equal(steps[row], torch.tensor(reference.ran))
        torch.testing.assert_close(logits[row], expected, **CLOSE)


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"core_layers": 0}, "core_layers is 0"),
        ({"mean_recurrence": 0}, "mean_recurrence is 0"),
        ({"gradient_steps": 0}, "gradient_steps is 0"),
        ({"state_std": -1.0}, "state_std is -1"),
        ({"state_init": "ones"}, "state_init is 'ones'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(RestpointError, match=message):
        RecurrentDepthConfig(**{**TINY, **settings})


def test_calls_that_are_refused():
    model, ids = recurrent(), tokens()
    with torch.no_grad():
        for arguments, message in (
            ({"num_steps": 0}, "num_steps is 0"),
            ({"gradient_steps": 0}, "gradient_steps is 0"),
            ({"initial_state": torch.zeros(1, 1, 32)}, "initial_state has the shape"),
            ({"cache": DynamicCache()}, "cache is a DynamicCache"),
        ):
            with pytest.raises(RestpointError, match=message):
                model(ids, **arguments)
        cache = model(ids).cache
        with pytest.raises(RestpointError, match="cache: it holds 3 rows and the pass has 1"):
            model(ids[:1], cache=cache)
        with pytest.raises(RestpointError, match="tokens_to_remove is 2"):
            cache.crop(2)
        with pytest.raises(RestpointError, match="budget is 0"):
            model.new_cache(budget=0)
        with pytest.raises(RestpointError, match="input_ids"):
            model()
        with pytest.raises(RestpointError, match="exits: this criterion reads logits"):
            model.model(ids, exits=Divergence())
    with pytest.raises(RestpointError, match="exits: tokens that stop give no gradients"):
        model(ids, exits=RelativeStep())
    with pytest.raises(RestpointError, match="use_cache: gradients do not flow"):
        model(ids, use_cache=True)
    assert model(ids).cache is None  # where gradients are recorded, none is made by itself
    with pytest.raises(RestpointError, match="model: it is in training mode"):
        recurrent_states(model.train(), ids)
