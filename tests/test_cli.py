import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from restpoint import bundled, cli
from restpoint.cli import loading, main
from restpoint.console import terminal
from restpoint.decode.acceptance import Calibration
from restpoint.decode.costs import Costs, device_name
from restpoint.equilibrium.predictors import IdentityPredictor
from restpoint.generate import Decoder
from restpoint.model.fingerprint import fingerprint
from restpoint.model.load import load
from restpoint.profile import Calibrations, Profile

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer:"
CPU = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _no_bundled_profile(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "PROFILE_PATH", tmp_path / "none")


@pytest.fixture(scope="module")
def profile(reference, tmp_path_factory):
    flat = Calibration.guess((), (0.9,))
    costs = Costs(device_name(torch.device("cpu")), "float32", (1.0,) * 8, {"lens@12": (0.01, 0.01)})
    predictor = replace(IdentityPredictor((12,)), name="lens@12")
    made = Profile(
        fingerprint(reference.model, reference.tokenizer),
        "reference",
        "lens@12",
        {"lens@12": predictor},
        {"lens@12": Calibrations(flat, flat)},
        costs,
        torch.arange(8192),
    )
    folder = tmp_path_factory.mktemp("profile")
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(reference):
    return Decoder(reference).generate(PROMPT, max_tokens=12).text


def error_of(capsys, arguments):
    """The one line that a wrong command line ends with."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("restpoint: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


# --- help ---


@pytest.mark.parametrize("arguments", [["--help"], [], ["generate", "--help"], ["fit", "-h"], ["--version"]])
def test_help_needs_no_torch(arguments):
    code = f"import sys; from restpoint.cli import main; print(main({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("0 False")


@pytest.mark.parametrize("verb", ["check", "fit", "generate", "bench"])
def test_help_teaches(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"restpoint {verb}" in out
    assert "For example:" in out
    assert "--trust-remote-code" in out
    assert "{None}" not in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"restpoint {terminal.version()}\n"


def test_flags_are_those_of_the_library():
    keywords = {
        name: one.default for name, one in inspect.signature(load).parameters.items() if one.kind is one.KEYWORD_ONLY
    }
    del keywords["causal"]  # each verb's own
    assert {one.name: one.default for one in fields(loading.LoadFlags) if one.name != "threads"} == keywords


# --- generate ---


def test_generate_writes_the_text_and_nothing_else(capsys, expected):
    assert main(["generate", PROMPT, "--max-tokens", "12", *CPU]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err == ""


def test_model_may_stand_before_the_flags_and_prompt_after(capsys, expected, profile):
    arguments = ["generate", str(bundled.MODEL_PATH), "--profile", str(profile), "--max-tokens", "12", *CPU, PROMPT]
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_stats_go_beside_the_text(capsys, expected, profile):
    assert main(["generate", "--profile", str(profile), "--stats", "--max-tokens", "12", *CPU, PROMPT]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert "12 new tokens in " in err
    assert "drafts by lookup, recycling, predictor" in err
    assert "of 16 layers a token" in err
    lengths = next(line for line in err.splitlines() if line.startswith("tokens of each pass: "))
    assert sum(int(word) for word in lengths.split(": ")[1].split()) == 11
    assert max(int(word) for word in lengths.split(": ")[1].split()) > 1


def test_bundled_profile_serves_the_bundled_model_unless_plain(capsys, monkeypatch, profile):
    monkeypatch.setattr(loading, "PROFILE_PATH", profile)
    common = ["--stats", "--max-tokens", "4", *CPU, PROMPT]
    seen = []
    for arguments in (["generate", *common], ["generate", "--plain", *common]):
        assert main(arguments) == 0
        seen.append(capsys.readouterr().err)
    assert "drafts by lookup, recycling, predictor" in seen[0]
    assert "(plain)" in seen[1]


def test_prompt_from_a_pipe_or_a_file(capsys, monkeypatch, tmp_path, expected):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", "-", "--max-tokens", "12", *CPU]) == 0
    assert capsys.readouterr().out == expected + "\n"
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "12", *CPU]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_stop_text_is_left_out(capsys, expected):
    stop = expected.split()[1]
    assert main(["generate", PROMPT, "--max-tokens", "12", "--stop", "no such text", "--stop", stop, *CPU]) == 0
    assert capsys.readouterr().out == expected[: expected.index(stop)] + "\n"


def test_sampling_flags_reach_the_sampler(capsys):
    sampled = ["generate", PROMPT, "--max-tokens", "8", "--temperature", "1.5", *CPU]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*sampled, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# --- the other verbs ---


def test_check_prints_every_capability(capsys):
    assert main(["check", *CPU]) == 0
    out = capsys.readouterr().out
    for word in ("reference: llama, 16 layers", "depth", "rollback", "tree", "tolerance", "Drafts can be verified"):
        assert word in out


def test_check_as_json(capsys):
    assert main(["check", "--json", *CPU]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["drafts"] is True
    assert content["layers"] == 16
    assert content["capabilities"]["resume"].keys() == {"supported", "difference", "tolerance", "reason"}


def test_bench_shows_and_writes(capsys, tmp_path, profile):
    arguments = ["bench", "--profile", str(profile), "--new-tokens", "4", "--prompts", "1", "--repetitions", "1"]
    files = ["--plot", str(tmp_path / "b.png"), "--json", str(tmp_path / "b.json")]
    assert main([*arguments, "--domains", "plays", *files, *CPU]) == 0
    out, err = capsys.readouterr()
    assert "huggingface early exit" in out
    assert "times plain on the slowest quarter of the prompts" in out
    assert err == ""
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 10
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.slow
def test_fit_writes_a_profile_that_generates_the_same_text(capsys, tmp_path, expected):
    folder = tmp_path / "profile"
    small = ["--max-tokens", "10240", "--features", "0", "--exit-layers", "0", "8", "--steps", "1"]
    assert main(["fit", "-o", str(folder), *small, *CPU]) == 0
    out = capsys.readouterr().out
    assert "recurrence@8" in out
    assert "(chosen)" in out
    assert main(["generate", "--profile", str(folder), "--max-tokens", "12", *CPU, PROMPT]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.slow
def test_quick_bench_takes_less_than_a_minute(tmp_path, profile):
    began = time.perf_counter()
    command = [sys.executable, "-m", "restpoint.cli", "bench", "--quick", "--profile", str(profile)]
    subprocess.run([*command, "--plot", str(tmp_path / "b.png")], capture_output=True, check=True)
    assert time.perf_counter() - began < 60


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a single process")
def test_interrupting_a_fit_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "restpoint.cli", "fit", "-o", str(tmp_path / "profile")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "profile" / "states").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("restpoint: interrupted; the same command resumes")


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "prompt: none is given"),
        (["generate", ""], "prompt: it is empty"),
        (["generate", "reference", ""], "prompt: it is empty"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--top-k", "5"], "top_k has no effect on greedy decoding"),
        (["generate", "x", "--plain", "--profile", "p"], "--plain and --profile contradict each other"),
        (["generate", "x", "y", "--prompt-file", "p"], "prompt and --prompt-file contradict"),
        (["generate", "--prompt-file", "gone.txt"], "prompt_file: gone.txt does not exist"),
        (["generate", "x", "--profile", "gone"], "profile: gone has no profile.json"),
        (["generate", "./gone", "x"], "model folder './gone' does not exist"),
        (["generate", "nobody/nothing", "x"], "model 'nobody/nothing' is neither a folder nor in the local Hub cache"),
        (["check", "nobody/nothing"], "model 'nobody/nothing' is neither"),
        (["check", "--dtype", "float"], "did you mean 'float32'"),
        (["check", "--threads", "0"], "threads is 0"),
        (["check", "--device", "cpu", "--device-map", "auto"], "contradict each other"),
        (["fit", "--text", "gone.txt"], "text: gone.txt does not exist"),
        (["fit", "--max-tokens", "0"], "max_tokens is 0"),
        (["bench", "--plot", "bench.bmp"], "plot: bench.bmp"),
        (["bench", "--profile", "gone"], "profile: gone has no profile.json"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(capsys, arguments, says):
    assert says in error_of(capsys, arguments)


def test_zero_tokens_are_refused(capsys):
    assert "max_tokens is 0; ask for at least 1" in error_of(capsys, ["generate", "x", "--max-tokens", "0", *CPU])


def test_an_empty_text_file_is_refused(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in error_of(capsys, ["fit", "--text", str(tmp_path / "empty.txt")])


def test_a_damaged_profile_is_refused(capsys, tmp_path, profile):
    cut = tmp_path / "cut"
    shutil.copytree(profile, cut)
    (cut / "profile.json").write_text((cut / "profile.json").read_text()[:-20])
    assert "is damaged or cut short" in error_of(capsys, ["generate", "x", "--profile", str(cut)])
    shutil.copytree(profile, cut, dirs_exist_ok=True)
    os.truncate(cut / "profile.safetensors", 100)
    assert "is damaged or cut short" in error_of(capsys, ["generate", "x", "--profile", str(cut)])


def test_another_models_profile_is_refused(capsys, tmp_path, profile):
    other = tmp_path / "other"
    shutil.copytree(profile, other)
    described = json.loads((other / "profile.json").read_text())
    (other / "profile.json").write_text(json.dumps({**described, "fingerprint": "0" * 64}))
    says = error_of(capsys, ["generate", "x", "--profile", str(other), *CPU])
    assert "profile: it belongs to another model" in says


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["write"],
        ["generate", "x", "--nonsense"],
        ["bench", "--new-tokens", "many"],
        ["check", "a", "b"],
    ],
)
def test_what_no_verb_knows_is_refused(capsys, arguments):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_debug_shows_the_traceback_from_anywhere(capsys, place):
    arguments = ["generate", "x", "--temperature", "-1"]
    arguments.insert(place, "--debug")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("restpoint: error: temperature is -1.0")


def fail(error):
    def run(_self):
        raise error

    return run


def test_a_fault_of_ours_is_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(cli.Check, "run", fail(RuntimeError("two\nlines")))
    assert main(["check"]) == 1
    assert capsys.readouterr().err == (
        "restpoint: internal error: RuntimeError: two lines; --debug shows the traceback\n"
    )


def test_interruption(capsys, monkeypatch):
    monkeypatch.setattr(cli.Fit, "run", fail(KeyboardInterrupt()))
    monkeypatch.setattr(cli.Check, "run", fail(KeyboardInterrupt()))
    assert main(["fit", "-o", "there"]) == 130
    assert capsys.readouterr().err == "restpoint: interrupted; the same command resumes from what there holds\n"
    assert main(["check"]) == 130
    assert capsys.readouterr().err == "restpoint: interrupted\n"


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m restpoint.cli --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


# --- the atlas ---

SMALL = ["--max-tokens", "600", "--sequence-length", "64", "--scenes", "1", "--measures", "geometry", "lens"]


@pytest.fixture(scope="module")
def atlases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlases")
    assert main(["analyze", *SMALL, "-o", str(folder / "whole")]) == 0
    return folder


def test_analyze_writes_atlas_page_tables_and_pictures(atlases, capsys):
    whole = atlases / "whole"
    names = {path.name for path in whole.iterdir()}
    assert names == {"atlas.json", "atlas.safetensors", "index.html", "tables", "pictures", "untrained"}
    assert {path.name for path in (whole / "untrained").iterdir()} == {"atlas.json", "atlas.safetensors"}
    assert "random weights" in (whole / "index.html").read_text(encoding="utf-8")
    assert (whole / "tables" / "geometry.csv").stat().st_size > 1000
    assert main(["report", str(whole), "-o", str(atlases / "page"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["subject"]["layers"] == 16
    assert len(content["results"]["geometry"]["step.mean"]) == 16
    assert (atlases / "page" / "index.html").exists()


def test_shares_are_merged_on_the_command_line(atlases, capsys):
    for share in ("1/2", "2/2"):
        where = str(atlases / share.replace("/", "-"))
        assert main(["analyze", *SMALL, "--share", share, "-o", where]) == 0
    parts = [str(atlases / name) for name in ("1-2", "2-2")]
    capsys.readouterr()
    assert main(["merge", *parts, "-o", str(atlases / "merged"), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)["results"]
    assert main(["report", str(atlases / "whole"), "-o", str(atlases / "again"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["results"]
    assert merged["geometry"]["step.mean"] == pytest.approx(whole["geometry"]["step.mean"], rel=1e-10)
    assert main(["merge", parts[0], "-o", str(atlases / "half")]) == 2
    assert "give each of them once" in capsys.readouterr().err


def test_compare_shows_both_and_what_they_have_in_common(atlases, capsys):
    both = [str(atlases / "whole"), str(atlases / "whole" / "untrained")]
    assert main(["compare", *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["reference", "reference (random weights)"]
    assert found["layers"] == [16, 16]
    profiles = {profile["name"]: profile for profile in found["profiles"]}
    assert len(profiles["geometry.anisotropy"]["second"]) == 5
    assert any("different texts" in note for note in found["notes"])
    assert main(["compare", *both, "-o", str(atlases / "both")]) == 0
    assert "geometry.anisotropy" in capsys.readouterr().out
    assert (atlases / "both" / "index.html").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "nowhere"], "atlas: nowhere holds none"),
        (["compare", "nowhere", "elsewhere"], "atlas: nowhere holds none"),
        (["analyze", "--share", "5/4"], "share is '5/4'"),
        (["analyze", "--measures", "geometri"], "measures: 'geometri' is unknown"),
        (["analyze", "--part", "encoder"], "part: no list of layers"),
        (["analyze", "--layers", "model.norm"], "path: model.norm is no list"),
        (["analyze", "--text", "nowhere.txt"], "text: nowhere.txt does not exist"),
    ],
)
def test_what_the_atlas_cannot_do_is_told_in_one_line(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert told in capsys.readouterr().err
