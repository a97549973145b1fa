"""Sweeps of exits inside a loop: thresholds, curves and the oracle by brute force, then the verb as a whole."""

import json
import math

import numpy as np
import pytest
import torch

from looped import recurrent, tokens
from restpoint import bundled
from restpoint.cli import main
from restpoint.equilibrium.exits import Acceleration, RelativeStep
from restpoint.errors import RestpointError
from restpoint.evaluate.looped.criteria import Watch, fewest_steps, spread
from restpoint.evaluate.looped.curves import LoopCurve, compare_at
from restpoint.evaluate.looped.options import LoopOptions
from restpoint.evaluate.looped.passes import Passed, token_by_token, whole
from restpoint.evaluate.looped.run import oracle, watched

STEPS = 7


def model_and_ids():
    return recurrent(mean_recurrence=STEPS, gain=0.2), tokens(3, 12)


# --- passes ---


@torch.no_grad()
def test_a_pass_gives_the_models_own_losses_and_steps():
    model, ids = model_and_ids()
    passed = whole(model, ids, STEPS, RelativeStep(threshold=0.3), batch=2)
    for row in range(3):
        output = model(ids[row : row + 1, :-1], exits=RelativeStep(threshold=0.3), labels=None)
        law = output.logits[0].double().softmax(-1)
        for place in range(11):
            expected = -math.log(float(law[place, ids[row, place + 1]]))
            assert float(passed.loss[row, place]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert torch.equal(passed.steps[row], output.steps[0])
        assert torch.equal(passed.best[row], law.argmax(-1))


def test_token_by_token_is_the_whole_pass_where_no_logits_are_read():
    model, ids = model_and_ids()
    one, other = (run(model, ids, STEPS, RelativeStep(threshold=0.3)) for run in (whole, token_by_token))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.steps, other.steps)
    assert len(one.steps.unique()) > 1


# --- thresholds ---


@torch.no_grad()
def test_thresholds_give_the_step_counts_that_were_asked_for():
    """What is told from one pass in which all run on, against stopping by hand at each threshold."""
    model, ids = model_and_ids()
    states = torch.stack(model.model(ids[:, :-1], output_states=True).states).flatten(1, 2)
    acceleration = (states[2:] - 2 * states[1:-1] + states[:-2]).norm(dim=-1)  # of steps 2, 3, ..
    lowest = watched(model, ids, STEPS, Acceleration(threshold=1.0))
    assert lowest.shape == (STEPS - 1, 33)
    assert fewest_steps(lowest) == 3
    wanted = [3.2, 4.5, 5.5, 6.9]
    for threshold, mean in zip(spread(lowest, wanted), wanted, strict=True):
        counts = []
        for row in range(33):
            stops = [
                step
                for step in range(3, STEPS)
                if acceleration[step - 2, row] < threshold and acceleration[step - 3, row] < threshold
            ]
            counts.append(min(stops, default=STEPS))
        told = 1 + float((lowest >= threshold).double().sum(0).mean())
        assert told == pytest.approx(np.mean(counts))
        assert told == pytest.approx(mean, abs=0.1)
    assert spread(lowest, [1.0])[0] > float(lowest[-1].max())


def test_watching_changes_nothing():
    model, ids = model_and_ids()
    plain, seen = whole(model, ids, STEPS), whole(model, ids, STEPS, Watch(criterion=RelativeStep(threshold=9.0)))
    assert torch.equal(plain.steps, seen.steps)
    torch.testing.assert_close(plain.loss, seen.loss, rtol=1e-5, atol=1e-5)


# --- curves ---


def curve(name="one", texts=6, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor([2.0, 5.0, 8.0])[:, None] + torch.rand(3, texts, generator=generator, dtype=torch.float64)
    full_loss = 3 + torch.rand(texts, generator=generator, dtype=torch.float64)
    rises = torch.tensor([0.04, 0.01, 0.001])[:, None] + scale * torch.rand(3, texts, generator=generator).double() / 20
    return LoopCurve(name, 12, (0.3, 0.2, 0.1), steps, full_loss + rises, full_loss, torch.zeros(3, texts).double())


@pytest.mark.parametrize("increase", [1e-4, 0.005, 0.02, 0.5])
def test_steps_at_one_rise_lie_on_the_straight_line(increase):
    one = curve()
    shares = torch.rand(6, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares /= shares.sum(0)
    found = one.matched(increase, shares)
    for sample in range(20):
        at = [12.0, *(one.steps @ shares)[:, sample].flip(0).tolist()]
        rises = [0.0, *torch.expm1((one.loss - one.full_loss) @ shares)[:, sample].flip(0).tolist()]
        assert float(found[sample]) == pytest.approx(np.interp(increase, rises, at), rel=1e-9)


def test_a_curve_that_dips_again_has_not_earned_it():
    loss = torch.tensor([[0.0], [0.1], [0.001]], dtype=torch.float64)
    steps = torch.tensor([[2.0], [4.0], [8.0]], dtype=torch.float64)
    one = LoopCurve("dips", 12, (3.0, 2.0, 1.0), steps, loss, torch.zeros(1).double(), loss)
    share = (math.log(1.005) - 0.001) / 0.099
    found = float(one.matched(0.005, torch.ones(1, 1).double())[0])
    assert found == pytest.approx(8 - 4 * share, abs=0.01)
    assert one.kept(0.005) == 3.0
    assert one.kept(-0.1) is None


def test_points_and_comparisons_are_means_with_plain_bootstrap_intervals():
    one, other = curve(), curve("other", seed=1)
    point = one.points()[1]
    assert point.steps.value == pytest.approx(float(one.steps[1].mean()))
    assert point.perplexity.value == pytest.approx(math.exp(float(one.loss[1].mean())))
    assert point.increase.value == pytest.approx(math.expm1(float((one.loss - one.full_loss)[1].mean())))
    picked = np.random.default_rng(0).integers(0, 6, (20000, 6))
    rises = np.expm1((one.loss - one.full_loss)[1].numpy()[picked].mean(1))
    assert (point.increase.low, point.increase.high) == pytest.approx(np.quantile(rises, (0.025, 0.975)), rel=0.02)
    rows = {row.name: row for row in compare_at([one, other], 0.005, "one")}
    assert rows["one"].fewer is None
    assert rows["other"].fewer.value == pytest.approx(1 - rows["other"].steps.value / rows["one"].steps.value)
    assert rows["other"].fewer.low < rows["other"].fewer.value < rows["other"].fewer.high
    assert rows["one"].setting == 0.1
    with pytest.raises(RestpointError, match="reference: 'two' is no curve"):
        compare_at([one], 0.005, "two")
    with pytest.raises(RestpointError, match="different numbers of texts"):
        compare_at([one, curve("short", texts=4)], 0.005, "one")


def test_the_oracle_stops_where_the_prediction_stays():
    best = torch.tensor([[[1, 2, 3, 9]], [[4, 2, 8, 3]], [[1, 2, 3, 3]], [[5, 2, 3, 3]]])
    fixed = {
        step + 1: Passed(torch.full((1, 4), float(step)), own, torch.full((1, 4), step + 1))
        for step, own in enumerate(best)
    }
    found = oracle(fixed)
    assert found.steps.tolist() == [[4, 1, 3, 2]]
    assert found.loss.tolist() == [[3.0, 0.0, 2.0, 1.0]]
    assert torch.equal(found.best, best[-1])


# --- the verb ---


@pytest.fixture
def folder(tmp_path):
    """A tiny random model with the bundled tokenizer, as a checkpoint folder."""
    from transformers import AutoTokenizer

    model = recurrent(dtype=torch.float32, vocab_size=8192, gain=0.3, eos_token_id=0)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(bundled.MODEL_PATH).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_verb_sweeps_a_loop(folder, tmp_path, capsys):
    settings = ["--texts", "3", "--text-tokens", "8", "--points", "2", "--start-tokens", "5000", "--speed-prompts", "1"]
    criteria = ["--criteria", "acceleration", "transport", "argmax-stability"]
    assert main(["sweep", str(folder), "-o", str(tmp_path / "out"), *settings, *criteria]) == 0
    printed = capsys.readouterr().out
    assert "Steps per token where perplexity rises by 0.50%, of 5" in printed
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert set(found["curves"]) == {"acceleration", "transport", "argmax-stability", "static", "oracle"}
    static = found["curves"]["static"]
    assert [point["steps"]["value"] for point in static] == [1, 2, 3, 4, 5]
    assert static[-1]["increase"]["value"] == 0
    assert static[-1]["perplexity"]["value"] == pytest.approx(found["perplexity"])
    assert {row["name"] for row in found["starts"]["rested"]} >= {"noise", "zero", "previous", "predicted"}
    assert all(row["milliseconds"] > 0 for row in found["decoding"])


def test_options_that_do_not_apply_are_refused_by_name(folder, tmp_path, capsys):
    assert main(["sweep", str(folder), "--new-tokens", "9", "-o", str(tmp_path)]) == 2
    assert "new_tokens is 9; it is for models that do not iterate" in capsys.readouterr().err
    assert main(["sweep", "--points", "9", "-o", str(tmp_path)]) == 2
    assert "points is 9; it is for models that iterate" in capsys.readouterr().err
    assert main(["sweep", str(folder), "--criteria", "aceleration", "-o", str(tmp_path)]) == 2
    assert "did you mean 'acceleration'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("texts", 1), ("points", 1), ("increase", 0.0), ("steps", 2)])
def test_settings_that_are_refused(name, value):
    with pytest.raises(RestpointError, match=f"{name} is {value}"):
        LoopOptions(**{name: value})
