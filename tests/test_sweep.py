"""Traces, sweeps and choices of early exits, against slow and obvious ways to the same numbers."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import VOCABULARY, build
from restpoint import bundled
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.evaluate import exit_chart
from restpoint.exit.bootstrap import RESAMPLES, percentile_intervals, resampled_shares
from restpoint.exit.choice import choose_layers, compare
from restpoint.exit.costs import ExitCosts, measure_exit_costs
from restpoint.exit.engine import ExitTarget
from restpoint.exit.law_signals import MaxProbability
from restpoint.exit.rules import PositionRule, ThresholdRule
from restpoint.exit.signals import RelativeStep, Signal
from restpoint.exit.sweep import (
    LASTING_ORACLE,
    NEVER,
    ORACLE,
    STATIC,
    Curve,
    fixed,
    oracle,
    sweep,
    sweeps,
    thresholds_of,
)
from restpoint.exit.traces import Traces, record_traces
from restpoint.exit.view import Readout, View
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded

SIGNALS = {"max-p": MaxProbability(), "relative-step": RelativeStep()}
COSTS = ExitCosts(
    device="none",
    dtype="float32",
    layer=(1.0, 1.1, 1.3, 1.6),
    head=2.0,
    readout=0.7,
    signals={"max-p": 0.1, "relative-step": 0.2},
    reads_law=frozenset(["max-p"]),
    overhead=0.5,
    joining=0.05,
)


def synthetic(sequences: int = 5, tokens: int = 40, layers: tuple[int, ...] = (2, 5, 6, 9), seed: int = 0) -> Traces:
    """Random traces of 12 layers, of which deeper ones and surer signals are right more often."""
    draws = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draws)

    shape = (sequences, tokens, len(layers))
    sure = (uniform(sequences, tokens, 1) + 0.1 * torch.arange(len(layers))).clamp_max(1)
    agrees = uniform(*shape) < sure
    return Traces(
        depth=12,
        layers=layers,
        confidences={
            "max-p": (sure + 0.2 * (uniform(*shape) - 0.5)).clamp(0, 1),
            "relative-step": (0.5 * sure + 0.5 * uniform(*shape)).clamp(0, 1),
        },
        tokens=torch.randint(99, shape[:2], generator=draws),
        agrees=agrees,
        log_probability=-2 * uniform(*shape),
        full_log_probability=-uniform(*shape[:2]),
        margin=uniform(*shape[:2]),
    )


def simulated(traces: Traces, depths: list[list[int]], signal: str | None) -> dict[str, list[float]]:
    """What stopping at these depths comes to, sequence by sequence: one text, token by token, with its queues."""
    found: dict[str, list[float]] = {key: [] for key in ("seen", "run", "wrong", "lost", "seconds")}
    for sequence, own in enumerate(depths):
        waiting = dict.fromkeys(traces.layers, 0)
        seen = run = wrong = 0
        lost = seconds = 0.0
        for token, stop in enumerate(own):
            seconds += COSTS.overhead
            block, at = 1, 0
            for layer in [*traces.layers, traces.depth]:
                duration = COSTS.layer[block - 1] if block <= 4 else 1.6 + (block - 4) * 0.25
                run += block * (layer - at)
                seconds += duration * (layer - at)
                at = layer
                if layer == traces.depth:
                    seconds += COSTS.head
                    break
                if signal is not None:
                    seconds += COSTS.signals[signal] + (COSTS.readout if signal == "max-p" else 0.0)
                if layer == stop:
                    waiting[layer] += block
                    place = traces.layers.index(layer)
                    wrong += not traces.agrees[sequence, token, place]
                    full, exit_ = traces.full_log_probability[sequence, token], traces.log_probability
                    lost += float(full) - float(exit_[sequence, token, place])
                    seconds += 0.0 if signal == "max-p" else COSTS.readout
                    break
                if waiting[layer]:
                    seconds += COSTS.joining
                    block += waiting[layer]
                    waiting[layer] = 0
            seen += at
        for key, value in {"seen": seen, "run": run, "wrong": wrong, "lost": lost, "seconds": seconds}.items():
            found[key].append(value / len(own))
    return found


def stopping_depths(traces: Traces, signal: str, threshold: float) -> list[list[int]]:
    """Where each token stops, by a loop."""
    threshold = float(torch.tensor(threshold))  # as a comparison with a float32 tensor takes it
    return [
        [
            next((traces.layers[at] for at, sure in enumerate(token) if sure >= threshold), traces.depth)
            for token in sequence
        ]
        for sequence in traces.confidences[signal].tolist()
    ]


def agrees_with(curve: Curve, point: int, expected: dict[str, list[float]]) -> None:
    for name, key in {
        "layers_seen": "seen",
        "layers_run": "run",
        "disagreement": "wrong",
        "log_loss": "lost",
        "seconds": "seconds",
    }.items():
        assert getattr(curve, name)[point].tolist() == pytest.approx(expected[key], rel=1e-9, abs=1e-9), name


@torch.no_grad()
def obvious(model: PreTrainedModel, prompt: list[int], new_tokens: int, layers: tuple[int, ...]) -> list[dict]:
    """Every traced token by whole passes of the model's own code."""
    ids = list(prompt)
    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    found = []
    for _ in range(new_tokens):
        output = model(torch.tensor([ids]), output_hidden_states=True)
        law = output.logits[0, -1].log_softmax(-1)
        token, two = int(law.argmax()), law.topk(2).values
        row = {"token": token, "full": float(law[token]), "margin": float(two[0] - two[1]), "layers": []}
        for layer in layers:
            state, before = (output.hidden_states[at][0, -1] for at in (layer, layer - 1))
            early = model.get_output_embeddings()(model.model.norm(state)).log_softmax(-1)
            step = float((state - before).norm() / before.norm())
            row["layers"].append(
                {
                    "agrees": int(early.argmax()) == token,
                    "log_probability": float(early[token]),
                    "max-p": float(early.max().exp()),
                    "relative-step": 1 / (1 + step),
                }
            )
        found.append(row)
        ids.append(token)
    return found


def check_traces(traces: Traces, number: int, expected: list[dict]) -> None:
    assert traces.tokens[number].tolist() == [row["token"] for row in expected]
    assert traces.full_log_probability[number].tolist() == pytest.approx([row["full"] for row in expected], abs=2e-4)
    assert traces.margin[number].tolist() == pytest.approx([row["margin"] for row in expected], abs=2e-4)
    for at in range(len(traces.layers)):
        own = [row["layers"][at] for row in expected]
        assert traces.agrees[number, :, at].tolist() == [each["agrees"] for each in own]
        assert traces.log_probability[number, :, at].tolist() == pytest.approx(
            [each["log_probability"] for each in own], abs=2e-4
        )
        for name, values in traces.confidences.items():
            assert values[number, :, at].tolist() == pytest.approx([each[name] for each in own], abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "olmo2"])
def test_traces_are_those_of_whole_passes_by_the_model_itself(family: str) -> None:
    model = build(family)
    layered = LayeredModel(model)
    prompts = [[5, 17, 33, 60, 8], [7, 9], [11, 3, 50, 71, 2, 90, 14, 15]]
    told: list[tuple[str, int, int]] = []
    traces = record_traces(
        layered,
        prompts,
        12,
        (1, 2, 3),
        Readout(layered),
        SIGNALS,
        batch=2,
        progress=lambda *own: told.append(own),
    )
    assert traces.agrees.shape == (3, 12, 3)
    assert 0 < traces.agrees.float().mean() < 1
    for number, prompt in enumerate(prompts):
        check_traces(traces, number, obvious(model, prompt, 12, (1, 2, 3)))
    assert told[-1] == ("traces", 36, 36)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def test_rows_in_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    layered = LayeredModel(build("llama"))
    prompts = [[5, 17, 33], [60, 8, 1], [9, 4, 4]]
    whole = record_traces(layered, prompts, 5, (1, 3), Readout(layered), SIGNALS)
    monkeypatch.setattr("restpoint.exit.traces._NUMBERS", 2 * 3 * VOCABULARY)
    parts = record_traces(layered, prompts, 5, (1, 3), Readout(layered), SIGNALS)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.agrees, parts.agrees)
    torch.testing.assert_close(whole.log_probability, parts.log_probability)


@pytest.mark.slow
def test_traces_of_the_bundled_model_are_those_of_whole_passes(reference: Loaded) -> None:
    layered = LayeredModel(reference.model)
    prompts = [reference.tokenizer(own.text).input_ids[:24] for own in bundled.prompts()[:2]]
    traces = record_traces(layered, prompts, 16, (8, 12, 14), Readout(layered), SIGNALS)
    assert 0 < traces.agrees.float().mean() < 1
    for number, prompt in enumerate(prompts):
        check_traces(traces, number, obvious(reference.model, prompt, 16, (8, 12, 14)))


def test_signals_that_look_back_are_noticed() -> None:
    @dataclass(frozen=True)
    class LooksBack(Signal):
        reads_law: ClassVar[bool] = False

        def confidence(self, view: View) -> torch.Tensor:
            if view.earlier is None:
                return torch.zeros(len(view.state))
            return 1 / (1 + (view.state - view.earlier.state).norm(dim=-1))

    layered = LayeredModel(build("llama"))
    traces = record_traces(layered, [[5, 6]], 3, (1, 2), Readout(layered), {**SIGNALS, "looks back": LooksBack()})
    assert traces.comparing == {"looks back"}


def test_traces_are_read_back_and_damage_is_refused(tmp_path: Path) -> None:
    traces = replace(synthetic(), comparing=frozenset(["max-p"]), about={"model": "none", "sizes": {10: 1, 9: 2}})
    traces.save(tmp_path)
    back = Traces.load(tmp_path)
    assert (back.depth, back.layers, back.comparing) == (traces.depth, traces.layers, traces.comparing)
    assert back.about["model"] == "none"
    for name in ("tokens", "agrees", "log_probability", "full_log_probability", "margin"):
        assert torch.equal(getattr(back, name), getattr(traces, name))
    assert back.confidences.keys() == traces.confidences.keys()
    assert all(torch.equal(back.confidences[name], own) for name, own in traces.confidences.items())

    described = (tmp_path / "traces.json").read_text()
    (tmp_path / "traces.json").write_text(described.replace('"depth": 12', '"depth": 13'))
    with pytest.raises(RestpointError, match="changed"):
        Traces.load(tmp_path)
    (tmp_path / "traces.json").write_text(json.dumps({**json.loads(described), "format": 99}))
    with pytest.raises(RestpointError, match="format 99"):
        Traces.load(tmp_path)
    (tmp_path / "traces.json").write_text(described[: len(described) // 2])
    with pytest.raises(RestpointError, match="damaged"):
        Traces.load(tmp_path)
    (tmp_path / "traces.json").write_text(described)
    content = bytearray((tmp_path / "traces.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "traces.safetensors").write_bytes(content)
    with pytest.raises(RestpointError, match="changed"):
        Traces.load(tmp_path)
    (tmp_path / "traces.safetensors").write_bytes(content[:200])
    with pytest.raises(RestpointError, match="damaged"):
        Traces.load(tmp_path)
    with pytest.raises(RestpointError, match="holds none"):
        Traces.load(tmp_path / "nowhere")


def test_a_sweep_is_what_token_by_token_simulation_gives() -> None:
    traces = synthetic()
    for signal in SIGNALS:
        curve = sweep(traces, signal, COSTS, thresholds=12)
        assert curve.settings[0] == 0.0
        assert curve.settings[-1] == NEVER
        assert len(curve.settings) > 8
        for point, threshold in enumerate(curve.settings):
            agrees_with(curve, point, simulated(traces, stopping_depths(traces, signal, threshold), signal))
    bare = sweep(traces, "max-p", thresholds=12)
    assert bare.seconds is None
    assert torch.equal(bare.layers_run, sweep(traces, "max-p", COSTS, thresholds=12).layers_run)


def test_settings_that_are_swept_in_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = synthetic()
    whole = sweep(traces, "max-p", COSTS)
    monkeypatch.setattr("restpoint.exit.sweep._AT_ONCE", 3 * traces.tokens.numel())
    parts = sweep(traces, "max-p", COSTS)
    assert whole.seconds is not None
    assert parts.seconds is not None
    assert torch.equal(whole.seconds, parts.seconds)


def test_fixed_depths_are_what_simulation_gives() -> None:
    traces = synthetic(layers=(5, 6, 7, 8))
    rules = [PositionRule(8, 5, 30), PositionRule(6, 6), PositionRule(12, 12)]
    curve = fixed(traces, COSTS, rules)
    for point, rule in enumerate(rules):
        depths = [[rule.layer_at(place) for place in range(1, 41)]] * 5
        agrees_with(curve, point, simulated(traces, depths, None))
    assert curve.settings == (8.0, 6.0, 12.0)
    static = fixed(traces)
    assert static.layers_seen.mean(-1).tolist() == [5, 6, 7, 8, 12]
    assert static.layers_run.mean(-1).tolist() == [5, 6, 7, 8, 12]
    with pytest.raises(RestpointError, match="depth 9"):
        fixed(traces, rules=[PositionRule(12, 5, 30)])


def test_a_higher_threshold_sees_more_layers_and_none_stops_at_the_last() -> None:
    traces = synthetic()
    for curve in sweeps(traces, COSTS).values():
        assert bool((curve.layers_seen.diff(dim=0) >= 0).all())
        assert torch.equal(curve.layers_seen[0], torch.full((5,), 2.0, dtype=torch.float64))
        assert torch.equal(curve.layers_seen[-1], torch.full((5,), 12.0, dtype=torch.float64))
        assert torch.equal(curve.layers_run[-1], curve.layers_seen[-1])
        assert not curve.disagreement[-1].any()
        assert not curve.log_loss[-1].any()
        assert bool((curve.layers_run + 1e-9 >= curve.layers_seen).all())


def test_the_oracle_is_the_ceiling() -> None:
    for seed in range(5):
        traces = synthetic(seed=seed)
        best = oracle(traces, COSTS)
        assert not best.disagreement.any()
        depths = [
            [next((traces.layers[at] for at, agrees in enumerate(token) if agrees), traces.depth) for token in sequence]
            for sequence in traces.agrees.tolist()
        ]
        agrees_with(best, 0, simulated(traces, depths, None))
        lasting = oracle(traces, lasting=True)
        assert not lasting.disagreement.any()
        assert lasting.layers_seen.mean() > best.layers_seen.mean()
        least = float(best.layers_seen.mean())
        curves = [*sweeps(traces).values(), lasting, fixed(traces)]
        for curve in curves:
            free = curve.disagreement.mean(-1) == 0
            assert free.any()
            assert float(curve.layers_seen.mean(-1)[free].min()) >= least - 1e-9
        shares = torch.cat([curve.disagreement.mean(-1) for curve in curves])
        ceiling = oracle(traces, budgets=shares.tolist())
        seen = torch.cat([curve.layers_seen.mean(-1) for curve in curves])
        assert bool((seen >= ceiling.layers_seen.mean(-1) - 1e-9).all())
        assert bool((ceiling.disagreement.mean(-1) <= shares + 1e-12).all())


def test_thresholds_lie_between_confidences() -> None:
    values = torch.tensor([0.25, 0.5, 0.5, 0.75, 1.0])
    assert thresholds_of(values, 5) == (0.0, 0.375, 0.625, 0.875, NEVER)
    assert thresholds_of(torch.full((3, 2, 2), 0.5), 9) == (0.0, NEVER)
    neighbours = torch.tensor([1.0 - 2.0**-24, 1.0])
    assert thresholds_of(neighbours, 2) == (0.0, 1.0, NEVER)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    # 600 repetitions: the share has a standard error of 0.9 points, so that one of 90% or below fails with
    # probability > 0.99, and so does one of 99% or above. 40 skewed sequences cost a percentile interval 1-2 points.
    repetitions, sequences = 600, 40
    draws = np.random.default_rng(1)
    samples = torch.tensor(draws.beta(2, 6, (repetitions, sequences)))
    low, high = percentile_intervals(samples @ resampled_shares(sequences, count=1999))
    share = float(((low <= 0.25) & (high >= 0.25)).double().mean())
    assert 0.92 <= share <= 0.975


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    sample = torch.tensor(np.random.default_rng(2).normal(size=25))
    shares = resampled_shares(25, seed=3)
    assert shares.shape == (25, RESAMPLES)
    torch.testing.assert_close(shares.sum(0), torch.ones(RESAMPLES, dtype=torch.float64))
    low, high = percentile_intervals(sample @ shares)
    picked = np.random.default_rng(4).integers(0, 25, (RESAMPLES, 25))
    expected = np.quantile(sample.numpy()[picked].mean(1), (0.025, 0.975))
    assert [float(low), float(high)] == pytest.approx(expected.tolist(), abs=0.02)


def test_points_give_means_with_intervals() -> None:
    traces = synthetic(sequences=12)
    curve = sweep(traces, "max-p", COSTS, thresholds=8)
    assert curve.seconds is not None
    for point, own in enumerate(curve.points()):
        assert own.layers_seen.value == pytest.approx(float(curve.layers_seen[point].mean()))
        assert own.layers_seen.low is not None
        assert own.layers_seen.high is not None
        assert own.layers_seen.low <= own.layers_seen.value + 1e-12 <= own.layers_seen.high + 2e-12
        assert own.speed is not None
        assert own.speed.value == pytest.approx(COSTS.plain(12) / float(curve.seconds[point].mean()))
    few = sweep(synthetic(sequences=2), "max-p", thresholds=8).points()
    assert few[1].layers_seen.low is None
    assert few[1].speed is None


def test_comparison_at_equal_disagreement() -> None:
    traces = synthetic(sequences=30)
    curves = {**sweeps(traces, COSTS), "oracle": oracle(traces, COSTS)}
    rows = compare(curves, (0.02, 0.2))
    assert [(row.disagreement, row.name) for row in rows] == list(itertools.product((0.02, 0.2), curves))
    for row in rows:
        curve = curves[row.name]
        allowed = [
            (float(seen), setting)
            for seen, wrong, setting in zip(
                curve.layers_seen.mean(-1), curve.disagreement.mean(-1), curve.settings, strict=True
            )
            if wrong <= row.disagreement
        ]
        least, setting = min(allowed)
        assert row.layers_saved.value == pytest.approx(12 - least)
        assert row.setting == setting
        assert row.speed is not None
        assert row.speed.value >= 1
    by_name = {row.name: row for row in rows if row.disagreement == 0.2}
    assert by_name["max-p"].difference is None
    lost = by_name["relative-step"].difference
    assert lost is not None
    assert lost.value == pytest.approx(
        by_name["relative-step"].layers_saved.value - by_name["max-p"].layers_saved.value
    )
    assert lost.high is not None
    assert lost.high < 0  # made to be the worse signal
    same = compare({"max-p": curves["max-p"], "again": replace(curves["max-p"], name="again")}, (0.2,))[1].difference
    assert same is not None
    assert (same.low, same.value, same.high) == (0, 0, 0)
    static = compare({"static": fixed(synthetic(layers=(2,)), rules=[PositionRule(2, 2)])}, (0.01,), "static")[0]
    assert static.setting is None
    assert static.layers_saved.value == 0
    with pytest.raises(RestpointError, match="reference"):
        compare({"oracle": curves["oracle"]})
    with pytest.raises(RestpointError, match="different numbers"):
        compare({"max-p": curves["max-p"], "other": sweep(synthetic(), "max-p")})


@pytest.mark.parametrize(("signal", "epsilon"), [("max-p", 0.1), ("max-p", 0.3), ("relative-step", 0.3)])
def test_chosen_layers_are_the_best_of_all(signal: str, epsilon: float) -> None:
    traces = synthetic(sequences=4, tokens=30)
    best: tuple[float, tuple[int, ...], float] = (1.0, (), NEVER)
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(4), size):
            some = replace(
                traces,
                layers=tuple(traces.layers[at] for at in chosen),
                confidences={name: own[..., list(chosen)] for name, own in traces.confidences.items()},
                agrees=traces.agrees[..., list(chosen)],
                log_probability=traces.log_probability[..., list(chosen)],
            )
            for threshold in thresholds_of(some.confidences[signal], 16):
                found = simulated(some, stopping_depths(some, signal, threshold), signal)
                speed = COSTS.plain(12) / (sum(found["seconds"]) / 4)
                if sum(found["wrong"]) / 4 <= epsilon + 1e-12 and speed > best[0] + 1e-12:
                    best = (speed, some.layers, threshold)
    choice = choose_layers(traces, COSTS, signal, epsilon, 3, thresholds=16)
    assert best[1]
    assert (choice.layers, choice.threshold) == best[1:]
    assert choice.speed == pytest.approx(best[0])
    assert choice.disagreement <= epsilon + 1e-12
    assert choice.rule == ThresholdRule(signal, best[2], best[1])


def test_plain_decoding_is_chosen_where_nothing_is_faster() -> None:
    dear = replace(COSTS, signals={"max-p": 50.0})
    choice = choose_layers(synthetic(), dear, "max-p", 0.5)
    assert (choice.layers, choice.speed, choice.rule) == ((), 1.0, None)
    assert choose_layers(synthetic(), COSTS, "max-p", 0.0).disagreement == 0


def test_a_signal_that_looks_back_is_told_of_the_first_layers_only() -> None:
    traces = synthetic()
    traces.agrees[..., :2] = False
    free = choose_layers(traces, COSTS, "max-p", 0.2, 2)
    bound = choose_layers(replace(traces, comparing=frozenset(["max-p"])), COSTS, "max-p", 0.2, 2)
    assert set(free.layers) & {6, 9}
    assert bound.layers in ((), (2,), (2, 5))
    assert bound.speed < free.speed


@pytest.mark.slow
@pytest.mark.parametrize("signal", SIGNALS)
def test_decoding_stops_where_the_traces_say(reference: Loaded, signal: str) -> None:
    layered = LayeredModel(reference.model)
    readout = Readout(layered)
    prompt = reference.tokenizer(bundled.prompts("code")[0].text).input_ids[:48]
    new_tokens = 60
    traces = record_traces(layered, [prompt], new_tokens, (12, 13, 14, 15), readout, SIGNALS)
    curve = sweep(traces, signal)
    right = curve.disagreement[:, 0] == 0
    settings = [
        curve.settings[int(torch.where(right, curve.layers_seen[:, 0], 99).argmin())],
        curve.settings[len(curve.settings) // 3],
    ]
    compared: set[int] = set()
    for setting in settings:
        point = curve.settings.index(setting)
        expected = stopping_depths(traces, signal, setting)[0]
        target = ExitTarget(layered, ThresholdRule(signal, setting, traces.layers), readout, SIGNALS[signal])
        rounds = list(decode(target, prompt, Sampler(SamplingSettings()), Stopping(1 + new_tokens)))
        tokens = [turn.tokens[0] for turn in rounds[1:]]
        full = traces.tokens[0].tolist()
        until = next((at for at, (one, other) in enumerate(zip(tokens, full, strict=True)) if one != other), new_tokens)
        # The token that differs was still decided on the full model's text.
        depths = [turn.depth for turn in rounds[1:]][: until + 1]
        assert depths == expected[: until + 1]
        assert (until == new_tokens) == bool(right[point])
        assert [one == other for one, other in zip(tokens, full, strict=True)][:until] == [True] * until
        compared |= set(depths)
        if until == new_tokens:
            assert sum(turn.layer_calls for turn in rounds[1:]) == curve.layers_seen[point, 0] * new_tokens
    assert len(compared) > 1


@pytest.mark.slow
def test_layers_run_are_counted_as_the_engine_counts_them(reference: Loaded) -> None:
    layered = LayeredModel(reference.model)
    readout = Readout(layered)
    prompt = reference.tokenizer(bundled.prompts("prose")[0].text).input_ids[:32]
    traces = record_traces(layered, [prompt], 48, (13, 15), readout, SIGNALS)
    curve = sweep(traces, "max-p")
    point = int(torch.where(curve.disagreement[:, 0] == 0, curve.layers_seen[:, 0], 99).argmin())
    rule = ThresholdRule("max-p", curve.settings[point], traces.layers)
    rounds = decode(
        ExitTarget(layered, rule, readout, SIGNALS["max-p"]), prompt, Sampler(SamplingSettings()), Stopping(49)
    )
    next(rounds)
    before = layered.work.token_layers
    assert [turn.tokens[0] for turn in rounds] == traces.tokens[0].tolist()
    run = float(curve.layers_run[point, 0]) * 48
    assert layered.work.token_layers - before == pytest.approx(run)
    assert 48 * float(curve.layers_seen[point, 0]) < run < 48 * layered.depth


@pytest.mark.parametrize("shows", ["layers", "speed"])
def test_a_chart_is_drawn(tmp_path: Path, shows: Literal["layers", "speed"]) -> None:
    traces = synthetic()
    curves = {**sweeps(traces, COSTS, 7), ORACLE: oracle(traces, COSTS, budgets=(0.0, 0.1, 0.2))}
    few = {**curves, LASTING_ORACLE: oracle(traces, COSTS, lasting=True), STATIC: fixed(traces, COSTS)}
    many = curves | {f"signal {number}": replace(curves["max-p"], name=f"signal {number}") for number in range(12)}
    drawn = []
    for name, own in (("few.svg", few), ("many.svg", many)):
        exit_chart.draw(own, tmp_path / name, shows=shows, most=0.5, model="a model")
        drawn.append((tmp_path / name).read_text())
    assert [text.count("<!-- signal ") for text in drawn] == [0, 12]
    for label in ("max-p", "relative-step", "oracle (ceiling)", "lasting oracle, none differs", "static depth"):
        assert f"<!-- {label} -->" in drawn[0]
    exit_chart.draw(curves, tmp_path / "one.png", shows=shows)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_nothing_is_refused(tmp_path: Path) -> None:
    curves = sweeps(synthetic(), thresholds=9)
    with pytest.raises(RestpointError, match="plot"):
        exit_chart.draw(curves, tmp_path / "chart.txt")
    with pytest.raises(RestpointError, match="curves"):
        exit_chart.draw({}, tmp_path / "chart.png")
    with pytest.raises(RestpointError, match="most"):
        exit_chart.draw(curves, tmp_path / "chart.png", most=0.0)
    with pytest.raises(RestpointError, match="no speed"):
        exit_chart.draw(curves, tmp_path / "chart.png", shows="speed")


def test_costs_are_measured_and_go_on_beyond_what_was() -> None:
    layered = LayeredModel(build("llama"))
    costs = measure_exit_costs(layered, Readout(layered), SIGNALS, (1, 2), repeats=3)
    assert list(costs.layer) == sorted(costs.layer)
    assert len(costs.layer) == 32
    assert min(costs.layer[0], costs.head, costs.readout, *costs.signals.values()) > 0
    assert costs.reads_law == {"max-p"}
    assert costs.check("max-p") == costs.signals["max-p"] + costs.readout
    assert (costs.stop("max-p"), costs.stop("relative-step")) == (0.0, costs.readout)
    assert COSTS.blocks(6).tolist() == pytest.approx([0, 1, 1.1, 1.3, 1.6, 1.85, 2.1])
    assert COSTS.blocks(2).tolist() == [0, 1, 1.1]
    assert replace(COSTS, layer=(1.0,)).blocks(3).tolist() == [0, 1, 2, 3]
    assert COSTS.plain(12) == 14.5
    with pytest.raises(RestpointError, match="not measured"):
        COSTS.check("entropy")
    with pytest.raises(RestpointError, match="costs"):
        replace(COSTS, head=-1.0)


def test_what_makes_no_sense_is_refused() -> None:
    layered = LayeredModel(build("llama"))
    readout = Readout(layered)
    for changed, named in (
        ({"layers": (2, 1)}, "layers"),
        ({"layers": (4,)}, "layers"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"new_tokens": 127}, "context"),
        ({"batch": 0}, "batch"),
        ({"prompts": []}, "prompts"),
        ({"prompts": [[]]}, "prompts"),
    ):
        asked = {"prompts": [[5, 6]], "new_tokens": 2, "layers": (1,), "batch": 1} | changed
        with pytest.raises(RestpointError, match=named):
            record_traces(layered, readout=readout, signals=SIGNALS, **asked)
    traces = synthetic()
    with pytest.raises(RestpointError, match="entropy"):
        sweep(traces, "entropy")
    with pytest.raises(RestpointError, match="thresholds"):
        sweep(traces, "max-p", thresholds=0)
    with pytest.raises(RestpointError, match="budgets"):
        oracle(traces, budgets=(2.0,))
    with pytest.raises(RestpointError, match="count"):
        choose_layers(traces, COSTS, "max-p", 0.1, 0)
    with pytest.raises(RestpointError, match="epsilon"):
        choose_layers(traces, COSTS, "max-p", -0.1)
    with pytest.raises(RestpointError, match="confidence is outside"):
        replace(traces, confidences={"max-p": traces.confidences["max-p"] * torch.nan})
