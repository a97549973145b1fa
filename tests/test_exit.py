"""Early exit: what is emitted, what later tokens see, and what is really left out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import Tensor

from families import VOCABULARY, build
from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, Target
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.predictors import AffinePredictor, RestPointRecurrence
from restpoint.errors import RestpointError
from restpoint.exit.engine import ExitTarget
from restpoint.exit.law_signals import MaxProbability
from restpoint.exit.rules import LayerSkipRule, PositionRule, Rule, ThresholdRule
from restpoint.exit.signals import RelativeStep, Signal
from restpoint.exit.view import Readout, View, views
from restpoint.model.layered import LayeredModel

PROMPTS = [[5, 9, 40, 7, 22], [3, 11, 60], [8, 8, 31, 70, 12, 90, 4]]
FAMILIES = ["llama", "gpt2", "gemma2", "gpt_neox", "bloom", "qwen3"]


@dataclass(frozen=True)
class Drawn(Rule):
    """Stops by a coin for each place, layer and text length: every order of exits comes up."""

    seed: int = 0
    layers: tuple[int, ...] = (0, 1, 2, 3)
    share: float = 0.35
    catch_up: str | None = "exact"

    def check(self, depth: int) -> None: ...

    def candidates(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def stops(self, view: View, places: Sequence[int], signal: Signal | None) -> Tensor:
        coins = [math.sin(1 + self.seed + 7.7 * place + 1.3 * view.layer) * 1e4 % 1 for place in places]
        return torch.tensor(coins) < self.share


@dataclass
class Written:
    """What was decoded: tokens, logits and depths of every row, and layers run."""

    tokens: list[list[int]]
    logits: list[Tensor]
    depths: list[list[int]]
    layer_calls: int


def write(target: Target, prompts: Sequence[Sequence[int]], new_tokens: int = 14) -> Written:
    texts = [
        Text(list(prompt), Sampler(SamplingSettings(), None, target.layered.device), Stopping(new_tokens), logits=[])
        for prompt in prompts
    ]
    depths: list[list[int]] = [[] for _ in texts]
    calls = 0
    for number, rounds in enumerate(decode_batch(target, texts)):
        for row, turn in rounds.items():
            depths[row] += [turn.depth] * len(turn.tokens)
        calls += next(iter(rounds.values())).layer_calls if number else 0
    logits = [torch.stack(text.logits) for text in texts if text.logits is not None]
    return Written([text.path.tokens[len(text.prompt) :] for text in texts], logits, depths, calls)


@contextmanager
def counting(model: hf.PreTrainedModel, layers: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """Tokens that each layer saw in each call, layer by layer."""
    seen: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0] * args[0].shape[1]))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def full_states(layered: LayeredModel, ids: list[int]) -> list[Tensor]:
    """h_0 .. h_L of a text by the model's own forward; the last one before the final norm."""
    kept: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: kept.append(out)) for layer in layered.stack.layers]
    first: list[Tensor] = []
    hooks.append(layered.stack.layers[0].register_forward_pre_hook(lambda _m, args: first.append(args[0])))
    with torch.no_grad():
        layered.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [first[0][0], *((out[0] if isinstance(out, tuple) else out)[0] for out in kept)]


def layered_model(family: str) -> LayeredModel:
    return LayeredModel(build(family))


# --- never, and always ---


@pytest.mark.parametrize("family", FAMILIES)
def test_never_to_exit_is_plain_decoding(family: str) -> None:
    layered = layered_model(family)
    rule = ThresholdRule("max-p", 1.5, (1, 2, 3))
    for prompts in (PROMPTS[:1], PROMPTS):
        plain = write(LayeredTarget(layered), prompts)
        exits = write(ExitTarget(layered, rule, Readout(layered), MaxProbability()), prompts)
        assert exits.tokens == plain.tokens
        assert exits.layer_calls == plain.layer_calls
        assert exits.depths == plain.depths == [[layered.depth] * 14] * len(prompts)


def test_always_to_exit_runs_the_first_layers_only() -> None:
    layered = layered_model("llama")
    target = ExitTarget(layered, ThresholdRule("max-p", 0.0, (2, 3)), Readout(layered), MaxProbability())
    with counting(layered.model, layered.stack.layers) as seen:
        written = write(target, PROMPTS[:1])
    assert written.depths == [[4] + [2] * 13]
    assert written.layer_calls == 13 * 2
    assert seen == [len(PROMPTS[0])] * 4 + [1] * 26


# --- exact catch-up ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_with_exact_catch_up_every_law_is_that_of_full_depth_states(family: str, seed: int) -> None:
    layered = layered_model(family)
    written = write(ExitTarget(layered, Drawn(seed), Readout(layered)), PROMPTS, new_tokens=24)
    for prompt, tokens, logits, depths in zip(PROMPTS, written.tokens, written.logits, written.depths, strict=True):
        assert len(set(depths[1:])) > 3
        states = full_states(layered, [*prompt, *tokens])
        for place, (own, depth) in enumerate(zip(logits, depths, strict=True)):
            expected = layered.logits(states[depth][None, None, len(prompt) - 1 + place])[0, 0]
            torch.testing.assert_close(own, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_texts_of_a_batch_do_not_depend_on_each_other() -> None:
    layered = layered_model("llama")
    together = write(ExitTarget(layered, Drawn(3), Readout(layered)), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = write(ExitTarget(layered, Drawn(3), Readout(layered)), [prompt])
        assert together.tokens[row] == alone.tokens[0]
        assert together.depths[row] == alone.depths[0]
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    layered = layered_model("llama")
    target = ExitTarget(layered, Drawn(3), Readout(layered))
    lengths = [6, 14, 9]
    texts = [
        Text(prompt, Sampler(SamplingSettings(), None, layered.device), Stopping(length))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    for _ in decode_batch(target, texts):
        pass
    whole = write(ExitTarget(layered, Drawn(3), Readout(layered)), PROMPTS)
    for text, tokens, length in zip(texts, whole.tokens, lengths, strict=True):
        assert text.path.tokens[len(text.prompt) :] == tokens[:length]


def test_layers_are_counted_where_they_run() -> None:
    """A layer is called once for all who are caught up with, and never for those whom nobody follows."""
    layered = layered_model("llama")

    @dataclass(frozen=True)
    class Last(Drawn):
        """All stop after layer 1 but the sixth new token."""

        def stops(self, view: View, places: Sequence[int], signal: Signal | None) -> Tensor:
            return torch.tensor([view.layer == 1 and place != 5 for place in places])

    target = ExitTarget(layered, Last(), Readout(layered))
    with counting(layered.model, layered.stack.layers) as seen:
        written = write(target, PROMPTS[:1], new_tokens=10)
    shallow, deep = [1], [1, 5, 5, 5]
    assert seen == [len(PROMPTS[0])] * 4 + shallow * 4 + deep + shallow * 4
    assert written.layer_calls == len(seen) - 4


# --- propagated ---


def test_propagated_keys_are_what_deeper_layers_make_of_the_state() -> None:
    layered = layered_model("llama")
    rule = ThresholdRule("max-p", 0.0, (2,), catch_up="propagated")
    target = ExitTarget(layered, rule, Readout(layered), MaxProbability())
    with counting(layered.model, layered.stack.layers) as seen:
        written = write(target, PROMPTS[:1], new_tokens=3)
    assert seen == [5] * 4 + [1] * 4, "what only writes keys is left before it is done"
    model = layered.model
    ids = [*PROMPTS[0], *written.tokens[0][:2]]
    cosine, sine = model.model.rotary_emb(torch.zeros(1), torch.arange(len(ids))[None])
    states = full_states(layered, ids)[2]
    layer = model.model.layers[3]
    normed = layer.input_layernorm(states[None, 5:7])
    keys = layer.self_attn.k_proj(normed).view(1, 2, 2, -1).transpose(1, 2)
    keys, _ = hf.models.llama.modeling_llama.apply_rotary_pos_emb(keys, keys, cosine[:, 5:7], sine[:, 5:7])
    values = layer.self_attn.v_proj(normed).view(1, 2, 2, -1).transpose(1, 2)
    found = target.cache.slot_layers[3].stored
    torch.testing.assert_close(found[0][:, :, 5:7], keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1][:, :, 5:7], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_batch_is_propagated_as_its_rows_are(family: str) -> None:
    layered = layered_model(family)
    rule = Drawn(2, catch_up="propagated")
    together = write(ExitTarget(layered, rule, Readout(layered)), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = write(ExitTarget(layered, rule, Readout(layered)), [prompt])
        assert (together.tokens[row], together.depths[row]) == (alone.tokens[0], alone.depths[0])


# --- rules without a signal ---


def test_position_rule_falls_by_the_formula_and_needs_no_catching_up() -> None:
    rule = PositionRule(first=12, last=4, length=9)
    assert [rule.layer_at(place) for place in range(12)] == [12, 11, 10, 9, 8, 7, 6, 5, 4, 4, 4, 4]
    assert [PositionRule(8, 5, 3).layer_at(place) for place in range(4)] == [8, 6, 5, 5]  # 8, 6.5, 5
    assert rule.candidates(12) == (4, 5, 6, 7, 8, 9, 10, 11)
    layered = layered_model("llama")
    with counting(layered.model, layered.stack.layers) as seen:
        written = write(ExitTarget(layered, PositionRule(4, 1, 10), Readout(layered)), PROMPTS[:1], 12)
    assert written.depths[0][1:] == [PositionRule(4, 1, 10).layer_at(place) for place in range(1, 12)]
    assert len(seen) - 4 == sum(written.depths[0][1:]) == written.layer_calls
    static = write(ExitTarget(layered, PositionRule(2, 2), Readout(layered)), PROMPTS[:1], 12)
    assert static.depths[0] == [4] + [2] * 11


def test_layer_skipping_is_the_model_without_these_layers() -> None:
    layered = layered_model("llama")
    rule = LayerSkipRule(4 / 3)
    assert rule.skipped(4) == {1}
    assert LayerSkipRule(2.0).skipped(16) == frozenset(range(16)) - {0, 2, 4, 6, 9, 11, 13, 15}
    written = write(ExitTarget(layered, rule, Readout(layered)), PROMPTS)
    shorter = build("llama")
    shorter.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(shorter.model.layers) if index != 1)
    for prompt, tokens in zip(PROMPTS, written.tokens, strict=True):
        ids = list(prompt)
        for token in tokens:
            assert token == int(shorter(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(token)
    assert written.layer_calls == 13 * 3
    assert written.depths == [[3] * len(tokens) for tokens in written.tokens]


def test_thresholds_decay_as_in_the_paper() -> None:
    rule = ThresholdRule("max-p", 0.8, (2,), decay_over=10)
    assert rule.threshold_at(0) == pytest.approx(0.8)
    assert rule.threshold_at(5) == pytest.approx(0.9 * 0.8 + 0.1 * 0.8 * math.exp(-2))
    layered = layered_model("llama")
    states = torch.randn(3, 3, 32)
    view = views(states, [2], Readout(layered))[0]
    confidence = MaxProbability().confidence(view)
    places = [0, 4, 9]
    thresholds = torch.tensor([rule.threshold_at(place) for place in places])
    assert rule.stops(view, places, MaxProbability()).tolist() == (confidence >= thresholds).tolist()


@pytest.mark.parametrize(
    "rule",
    [
        ThresholdRule("max-p", 0.9, (1, 3), decay_over=7, catch_up="propagated"),
        PositionRule(4, 2, 9),
        LayerSkipRule(1.5),
    ],
)
def test_rules_are_their_own_json(rule: Rule) -> None:
    import json

    assert Rule.from_described(json.loads(json.dumps(rule.described()))) == rule


# --- what is emitted ---


def test_a_fitted_predictor_is_emitted_with_its_features() -> None:
    layered = layered_model("llama")
    generator = torch.Generator().manual_seed(0)
    features = RandomFeatures.draw(torch.zeros(32), torch.ones(32), 6, seed=0).to(dtype=torch.float32)
    affine = AffineMap(torch.randn(38, 32, generator=generator) / 6, torch.randn(32, generator=generator))
    predictor = AffinePredictor((2,), affine, features=features)
    target = ExitTarget(layered, ThresholdRule("max-p", 0.0, (2,)), Readout(layered, {2: predictor}), MaxProbability())
    written = write(target, PROMPTS[:1], 4)
    states = full_states(layered, [*PROMPTS[0], *written.tokens[0]])[2]
    lifted = torch.cat([states, torch.relu(states @ features.weight + features.bias)], 1)
    rest = lifted @ affine.matrix + affine.offset
    logits = layered.model.lm_head(layered.model.model.norm(rest))
    torch.testing.assert_close(written.logits[0][1:], logits[5 : 5 + 3], atol=1e-4, rtol=1e-4)
    config, tensors = predictor.state()
    again = AffinePredictor.from_state(config, tensors)
    torch.testing.assert_close(again.predict([states]), rest)
    assert again.parameters_read() == 38 * 32 + 32 * 6


def test_a_readout_of_several_layers_is_emitted_from_the_states_of_these() -> None:
    layered = layered_model("llama")
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(32, 32, generator=generator) / 6 for _ in range(3)]
    offset = torch.randn(32, generator=generator)
    predictor = AffinePredictor((0, 2, 3), AffineMap(torch.cat(parts), offset))
    target = ExitTarget(layered, ThresholdRule("max-p", 0.0, (3,)), Readout(layered, {3: predictor}), MaxProbability())
    written = write(target, PROMPTS[:1], 4)
    states = full_states(layered, [*PROMPTS[0], *written.tokens[0]])
    rest = sum((states[layer] @ part for layer, part in zip((0, 2, 3), parts, strict=True)), offset)
    logits = layered.model.lm_head(layered.model.model.norm(rest))
    torch.testing.assert_close(written.logits[0][1:], logits[5 : 5 + 3], atol=1e-4, rtol=1e-4)


def test_views_of_a_recording_are_those_of_decoding() -> None:
    layered = layered_model("llama")
    states = torch.stack(full_states(layered, PROMPTS[2]), 1)
    first, second = views(states, (1, 3), Readout(layered))
    assert second.earlier is first
    torch.testing.assert_close(second.step(1), states[:, 2] - states[:, 1])
    torch.testing.assert_close(second.log_law, layered.logits(states[None, :, 3])[0].log_softmax(-1))
    some = second.select(torch.tensor([4, 1]))
    torch.testing.assert_close(some.entropy, second.entropy[[4, 1]])
    assert some.earlier is not None
    assert torch.equal(some.earlier.state, states[[4, 1], 1])
    relative = RelativeStep().confidence(second)
    norm = (states[:, 3] - states[:, 2]).norm(dim=1) / states[:, 2].norm(dim=1)
    torch.testing.assert_close(relative, 1 / (1 + norm))


# --- what is refused ---


def test_what_makes_no_sense_is_refused() -> None:
    layered = layered_model("llama")
    readout = Readout(layered)
    for message, make in (
        (
            r"^layers: an exit after layer 4 of 4",
            lambda: ExitTarget(layered, ThresholdRule("max-p", 0.5, (2, 4)), readout),
        ),
        (r"^layers is \(3, 1\)", lambda: ThresholdRule("max-p", 0.5, (3, 1))),
        (r"^threshold is nan", lambda: ThresholdRule("max-p", math.nan, (1,))),
        (r"^decay_over is 0", lambda: ThresholdRule("max-p", 0.5, (1,), decay_over=0)),
        (r"^catch_up is None", lambda: ThresholdRule("max-p", 0.5, (1,), catch_up=None)),
        (r"^first is 3 and last 4", lambda: PositionRule(3, 4)),
        (r"^first is 5, and the model has 4", lambda: ExitTarget(layered, PositionRule(5, 2), readout)),
        (r"^speed is 0.5", lambda: LayerSkipRule(0.5)),
        (r"^speed is 4.0: of 4 layers", lambda: ExitTarget(layered, LayerSkipRule(4.0), readout)),
        (r"^rule: 'other' is unknown", lambda: Rule.from_described({"kind": "other"})),
        (r"^signal: 'other' is unknown", lambda: Signal.from_state({"kind": "other"}, {})),
    ):
        with pytest.raises(RestpointError, match=message):
            make()
    recurrence = RestPointRecurrence((1,), (AffineMap(torch.zeros(64, 32), torch.zeros(32)),))
    with pytest.raises(RestpointError, match="rest state of the token before, which is not known after an exit"):
        Readout(layered, {1: recurrence})
    with pytest.raises(RestpointError, match="reads layer 1 and is given for layer 2"):
        Readout(layered, {2: AffinePredictor((1,), AffineMap(torch.zeros(32, 32), torch.zeros(32)))})
    with pytest.raises(RestpointError, match="which was not given"):
        write(ExitTarget(layered, ThresholdRule("max-p", 0.5, (1,)), readout), PROMPTS[:1])
    assert layered.vocabulary_size == VOCABULARY
