"""A model that iterates a block, unrolled: the model's own text whatever is drafted, and no step run twice."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

import looped
from decoding import costs, fused, native, together, tokens_of
from restpoint.decode.control import Control
from restpoint.decode.draft import Draft, TokenPath
from restpoint.decode.drafters.few_steps import FewStepsDrafter, default_steps
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Stopping, Text, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget
from restpoint.decode.tree import TreeSettings
from restpoint.drafting.speculators import drafting_for
from restpoint.errors import RestpointError
from restpoint.model.check import check
from restpoint.model.compiled import CompiledModel
from restpoint.model.layered import LayeredModel
from restpoint.model.recurrent.causal import recurrent_states
from restpoint.model.unrolled import SolvedModel, UnrolledModel, layered_model, stack_of
from test_law import LEVEL, SAMPLES, SETTINGS, Few, Rewound, exact_law, g_test

GREEDY = SamplingSettings()
CHOSEN, CHAIN, TREE = TreeSettings(), TreeSettings(levels=3, branching=False), TreeSettings(fixed=6)
TEXT = [5, 17, 40, 3, 58, 21, 9, 60]
SHAPES = {
    "plain": {},
    "eager": {"attention": "eager"},
    "float32": {"dtype": torch.float32, "gain": 0.3},
    "no coda": {"coda_layers": 0, "prelude_layers": 0, "state_init": "zero"},
    "narrow core": {"core_layers": 1, "coda_layers": 2, "embedding_scale": 3.0},
    "biased": {"qk_bias": True, "adapter_bias": True, "num_key_value_heads": 4},
}


def few_steps(target: LayeredTarget, steps: int) -> FewStepsDrafter:
    return FewStepsDrafter(target.layered, lambda: target.cache, steps, name="scripted")


def drafting(
    target: LayeredTarget, steps: int, settings: TreeSettings = CHAIN, sampler: Sampler | None = None
) -> Fusion:
    return Fusion([], few_steps(target, steps), sampler or Sampler(GREEDY), Control.alone(costs()), None, settings)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_capability_is_established(shape: str) -> None:
    layered = layered_model(looped.recurrent(**SHAPES[shape]))
    assert isinstance(layered, UnrolledModel)
    assert layered.depth == layered.config.effective_depth
    assert check(layered).refused() == {}
    assert layered.head.direct


def test_other_depths_than_the_mean() -> None:
    model, steps = looped.recurrent(), 3
    layered = UnrolledModel(model, num_steps=steps)
    assert check(layered).refused() == {}
    ids = looped.tokens(2, 7)
    expected = model(input_ids=ids, num_steps=steps).logits
    torch.testing.assert_close(layered.logits(layered.run(layered.plan(ids))), expected)
    whole = UnrolledModel(model)
    states = whole.run(whole.plan(ids), skip=whole.later_steps(steps))
    torch.testing.assert_close(whole.logits(states), expected)


def test_states_within_the_core_are_the_models_own() -> None:
    model = looped.recurrent()
    layered = UnrolledModel(model)
    ids = looped.tokens(2, 9)
    kept: list[torch.Tensor] = []
    layered.run(layered.plan(ids), keep=kept)
    for step, state in enumerate(recurrent_states(model, ids)[1:], 1):
        torch.testing.assert_close(kept[layered.after_step(step) - 1], state)


@pytest.mark.parametrize(
    ("shape", "steps", "settings"),
    [
        ("plain", 1, TREE),
        ("plain", 4, CHAIN),
        ("float32", 2, TREE),
        ("float32", 3, CHOSEN),
        *(
            pytest.param(shape, steps, settings, marks=pytest.mark.slow)
            for shape in SHAPES
            for steps, settings in ((1, CHOSEN), (2, CHAIN), (4, TREE))
        ),
    ],
    ids=str,
)
def test_text_is_that_of_generate(shape: str, steps: int, settings: TreeSettings) -> None:
    model = looped.recurrent(**SHAPES[shape])
    target = LayeredTarget(layered_model(model))
    for seed in range(3):
        prompt = looped.tokens(1, 4 + 5 * seed, seed)[0].tolist()
        rounds = list(decode(target, prompt, Sampler(GREEDY), Stopping(16), drafting(target, steps, settings)))
        assert tokens_of(rounds) == native(model, prompt, 16)
        assert sum(turn.drafted for turn in rounds) > 0


def test_near_its_rest_a_core_accepts_what_few_steps_draft() -> None:
    model = looped.recurrent(gain=0.02)
    target = LayeredTarget(layered_model(model))
    four = TreeSettings(levels=4, branching=False)
    rounds = list(decode(target, TEXT, Sampler(GREEDY), Stopping(40), drafting(target, 2, four)))
    assert tokens_of(rounds) == native(model, TEXT, 40)
    assert len(rounds) <= 12


@pytest.mark.parametrize("names", [("lookup",), ("lookup", "recycling", "ngrams"), ("lookahead",)], ids=str)
def test_instant_drafters_alone_and_in_a_batch(names: tuple[str, ...]) -> None:
    model = looped.recurrent()
    prompts = [looped.tokens(1, count, count)[0].tolist() * 2 for count in (3, 9, 21)]
    layered = layered_model(model)
    target = LayeredTarget(layered)
    texts = [Text(prompt, Sampler(GREEDY), Stopping(20), fused(target, Sampler(GREEDY), names)) for prompt in prompts]
    found = together(target, texts)
    assert [tokens_of(rounds) for rounds in found] == [native(model, prompt, 20) for prompt in prompts]
    assert sum(turn.drafted for rounds in found for turn in rounds) > 0


def test_a_long_prompt_makes_the_cache_grow() -> None:
    model = looped.recurrent(gain=0.1)
    target = LayeredTarget(layered_model(model))
    prompt = looped.tokens(1, 250)[0].tolist()
    target.cache = target.layered.cache(capacity=8)
    target._new_cache = lambda rows, longest: target.layered.cache(rows, capacity=8)
    rounds = decode(target, prompt, Sampler(GREEDY), Stopping(24), drafting(target, 2, TREE))
    assert tokens_of(rounds) == native(model, prompt, 24)


def test_no_step_is_run_twice() -> None:
    """A chain of n tokens: n passes of k steps, k for the token that nothing follows, r - k for all n + 1 together."""
    model, steps, count = looped.recurrent(), 2, 3
    target = LayeredTarget(layered_model(model))
    target.prefill([TEXT[:-1]])
    drafter = few_steps(target, steps)
    seen: list[tuple[str, int]] = []
    inner = model.model
    for name in ("prelude", "core", "coda"):
        for layer in getattr(inner, name):
            layer.register_forward_hook(lambda _m, args, _o, name=name: seen.append((name, args[0].shape[1])))
    logits = drafter.start(TokenPath(TEXT, None))
    tokens = [int(logits.argmax())]
    for node in range(count - 1):
        tokens.append(int(drafter.extend([node - 1], tokens[-1:]).argmax()))
    width, r = len(inner.core), model.config.mean_recurrence
    one_pass = [("prelude", 1)] + [("core", 1)] * (steps * width) + [("coda", 1)]
    assert seen == one_pass * count
    seen.clear()
    layer, states = drafter.exits() or (0, None)
    before = target.layered.work.layer_calls
    scored = target.score([TEXT[-1]], [replace(Draft.chain(tokens), exit_layer=layer, exits=states)])[0]
    assert seen == one_pass[:-1] + [("core", count + 1)] * ((r - steps) * width) + [("coda", count + 1)]
    assert target.layered.work.layer_calls - before == len(seen)
    full = torch.tensor([[*TEXT, *tokens]])
    torch.testing.assert_close(scored.logits, model(input_ids=full).logits[0, -count - 1 :])
    assert states is not None
    torch.testing.assert_close(states, recurrent_states(model, full[:, :-1])[steps][:, -count:])


def test_drafts_are_the_law_of_k_steps_over_the_full_texts_keys() -> None:
    model = looped.recurrent()
    for steps in (1, 3):
        target = LayeredTarget(layered_model(model))
        target.prefill([TEXT[:-1]])
        drafter = few_steps(target, steps)
        drafted = torch.cat([drafter.start(TokenPath(TEXT, None)), drafter.extend([-1], [7]), drafter.extend([0], [8])])
        slow = looped.Slow(model, model.config.mean_recurrence)
        slow.run(torch.tensor(TEXT[:-1]))
        slow.num_steps = steps
        torch.testing.assert_close(drafted, slow.run_together(torch.tensor([TEXT[-1], 7, 8])), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [TREE, CHAIN], ids=["tree", "chain"])
def test_after_every_round_the_cache_is_that_of_plain_decoding(settings: TreeSettings) -> None:
    """Keys and values of every step, held against those that the model's own forward stores of the kept text."""
    model = looped.recurrent()
    layered = UnrolledModel(model)
    target, text = LayeredTarget(layered), list(TEXT)
    inner = model.model
    first, width = len(inner.prelude), len(inner.core)
    rejected = 0
    for turn in decode(target, TEXT, Sampler(GREEDY), Stopping(14), drafting(target, 2, settings)):
        rejected += turn.drafted - turn.accepted
        text += turn.tokens
        if turn.finished:
            break
        kept = len(text) - 1
        assert target.cache.lengths == [kept]
        own = model.new_cache()
        injected: list[torch.Tensor] = []
        hook = inner.prelude[-1].register_forward_hook(lambda _m, _a, out, to=injected: to.append(out))
        with torch.no_grad():
            model(input_ids=torch.tensor([text[:-1]]), cache=own)
        hook.remove()
        for index in range(layered.depth):
            step, within = divmod(index - first, width)
            inside = first <= index < layered.after_step(layered.steps)
            place = first + within if inside else index if index < first else index - (layered.steps - 1) * width
            stored = zip(target.cache.slot_layers[index].stored, own.step_layers[place].stored, strict=True)
            for ours, theirs in stored:
                torch.testing.assert_close(ours[:, :, :kept], theirs[step if inside else 0][:, :, :kept])
        torch.testing.assert_close(target.cache.slot_layers[-1].stored[0][:, 0, :kept], injected[0])
    assert rejected > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TreeSettings(levels=2, branching=False), TreeSettings(fixed=4)], ids=str)
def test_sampled_text_has_the_models_law(settings: TreeSettings) -> None:
    """See test_law.py for the power of the G-test."""
    model = looped.recurrent(gain=0.3)
    target = Rewound(layered_model(model))
    sampler = Sampler(SETTINGS, LogitsProcessorList([Few()]))
    law = exact_law(model, TEXT, sampler, 4)
    speculator = drafting(target, 2, settings, sampler)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for _ in range(SAMPLES):
        rounds = list(decode(target, TEXT, sampler, Stopping(4), speculator))
        counts[tuple(tokens_of(rounds))] += 1
        accepted += sum(turn.accepted for turn in rounds)
    assert accepted > SAMPLES / 10
    assert g_test(counts, law) > LEVEL


@pytest.mark.slow
def test_drafting_by_name() -> None:
    layered = layered_model(looped.recurrent(mean_recurrence=9))
    found = check(layered)
    made, notes = drafting_for(layered, found, None, ("lookup", "steps@4"))
    assert made is not None
    assert made.names == ("lookup", "steps@4")
    assert notes == []
    target = LayeredTarget(layered)
    (one,) = made.speculators(target, [Sampler(GREEDY)], 3)
    assert one is not None
    assert isinstance(one.stepped, FewStepsDrafter)
    assert one.stepped.steps == 4
    assert tokens_of(decode(target, TEXT, Sampler(GREEDY), Stopping(12), one)) == native(layered.model, TEXT, 12)
    assert default_steps(UnrolledModel(layered.model)) == 2
    two = made.speculators(LayeredTarget(layered), [Sampler(GREEDY), Sampler(GREEDY)])
    assert all(own is not None and own.stepped is None for own in two)
    assert made.notes == ["steps@4 does not draft for a batch: it runs layers"]


@pytest.mark.parametrize("name", ["steps@0", "steps@9", "steps@x", "steps@-1"])
def test_wrong_numbers_of_steps_are_refused(name: str) -> None:
    layered = layered_model(looped.recurrent(mean_recurrence=9))
    with pytest.raises(RestpointError, match=r"^drafters: .*steps"):
        drafting_for(layered, check(layered), None, (name,))


def test_steps_are_refused_where_there_are_none_to_leave_out() -> None:
    layered = layered_model(looped.recurrent(mean_recurrence=1))
    with pytest.raises(RestpointError, match="fewer steps than the model's one"):
        drafting_for(layered, check(layered), None, ("steps",))
    with pytest.raises(RestpointError, match=r"^num_steps is 0"):
        UnrolledModel(looped.recurrent(), num_steps=0)


def test_a_pass_that_has_not_run_the_prelude_is_refused() -> None:
    layered = layered_model(looped.recurrent())
    assert isinstance(layered, UnrolledModel)
    plan = layered.plan(looped.tokens(1, 4))
    with pytest.raises(RestpointError, match="run it from layer 0"):
        layered.run(plan, layered.after_step(2), hidden=plan.hidden)
    with pytest.raises(RestpointError, match=r"^step is 6"):
        layered.after_step(6)
    with pytest.raises(RestpointError, match="iterates its layers"):
        CompiledModel(layered_model(looped.recurrent(dtype=torch.float32)))


def test_a_solved_core_is_decoded_by_its_own_forward() -> None:
    model = looped.equilibrium()
    layered = layered_model(model)
    assert isinstance(layered, SolvedModel)
    found = check(layered)
    assert not found.drafts
    assert set(found.refused()) == {name for name, _ in found.table()}
    made, notes = drafting_for(layered, found, None, ("lookup", "steps"))
    assert made is None
    assert "a solver decides" in notes[0]
    calls: list[int] = []
    hooks = [one.register_forward_hook(lambda *_: calls.append(1)) for one in dict.fromkeys(stack_of(model).layers)]
    rounds = list(decode(NativeTarget(layered), TEXT, Sampler(GREEDY), Stopping(8)))
    for hook in hooks:
        hook.remove()
    assert tokens_of(rounds) == native(model, TEXT, 8)
    assert sum(turn.layer_calls for turn in rounds) == len(calls)
    with pytest.raises(RestpointError, match="a solver decides"):
        UnrolledModel(model)


def test_other_models_are_taken_apart_as_before() -> None:
    from families import build

    model = build("llama")
    assert not isinstance(layered_model(model), UnrolledModel)
    with pytest.raises(RestpointError, match=r"^drafters: steps drafts for models that iterate a block"):
        FewStepsDrafter(LayeredModel(model), lambda: LayeredModel(model).cache(), 1)
    with pytest.raises(RestpointError, match="iterates no block"):
        UnrolledModel.__new__(UnrolledModel)._take_apart(model)


def test_sampling_settings_reach_the_draft() -> None:
    """A greedy and a sampled text of one model differ, so the law test above samples indeed."""
    target = LayeredTarget(layered_model(looped.recurrent()))
    texts = {
        tuple(tokens_of(decode(target, TEXT, sampler, Stopping(6), drafting(target, 2, CHOSEN, sampler))))
        for sampler in (Sampler(GREEDY), Sampler(SamplingSettings(temperature=2.0, seed=3)))
    }
    assert len(texts) == 2
