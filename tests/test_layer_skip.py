"""Layers left out: the same tokens as the full model's cache allows, chosen offline and online."""

import itertools
import sys
from collections.abc import Sequence

import pytest
import torch

from families import build
from restpoint.decode.draft import TokenPath
from restpoint.decode.drafters.layer_skip import LayerSkipDrafter
from restpoint.decode.drafters.skip_choice import SkipChoice, choose_layers, layers_at_end
from restpoint.decode.drafters.skip_judge import SkipJudge, SkipQuality
from restpoint.decode.drafters.skip_search import SkipSearchOptions, search_skip_set
from restpoint.decode.drafters.skips import SkipSet
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.model.masks import Tree

TEXT = [5, 17, 40, 3, 88, 21, 9, 60]
PATH = TokenPath(TEXT, None)
PARENTS, TOKENS = [-1, -1, 0, 1, 1], [11, 12, 13, 14, 15]


def read(layered: LayeredModel, tokens: Sequence[int]) -> tuple[SlotCache, torch.Tensor]:
    """A cache that has read the tokens, and the states h_0 .. h_L of the last of them."""
    cache = layered.cache()
    kept = [(plan := layered.plan(torch.tensor([list(tokens)]), cache)).hidden]
    layered.run(plan, keep=kept)
    cache.commit([len(tokens)])
    return cache, torch.cat([state[0, -1:] for state in kept])


def draft(drafter: LayerSkipDrafter) -> torch.Tensor:
    rows = [drafter.start(PATH), drafter.extend(PARENTS[:2], TOKENS[:2]), drafter.extend(PARENTS[2:], TOKENS[2:])]
    return torch.cat(rows)


def node_paths() -> list[list[int]]:
    found: list[list[int]] = [[]]
    for parent, token in zip(PARENTS, TOKENS, strict=True):
        found.append([*found[parent + 1], token])
    return found


def plant(layered: LayeredModel, layers: Sequence[int]) -> LayeredModel:
    """Make layers of a llama do nothing."""
    for layer in layers:
        block = layered.model.model.layers[layer]
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return layered


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("skip", [(), (1,), (0, 2)])
def test_drafts_run_kept_layers_over_the_full_models_cache(family: str, skip: tuple[int, ...]) -> None:
    layered = LayeredModel(build(family))
    cache, _ = read(layered, TEXT[:-1])
    drafter = LayerSkipDrafter(layered, lambda: cache, SkipSet(skip))
    logits = draft(drafter)
    assert cache.lengths == [len(TEXT) - 1]
    for row, nodes in zip(logits, node_paths(), strict=True):
        fresh, _ = read(layered, TEXT[:-1])
        plan = layered.plan(torch.tensor([[TEXT[-1], *nodes]]), fresh)
        expected = layered.logits(layered.run(plan, skip=skip))[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
        if not skip:
            full = layered.model(input_ids=torch.tensor([TEXT + nodes]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [(), (1, 2), (0, 3)])
def test_verification_resumes_where_the_first_layer_was_left_out(skip: tuple[int, ...]) -> None:
    layered = LayeredModel(build("llama"))
    cache, _ = read(layered, TEXT[:-1])
    drafter = LayerSkipDrafter(layered, lambda: cache, SkipSet(skip), resumes=True)
    draft(drafter)
    found = drafter.exits()
    assert (found is None) == (0 in skip)
    layer, states = found or (0, None)
    assert layer == min(skip, default=4)
    tree = Tree((-1, *(parent + 1 for parent in PARENTS)))
    plan = layered.plan(torch.tensor([[TEXT[-1], *TOKENS]]), cache, tree=tree)
    logits = layered.logits(layered.run(plan, layer, hidden=states))[0]
    cache.keep(0, [0, 2, 5])
    kept = [*TEXT, 12, 15]
    for row, nodes in zip(logits, node_paths(), strict=True):
        full = layered.model(input_ids=torch.tensor([TEXT + nodes]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(row, full, rtol=1e-4, atol=1e-4)
    after = layered.logits(layered.run(layered.plan(torch.tensor([[33]]), cache)))[0, 0]
    full = layered.model(input_ids=torch.tensor([[*kept, 33]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(after, full, rtol=1e-4, atol=1e-4)
    assert LayerSkipDrafter(layered, lambda: cache, SkipSet((1,))).exits() is None


def test_layers_run_anew_on_the_last_token() -> None:
    for family in ("llama", "gpt2", "mistral"):
        layered = LayeredModel(build(family))
        cache, states = read(layered, TEXT)
        before = [layer.stored[0][:, :, : len(TEXT)].clone() for layer in cache.slot_layers]
        run_layer = layers_at_end(layered, cache, 3)
        for layer in range(4):
            again = run_layer(layer, states[layer].expand(3, -1))
            torch.testing.assert_close(again, states[layer + 1].expand(3, -1), rtol=1e-4, atol=1e-4)
        assert cache.lengths == [len(TEXT)]
        assert all(
            torch.equal(layer.stored[0][:, :, : len(TEXT)], old)
            for layer, old in zip(cache.slot_layers, before, strict=True)
        )


def test_choosing_is_exact_where_layers_add_on_axes_of_their_own() -> None:
    """There the cosine is the length that is left, so the best set leaves out the smallest steps."""
    for seed in range(5):
        torch.manual_seed(seed)
        steps = torch.diag(torch.rand(6) + 0.1)
        steps = torch.nn.functional.pad(steps, (1, 0))
        first = torch.eye(7)[:1]
        states = torch.cat([first, first + steps.cumsum(0)])
        found = choose_layers(states, lambda layer, given, steps=steps: given + steps[layer], 5)
        for skipped, (skip, near) in enumerate(found):
            sets = itertools.combinations(range(6), skipped)
            finals = {left: first[0] + steps[[l for l in range(6) if l not in left]].sum(0) for left in sets}
            cosine = {left: float(torch.cosine_similarity(end, states[-1], 0)) for left, end in finals.items()}
            assert near == pytest.approx(max(cosine.values()), abs=1e-6)
            assert cosine[skip.layers] == pytest.approx(near, abs=1e-6)


def test_chosen_sets_are_near_the_best_on_a_model() -> None:
    layered = LayeredModel(build("llama"))
    cache, states = read(layered, TEXT)
    found = choose_layers(states, layers_at_end(layered, cache, 4), 3)
    assert [len(skip.layers) for skip, _ in found] == [0, 1, 2, 3]
    for skipped, (skip, near) in enumerate(found):
        cosines = {}
        for left in itertools.combinations(range(4), skipped):
            fresh, _ = read(layered, TEXT[:-1])
            end = layered.run(layered.plan(torch.tensor([TEXT[-1:]]), fresh), skip=left)[0, 0]
            cosines[left] = float(torch.cosine_similarity(end, states[-1], 0))
        assert near == pytest.approx(cosines[skip.layers], abs=1e-4)
        assert sum(cosine > near + 1e-4 for cosine in cosines.values()) <= len(cosines) // 3


def test_planted_layers_are_left_out_online() -> None:
    layered = plant(LayeredModel(build("llama")), (1, 3))
    cache, states = read(layered, TEXT[:-1])
    drafter = LayerSkipDrafter(
        layered, lambda: cache, SkipSet((0, 2)), choice=SkipChoice(skipped=2, every=3), resumes=True
    )
    drafter.begin(TEXT[:-1])
    wanted = []
    for round_ in range(7):
        wanted.append(drafter.wants_states)
        if drafter.wants_states:
            drafter.on_states(states)
        logits = drafter.start(PATH)
        assert drafter.skip == SkipSet((1, 3)), round_
    assert wanted == [True, False, False, True, False, False, True]
    full = layered.model(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0, -1:]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-4)
    layer, kept = drafter.exits() or (0, states)
    assert (layer, kept.shape[1]) == (1, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_judging_equals_drafting_from_every_place(family: str) -> None:
    layered = LayeredModel(build(family))
    torch.manual_seed(1)
    text = torch.randint(0, 96, (14,)).tolist()
    skip = (1,)
    quality = SkipJudge(layered, [text, text[:3]], longest=4).judge(SkipSet(skip))
    full = layered.model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    agreed, accepted = torch.zeros(4), torch.zeros(4)
    for start in (1, 5, 9):
        cache, _ = read(layered, text[:start])
        plan = layered.plan(torch.tensor([text[start : start + 4]]), cache)
        drafted = layered.logits(layered.run(plan, skip=skip))[0]
        agreed += drafted.argmax(-1) == full[start : start + 4].argmax(-1)
        laws = torch.softmax(drafted, -1), torch.softmax(full[start : start + 4], -1)
        accepted += torch.minimum(*laws).sum(-1)
    assert quality.positions == 3
    assert quality.agreement == pytest.approx((agreed / 3).tolist())
    assert quality.acceptance == pytest.approx((accepted / 3).tolist(), abs=1e-4)


def test_gain_is_tokens_for_the_cost() -> None:
    quality = SkipQuality(SkipSet((1, 2)), 0.5, (0.8, 0.5, 0.5), (0.9, 0.9, 0.9), 10)
    assert quality.tokens(2) == pytest.approx(1 + 0.8 + 0.4)
    assert quality.gain(2, block_cost=0.1) == pytest.approx(2.2 / (1 + 2 * 0.6))
    assert quality.tokens(3, greedy=False) == pytest.approx(1 + 0.9 + 0.81 + 0.729)
    assert quality.best_length() == 1
    assert quality.best_length(greedy=False) == 3
    assert quality.best_length(block_cost=1.0) == 0


def test_the_search_finds_planted_layers() -> None:
    layered = plant(LayeredModel(build("llama")), (0, 2))
    torch.manual_seed(0)
    texts = torch.randint(0, 96, (3, 33)).tolist()
    seen: list[int] = []
    options = SkipSearchOptions(trials=14, longest=4)
    found = search_skip_set(layered, texts, options, lambda done, _total, _quality: seen.append(done))
    assert found.best.skip == SkipSet((0, 2))
    assert found.best.agreement == (1.0,) * 4
    assert found.gain == pytest.approx(5 / 3)
    assert found.length == 4
    assert seen == list(range(1, 15))
    assert len(found.trials) <= 14
    values = [options.value(quality) for quality in found.trials]
    assert values == sorted(values, reverse=True)
    again = search_skip_set(layered, texts, options)
    assert [quality.skip for quality in again.trials] == [quality.skip for quality in found.trials]


def test_on_the_bundled_model_more_kept_layers_agree_more(reference: Loaded) -> None:
    layered = LayeredModel(reference.model)
    text = reference.tokenizer("The art of programming is the art of organising complexity, " * 3).input_ids
    judge = SkipJudge(layered, [text], longest=4)
    rates = [sum(judge.judge(SkipSet.spread(16, skipped)).acceptance) / 4 for skipped in (0, 4, 12)]
    assert rates[0] == pytest.approx(1.0, abs=1e-4)
    assert rates[0] > rates[1] > rates[2]


def test_sets_are_sorted_and_checked() -> None:
    assert SkipSet((3, 1)) == SkipSet((1, 3))
    assert SkipSet((3, 1)).kept_share(8) == 0.75
    assert SkipSet.spread(16, 4) == SkipSet((2, 6, 9, 13))
    for depth in range(3, 20):
        for skipped in range(depth):
            spread = SkipSet.spread(depth, skipped)
            spread.check(depth)
            assert len(spread.layers) == skipped
    with pytest.raises(RestpointError, match="repeated"):
        SkipSet((1, 1))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layered = LayeredModel(build("llama"))
    cache = layered.cache()
    for skip, named in ((SkipSet((7,)), "layer 7"), (SkipSet((0, 1, 2, 3)), "keep at least one")):
        with pytest.raises(RestpointError, match=named):
            LayerSkipDrafter(layered, lambda: cache, skip)
    with pytest.raises(RestpointError, match="choice: skipped=4"):
        LayerSkipDrafter(layered, lambda: cache, SkipSet(), choice=SkipChoice(4))
    with pytest.raises(RestpointError, match="cannot see trees"):
        LayerSkipDrafter(layered, lambda: cache, SkipSet(), choice=SkipChoice(2), trees=False)
    with pytest.raises(RestpointError, match="most=4"):
        choose_layers(torch.zeros(5, 3), lambda _, states: states, 4)
    with pytest.raises(RestpointError, match="longer than 8"):
        SkipJudge(layered, [[1, 2, 3]])
    with pytest.raises(RestpointError, match="most=4 leaves none"):
        search_skip_set(layered, [TEXT], SkipSearchOptions(most=4))
    with pytest.raises(RestpointError, match="least=3, most=2"):
        SkipSearchOptions(least=3, most=2)
    with pytest.raises(RestpointError, match="every=0"):
        SkipChoice(2, every=0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RestpointError, match="pip install"):
        search_skip_set(layered, [TEXT], SkipSearchOptions(longest=2))
