"""Decoding by a model's own loop: slow recomputation, the model's own ``generate``, counted calls, and the verb."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import looped
from decoding import native
from families import build
from restpoint.cli import main
from restpoint.decode.acceptance import Calibration
from restpoint.decode.costs import Costs
from restpoint.decode.settings import SamplingSettings
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.criteria import CRITERIA, DEFAULTS, RELATIVE, criterion
from restpoint.equilibrium.exits import Acceleration, RelativeStep
from restpoint.equilibrium.predictors import IdentityPredictor, RestPointRecurrence
from restpoint.errors import RestpointError
from restpoint.fit.options import FitOptions
from restpoint.fit.run import fit_profile
from restpoint.generate import Decoder
from restpoint.looping import Looping, looping
from restpoint.model.fingerprint import fingerprint
from restpoint.model.load import Loaded, load
from restpoint.model.recurrent.starts import PredictedStart, PreviousStart, ZeroStart
from restpoint.profile import Calibrations, Profile
from test_recurrent import divergence, relative

STEPS, NEW = 7, 9
PROMPT = [5, 17, 40, 3, 58, 21]


def tiny(model=None, name="tiny"):
    words = {f"w{index}": index for index in range(looped.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    model = looped.recurrent(mean_recurrence=STEPS, gain=0.2) if model is None else model
    return Loaded(name, model, PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def steps_of(decoder, pieces):
    return [round(decoder.layered.steps_of(float(piece.round.depth))) for piece in pieces]


def decoded(decoder, prompt=PROMPT, **options):
    """Tokens, and the steps behind each."""
    pieces = list(decoder.stream(prompt, max_tokens=NEW, ignore_end=True, **options))
    return [token for piece in pieces for token in piece.round.tokens], steps_of(decoder, pieces)


def accelerating(states):
    moves = [after - before for before, after in pairwise(states)]
    sizes = [float((b - a).norm()) for a, b in pairwise(moves)]
    ends = [float(state.norm()) for state in states[-2:]]
    return len(sizes) >= 2 and all(size < 0.5 * end for size, end in zip(sizes[-2:], ends, strict=True))


# --- tokens and steps ---


@pytest.mark.parametrize(
    ("asked", "prompt", "rule"),
    [
        ("relative-step=0.3", PROMPT, lambda states, _: relative(states) < 0.3),
        ("step-norm=30%", PROMPT, lambda states, _: relative(states) < 0.3),
        ("acceleration=50%", PROMPT, lambda states, _: accelerating(states)),
        ("kl=0.05", PROMPT[:1], lambda _, predicted: divergence(predicted) < 0.05),
        (
            "argmax-stability=2",
            PROMPT[:1],
            lambda _, predicted: len(predicted) > 2 and len({int(p.argmax()) for p in predicted[-3:]}) == 1,
        ),
    ],
)
def test_tokens_and_steps_are_those_of_a_slow_recomputation(asked, prompt, rule):
    """A prompt of one token where logits are read: in a longer one the coda sees earlier tokens as they are by then."""
    loaded = tiny()
    decoder = Decoder(loaded, looping=looping(loaded, exits=asked))
    tokens, steps = decoded(decoder, prompt)
    logits, ran = looped.Slow(loaded.model, STEPS, rule).run(torch.tensor([*prompt, *tokens[:-1]]))
    assert tokens == logits[len(prompt) - 1 :].argmax(-1).tolist()
    assert steps == ran[len(prompt) - 1 :].tolist()
    assert len(set(steps)) > 1
    assert min(steps) < STEPS


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_never_met_gives_the_full_counts_own_tokens(name):
    loaded = tiny()
    plain = Decoder(loaded)
    never = Decoder(loaded, looping=looping(loaded, exits=f"{name}={'99' if name == 'argmax-stability' else '0'}"))
    for sampling in (SamplingSettings(), SamplingSettings(temperature=1.0, seed=3)):
        tokens, steps = decoded(never, sampling=sampling)
        assert tokens == decoded(plain, sampling=sampling)[0]
        assert steps == [STEPS] * NEW


@pytest.mark.parametrize("keys", [None, 2])
@pytest.mark.parametrize("kind", ["zero", "previous", "predicted"])
def test_starts_give_the_text_of_the_models_own_generate(kind, keys):
    loaded, start = tiny(), predicted()
    profile = profile_of(loaded, start)
    own = {"zero": ZeroStart(), "previous": PreviousStart(), "predicted": start}[kind]
    decoder = Decoder(
        loaded, profile, (), looping=looping(loaded, exits="relative-step=0.3", start=kind, keys=keys, profile=profile)
    )
    tokens, _ = decoded(decoder)
    cache = loaded.model.new_cache(budget=keys or 1)
    arguments = {"exits": RelativeStep(threshold=0.3), "cache": cache}
    assert tokens == native(loaded.model, PROMPT, NEW, start=own, **arguments)
    differing = Decoder(loaded, looping=Looping(exits=RelativeStep(threshold=0.3)))
    assert decoded(differing)[1] != decoded(decoder)[1]


def test_fewer_steps_are_those_of_the_models_own_generate():
    loaded = tiny()
    tokens, steps = decoded(Decoder(loaded, looping=looping(loaded, steps=2)))
    assert tokens == native(loaded.model, PROMPT, NEW, num_steps=2)
    assert tokens != decoded(Decoder(loaded))[0]
    assert steps == [2] * NEW


@pytest.mark.parametrize("asked", ["relative-step=0.3", "kl=0.05"])
def test_steps_and_layers_are_counted_where_they_run(asked):
    loaded = tiny()
    decoder = Decoder(loaded, looping=looping(loaded, exits=asked))
    inner, cores, layers = loaded.model.model, [], []
    hooks = [inner.adapter.register_forward_hook(lambda *_: cores.append(1))]
    hooks += [
        layer.register_forward_hook(lambda *_: layers.append(1)) for layer in (*inner.prelude, *inner.core, *inner.coda)
    ]
    pieces = []
    for piece in decoder.stream(PROMPT, max_tokens=NEW, ignore_end=True):
        pieces.append((piece, len(cores), len(layers)))
        cores.clear()
        layers.clear()
    for hook in hooks:
        hook.remove()
    assert [count for _, count, _ in pieces[1:]] == steps_of(decoder, [piece for piece, _, _ in pieces[1:]])
    assert [count for _, _, count in pieces] == [piece.round.layer_calls for piece, _, _ in pieces]
    seen = decoder.generate(PROMPT, max_tokens=NEW, ignore_end=True).statistics
    mean = sum(count for _, count, _ in pieces[1:]) / (NEW - 1)
    assert decoder.layered.steps_of(seen.depth_per_token) == pytest.approx(mean)


def test_texts_stream_and_several_prompts_are_decoded_one_by_one():
    loaded = tiny()
    decoder = Decoder(loaded, looping=looping(loaded, exits="relative-step=0.3", start="previous"))
    prompts = ["w5 w17 w40", "w9 w9", "w30 w3 w4 w41 w7"]
    alone = [decoder.generate(prompt, max_tokens=NEW) for prompt in prompts]
    together = decoder.generate_batch(prompts, max_tokens=NEW)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    streamed = "".join(piece.text for piece in decoder.stream(prompts[0], max_tokens=NEW))
    assert streamed == alone[0].text
    assert "may differ" in decoder.notes[-1]
    assert "relative-step=0.3, start=previous" in decoder.notes[-1]


# --- names ---


def test_every_criterion_has_a_default_that_help_states(capsys):
    assert set(DEFAULTS) == set(CRITERIA)
    assert main(["generate", "--help"]) == 0
    helped = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    for name, setting in DEFAULTS.items():
        assert f"{name}[={setting}]" in helped
        said, found = criterion(name, torch.zeros(3, 2))
        assert said == f"{name}={setting}"
        assert repr(found) == repr(criterion(said, torch.zeros(3, 2))[1])


def test_a_share_is_of_the_states_size_and_a_number_in_its_units():
    weight = torch.zeros(3, 2)
    assert criterion("acceleration=10%", weight)[1] == criterion("acceleration = 10%", weight)[1]
    assert repr(criterion("acceleration=10%", weight)[1]) == repr(Acceleration(threshold=0.1, relative=True))
    assert repr(criterion("acceleration=10", weight)[1]) == repr(Acceleration(threshold=10.0))
    memory_less = {name: RELATIVE[name](0.5).hits for name in RELATIVE}
    assert memory_less == {name: CRITERIA[name](0.5, weight).hits for name in RELATIVE}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": "relativ-step"}, r"loop_exit='relativ-step' is not known \(did you mean 'relative-step'\?\)"),
        ({"exits": "kl=5%"}, "loop_exit: the setting of kl has no unit"),
        ({"exits": "kl=a"}, "loop_exit: 'a' is no number; write kl=0.01"),
        ({"exits": "kl="}, "loop_exit: '' is no number"),
        ({"exits": "kl=nan"}, "loop_exit: kl=nan: threshold"),
        ({"exits": "kl=-1"}, "loop_exit: kl=-1: threshold"),
        ({"exits": "argmax-stability=2.5"}, "loop_exit: argmax-stability counts steps"),
        ({"exits": "argmax-stability=inf"}, "loop_exit: argmax-stability counts steps"),
        ({"exits": "argmax-stability=0"}, "loop_exit: argmax-stability=0: hits"),
        ({"start": "noise"}, "loop_start='noise' is not known: choose one of zero, previous, predicted"),
        ({"start": "predicted"}, "loop_start: predicted needs a fitted start and no profile is given"),
        ({"steps": 0}, "loop_steps is 0"),
        ({"keys": 0}, "loop_keys is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(RestpointError, match=message):
        looping(tiny(), **settings)


def test_models_without_a_loop_are_refused_by_name():
    solved, ordinary = tiny(looped.equilibrium(), "solved"), tiny(build("llama"), "ordinary")
    with pytest.raises(RestpointError, match="looping: solved is solved, and stops by its tolerance"):
        looping(solved, exits="kl")
    with pytest.raises(RestpointError, match="looping: ordinary iterates no block"):
        looping(ordinary, start="zero")
    for loaded in (solved, ordinary):
        with pytest.raises(RestpointError, match="looping: "):
            Decoder(loaded, looping=Looping(steps=2))


def test_nobody_drafts_and_nothing_else_exits():
    loaded = tiny()
    for arguments in ({"drafters": ("lookup",)}, {"compile": True}, {"exits": True}):
        with pytest.raises(RestpointError, match=r"^looping: "):
            Decoder(loaded, looping=Looping(steps=2), **arguments)


# --- a start that is kept ---


def predicted():
    generator = torch.Generator().manual_seed(1)
    width = looped.TINY["hidden_size"]
    matrix = torch.randn(2 * width, width, generator=generator) / width**0.5
    affine = AffineMap(matrix.to(torch.bfloat16).float(), torch.ones(width))
    return PredictedStart(RestPointRecurrence((0,), (affine,)))


def profile_of(loaded, start):
    flat = Calibration.guess((), (0.9,))
    return Profile(
        fingerprint(loaded.model, loaded.tokenizer),
        loaded.name,
        "lens@1",
        {"lens@1": replace(IdentityPredictor((1,)), name="lens@1")},
        {"lens@1": Calibrations(flat, flat)},
        Costs("cpu", "float32", (1.0,) * 8, {"lens@1": (0.01, 0.01)}),
        None,
        start=start,
    )


def test_a_start_is_kept_in_the_profile(tmp_path):
    start = predicted()
    profile_of(tiny(), start).save(tmp_path)
    found = Profile.load(tmp_path).start
    assert found is not None
    (config, tensors), (expected, own) = found.predictor.state(), start.predictor.state()
    assert config == expected
    assert tensors.keys() == own.keys()
    for name in own:
        assert torch.equal(tensors[name], own[name])


def test_profiles_of_before_there_were_starts_are_read(tmp_path):
    profile_of(tiny(), None).save(tmp_path)
    described = json.loads((tmp_path / "profile.json").read_text())
    del described["start"]
    (tmp_path / "profile.json").write_text(json.dumps(described))
    profile = Profile.load(tmp_path)
    assert profile.start is None
    with pytest.raises(RestpointError, match="needs a fitted start and the profile has none"):
        looping(tiny(), start="predicted", profile=profile)


def test_a_start_of_another_kind_is_refused(tmp_path):
    profile_of(tiny(), predicted()).save(tmp_path)
    described = json.loads((tmp_path / "profile.json").read_text())
    described["start"] = {"kind": "identity", "name": "start", "state_layers": [0]}
    (tmp_path / "profile.json").write_text(json.dumps(described))
    with pytest.raises(RestpointError, match="profile: its start is of the kind identity"):
        Profile.load(tmp_path)


def test_another_models_start_is_refused():
    other = tiny(looped.recurrent(mean_recurrence=STEPS, gain=0.2, state_seed=1))
    with pytest.raises(RestpointError, match="profile: it belongs to another model"):
        looping(tiny(), start="predicted", profile=profile_of(other, predicted()))


def texts(count=400):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        words = torch.randint(3, looped.VOCABULARY, (50,), generator=generator).tolist()
        yield " ".join(f"w{word}" for word in words)


OPTIONS = FitOptions(max_tokens=3200, sequence_length=32, batch=4, features=0, exit_layers=(0,), start=True)


@pytest.mark.slow
def test_a_fitted_start_is_nearer_to_rest(tmp_path):
    loaded = tiny(looped.recurrent(mean_recurrence=STEPS, gain=0.2, dtype=torch.float32))
    report = fit_profile(loaded, texts(), OPTIONS, tmp_path)
    assert report.profile.start is not None
    profile = Profile.load(tmp_path)
    asked = {"exits": "relative-step=0.02", "profile": profile}
    mean = {}
    for start in ("zero", "previous", "predicted"):
        decoder = Decoder(loaded, profile, (), looping=looping(loaded, start=start, **asked))
        kept = [decoder.generate(text, max_tokens=20, ignore_end=True).statistics for text in list(texts(6))]
        mean[start] = sum(decoder.layered.steps_of(one.depth_per_token) for one in kept) / len(kept)
    assert mean["predicted"] < mean["zero"]
    assert mean["predicted"] < mean["previous"]


def test_a_start_is_not_fitted_where_there_is_no_loop(tmp_path):
    with pytest.raises(RestpointError, match="start: ordinary iterates no block"):
        fit_profile(tiny(build("llama"), "ordinary"), texts(), OPTIONS, tmp_path)


# --- the verb ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    kept = tmp_path_factory.mktemp("model")
    loaded = tiny(looped.recurrent(mean_recurrence=STEPS, gain=0.2, dtype=torch.float32))
    loaded.model.save_pretrained(kept)
    loaded.tokenizer.save_pretrained(kept)
    profile_of(loaded, predicted()).save(kept / "profile")
    return kept


VERB = ["--max-tokens", str(NEW), "--ignore-end", "--dtype", "float32", "--device", "cpu"]
WORDS = " ".join(f"w{token}" for token in PROMPT)


def test_the_verb_gives_the_librarys_text_steps_and_times(folder, capsys):
    arguments = ["--loop-exit", "relative-step=0.3", "--loop-start", "predicted", "--profile", str(folder / "profile")]
    assert main(["generate", str(folder), *arguments, "--stats", "--json", *VERB, WORDS]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    loaded = load(str(folder), dtype="float32", device="cpu")
    profile = Profile.load(folder / "profile")
    own = looping(loaded, exits="relative-step=0.3", start="predicted", profile=profile)
    tokens, steps = decoded(Decoder(loaded, looping=own))
    assert found["tokens"] == tokens
    assert found["prompt_tokens"] == len(PROMPT)
    mean = sum(steps[1:]) / (NEW - 1)
    assert found["loop"]["steps_per_token"] == pytest.approx(mean)
    assert found["loop"]["full_steps"] == STEPS
    assert found["loop"]["milliseconds_per_token"] == pytest.approx(1000 / found["statistics"]["tokens_per_second"])
    assert f"{mean:.2f} of {STEPS} steps a token" in err
    assert "ms a token" in err
    assert "restpoint: tokens go through the loop by relative-step=0.3, start=predicted" in err
    assert main(["generate", str(folder), *arguments, *VERB, WORDS]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


def test_json_of_an_ordinary_generation(folder, capsys):
    assert main(["generate", str(folder), "--plain", "--json", *VERB, WORDS]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["tokens"]) == NEW
    assert found["finished"] == "length"
    assert "loop" not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loop-exit", "kll"], "loop_exit='kll' is not known"),
        (["--loop-steps", "2", "--drafters", "lookup"], "--drafters: with --loop-exit and its like"),
        (["--loop-exit", "kl", "--exit"], "--exit: with --loop-exit"),
        (["--loop-start", "predicted"], "restpoint fit"),
    ],
)
def test_the_verb_refuses_in_one_line(folder, capsys, arguments, message):
    assert main(["generate", str(folder), *arguments, *VERB, WORDS]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
