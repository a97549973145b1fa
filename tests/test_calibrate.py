"""Calibration: text dealt out, losses held against the full model, certificates that bind, exits in use."""

import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from restpoint import bundled, cli
from restpoint.calibrate import kept_readout, sweeping
from restpoint.calibrate import run as calibration
from restpoint.calibrate.certify import Decoded, decode_with_exits, losses_of
from restpoint.calibrate.kept import Kept
from restpoint.calibrate.kept_readout import readout_once
from restpoint.calibrate.ladders import check_rule
from restpoint.calibrate.options import CalibrateOptions, ReadOptions, SweepOptions
from restpoint.calibrate.passages import deal
from restpoint.calibrate.readers import candidate_layers, fit_readout, state_layers
from restpoint.calibrate.run import CalibrateReport, calibrate_exits
from restpoint.calibrate.sweeping import sweep_exits
from restpoint.console import tables
from restpoint.decode.settings import SamplingSettings
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.predictors import AffinePredictor
from restpoint.errors import RestpointError
from restpoint.evaluate.options import BenchOptions
from restpoint.evaluate.speed import bench
from restpoint.exit.choice import LayerChoice
from restpoint.exit.engine import ExitTarget
from restpoint.exit.losses import Disagreement, Outcome
from restpoint.exit.policy import ExitPolicy, document_hash
from restpoint.exit.registry import SIGNALS
from restpoint.exit.risk import RiskControl, select
from restpoint.exit.rules import PositionRule, ThresholdRule
from restpoint.exit.sweep import sweep
from restpoint.exit.traces import record_traces
from restpoint.exit.view import Readout
from restpoint.generate import Decoder
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded, load
from restpoint.profile import Profile

SMALL = CalibrateOptions(
    epsilon=0.3,
    signal="max-p",
    layers=(12, 14),
    lens=True,
    sequences=30,
    prompt_tokens=8,
    new_tokens=12,
    batch=30,
    fit_tokens=1000,
)


@pytest.fixture(scope="module", autouse=True)
def _tuned_on_little() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_TUNED", 60)
        yield


@pytest.fixture(scope="module")
def profile() -> Profile:
    return replace(Profile.load(bundled.PROFILE_PATH), exits=None)


@pytest.fixture(scope="module")
def report(reference: Loaded, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> CalibrateReport:
    return calibrate_exits(reference, bundled.fit_texts(), profile, SMALL, tmp_path_factory.mktemp("calibrated"))


# --- text ---


def test_no_document_serves_two_ends(reference: Loaded) -> None:
    options = ReadOptions(prompt_tokens=16, fit_tokens=20_000)
    texts = list(bundled.fit_texts())
    dealt = deal(texts, reference.tokenizer, options, tune=60, judge=80)
    assert (len(dealt.tune), len(dealt.judge)) == (60, 80)
    by_prompt = {}
    for text in texts:
        ids = list(reference.tokenizer(text).input_ids)
        for start in range(0, len(ids) - 15, 64):
            by_prompt.setdefault(tuple(ids[start : start + 16]), text)
    tune, judge = ({by_prompt[tuple(prompt)] for prompt in own} for own in (dealt.tune, dealt.judge))
    assert len(judge) == dealt.sources
    assert not tune & judge
    assert not (tune | judge) & set(dealt.fit)
    assert {document_hash(text) for text in tune | judge | set(dealt.fit)} <= set(dealt.documents)
    with pytest.raises(RestpointError, match=r"^text: it gives .* 500 are needed to judge on"):
        deal(texts[:20], reference.tokenizer, options, tune=60, judge=500)


# --- readouts ---


def test_readouts_read_the_layers_before_an_exit() -> None:
    assert state_layers(9, ReadOptions()) == (5, 6, 7, 8, 9)
    assert state_layers(2, ReadOptions()) == (0, 1, 2)
    assert state_layers(9, ReadOptions(read_layers=1)) == (9,)


@pytest.mark.slow
def test_refined_readouts_come_closer_to_the_laws_that_are_emitted(reference: Loaded, tmp_path: Path) -> None:
    """On text that was not fitted on, with the states of the model as transformers runs it."""
    layered = LayeredModel(reference.model)
    documents = list(islice(bundled.fit_texts(), 60))
    told: list[tuple[str, int, int]] = []
    options = ReadOptions(fit_tokens=8_000, vocabulary=500, refine=150)

    def read(own: ReadOptions) -> Readout:
        return fit_readout(reference, layered, documents[:40], (3, 9), own, tmp_path, lambda *news: told.append(news))

    refined, solved = read(options), read(replace(options, refine=0))
    assert ("refine predictors", 300, 300) in told
    assert [done for stage, done, _ in told if stage == "refine predictors"] == sorted(
        done for stage, done, _ in told if stage == "refine predictors"
    )
    assert refined.vocabulary is not None
    assert solved.vocabulary is not None
    assert torch.equal(refined.vocabulary, solved.vocabulary), "the text is the same"
    ids = torch.tensor([reference.tokenizer(text).input_ids[:64] for text in documents[40:]])
    out = reference.model(ids, output_hidden_states=True)
    law = out.logits[:, 1:, refined.vocabulary].log_softmax(-1).flatten(0, 1)
    for layer, reads in ((3, (0, 1, 2, 3)), (9, (5, 6, 7, 8, 9))):
        assert refined.predictors[layer].state_layers == reads
        divergences = []
        for readout in (refined, solved):
            matrix, offset = (readout.predictors[layer].state()[1][name] for name in ("matrix", "offset"))
            assert torch.equal(matrix, matrix.bfloat16().float()), "rounded as it is saved"
            states = torch.cat([out.hidden_states[own][:, 1:] for own in reads], -1).flatten(0, 1)
            rest = reference.model.model.norm(states @ matrix + offset)
            own = (rest @ reference.model.lm_head.weight[readout.vocabulary].T).log_softmax(-1)
            divergences.append(float((law.exp() * (law - own)).sum(-1).mean()))
        assert divergences[0] < divergences[1], layer
    assert not (tmp_path / "states").exists()


# --- losses ---


def test_outcomes_are_those_of_the_full_model_after_the_same_prefix(reference: Loaded) -> None:
    layered = LayeredModel(reference.model)
    rule = ThresholdRule("max-p", 0.6, (8, 12))
    prompts = [reference.tokenizer(prompt.text).input_ids[:20] for prompt in bundled.prompts()[:5]]
    target = ExitTarget(layered, rule, Readout(layered), SIGNALS["max-p"])
    decoded = decode_with_exits(target, prompts, 10, frozenset(), batch=3)
    assert decoded.tokens == 45
    assert 8 < decoded.mean_depth < 16
    calls = 0
    for prompt, outcome in zip(prompts, decoded.outcomes, strict=True):
        assert outcome is not None
        alone = Decoder(reference, exits=ExitPolicy(rule, {}, SIGNALS["max-p"]))
        pieces = list(alone.stream(prompt, max_tokens=10, ignore_end=True))
        tokens = [token for piece in pieces for token in piece.round.tokens]
        calls += sum(piece.round.layer_calls for piece in pieces[1:])
        assert tokens[1:] == outcome.tokens.tolist()
        ids = torch.tensor([prompt + tokens])
        out = reference.model(ids, output_hidden_states=True)
        full = out.logits[0, len(prompt) : -1].log_softmax(-1)
        assert outcome.full_tokens.tolist() == full.argmax(-1).tolist()
        np.testing.assert_allclose(outcome.full_log_probability, full[torch.arange(9), ids[0, -9:]], atol=1e-4)
        for place, piece in enumerate(pieces[1:]):
            depth = piece.round.depth
            hidden = out.hidden_states[depth][:, len(prompt) + place]
            law = (out.logits[:, len(prompt) + place] if depth == 16 else layered.logits(hidden[None])[0]).log_softmax(
                -1
            )
            assert outcome.log_probability[place] == pytest.approx(float(law[0, tokens[place + 1]]), abs=1e-4)
        expected = np.mean(outcome.tokens != outcome.full_tokens)
        assert Disagreement()(outcome) == expected
    assert decoded.layer_calls < calls, "a batch shares passes"
    assert losses_of(decoded, Disagreement()).shape == (5,)


def test_a_text_that_ends_at_once_loses_nothing(reference: Loaded) -> None:
    layered = LayeredModel(reference.model)
    target = ExitTarget(layered, PositionRule(8, 8), Readout(layered))
    prompt = reference.tokenizer("Once upon a time").input_ids
    first = int(reference.model(torch.tensor([prompt])).logits[0, -1].argmax())
    decoded = decode_with_exits(target, [prompt], 10, frozenset([first]), batch=1)
    assert decoded.outcomes == [None]
    assert losses_of(decoded, Disagreement()).tolist() == [0.0]


# --- certificates ---


def test_a_calibration_writes_what_it_found(report: CalibrateReport, reference: Loaded, tmp_path: Path) -> None:
    certificate = report.policy.certificate
    assert certificate is not None
    assert report.selection.index is not None
    assert certificate.mean_loss == pytest.approx(report.mean_losses[report.selection.index])
    assert certificate.mean_loss < certificate.upper_bound <= 0.3
    assert report.settings == tuple(sorted(report.settings, reverse=True))
    assert report.policy.rule == ThresholdRule("max-p", report.settings[report.selection.index], (12, 14))
    assert "at most 0.3 with probability 0.9" in certificate.promise
    report.profile.save(tmp_path)
    exits = Profile.load(tmp_path).exits
    assert exits is not None
    assert (exits.rule, exits.certificate, exits.monitor) == (
        report.policy.rule,
        certificate,
        report.policy.monitor,
    )
    described, tensors = report.policy.state()
    older = dict(described["certificate"])
    assert older.pop("setting") == "threshold"
    older["thresholds"] = list(older.pop("settings"))
    assert ExitPolicy.from_state({**described, "certificate": older}, tensors).certificate == certificate
    decoder = Decoder(reference, Profile.load(tmp_path), exits=True)
    assert any(certificate.promise in note for note in decoder.notes)
    generation = decoder.generate("Once upon a time", max_tokens=20)
    assert generation.statistics.new_tokens == 20
    batch = decoder.generate_batch(["Once upon a time", "def main("], max_tokens=12)
    assert batch[0].tokens == generation.tokens[:12]
    warm = SamplingSettings(temperature=1.0)
    with pytest.raises(RestpointError, match=r"^temperature: the exits are certified for greedy decoding"):
        decoder.generate("Once upon a time", warm, max_tokens=5)
    promised_nothing = Decoder(reference, Profile.load(tmp_path), exits=replace(exits, certificate=None))
    assert len(promised_nothing.generate("Once upon a time", warm, max_tokens=5).tokens) == 5


def test_a_certificate_binds(report: CalibrateReport, reference: Loaded, profile: Profile) -> None:
    policy = report.policy
    half = load(dtype="bfloat16", device="cpu")
    with pytest.raises(RestpointError, match=r"^dtype: the exits were calibrated in float32 and the model is in bfl"):
        Decoder(half, report.profile, exits=True)
    with pytest.raises(RestpointError, match=r"^profile: its exits were calibrated with other predictors"):
        replace(policy, signal=SIGNALS["kl"]).target(LayeredModel(reference.model))
    certificate = policy.certificate
    assert certificate is not None
    seen = next(iter(bundled.fit_texts()))
    with pytest.raises(RestpointError, match=r"^text: a document of it was calibrated on"):
        certificate.require_unseen(["Another text.", f"  {seen}\n"])
    certificate.require_unseen([prompt.text for prompt in bundled.prompts()])
    with pytest.raises(RestpointError, match=r"^exits: the profile has none"):
        Decoder(reference, profile, exits=True)
    with pytest.raises(RestpointError, match=r"^exits: early exits and drafters exclude each other"):
        Decoder(reference, report.profile, ("lookup",), exits=True)
    with pytest.raises(RestpointError, match=r"^exits: compiled passes run all layers"):
        Decoder(reference, report.profile, compile=True, exits=True)


def test_a_prompt_unlike_the_calibration_is_warned_of(report: CalibrateReport, reference: Loaded) -> None:
    monitor = report.policy.monitor
    assert monitor is not None
    assert len(monitor.calibration) == 30
    few = Decoder(reference, report.profile, exits=report.policy)
    assert few.unfamiliar(bundled.prompts()[0].text) is None, "few numbers make no error of it"
    more = replace(report.policy, monitor=replace(monitor, calibration=tuple(np.linspace(0.4, 0.5, 199))))
    decoder = Decoder(reference, report.profile, exits=more)
    assert decoder.unfamiliar([5]) is None, "too short to tell"
    strange = decoder.unfamiliar("1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1")
    assert strange is not None
    assert "unlike the text that the exits were calibrated on" in strange


def test_an_interrupted_calibration_goes_on(
    report: CalibrateReport, reference: Loaded, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = calibration.decode_with_exits
    seen: list[float] = []

    def stopping(after: int) -> Callable:
        def decoding(target: ExitTarget, *args: object) -> object:
            if len(seen) == after:
                raise KeyboardInterrupt
            assert isinstance(target.rule, ThresholdRule)
            seen.append(target.rule.threshold)
            return decode(target, *args)

        return decoding

    assert len(report.settings) > 2
    monkeypatch.setattr(calibration, "decode_with_exits", stopping(2))
    with pytest.raises(KeyboardInterrupt):
        calibrate_exits(reference, bundled.fit_texts(), profile, SMALL, tmp_path)
    with pytest.raises(RestpointError, match=r"^output: .* unfinished calibration of other text, options"):
        calibrate_exits(reference, bundled.fit_texts(), profile, replace(SMALL, epsilon=0.31), tmp_path)
    monkeypatch.setattr(calibration, "decode_with_exits", stopping(-1))
    again = calibrate_exits(reference, bundled.fit_texts(), profile, SMALL, tmp_path)
    assert tuple(seen) == report.settings, "no threshold is decoded with twice"
    assert again.policy.rule == report.policy.rule
    assert again.mean_losses == report.mean_losses
    assert not (tmp_path / "calibration.safetensors").exists()


def test_no_threshold_may_qualify(reference: Loaded, profile: Profile, tmp_path: Path) -> None:
    def always(outcome: Outcome) -> float:
        return 0.25

    hard = replace(SMALL, epsilon=0.26)
    found = calibrate_exits(reference, bundled.fit_texts(), profile, hard, tmp_path, loss=always)
    assert found.selection.index is None
    assert found.selection.needed_sequences is not None
    assert found.selection.needed_sequences > 30
    assert found.profile.exits is None
    assert Profile.load(tmp_path).exits is None

    def wrong(outcome: Outcome) -> float:
        return 1.5

    with pytest.raises(RestpointError, match=r"^loss: wrong gave 1.5"):
        calibrate_exits(reference, bundled.fit_texts(), profile, SMALL, tmp_path, loss=wrong)


def test_what_cannot_be_calibrated_is_refused(reference: Loaded, profile: Profile, tmp_path: Path) -> None:
    for message, options in (
        (r"^epsilon is 0", {"epsilon": 0.0}),
        (r"^delta is 1", {"delta": 1.0}),
        (r"^sequences is 30; epsilon=0.01 at delta=0.1 needs \d+ at least", {"epsilon": 0.01}),
        (r"^layers is \(12, 16\); each must lie between 0 and 15", {"layers": (12, 16)}),
        (r"^signal.*max-q", {"signal": "max-q"}),
        (r"^loss.*agreement", {"loss": "agreement"}),
        (r"^method.*coin", {"method": "coin"}),
    ):
        with pytest.raises(RestpointError, match=message):
            calibrate_exits(reference, bundled.fit_texts(), profile, replace(SMALL, **options), tmp_path)
    by_place = CalibrateOptions(rule="position")
    for message, make in (
        (r"^new_tokens is 1", lambda: ReadOptions(new_tokens=1)),
        (r"^batch is 0", lambda: ReadOptions(batch=0)),
        (r"^features is -1", lambda: ReadOptions(features=-1)),
        (r"^refine is -1", lambda: ReadOptions(refine=-1)),
        (r"^read_layers is 0", lambda: ReadOptions(read_layers=0)),
        (r"^layers is \(3, 2\)", lambda: ReadOptions(layers=(3, 2))),
        (r"^rule is 'coin'; choose threshold, position or layer-skip", lambda: CalibrateOptions(rule="coin")),
        (r"^signal is kl; rule position", lambda: CalibrateOptions(rule="position", signal="kl")),
        (r"^lens is True; rule layer-skip", lambda: CalibrateOptions(rule="layer-skip", lens=True)),
        (r"^layers is \(8,\); rule layer-skip", lambda: CalibrateOptions(rule="layer-skip", layers=(8,))),
        (r"^layers is \(0, 3\); by position", lambda: check_rule(16, replace(by_place, layers=(0, 3)))),
        (r"^layers is \(3, 16\); by position", lambda: check_rule(16, replace(by_place, layers=(3, 16)))),
        (r"^rule is position: of 1 layer", lambda: check_rule(1, by_place)),
        (r"^rule is layer-skip: of 2 layers", lambda: check_rule(2, CalibrateOptions(rule="layer-skip"))),
        (r"^catch_up is 'late'", lambda: CalibrateOptions(catch_up="late")),
        (r"^most_layers is 0", lambda: CalibrateOptions(most_layers=0)),
        (r"^sequences is 1", lambda: SweepOptions(sequences=1)),
        (r"^disagreements is \(1.0,\)", lambda: SweepOptions(disagreements=(1.0,))),
    ):
        with pytest.raises(RestpointError, match=message):
            make()
    assert candidate_layers(16, ReadOptions()) == (8, 9, 10, 11, 12)
    assert candidate_layers(2, ReadOptions()) == (1,)


def test_kept_losses_are_of_one_recipe(tmp_path: Path) -> None:
    kept = Kept(tmp_path, {"seed": 1})
    choice = LayerChoice("max-p", (8, 12), 0.5, 1.2, 10.0, 0.04)
    kept.begin(choice, "readers")
    kept.add(0.9, np.array([0.0, 0.25]), 12.5)
    again = Kept(tmp_path, {"seed": 1})
    assert again.choice == choice
    assert again.done[0.9][0].tolist() == [0.0, 0.25]
    assert again.done[0.9][1] == 12.5
    again.begin(choice, "readers")
    with pytest.raises(RestpointError, match=r"^output: "):
        again.begin(choice, "others")
    with pytest.raises(RestpointError, match=r"^output: "):
        Kept(tmp_path, {"seed": 2})


# --- scores ---

PLAIN = CalibrateOptions(epsilon=0.8, sequences=30, prompt_tokens=8, new_tokens=6, batch=30)


def judged(loaded: Loaded) -> list[list[int]]:
    """Prompts that certify where nothing is fitted or tuned: every 32 tokens of each document, from the first on."""
    found = [
        ids[start : start + 8]
        for ids in (loaded.tokenizer(text).input_ids for text in islice(bundled.fit_texts(), 30))
        for start in range(0, len(ids) - 7, 32)
    ]
    return found[:30]


def test_a_drop_of_the_score_is_certified(
    reference: Loaded, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score of the text with exits, beside that of the text that transformers writes from the same prompt."""
    given: list[tuple[list[int], list[int]]] = []

    def evenness(prompt: list[int], tokens: list[int]) -> float:
        given.append((prompt, tokens))
        return sum(token % 2 == 0 for token in tokens) / len(tokens)

    options = replace(PLAIN, rule="layer-skip", loss="score-drop", epsilon=0.5, new_tokens=8)
    decode = calibration.decode_with_exits
    found: list[Decoded] = []

    def stopping(*arguments: Any) -> Decoded:
        if len(found) == 1:
            found.clear()
            raise KeyboardInterrupt
        found.append(decode(*arguments))
        return found[-1]

    monkeypatch.setattr(calibration, "decode_with_exits", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path, score=evenness)
    first, given = given, []
    monkeypatch.setattr(calibration, "decode_with_exits", lambda *own: found.append(decode(*own)) or found[-1])
    report = calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path, score=evenness)
    prompts = judged(reference)
    ends = sorted(reference.end_tokens())
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = reference.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=ends,
            pad_token_id=ends[0],
        )  # fmt: skip
        alone.append(text[0, 8:].tolist())
    assert first[:30] == list(zip(prompts, alone, strict=True))
    assert [prompt for prompt, _ in first[30:]] == prompts
    assert len(given) == 30 * len(found), "neither the full texts nor the first setting's are scored again"
    drops = [
        max(0.0, sum(token % 2 == 0 for token in full) / len(full) - sum(token % 2 == 0 for token in own) / len(own))
        for full, (_, own) in zip(alone, first[30:], strict=True)
    ]
    assert sum(drops) > 0
    assert report.mean_losses[0] == pytest.approx(sum(drops) / 30)
    for number, decoded in enumerate(found):
        assert decoded.texts == [tokens for _, tokens in given[30 * number : 30 * number + 30]]
    certificate = report.policy.certificate
    assert certificate is not None
    assert certificate.loss == "score-drop of evenness"


def test_scores_that_are_refused(
    reference: Loaded, profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def two(prompt: list[int], tokens: list[int]) -> float:
        return 2.0

    skip = replace(PLAIN, rule="layer-skip", new_tokens=2)
    for message, options, score in (
        (r"^loss: score-drop needs a score of each text, which only Python", replace(skip, loss="score-drop"), None),
        (r"^score: the loss disagreement reads none", skip, two),
        (r"^score: two gave 2.0; scores must lie in \[0, 1\]", replace(skip, loss="score-drop"), two),
    ):
        with pytest.raises(RestpointError, match=message):
            calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path, score=score)
    assert cli.main(["calibrate", "--loss", "score-drop"]) == 2
    assert "score-drop needs a score of each text, which only Python can give" in capsys.readouterr().err


# --- other rules ---


def shown(report: CalibrateReport) -> str:
    table = Console(width=120, record=True, file=io.StringIO())
    table.print(tables.calibrate_table(report))
    return table.export_text()


def test_layer_skipping_is_certified_on_all_new_tokens(reference: Loaded, profile: Profile, tmp_path: Path) -> None:
    """Against transformers with these layers taken out, of the prompt and of the first new token too."""
    options = replace(PLAIN, rule="layer-skip")
    report = calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path)
    assert (report.setting, report.choice) == ("layers left out", None)
    assert report.settings == tuple(float(count) for count in range(1, len(report.settings) + 1))
    assert len(report.settings) >= 2
    prompts = torch.tensor(judged(reference))
    for place, count in enumerate(report.settings[:2]):
        kept = {round(index * 15 / (15 - int(count))) for index in range(16 - int(count))}
        assert len(kept) == 16 - count
        shorter = copy.deepcopy(reference.model)
        shorter.model.layers = torch.nn.ModuleList(shorter.model.layers[layer] for layer in sorted(kept))
        ids = prompts
        for _ in range(6):
            ids = torch.cat([ids, shorter(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        full = reference.model(ids).logits[:, 7:-1].argmax(-1)
        ends = [ended(row, reference) for row in ids[:, 8:].tolist()]
        wrong = [(ids[row, 8:] != full[row])[: ends[row]].double().mean() for row in range(30)]
        assert report.mean_losses[place] == pytest.approx(float(torch.stack(wrong).mean()), abs=1e-9)
        assert report.depths[place] == 16 - count
    if report.selection.index is not None:
        certificate = report.policy.certificate
        assert certificate is not None
        assert (certificate.setting, certificate.settings) == ("layers left out", report.settings)
        assert report.policy.monitor is None
        loaded = Profile.load(tmp_path).exits
        assert loaded is not None
        assert (loaded.certificate, loaded.rule) == (certificate, report.policy.rule)
        decoder = Decoder(reference, Profile.load(tmp_path), exits=True)
        assert decoder.unfamiliar([5] * 20) is None
        calls = decoder.generate(judged(reference)[0], max_tokens=5, ignore_end=True).statistics.layers_per_token
        assert calls == 16 - report.settings[report.selection.index]
    assert "layers left out" in shown(report)
    assert "Evenly spaced layers left out, from safe to fast" in shown(report)


def ended(tokens: list[int], loaded: Loaded) -> int:
    """How many of the tokens a text has that an end token ends."""
    return next((place + 1 for place, token in enumerate(tokens) if token in loaded.end_tokens()), len(tokens))


def test_exits_by_position_are_certified(reference: Loaded, profile: Profile, tmp_path: Path) -> None:
    """Against hidden states of transformers: nothing that was skipped is needed later, so they are the full model's."""
    options = replace(PLAIN, rule="position", lens=True)
    report = calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path)
    assert (report.setting, report.choice) == ("last layer", None)
    assert report.settings == tuple(float(layer) for layer in range(15, 15 - len(report.settings), -1))
    assert len(report.settings) >= 2
    for place, last in enumerate(report.settings[:2]):
        ids = torch.tensor(judged(reference))
        for number in range(6):
            # Depth 16 of the prompt's pass; then linearly down to the last layer at the sixth token, rounded down.
            depth = math.floor(16 + (last - 16) * number / 5 + 1e-9)
            out = reference.model(ids, output_hidden_states=True)
            states = out.hidden_states[depth][:, -1]
            logits = out.logits[:, -1]
            if depth < 16:
                logits = reference.model.lm_head(reference.model.model.norm(states))
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        full = reference.model(ids).logits[:, 7:-1].argmax(-1)
        ends = [ended(row, reference) for row in ids[:, 8:].tolist()]
        wrong = [
            (ids[row, 9:] != full[row, 1:])[: ends[row] - 1].double().mean() if ends[row] > 1 else torch.zeros(())
            for row in range(30)
        ]
        assert report.mean_losses[place] == pytest.approx(float(sum(wrong)) / 30, abs=1e-9)
    assert "last layer" in shown(report)
    if report.selection.index is not None:
        exits = Profile.load(tmp_path).exits
        assert exits is not None
        assert exits.rule == PositionRule(16, int(report.settings[report.selection.index]), 6)
        assert exits.monitor is None


def test_a_readout_is_fitted_once(
    reference: Loaded, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(PLAIN, rule="position", layers=(14,), read_layers=1, refine=2, fit_tokens=12_000)
    texts = list(islice(bundled.fit_texts(), 120))
    fitted: list[tuple[int, ...]] = []
    fit, decode = kept_readout.fit_readout, calibration.decode_with_exits

    def fitting(*args: Any, **named: Any) -> Readout:
        fitted.append(args[3])
        return fit(*args, **named)

    def stopping(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_readout, "fit_readout", fitting)
    monkeypatch.setattr(calibration, "decode_with_exits", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate_exits(reference, texts, profile, options, tmp_path)
    assert fitted == [(14, 15)], "every depth down to the last layer occurs"
    assert (tmp_path / "readout.safetensors").exists()
    with safe_open(tmp_path / "readout.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    monkeypatch.setattr(calibration, "decode_with_exits", decode)
    report = calibrate_exits(reference, texts, profile, options, tmp_path)
    assert fitted == [(14, 15)]
    assert report.policy.vocabulary is None, "no token runs the whole depth, so all must be within reach"
    for layer in (14, 15):
        matrix = report.policy.predictors[layer].state()[1]["matrix"]
        assert torch.equal(matrix, saved[f"predictors/{layer}/matrix"].float())
    assert not (tmp_path / "readout.safetensors").exists()
    assert not (tmp_path / "calibration.safetensors").exists()


def test_a_kept_readout_is_of_one_recipe(reference: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = LayeredModel(reference.model)
    generator = torch.Generator().manual_seed(0)
    fitted: list[str] = []

    def fitting(*_: Any, **__: Any) -> Readout:
        fitted.append("")
        matrix = torch.randn(256, 256, generator=generator).bfloat16().float()
        affine = AffinePredictor((9,), AffineMap(matrix, torch.zeros(256)))
        return Readout(layered, {9: affine}, torch.tensor([3, 5, 8]))

    monkeypatch.setattr(kept_readout, "fit_readout", fitting)

    def once(texts: list[str], options: ReadOptions, layers: tuple[int, ...] = (9,), **named: Any) -> Readout:
        return readout_once(reference, layered, texts, layers, options, tmp_path, lambda *_: None, **named)

    first = once(["one", "two"], ReadOptions())
    again = once(["one", "two"], ReadOptions(batch=3))
    assert len(fitted) == 1, "how many texts are decoded at once makes no difference to it"
    assert torch.equal(again.predictors[9].state()[1]["matrix"], first.predictors[9].state()[1]["matrix"])
    assert again.vocabulary is not None
    assert again.vocabulary.tolist() == [3, 5, 8]
    for number, differently in enumerate(
        (
            lambda: once(["one", "three"], ReadOptions()),
            lambda: once(["one", "three"], ReadOptions(refine=5)),
            lambda: once(["one", "three"], ReadOptions(refine=5), (8, 9)),
            lambda: once(["one", "three"], ReadOptions(refine=5), (8, 9), whole_vocabulary=True),
        ),
        2,
    ):
        differently()
        assert len(fitted) == number
    assert not once(["one"], ReadOptions(lens=True)).predictors


def test_a_fitted_calibration_emits_what_it_was_certified_with(
    reference: Loaded, profile: Profile, tmp_path: Path
) -> None:
    options = replace(
        SMALL,
        signal="gate",
        layers=(),
        lens=False,
        read_layers=3,
        refine=10,
        features=64,
        fit_tokens=12_000,
        vocabulary=1000,
        new_tokens=8,
    )
    found = calibrate_exits(reference, bundled.fit_texts(), profile, options, tmp_path)
    policy = Profile.load(tmp_path).exits
    assert policy is not None
    assert policy.vocabulary is not None
    assert len(policy.vocabulary) == 1000
    assert set(policy.predictors) == set(found.policy.rule.candidates(16))
    for layer, predictor in policy.predictors.items():
        assert predictor.state_layers == (layer - 2, layer - 1, layer)
    assert policy.readers == found.policy.readers
    decoders = [Decoder(reference, own, exits=True) for own in (Profile.load(tmp_path), found.profile)]
    first, second = (decoder.generate("def read(path):", max_tokens=40).tokens for decoder in decoders)
    assert first == second
    assert not (tmp_path / "states").exists()


def test_a_sweep_compares_signals_on_the_same_traces(reference: Loaded, tmp_path: Path) -> None:
    options = SweepOptions(
        signals=("gate", "relative-step"),
        layers=(8, 12),
        features=32,
        refine=0,
        fit_tokens=12_000,
        sequences=12,
        prompt_tokens=8,
        new_tokens=8,
        disagreements=(0.05, 0.2),
    )
    found = sweep_exits(reference, bundled.fit_texts(), options, tmp_path)
    assert set(found.curves) == {"max-p", "gate", "relative-step", "static depth"}
    assert {(row.name, row.disagreement) for row in found.comparisons} == {
        (name, most) for name in found.curves for most in (0.05, 0.2)
    }
    assert set(found.choices) == {0.05, 0.2}
    assert set(found.choices[0.2]) == {"max-p", "gate", "relative-step"}
    for curve in found.curves.values():
        exact = [point for point in curve.points() if point.disagreement.value == 0]
        ceiling = found.oracle.points()[0]
        assert all(point.layers_seen.value >= ceiling.layers_seen.value - 1e-9 for point in exact)
    found.write(tmp_path / "sweep.json")
    assert set(json.loads((tmp_path / "sweep.json").read_text())["curves"]) == {*found.curves, "oracle"}
    assert (tmp_path / "traces.safetensors").exists()


def test_the_bound_holds_over_draws_of_recorded_losses_for_every_signal(reference: Loaded) -> None:
    """200 calibrations of 120 texts drawn from 150: the risk is that of all 150, known exactly. Power: 3 errors."""
    layered = LayeredModel(reference.model)
    prompts = [reference.tokenizer(text).input_ids[:8] for text in islice(bundled.fit_texts(), 150)]
    traces = record_traces(layered, prompts, 12, (10, 13), Readout(layered), SIGNALS, batch=50)
    control = RiskControl(epsilon=0.1, delta=0.1)
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, 150, 120) for _ in range(200)]
    found = 0
    for name in SIGNALS:
        curve = sweep(traces, name, thresholds=24)
        losses = curve.disagreement.flip(0).T.numpy()  # from safe to fast
        risk = losses.mean(0)
        assert risk[0] == 0
        chosen = [select(losses[draw], control).index for draw in draws]
        found += sum(index is not None and risk[index] > 0 for index in chosen)
        violations = np.mean([index is not None and risk[index] > control.epsilon for index in chosen])
        assert violations <= control.delta + 3 * math.sqrt(control.delta * (1 - control.delta) / 200), name
    assert found > 1000, "a bound that lets nobody stop would hold too"


# --- the command line ---


def test_verbs_of_early_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_TUNED", 20)
    small = ["--lens", "--layers", "12", "14", "--prompt-tokens", "8", "--new-tokens", "8", "--dtype", "float32"]
    profile = str(tmp_path / "profile")
    words = ["calibrate", "--signal", "max-p", "--sequences", "30", "--epsilon", "0.3", "-o", profile, *small]
    assert cli.main(words) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "kept: expected disagreement at most 0.3 with probability 0.9 (30 texts of 8 new tokens" in told
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "controlled"
    assert found["certificate"]["sequences"] == 30
    generate = ["generate", "--profile", profile, "--dtype", "float32", "--max-tokens", "12", "Once upon a time"]
    assert cli.main([*generate, "--exit", "--show-depth", "--stats"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "early exits: expected disagreement at most 0.3" in shown.err
    assert "tokens by layers: " in shown.err
    assert "(early exits)" in shown.err
    assert cli.main([*generate, "--exit", "--drafters", "lookup"]) == 2
    assert "early exits and drafters exclude each other" in capsys.readouterr().err
    for flags in (["--datastore", str(tmp_path)], ["--skip-layers", "3"], ["--draft-tokens", "4"]):
        assert cli.main([*generate, "--exit", *flags]) == 2
        assert f"{flags[0]}: with --exit nobody drafts" in capsys.readouterr().err
    assert cli.main([*generate, "--exit", "--dtype", "bfloat16"]) == 2
    assert "the exits were calibrated in float32" in capsys.readouterr().err
    sweep_words = ["sweep", "--signals", "max-p", "kl", "--sequences", "10", "-o", str(tmp_path / "sweep"), *small]
    assert cli.main(sweep_words) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "At most 5% of tokens differ" in told
    assert "oracle" in told
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    assert cli.main(["calibrate", "MODEL"]) == 2
    assert "profile: none is given; make one with: restpoint fit MODEL" in capsys.readouterr().err


def test_the_bundled_exits_are_measured_beside_plain_decoding(reference: Loaded) -> None:
    profile = Profile.load(bundled.PROFILE_PATH)
    options = BenchOptions(new_tokens=16, prompts=1, repetitions=1, domains=("maths",), exits=True, budget_seconds=0.1)
    rows = {row.method: row for row in bench(reference, profile, options).rows if row.domain == "average"}
    exits, verified = rows["early exits"], rows["early exits, verified"]
    assert exits.disagreement is not None
    assert 0 <= exits.disagreement < 0.5
    assert exits.layers_per_token is not None
    assert 11 <= exits.layers_per_token < 16
    assert exits.divergences == ()
    assert verified.identical == 1
    assert verified.disagreement is None
    with pytest.raises(RestpointError, match=r"^exits: the profile has none"):
        bench(reference, replace(profile, exits=None), options)


def test_the_bundled_model_exits_early_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--exit", "--show-depth", "--dtype", "float32", "--max-tokens", "24", "Once upon a time"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert "expected disagreement at most 0.05 with probability 0.9 (500 texts" in shown.err
    assert "9: " in shown.err
