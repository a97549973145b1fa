"""The studies: their numbers, their files, and the command that makes them."""

import base64
import csv
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from restpoint.cli import main
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.options import HEAD, LAYERS, STUDIES, SimulateOptions, chosen
from restpoint.theory.page import write_page
from restpoint.theory.pictures import draw
from restpoint.theory.simulate import RUN, SPECTRA, causal, mean_field, phase, spectrum, strip
from restpoint.theory.simulate_model import head
from restpoint.theory.weights import read_heads

SMALL = {
    "phase": SimulateOptions(particles=6, seeds=1, betas=(5.0, 0.1), time=2.0),
    "strip": SimulateOptions(particles=6, time=2.0),
    "causal": SimulateOptions(particles=12, seeds=2, time=2.0),
    "spectrum": SimulateOptions(particles=5, seeds=1, time=2.0),
    "mean-field": SimulateOptions(particles=40, seeds=2, time=0.2),
}


# --- what the studies find ---


def test_phase_diagram_goes_from_one_cluster_to_several():
    study = phase(SimulateOptions(seeds=2, betas=(9.0, 0.1), time=20.0))
    rows = {(beta, time): (share, clusters) for beta, time, share, clusters in study.rows}
    assert rows[0.1, 20.0] == (1.0, 1.0)
    assert rows[9.0, 20.0][0] < 0.7
    assert rows[9.0, 20.0][1] > 1.5
    assert rows[9.0, 0.0][0] < 0.1
    assert study.arrays["shares"].shape == (61, 2)


def test_strip_keeps_particles_where_they_are_said_to_be():
    study = strip(SimulateOptions(particles=5, time=1.0))
    assert len(study.rows) == 2 * 121 * 5
    on, _, _, x, y, z = study.rows[-1]
    assert on == "sphere"
    assert math.hypot(x, y, z) == pytest.approx(1)
    assert study.rows[0][-1] == ""


def test_strong_centres_are_as_many_as_expected_and_hold_their_place():
    study = causal(SimulateOptions(seeds=8, time=10.0))
    assert study.facts["expected number"] == pytest.approx(6.283, abs=5e-4)
    assert study.facts["strong Renyi centres"] == pytest.approx(6.283, abs=1.5)
    assert float(study.facts["largest move of a strong centre"]) < 0.05
    assert float(study.facts["largest move of a Renyi centre"]) > 0.1
    held = study.arrays["held"]
    assert held[0, 1] == 1  # every particle starts near a Renyi centre, or would be one
    assert held[-1, 0] > held[0, 0]  # the strong ones gather


def test_final_configurations_follow_the_leading_eigenvalue():
    study = spectrum(SimulateOptions(seeds=2, time=100.0))
    rows = {row[0]: dict(zip(study.columns, row, strict=True)) for row in study.rows}
    assert set(rows) == set(SPECTRA)
    for name, row in rows.items():
        assert row["first_in_eigenspace"] > 0.999, name
    for simple in ("1, 0, 0", "1, -1, -1"):  # two antipodal points
        assert rows[simple]["clusters"] == 2
        assert rows[simple]["share_at_first"] + rows[simple]["share_opposite"] == 1
    assert rows["1, 1, -1"]["share_in_eigenspace"] > 0.95
    assert rows["-1, -1, -1"]["clusters"] > 28  # repelled from one another: hardly any two together
    assert rows["-0.2, -0.2, -1"]["share_in_eigenspace"] > 0.8


def test_distance_to_the_mean_field_falls_like_one_over_the_root_of_n():
    study = mean_field(SimulateOptions(particles=256, seeds=24, time=0.5))
    assert float(study.facts["exponent of n"]) == pytest.approx(-0.5, abs=0.1)
    assert [row[0] for row in study.rows] == [32, 64, 128, 256]


def test_a_models_head(reference):
    layered = LayeredModel(reference.model)
    read = read_heads(layered, 4, [1])
    study = head(SimulateOptions(particles=6, seeds=1, betas=(1.0,), time=2.0), read, "a head")
    value = read.maps.value[0].numpy()
    assert study.facts["largest singular value of V"] == pytest.approx(np.linalg.norm(value, 2))
    real = float(study.facts["leading eigenvalue of V, real part"])
    assert real == pytest.approx(np.linalg.eigvals(value).real.max(), rel=1e-6)
    assert study.rows[0][-1] == pytest.approx(2**0.5 / layered.hidden_size**0.5, rel=0.8)  # at random, in a plane
    assert study.facts["left out"] == "rotary positions"


@pytest.mark.parametrize("name", STUDIES)
def test_studies_can_be_repeated(name):
    first, second, third = (
        RUN[name](options)
        for options in (SMALL[name], SMALL[name], SimulateOptions(**{**vars(SMALL[name]), "seed": 1}))
    )
    assert first.rows == second.rows
    assert first.rows != third.rows


# --- the command ---


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_writes_a_table_and_a_picture(name, tmp_path, capsys):
    given = SMALL[name]
    words = [f"--{key}={value}" for key in ("particles", "seeds", "time") if (value := getattr(given, key)) is not None]
    assert main(["simulate", name, *words, "--json", "-o", str(tmp_path)]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert content["study"] == name
    assert content["papers"]
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    if name != "phase":  # which was asked for other temperatures
        assert len(rows) == len(RUN[name](given).rows)
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{name}.csv", f"{name}.png", "index.html"])


def test_simulate_shows_what_it_found(tmp_path, capsys):
    assert main(["simulate", "causal", "--particles", "20", "--time", "1", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "causal: Causal attention: n = 20 particles" in out
    assert "strong Renyi centres" in out
    assert "Karagodin" in out


def test_simulate_takes_a_head_from_a_model(tmp_path, capsys):
    words = ["--layer", "4", "--head", "1", "--particles", "6", "--seeds", "1", "--time", "1", "--betas", "1"]
    assert main(["simulate", "head", "--from", "reference", *words, "--json", "-o", str(tmp_path)]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert content["study"] == HEAD
    assert "head 1 of layer 4 of reference: n = 6, d = 256, causal" in content["title"]
    assert (tmp_path / "head.png").stat().st_size > 10_000


def test_simulate_holds_the_layers_of_a_model_against_theory(tmp_path, capsys):
    words = ["layers", "--from", "reference", "--seeds", "2", "--particles", "20", "--json"]
    assert main(["simulate", *words, "-o", str(tmp_path)]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert content["facts"]["texts, tokens"] == "2, 40"
    assert content["facts"]["left out of the particles"] == "rotary positions"
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["level"]) for row in rows] == list(range(17))
    assert rows[-1]["next_layer_contraction"] == "" != rows[0]["next_layer_contraction"]
    for row, after in itertools.pairwise(rows):
        change = float(after["mean_cosine"]) - float(row["mean_cosine"])
        assert float(row["next_layer_contraction"]) == pytest.approx(change, abs=1e-9)
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    text = tmp_path / "text.txt"
    text.write_text("One text of some length, to be read.")
    assert main(["simulate", *words, "--text", str(text), "-o", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["facts"]["texts, tokens"].startswith("1, ")


def test_all_studies_are_on_one_page_that_needs_nothing_else(tmp_path, capsys):
    words = ["phase", "causal", "--particles", "6", "--seeds", "1", "--time", "1", "--betas", "3"]
    assert main(["simulate", *words, "-o", str(tmp_path)]) == 0
    assert "index.html" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text()
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert pictures == [(tmp_path / f"{name}.png").read_bytes() for name in ("phase", "causal")]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    for word in ("strong Renyi centres", "Karagodin", 'href="causal.csv"', 'href="#phase"', "width=device-width"):
        assert word in page
    study = RUN["phase"](SimulateOptions(particles=4, seeds=1, time=1.0, betas=(1.0,)))
    draw(replace(study, title="a < b & c"), tmp_path / "phase.png")
    assert "<h2>a &lt; b &amp; c</h2>" in write_page([replace(study, title="a < b & c")], tmp_path).read_text()


def test_help_teaches_without_torch():
    code = "import sys; from restpoint.cli import main; print(main(['simulate', '--help']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("0 False")
    for word in (
        "For example:",
        "restpoint simulate head --from reference --layer 4",
        "mean-field",
        "--betas",
        "--json",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["phases"], "studies: 'phases' is unknown; choose from phase, strip"),
        (["head"], "studies: head is a study of a model; give --from"),
        (["phase", "--from", "reference"], "studies: phase is not a study of a model; leave out --from"),
        (["layers", "--from", "reference", "--particles", "2"], "particles is 2; the layers of a model need"),
        (["--from", "reference", "--layer", "99"], "layer is 99; the model has layers 0 to 15"),
        (["--from", "reference", "--head", "99"], "head: [99] is not among heads"),
        (["strip", "--betas", "1", "2"], "betas: this study takes one"),
        (["phase", "--betas", "-1"], "betas: -1 is none; an inverse temperature is finite and above 0"),
        (["phase", "--betas", "0"], "betas: 0 is none"),
        (["phase", "--particles", "1"], "particles is 1; it must be at least 2"),
        (["mean-field", "--particles", "20"], "particles is 20; a limit needs at least 33"),
        (["phase", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["phase", "--time", "0"], "time is 0.0; it must be positive"),
        (["phase", "--step", "nan"], "step is nan; it must be positive"),
        (["causal", "--step", "30", "--time", "3000"], "step: one of 30 at time 0 moves a particle by"),
        (["causal", "--betas", "1"], "delta is 4.0; give an angle between 0 and pi"),
    ],
)
def test_errors_name_the_argument(arguments, says, tmp_path, capsys):
    assert main(["simulate", *arguments, "-o", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["simulate", "causal", "--particles", "5", "--time", "1", "-o", str(tmp_path / "file")]
    assert main(arguments) == 2
    assert "output: " in capsys.readouterr().err


def test_an_interrupted_picture_leaves_the_old_one(tmp_path, monkeypatch):
    study, path = strip(SMALL["strip"]), tmp_path / "strip.png"
    path.write_bytes(b"old")

    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(RestpointError, match=r"output: .*strip\.png cannot be written \(No space left"):
        draw(study, path)
    assert path.read_bytes() == b"old"


def test_chosen_studies():
    assert chosen((), model=False) == STUDIES
    assert chosen(("strip", "phase", "strip"), model=False) == ("strip", "phase")
    assert chosen((), model=True) == (LAYERS, HEAD)
    assert chosen((HEAD,), model=True) == (HEAD,)
    assert tuple(RUN) == STUDIES
