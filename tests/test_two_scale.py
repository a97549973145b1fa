"""Two scales, against recomputation and closed forms; models that iterate a block, analysed from end to end."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from families import FAMILIES, build
from looped import equilibrium, recurrent, tokens
from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.load import Loaded
from restpoint.model.recurrent.causal import recurrent_states
from restpoint.model.recurrent.watch import WatchedRecurrence
from restpoint.model.watch import Loop, WatchedLayers
from restpoint.report.page import write_report
from restpoint.report.pictures import export_pictures
from restpoint.report.sections import sections
from restpoint.report.tables import export_tables
from restpoint.trajectory.atlas import Atlas
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.options import SurveyOptions
from restpoint.trajectory.reading import Piece, Reader, Sample
from restpoint.trajectory.scenes import path_of
from restpoint.trajectory.survey import merge, survey
from restpoint.trajectory.surveyed import Surveyed, untrained_twin
from restpoint.trajectory.two_scale import LEGS, STEPS, Block, TwoScale, blocks_of

OPTIONS = SurveyOptions(max_tokens=400, sequence_length=48, batch=4, scenes=2)
NAMES = ["embedding", "prelude 1", *(f"step {step}" for step in range(6)), "coda 1"]


def samples() -> list[Sample]:
    return [Sample(text, domain) for domain, text in bundled.documents()]


def looped(reference: Loaded, **settings: object) -> Surveyed:
    """A random model of the bundled vocabulary that iterates a block five times."""
    return Surveyed("looped", recurrent(dtype=torch.float32, vocab_size=8192, **settings), reference.tokenizer)


def measured(states: torch.Tensor, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    measure = TwoScale(blocks)
    measure.add(Trajectory(states.float(), 0))
    return measure.results()


# --- closed forms ---


def test_a_straight_line_drifts_and_a_closed_loop_does_not() -> None:
    along = torch.tensor([0.0, 1.0, 3.0, 4.0, 8.0])
    line = along[:, None, None] * torch.tensor([[3.0, 4.0]]) + torch.tensor([[1.0, -2.0]])
    found = measured(line, [Block("all", tuple(range(5)))])
    assert found["blocks.straightness.mean"].item() == pytest.approx(1.0, abs=1e-6)
    assert found["blocks.net.mean"].item() == pytest.approx(40.0)
    assert found["blocks.within.mean"].item() == pytest.approx(10.0)
    assert found["blocks.step_ratio.mean"].item() == pytest.approx(0.25)
    np.testing.assert_allclose(found["angle.mean"][2:], 1.0, atol=1e-6)
    np.testing.assert_allclose(found["step.mean"][1:], [5, 10, 5, 20], rtol=1e-6)
    np.testing.assert_allclose(found["remaining.mean"][1:], [7 / 8, 5 / 8, 4 / 8, 0], atol=1e-6)

    turns = torch.arange(7) * math.pi / 3  # a hexagon: every corner turns by 60 degrees
    ring = torch.stack([turns.cos(), turns.sin()], -1)[:, None]
    found = measured(ring, [Block("all", tuple(range(7)))])
    assert found["blocks.straightness.mean"].item() == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(found["angle.mean"][2:], 0.5, atol=1e-5)
    np.testing.assert_allclose(found["curvature.mean"][2:], 1.0, atol=1e-5)  # chords of length 1 that differ by 1


@pytest.mark.parametrize(("factor", "turn"), [(0.8, 1.2), (0.9, math.pi / 2), (1.1, 2.5)])
def test_a_logarithmic_spiral_turns_by_its_angle(factor: float, turn: float) -> None:
    """z_k = z_0 (a e^(i t))^k: steps are z_k (q - 1), so that all that is measured has a closed form."""
    q, n = factor * complex(math.cos(turn), math.sin(turn)), 9
    places = np.array([2.0 * q**k for k in range(n + 1)])
    states = torch.from_numpy(np.stack([places.real, places.imag], -1))[:, None]
    found = measured(states, [Block("loop", tuple(range(n + 1)))])
    np.testing.assert_allclose(found["angle.mean"][2:], math.cos(turn), atol=1e-5)
    np.testing.assert_allclose(found["step.mean"][1:], 2 * abs(q - 1) * factor ** np.arange(n), rtol=1e-5)
    np.testing.assert_allclose(found["acceleration.mean"][2:], 2 * abs(q - 1) ** 2 * factor ** np.arange(n - 1), 1e-5)
    ratio = abs(q**n - 1) / (abs(q - 1) * sum(factor**k for k in range(n)))
    assert found["blocks.straightness.mean"].item() == pytest.approx(ratio, rel=1e-5)


def test_drift_is_told_from_steps() -> None:
    """Three steps of 1, a move of 7 (of 8 where the state between blocks is shared), two steps of 2."""
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 12.0, 14.0])[:, None, None] * torch.tensor([[0.6, 0.8]])
    apart = measured(places, [Block("first", (0, 1, 2, 3)), Block("second", (4, 5, 6))])
    np.testing.assert_allclose(apart["blocks.drift_ratio.mean"], [math.nan, 7.0], rtol=1e-5)
    shared = measured(places[[0, 1, 2, 4, 5]], [Block("first", (0, 1, 2)), Block("second", (2, 3, 4))])
    np.testing.assert_allclose(shared["blocks.drift_ratio.mean"], [math.nan, 8.0], rtol=1e-5)


def test_a_step_that_is_lost_in_rounding_has_no_direction() -> None:
    states = torch.full((4, 2, 16), 1000.0)
    states[1:, :, 0] += 10.0  # the first token rests from state 1 on
    states[2:, 1, 1] -= 20.0
    states[2, 0, 0] = torch.nextafter(states[1, 0, 0], torch.tensor(torch.inf))
    states[3, 1, 1] += 10.0
    found = measured(states, [Block("all", (0, 1, 2, 3))])
    np.testing.assert_array_equal(found["still"][1:], [0, 0.5, 0.5])
    np.testing.assert_allclose(found["angle.mean"][2:], [0.0, -1.0], atol=1e-6)
    assert found["step.mean"][2] == pytest.approx((20 + 2**-14) / 2, abs=1e-6)


def test_paths_of_iterates_keep_their_distances_in_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(20, 2, generator=generator, dtype=torch.float64)).Q
    flat = torch.randn(6, 5, 2, generator=generator, dtype=torch.float64)
    path = path_of(flat @ plane.T + torch.randn(5, 20, generator=generator, dtype=torch.float64))
    assert torch.equal(path[-1], torch.zeros(5, 2))
    distances = (flat - flat[-1]).norm(dim=-1)
    np.testing.assert_allclose(path.norm(dim=-1), distances, atol=1e-5)
    assert path[..., 0].square().sum() >= path[..., 1].square().sum()


# --- recomputation ---


def slowly(states: np.ndarray, blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """Every quantity of every token, one by one, in float64."""
    depth, count, _ = states.shape
    found = {name: np.full((depth, count), np.nan) for name in STEPS}
    found |= {f"blocks.{name}": np.full((len(blocks), count), np.nan) for name in LEGS}
    for token in range(count):
        before, pace = states[blocks[0].states[0], token], math.nan
        for number, block in enumerate(blocks):
            x = [states[at, token] for at in block.states]
            lengths = []
            for k in range(1, len(x)):
                step, at = x[k] - x[k - 1], block.states[k]
                lengths.append(math.dist(x[k], x[k - 1]))
                found["step"][at, token] = lengths[-1]
                found["relative_step"][at, token] = lengths[-1] / np.linalg.norm(x[k - 1])
                found["remaining"][at, token] = math.dist(x[k], x[-1]) / math.dist(x[-1], x[0])
                if k > 1:
                    last = x[k - 1] - x[k - 2]
                    found["angle"][at, token] = step @ last / lengths[-1] / lengths[-2]
                    found["acceleration"][at, token] = np.linalg.norm(step - last)
                    bend = np.linalg.norm(step / lengths[-1] - last / lengths[-2])
                    found["curvature"][at, token] = bend / ((lengths[-1] + lengths[-2]) / 2)
            legs = {
                "within": sum(lengths) / len(lengths),
                "path": sum(lengths),
                "net": math.dist(x[0], x[-1]),
                "entry": math.dist(x[0], before),
                "across": math.dist(x[-1], before),
            }
            legs["straightness"] = legs["net"] / legs["path"]
            legs["step_ratio"] = legs["within"] / legs["across"]
            for name, value in legs.items():
                found[f"blocks.{name}"][number, token] = value
            if number > 0:
                first = next(state for state in block.states if state not in blocks[number - 1].states)
                found["blocks.drift_ratio"][number, token] = math.dist(states[first, token], before) / pace
            before, pace = x[-1], legs["within"]
    return found


@pytest.mark.parametrize("loop", [None, Loop(2, 6), Loop(2, 8, 3)])
def test_all_is_what_a_slow_recomputation_finds(loop: Loop | None) -> None:
    blocks = blocks_of(9, loop, 4)
    states = torch.randn(10, 40, 12, generator=torch.Generator().manual_seed(1)).cumsum(0)
    wanted = slowly(states.double().numpy(), blocks)
    found = measured(states, blocks)
    for name, values in wanted.items():
        there = np.isfinite(values).all(-1)
        assert np.array_equal(there, np.isfinite(found[f"{name}.mean"].numpy())), name
        np.testing.assert_allclose(found[f"{name}.mean"][there], values[there].mean(-1), 1e-4, 1e-5, err_msg=name)
        np.testing.assert_allclose(found[f"{name}.std"][there], values[there].std(-1), 2e-3, 1e-4, err_msg=name)
        ordered = np.sort(values[there], -1)
        width = 0.012 if name not in ("angle", "blocks.straightness") else 0.002  # of a bin, relative or absolute
        told = found[f"{name}.q50"][there].numpy()
        room = width * (np.abs(told) + (width < 0.01)) + 2e-9  # the lowest bin begins there
        assert (ordered[:, 19] - room <= told).all(), name
        assert (told <= ordered[:, 20] + room).all(), name


def test_parts_of_a_corpus_merge_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randn(9, 3 + number, 8, generator=generator).cumsum(0) for number in range(8)]
    blocks = blocks_of(8, Loop(2, 7), 4)
    whole, parts = TwoScale(blocks), [TwoScale(blocks), TwoScale(blocks), TwoScale(blocks)]
    for number, states in enumerate(texts):
        for measure in (whole, parts[number % 3]):
            measure.add(Trajectory(states, number))
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    for name, value in whole.results().items():
        np.testing.assert_allclose(parts[0].results()[name], value, 1e-10, 1e-10, err_msg=name)


def test_blocks_cover_the_depth() -> None:
    assert [block.states for block in blocks_of(16, None, 4)] == [
        (0, 1, 2, 3, 4),
        (4, 5, 6, 7, 8),
        (8, 9, 10, 11, 12),
        (12, 13, 14, 15, 16),
    ]
    assert [block.name for block in blocks_of(5, None, 3)] == ["layers 1-2", "layer 3", "layers 4-5"]
    assert [block.states for block in blocks_of(2, None, 4)] == [(0, 1), (1, 2)]
    assert [(block.name, block.states) for block in blocks_of(9, Loop(2, 8, 3), 4)] == [
        ("prelude", (0, 1)),
        ("loop", (2, 5, 8)),
        ("coda", (8, 9)),
    ]
    assert [block.name for block in blocks_of(4, Loop(1, 4), 4)] == ["loop"], "neither prelude nor coda"
    with pytest.raises(RestpointError, match=r"^states: there are 4, and the blocks go up to state 5"):
        measured(torch.randn(4, 3, 2), blocks_of(5, None, 2))


# --- states of models that iterate a block ---


@pytest.mark.parametrize(
    ("model", "inner"),
    [
        (recurrent(dtype=torch.float32), False),
        (recurrent(dtype=torch.float32, coda_layers=2, prelude_layers=3), True),
        (recurrent("eager", dtype=torch.float32), False),
        (recurrent(dtype=torch.float32, prelude_layers=0, coda_layers=0, state_init="zero"), True),
        (equilibrium(dtype=torch.float32, tolerance=1e-6), False),
    ],
)
def test_states_are_those_of_the_model_and_are_read_as_it_reads_them(model: PreTrainedModel, inner: bool) -> None:
    ids = tokens(3, 9)
    watched = WatchedRecurrence(model, inner)
    read = Reader(watched).read([Piece(number, row.tolist()) for number, row in enumerate(ids)])
    iterates, loop = recurrent_states(model, ids), watched.loop
    assert loop is not None
    with torch.no_grad():
        logits = model(ids).logits
        embedded = model.model.embed_tokens(ids) * model.config.embedding_scale
        steps = len(loop.iterates()) - 1
        shallower = [
            model(ids, num_steps=step).logits for step in range(1, steps + 1) if model.config.model_type[-3:] != "deq"
        ]
    for row, trajectory in enumerate(read):
        assert trajectory.states.shape == (len(watched.depths), 9, 32)
        assert watched.length == len(watched.depths) - 1
        torch.testing.assert_close(trajectory.states[0], embedded[row])
        torch.testing.assert_close(trajectory.states[loop.iterates()], iterates[:, row])
        head = Surveyed("any", model).head()
        assert head is not None
        for depth in range(loop.last, watched.length + 1):
            torch.testing.assert_close(head.readout(trajectory.read[depth]), logits[row], atol=1e-4, rtol=1e-4)
        for step, wanted in enumerate(shallower, 1):
            at = loop.iterates()[step]
            torch.testing.assert_close(head.readout(trajectory.read[at]), wanted[row], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids).logits, logits), "the model is as it was"


def test_layers_inside_an_iteration_are_recorded_in_their_order() -> None:
    model = recurrent(dtype=torch.float32)
    watched = WatchedRecurrence(model, inner_layers=True)
    assert watched.depths[2:7] == ["step 0", "step 1, layer 1", "step 1", "step 2, layer 1", "step 2"]
    ids = tokens(1, 6)
    with WatchedLayers(model, path="model.core").watch() as core:
        model.model(ids, use_cache=False)
    (trajectory,) = Reader(watched).read([Piece(0, ids[0].tolist())])
    torch.testing.assert_close(trajectory.states[3:13], torch.cat(core[1:]))
    with pytest.raises(RestpointError, match=r"^inner_layers: .*solved"):
        WatchedRecurrence(equilibrium(), inner_layers=True)
    with pytest.raises(RestpointError, match=r"^inner_layers: only a model that iterates"):
        Surveyed("llama", build("llama")).watched(SurveyOptions(inner_layers=True))
    with pytest.raises(RestpointError, match=r"^model: it is in training mode"):
        WatchedRecurrence(recurrent().train())


# --- surveys ---


@pytest.fixture(scope="module")
def subject(reference: Loaded) -> Surveyed:
    return looped(reference)


@pytest.fixture(scope="module")
def whole(subject: Surveyed) -> Atlas:
    return survey(subject, samples(), OPTIONS)


def test_a_looped_model_is_surveyed(whole: Atlas, subject: Surveyed, tmp_path: Path) -> None:
    assert whole.subject.depths == NAMES
    assert (whole.subject.layers, whole.subject.loop) == (8, Loop(2, 7))
    assert set(whole.results) == {"geometry", "pairs", "lens", "saturation", "transport", "bounds", "two-scale"}
    assert [note.partition(" ")[0] for note in whole.conditions["notes"]] == ["tasks", "sinks"]
    assert whole.results["lens"]["logit.agreement"][-2:].tolist() == [1.0, 1.0], "the last iterate is what is read"
    assert float(whole.results["lens"]["logit.kl"][2]) > 0.01
    assert whole.results["saturation"]["layer.histogram"].shape == (5, 9)
    assert not whole.results["saturation"]["layer.histogram"][:, 8].any(), "nothing is left to be settled by the coda"
    scales = whole.results["two-scale"]
    assert scales["blocks.first"].tolist() == [0, 2, 7]
    geometry = whole.results["geometry"]["step.mean"]  # knows of no blocks
    inside = [1, *range(3, 9)]
    np.testing.assert_allclose(scales["step.mean"][inside], geometry[[at - 1 for at in inside]], rtol=1e-6)
    assert scales["step.mean"][[0, 2]].isnan().all()
    for scene in whole.scenes:
        assert scene.path is not None
        assert scene.path.shape == (5, len(scene.tokens), 2)
    whole.save(tmp_path)
    again = Atlas.load(tmp_path)
    assert again.subject == whole.subject
    assert torch.equal(again.scenes[1].path, whole.scenes[1].path)  # type: ignore[arg-type]
    with pytest.raises(RestpointError, match=r"^measures: sinks cannot be measured .*once at every step"):
        survey(subject, samples(), replace(OPTIONS, measures=("sinks",)))
    core = survey(subject, samples(), replace(OPTIONS, layers="model.core", scenes=1, measures=("geometry",)))
    assert core.subject.layers == 2, "a list that is named is watched by itself"


def test_shares_of_a_looped_survey_merge(subject: Surveyed) -> None:
    options = replace(OPTIONS, scenes=0, measures=("geometry", "lens", "saturation", "two-scale"), max_tokens=700)
    whole = survey(subject, samples(), options)
    merged = merge([survey(subject, samples(), replace(options, share=f"{number}/2")) for number in (1, 2)])
    for measure, results in whole.results.items():
        for name, value in results.items():
            power = 2 if name.endswith(".std") else 1  # norms are all one: their deviation is the root of rounding
            one, other = merged.results[measure][name] ** power, value**power
            np.testing.assert_allclose(one, other, 1e-10, 1e-10, err_msg=name)


def test_an_atlas_of_the_first_format_is_still_read(whole: Atlas, tmp_path: Path) -> None:
    plain = replace(whole, subject=replace(whole.subject, depths=[], loop=None))
    replace(plain, scenes=[replace(scene, path=None) for scene in whole.scenes]).save(tmp_path)
    described = json.loads((tmp_path / "atlas.json").read_text())
    assert described["format"] == 2
    described["format"] = 1
    del described["subject"]["depths"], described["subject"]["loop"]
    (tmp_path / "atlas.json").write_text(json.dumps(described))
    again = Atlas.load(tmp_path)
    assert again.subject == plain.subject
    assert again.scenes[0].path is None


def test_a_solved_model_that_begins_with_zeros_is_surveyed(reference: Loaded) -> None:
    """Zeros have no direction and no spread: what needs those is not a number there, and only there."""
    model = equilibrium(dtype=torch.float32, tolerance=1e-5, vocab_size=8192)
    options = replace(OPTIONS, max_tokens=3000, scenes=0, measures=("geometry", "pairs", "transport", "two-scale"))
    atlas = survey(Surveyed("solved", model, reference.tokenizer), samples(), options)
    assert atlas.subject.depths == ["embedding", "prelude 1", "first state", "fixed point", "coda 1"]
    geometry = atlas.results["geometry"]
    for name in ("anisotropy", "clusters.components", "rank_collapse", "effective_rank"):
        assert geometry[name].isnan().tolist() == [False, False, True, False, False], name
    np.testing.assert_array_equal(geometry["norm.mean"][2], 0.0)
    assert atlas.results["transport"]["unit.gaussian.to_final"].isfinite().all()
    r2 = atlas.results["pairs"]["r2"]
    assert r2[:, 2].isnan().all()
    assert (r2[2, [0, 1, 3, 4]] < 0.05).all()
    assert r2[3, 3] > 0.99
    assert atlas.results["two-scale"]["blocks.straightness.mean"][1] == 1.0, "one step is straight"


def test_ordinary_models_have_stretches_of_layers(reference: Loaded) -> None:
    settings = FAMILIES["llama"].to_dict() | {"vocab_size": 8192, "num_hidden_layers": 6}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).eval()
    llama = Surveyed("llama", model, reference.tokenizer)
    atlas = survey(llama, samples(), replace(OPTIONS, blocks=3, measures=("geometry", "two-scale")))
    scales = atlas.results["two-scale"]
    assert scales["blocks.first"].tolist() == [0, 2, 4]
    np.testing.assert_allclose(scales["step.mean"][1:], atlas.results["geometry"]["step.mean"], rtol=1e-6)
    assert not scales["blocks.entry.mean"].any()
    np.testing.assert_allclose(scales["blocks.across.mean"], scales["blocks.net.mean"], rtol=1e-6)
    assert atlas.scenes[0].path is None
    (section,) = [one for one in sections(atlas) if one.name == "two-scale"]
    assert [chart.name for chart in section.charts] == [
        *("step", "relative-step", "angle", "acceleration", "remaining", "drift-ratio", "straightness", "step-ratio")
    ]
    assert not any(chart.ticks for chart in section.charts if chart.layers)


# --- the page ---


def test_states_are_called_by_their_names_everywhere(whole: Atlas, subject: Surveyed, tmp_path: Path) -> None:
    measures = ("geometry", "lens", "two-scale")
    twin = survey(untrained_twin(subject), samples(), replace(OPTIONS, scenes=0, measures=measures))
    made = {section.name: section for section in sections(whole, twin)}
    charts = {chart.name: chart for chart in made["two-scale"].charts}
    assert list(charts) == ["step", "relative-step", "angle", "acceleration", "remaining", "path-1", "path-2"]
    for section in made.values():
        for chart in section.charts:
            assert "layer" not in (chart.x, chart.y), (section.name, chart.name)
            if chart.lines and chart.layers and chart.name != "order":
                assert chart.ticks == tuple(NAMES), (section.name, chart.name)
    loop = next(line for line in charts["step"].lines if line.name == "step 0 to step 5")
    assert loop.x.tolist() == [3, 4, 5, 6, 7]
    np.testing.assert_array_equal(loop.y, whole.results["two-scale"]["step.q50"][3:8])
    assert {"Drift ratio, step 0 to step 5", "Mean relative step below 0.03"} <= {
        fact for fact, _ in made["two-scale"].facts
    }
    assert all(trail.steps.tolist() == [1, 2, 3, 4, 5] for trail in charts["path-1"].trails)
    page = write_report(whole, tmp_path / "page.html", twin).read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["depths"] == NAMES
    assert data["charts"]["two-scale-step"]["layout"]["xaxis"]["ticktext"] == NAMES
    export_tables(whole, tmp_path / "tables")
    with (tmp_path / "tables" / "two-scale.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["state"] for row in rows] == NAMES
    assert float(rows[4]["angle.mean"]) == float(whole.results["two-scale"]["angle.mean"][4])
    only = replace(whole, results={"two-scale": whole.results["two-scale"]}, scenes=whole.scenes[:1])
    written = {path.name for path in export_pictures(only, tmp_path / "pictures", twin)}
    assert {"two-scale-step.png", "two-scale-angle.png", "two-scale-path-1.png"} <= written


def test_a_token_of_the_corpus_cannot_break_out_of_a_path(whole: Atlas, tmp_path: Path) -> None:
    scene = whole.scenes[0]
    nasty = replace(scene, tokens=["<b>&x</b>", *scene.tokens[1:]])
    page = write_report(replace(whole, scenes=[nasty]), tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["charts"]["two-scale-path-1"]["data"][0]["name"] == "&lt;b&gt;&amp;x&lt;/b&gt;"


@pytest.mark.slow
def test_the_command_line_analyses_a_looped_model(reference: Loaded, tmp_path: Path) -> None:
    looped(reference).model.save_pretrained(tmp_path / "model")
    reference.tokenizer.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "restpoint.cli", "analyze", str(tmp_path / "model")),
            *("--max-tokens", "600", "--inner-layers", "-o", str(tmp_path / "atlas")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 5" in done.stdout
    assert "sinks is left out" in done.stdout + done.stderr
    atlas = Atlas.load(tmp_path / "atlas")
    assert atlas.subject.loop == Loop(2, 12, 2)
    assert "step 3, layer 1" in atlas.subject.depths
    assert (tmp_path / "atlas" / "untrained" / "atlas.json").exists()
    assert (tmp_path / "atlas" / "pictures" / "two-scale-angle.png").exists()
