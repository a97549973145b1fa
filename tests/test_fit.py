"""Fitting: what comes out, that it resumes, and that profiles are bound to their model."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from families import VOCABULARY, build
from restpoint.decode.costs import Costs
from restpoint.decode.draft import Candidates, InstantDrafter, TokenPath, Verified
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.fit.measuring import measure_instant
from restpoint.fit.options import FitOptions
from restpoint.fit.recording import record
from restpoint.fit.run import FitReport, fit_profile
from restpoint.generate import Decoder
from restpoint.model.fingerprint import fingerprint
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.profile import Profile
from restpoint.trajectory.record import pack
from restpoint.trajectory.store import StateStore, StoreLayout

OPTIONS = FitOptions(
    max_tokens=3200, sequence_length=32, batch=4, features=48, heads=2, vocabulary=40, exit_layers=(0, 2), refine=60
)


def tiny(family: str = "llama") -> Loaded:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return Loaded("tiny", build(family), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2"))


def texts() -> Iterator[str]:
    draw = random.Random(4)
    while True:
        yield " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(50))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitReport]:
    output = tmp_path_factory.mktemp("profile")
    return output, fit_profile(tiny(), texts(), OPTIONS, output)


def test_every_predictor_is_fitted_measured_and_saved(fitted: tuple[Path, FitReport]) -> None:
    output, report = fitted
    names = {row.predictor for row in report.rows}
    assert names == {
        *("recurrence@0", "recurrence+features@0", "refined-recurrence@0", "recurrence@2"),
        *("lens@2", "ridge@2", "monge@2"),
    }
    assert all(0 <= row.acceptance <= 1 and 0 <= row.top1 <= 1 and row.expected_speed for row in report.rows)
    by_name = {row.predictor: row for row in report.rows}
    assert by_name["ridge@2"].acceptance > by_name["lens@2"].acceptance
    assert report.profile.chosen == report.rows[0].predictor
    assert report.tokens == 3200
    assert set(report.profile.calibrations) == names | set(TABLES) | {"heads"}
    assert set(report.profile.costs.draft) == names
    assert report.profile.costs.largest == 64
    assert list(report.profile.costs.verify) == sorted(report.profile.costs.verify)
    assert {path.name for path in output.iterdir()} == {"profile.json", "profile.safetensors"}


def test_calibrations_say_how_often_drafts_stand(fitted: tuple[Path, FitReport]) -> None:
    """Random words never repeat, so what is copied or counted rarely stands; the curves rise with confidence."""
    for name, own in fitted[1].profile.calibrations.items():
        for calibration in (own.greedy, own.sampling):
            for acceptance, share in zip(calibration.acceptance, calibration.share, strict=True):
                assert len(acceptance) == len(share) == len(calibration.edges) + 1, name
                assert list(acceptance) == sorted(acceptance), name
                assert all(0 <= value <= 1 for value in acceptance), name
                assert sum(share) == pytest.approx(1.0)
            if name in TABLES:
                assert calibration.edges == TABLES[name].make(VOCABULARY, None).edges


ALONG_DEPTH = replace(OPTIONS, exit_layers=(1, 3), heads=0, features=0, extrapolate=True, refine=40, tuned_lens=True)


@pytest.fixture(scope="module")
def fitted_along_depth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitReport]:
    """With extrapolations, for which layer 1 has too few before it, and refined ridge maps."""
    output = tmp_path_factory.mktemp("along_depth")
    return output, fit_profile(tiny(), texts(), ALONG_DEPTH, output)


def test_extrapolations_and_refined_maps_are_fitted_measured_and_saved(
    fitted_along_depth: tuple[Path, FitReport],
) -> None:
    """And after loading they draft losslessly."""
    output, report = fitted_along_depth
    along_depth = {"rre@3", "anderson@3", "dmd@3"}
    both = {f"{kind}@{layer}" for kind in ("lens", "ridge", "monge", "recurrence", "refined") for layer in (1, 3)}
    assert {row.predictor for row in report.rows} == along_depth | both
    assert all(row.expected_speed for row in report.rows)
    loaded, profile = tiny(), Profile.load(output)
    assert profile.predictors["rre@3"].state_layers == (0, 1, 2, 3)
    assert profile.measured == report.rows
    generator = torch.Generator().manual_seed(0)
    expected = Decoder(loaded).generate("w5 w20 w7", max_tokens=24, ignore_end=True)
    for name in sorted(along_depth | {"refined@3"}):
        predictor, saved = report.profile.predictors[name], profile.predictors[name]
        states = [torch.randn(1, 3, 32, generator=generator) for _ in predictor.state_layers]
        torch.testing.assert_close(saved.predict(states), predictor.predict(states), atol=0.05, rtol=0.05)
        fast = Decoder(loaded, profile, (name,))
        drafted = fast.generate("w5 w20 w7", max_tokens=24, ignore_end=True, draft_tokens=4)
        assert drafted.tokens == expected.tokens
        assert drafted.statistics.drafted > 0


def test_refined_maps_tell_the_laws_better_on_text_kept_aside(
    fitted_along_depth: tuple[Path, FitReport], tmp_path: Path
) -> None:
    """KL to transformers' own logits, over the sequences that refinement is judged on."""
    predictors = fitted_along_depth[1].profile.predictors
    loaded = tiny()
    layered = LayeredModel(loaded.model)
    recorded = record(loaded, layered, texts(), ALONG_DEPTH, (0, 1, 3), tmp_path, lambda *_: None)
    found = dict.fromkeys(("ridge@1", "refined@1", "ridge@3", "refined@3"), 0.0)
    for index in recorded.held_out[:: max(1, len(recorded.held_out) // 16)]:
        ids, _ = next(recorded.store.read([index]))
        with torch.no_grad():
            output = loaded.model(ids, output_hidden_states=True)
            law = torch.log_softmax(output.logits[0, 1:], -1)
            for name in found:
                predictor = predictors[name]
                rest = predictor.predict([output.hidden_states[predictor.exit_layer][0, 1:]])
                guess = torch.log_softmax(loaded.model.lm_head(loaded.model.model.norm(rest)), -1)
                found[name] += float((law.exp() * (law - guess)).sum())
    for layer in (1, 3):
        assert found[f"refined@{layer}"] < found[f"ridge@{layer}"]


def test_the_refined_recurrence_drafts_the_laws_better_on_text_kept_aside(
    fitted: tuple[Path, FitReport], tmp_path: Path
) -> None:
    """KL to transformers' own logits of the first and second drafted token, over the tokens that may be drafted."""
    profile = fitted[1].profile
    assert profile.vocabulary is not None
    loaded = tiny()
    recorded = record(loaded, LayeredModel(loaded.model), texts(), OPTIONS, (0, 2), tmp_path, lambda *_: None)
    found = dict.fromkeys(("recurrence+features@0", "refined-recurrence@0"), 0.0)
    for index in recorded.held_out:
        ids, _ = next(recorded.store.read([index]))
        inner = loaded.model.model
        with torch.no_grad():
            rest = recorded.rests(index)[None]
            law = torch.log_softmax(loaded.model(ids).logits[0][2:, profile.vocabulary], -1)
            embedded = inner.embed_tokens(ids)
            for name in found:
                predictor = profile.predictors[name]
                first = predictor.predict([embedded[:, 1:]], rest[:, :-1])
                second = predictor.predict([embedded[:, 2:]], first[:, :-1], 1)
                for drafted in (first[0, 1:], second[0]):
                    guess = torch.log_softmax(loaded.model.lm_head(inner.norm(drafted))[:, profile.vocabulary], -1)
                    found[name] += float((law.exp() * (law - guess)).sum())
    assert found["refined-recurrence@0"] < 0.95 * found["recurrence+features@0"]


class Known(InstantDrafter):
    """Says of every position what it was told, and of the one after it something else."""

    name = "known"
    edges = (0.5,)

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.learnt = 0

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        text = next(text for text in self.texts if text[: len(path.tokens)] == path.tokens)
        place = len(path.tokens)
        right, wrong = text[place], (text[place] + 1) % VOCABULARY
        after = [(text[place + 1] + 1) % VOCABULARY] if room > 1 and place + 1 < len(text) else []
        return Candidates([right, wrong, *after], [-1, -1, *[0 for _ in after]], [0.9, 0.1, *[0.9 for _ in after]])

    def learn(self, path: TokenPath, verified: Verified) -> None:
        self.learnt += 1
        assert verified.draft.tokens == ()


def test_instant_drafters_are_held_against_the_models_own_text(tmp_path: Path) -> None:
    """One that is always right at confidence 0.9, always wrong at 0.1, and always wrong one token further on."""
    loaded = tiny()
    layered = LayeredModel(loaded.model)
    recorded = record(loaded, layered, texts(), OPTIONS, (0, 2), tmp_path, lambda *_: None)
    held_out = [(index, tokens) for index, tokens in recorded.held_out_tokens() if recorded.own(index)]
    assert len(held_out) > 2
    drafter = Known([tokens for _, tokens in held_out])
    found = measure_instant(recorded, drafter)
    assert drafter.learnt == sum(len(tokens) - recorded.prompt_length for _, tokens in held_out)
    for calibration in (found.greedy, found.sampling):
        assert calibration.acceptance[0][0] < 0.05
        assert calibration.acceptance[0][1] > 0.95
        assert calibration.acceptance[1][1] < 0.05
        assert calibration.share[0] == pytest.approx((0.5, 0.5))
        assert calibration.share[1] == pytest.approx((0.0, 1.0), abs=1e-6)
    for index, tokens in held_out:
        with torch.no_grad():
            expected = loaded.model(torch.tensor([tokens])).logits[0]
        found = layered.logits(recorded.rests(index)[None])[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_model_never_begins_twice_with_the_same_text(tmp_path: Path) -> None:
    """Even where it writes more sequences than there are to begin with: a greedy one would come twice."""
    own = replace(OPTIONS, own_share=0.7, max_tokens=4480)
    loaded = tiny()
    recorded = record(loaded, LayeredModel(loaded.model), texts(), own, (0,), tmp_path, lambda *_: None)
    assert (recorded.natural, recorded.store.count) == (42, 139)
    ids = torch.cat([ids for ids, _states in recorded.store.read(range(139))])
    begun = [tuple(prompt) for prompt in ids[42:, : recorded.prompt_length].tolist()]
    assert len(set(begun)) == 97
    natural = {tuple(row[start : start + 8].tolist()) for row in ids[:42] for start in (0, 8, 16)}
    assert set(begun) <= natural


def test_acceptance_is_what_transformers_would_say(fitted: tuple[Path, FitReport], tmp_path: Path) -> None:
    """The logit lens row, computed again from ``output_hidden_states`` and the model's own modules."""
    loaded = tiny()
    report = fit_profile(
        loaded, texts(), replace(OPTIONS, own_share=0.0, features=0, vocabulary=0, max_tokens=1920), tmp_path
    )
    row = next(row for row in report.rows if row.predictor == "lens@2")
    documents = ([*loaded.tokenizer(text).input_ids, 2] for text in texts())
    sequences = [sequence for _, sequence in zip(range(60), pack(documents, 32), strict=False)]
    every = round(1 / OPTIONS.held_out)
    shares = []
    for index in range(every - 1, 60, every):
        ids = torch.tensor([sequences[index]])
        with torch.no_grad():
            output = loaded.model(ids, output_hidden_states=True)
            lens = loaded.model.lm_head(loaded.model.model.norm(output.hidden_states[2]))
        p, q = (torch.softmax(logits[0, 2:], -1) for logits in (output.logits, lens))
        shares.append(torch.minimum(p, q).sum(-1))
    assert row.acceptance == pytest.approx(float(torch.cat(shares).mean()), abs=1e-5)


def test_profile_round_trip(fitted: tuple[Path, FitReport]) -> None:
    output, report = fitted
    profile = Profile.load(output)
    assert profile.chosen == report.profile.chosen
    assert profile.calibrations == report.profile.calibrations
    assert profile.costs == report.profile.costs
    assert profile.heads is not None
    assert profile.measured == report.profile.measured
    assert profile.vocabulary is not None
    assert torch.equal(profile.vocabulary, report.profile.vocabulary)
    states = [torch.randn(1, 1, 32)]
    previous = torch.randn(1, 1, 32)
    before = report.profile.predictors["recurrence+features@0"].predict(states, previous, 1)
    after = profile.predictors["recurrence+features@0"].predict(states, previous, 1)
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)  # kept in bfloat16


def test_profile_decodes_losslessly(fitted: tuple[Path, FitReport]) -> None:
    """By every predictor alone, and by the default: the chosen one with lookup and recycling."""
    loaded, profile = tiny(), Profile.load(fitted[0])
    plain = Decoder(loaded)
    for names in (None, *((name,) for name in profile.predictors), ("heads", "lookahead"), ("dynamic-exit",)):
        fast = Decoder(loaded, profile, names)
        assert fast.drafting is not None
        assert fast.drafting.names == (names or ("lookup", "recycling", "predictor"))
        for start in range(3):
            prompt = f"w{start + 5} w{start + 20} w7"
            expected = plain.generate(prompt, max_tokens=40, ignore_end=True)
            drafted = fast.generate(prompt, max_tokens=40, ignore_end=True, draft_tokens=4)
            assert drafted.tokens == expected.tokens
            assert drafted.text == expected.text
            assert drafted.statistics.drafted > 0


def test_an_interrupted_fit_resumes_with_the_same_result(fitted: tuple[Path, FitReport], tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "record" and done >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_profile(tiny(), texts(), OPTIONS, tmp_path, interrupt)
    assert not (tmp_path / "profile.json").exists()
    recorded = []
    report = fit_profile(tiny(), texts(), OPTIONS, tmp_path, lambda stage, done, _n: recorded.append((stage, done)))
    assert recorded[0] == ("record", 48)
    for name, predictor in report.profile.predictors.items():
        _, tensors = predictor.state()
        _, expected = fitted[1].profile.predictors[name].state()
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
    with pytest.raises(KeyboardInterrupt):
        fit_profile(tiny(), texts(), OPTIONS, tmp_path, interrupt)
    with pytest.raises(RestpointError, match="unfinished recording with another model, text or options"):
        fit_profile(tiny(), texts(), replace(OPTIONS, features=50), tmp_path)


def test_store_drops_a_half_written_sequence(tmp_path: Path) -> None:
    layout = StoreLayout("model", "text", 4, (0, 2), 3, "float32")
    store = StateStore(tmp_path, layout)
    ids, states = torch.arange(8).view(2, 4), torch.randn(2, 4, 3, 3)
    store.append(ids, states)
    with (tmp_path / "ids.bin").open("ab") as file:
        file.write(b"\0" * 16)  # the ids of a third sequence, whose states never came
    again = StateStore(tmp_path, layout)
    assert again.count == 2
    ((read_ids, read_states),) = again.read([1, 0])
    assert torch.equal(read_ids, ids[[1, 0]])
    assert torch.equal(read_states, states[[1, 0]])
    with pytest.raises(RestpointError, match="another model, text or options"):
        StateStore(tmp_path, replace(layout, hidden=4))


def test_profiles_are_refused_where_they_do_not_belong(fitted: tuple[Path, FitReport]) -> None:
    profile = Profile.load(fitted[0])
    loaded = tiny()
    profile.require(loaded)
    with pytest.raises(RestpointError, match="belongs to another model"):
        Decoder(tiny("qwen2"), profile)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.5)
    with pytest.raises(RestpointError, match="unembedding differ"):
        profile.require(loaded)
    half = tiny()
    half.model.to(torch.bfloat16)
    assert fingerprint(half.model, half.tokenizer) == profile.fingerprint


def test_damaged_profiles_are_refused(fitted: tuple[Path, FitReport], tmp_path: Path) -> None:
    output = fitted[0]

    def damaged(name: str, content: bytes) -> Path:
        for file in output.iterdir():
            (tmp_path / file.name).write_bytes(content if file.name == name else file.read_bytes())
        return tmp_path

    tensors = (output / "profile.safetensors").read_bytes()
    described = json.loads((output / "profile.json").read_text())
    with pytest.raises(RestpointError, match=r"has no profile\.json"):
        Profile.load(tmp_path / "nowhere")
    for name, content, said in (
        ("profile.safetensors", tensors[: len(tensors) // 2], "damaged or cut short"),
        ("profile.safetensors", tensors[:-8] + b"\1" * 8, "do not belong together"),
        ("profile.json", (output / "profile.json").read_bytes()[:200], "damaged or cut short"),
        ("profile.json", json.dumps(described | {"format": 99}).encode(), "format 99"),
        ("profile.json", json.dumps({k: v for k, v in described.items() if k != "chosen"}).encode(), "lacks 'chosen'"),
    ):
        with pytest.raises(RestpointError, match=said):
            Profile.load(damaged(name, content))


def test_push_to_hub_uploads_a_profile_that_loads(
    fitted: tuple[Path, FitReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client is watched, not called: what it would upload is a complete profile."""
    calls: dict[str, dict[str, object]] = {}

    def create_repo(_api: object, repository: str, **options: object) -> None:
        calls["create"] = {"repository": repository, **options}

    def upload_folder(_api: object, **options: object) -> str:
        shutil.copytree(str(options["folder_path"]), tmp_path / "uploaded")
        calls["upload"] = options
        return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    profile = Profile.load(fitted[0])
    assert profile.push_to_hub("someone/profile") == "https://hub/commit"
    assert calls["create"] == {"repository": "someone/profile", "private": True, "exist_ok": True}
    assert calls["upload"]["repo_id"] == "someone/profile"
    uploaded = Profile.load(tmp_path / "uploaded")
    assert (uploaded.calibrations, uploaded.costs) == (profile.calibrations, profile.costs)


def test_costs_are_measured_again_elsewhere(fitted: tuple[Path, FitReport], monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile's own where device and dtype are the same and they still hold, else measured: once, a batch anew."""
    profile = Profile.load(fitted[0])
    holds = True
    monkeypatch.setattr("restpoint.drafting.costs.still_hold", lambda *_: holds)

    def costs_of(profile: Profile, rows: int = 1) -> tuple[Costs, Costs]:
        decoder = Decoder(tiny(), profile, (profile.chosen,))
        assert decoder.drafting is not None
        target = LayeredTarget(decoder.layered)
        made = [decoder.drafting.speculators(target, [Sampler(SamplingSettings())] * rows)[0] for _ in range(2)]
        assert None not in made
        return made[0].control.costs, made[1].control.costs

    assert costs_of(profile)[0] == profile.costs
    holds = False
    assert costs_of(profile)[0].verify != profile.costs.verify
    holds = True
    moved = replace(profile, costs=replace(profile.costs, device="another machine"))
    once, again = costs_of(moved)
    assert once == again
    assert once.device == profile.costs.device
    assert once.verify != profile.costs.verify
    assert once.draft[profile.chosen] != profile.costs.draft[profile.chosen]
    at_zero = replace(profile, chosen="recurrence@0")
    assert costs_of(at_zero, rows=3)[0].verify != profile.costs.verify


def test_bad_options_and_texts(tmp_path: Path) -> None:
    for wrong, said in (
        ({"max_tokens": 100}, "max_tokens is 100"),
        ({"own_share": 1.0}, r"own_share is 1.0"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"features": -1}, "features is -1"),
        ({"heads": -2}, "heads is -2"),
        ({"refine": -1}, "refine is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"sequence_length": 8}, "sequence_length is 8"),
    ):
        with pytest.raises(RestpointError, match=said):
            replace(OPTIONS, **wrong)
    with pytest.raises(RestpointError, match="text: it has only 2 sequences"):
        fit_profile(tiny(), [" ".join(["w5"] * 70)], OPTIONS, tmp_path)
    with pytest.raises(RestpointError, match=r"exit_layers is \(0, 4\)"):
        fit_profile(tiny(), texts(), replace(OPTIONS, exit_layers=(0, 4)), tmp_path)
    with pytest.raises(RestpointError, match="sequence_length is 256, above the model's context of 128"):
        fit_profile(tiny(), texts(), FitOptions(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*")
def test_families_that_cannot_verify_are_refused_or_decoded_plainly(tmp_path: Path) -> None:
    loaded = tiny("mamba")
    with pytest.raises(RestpointError, match="cannot verify drafts"):
        fit_profile(loaded, texts(), OPTIONS, tmp_path)
    decoder = Decoder(loaded)
    assert decoder.notes
    assert "plainly" in decoder.notes[0]
    generation = decoder.generate("w5 w6 w7", max_tokens=12, ignore_end=True)
    expected = loaded.model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert generation.tokens == expected[0, 3:].tolist()
    assert generation.statistics.tokens_per_pass == 1
