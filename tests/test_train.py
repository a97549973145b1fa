"""Training of models that iterate a block: it resumes to what it would have become, and refuses what it cannot do."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from restpoint import bundled, cli
from restpoint.errors import RestpointError
from restpoint.model.load import load
from restpoint.model.recurrent.config import DeepEquilibriumConfig
from restpoint.train.options import TrainOptions
from restpoint.train.recipe import Schedule, new_model, optimisers
from restpoint.train.run import train_recurrent
from restpoint.train.text import training_text

TINY = {
    "max_tokens": 12 * 4 * 32,
    "hidden_size": 16,
    "heads": 2,
    "key_value_heads": 1,
    "mean_recurrence": 3,
    "gradient_steps": 2,
    "sequence_length": 32,
    "batch": 4,
    "held_out": 0.2,
    "evaluate_every": 5,
    "save_every": 4,
}


@pytest.fixture(scope="module")
def documents():
    return [text for _, text in zip(range(40), bundled.fit_texts("maths"), strict=False)]


@pytest.fixture(scope="module")
def finished(reference, documents, tmp_path_factory):
    """A folder with a finished training, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(reference, documents, folder)


def train(reference, documents, folder, progress=None, **options):
    return train_recurrent(
        reference.tokenizer, documents, TrainOptions(**{**TINY, **options}), folder, progress=progress
    )


def weights(folder):
    return load_file(folder / "model.safetensors")


class Stop:
    """Interrupts a training when it has taken some steps, as the user's key does."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, stage, done, total):
        if stage.startswith("train") and done == self.steps:
            raise KeyboardInterrupt


def test_a_stopped_training_resumes_to_what_it_would_have_become(reference, documents, finished, tmp_path):
    folder, whole = finished
    with pytest.raises(KeyboardInterrupt):
        train(reference, documents, tmp_path / "parts", progress=Stop(3))  # nothing saved yet
    with pytest.raises(KeyboardInterrupt):
        train(reference, documents, tmp_path / "parts", progress=Stop(10))  # saved after 8
    seen = []
    parts = train(
        reference, documents, tmp_path / "parts", progress=lambda stage, done, _: seen.append((stage[:5], done))
    )
    assert min(done for stage, done in seen if stage == "train") == 9
    expected, found = weights(folder), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [look.held_out for look in parts.looks] == [look.held_out for look in whole.looks]
    assert [look.step for look in parts.looks] == [5, 10, 12]


def test_what_comes_out_is_a_checkpoint_that_loads_and_has_learned(reference, documents, tmp_path):
    report = train(reference, documents, tmp_path, max_tokens=80 * 4 * 32, learning_rate=2e-2, evaluate_every=20)
    assert report.tokens == 80 * 4 * 32
    assert set(report.looks[-1].held_out) == {1, 3, 6}
    assert report.looks[-1].held_out[3] < report.looks[0].held_out[3] - 0.5
    loaded = load(str(tmp_path))
    assert loaded.end_tokens() == {reference.tokenizer.eos_token_id}
    assert loaded.model.num_parameters() == report.parameters
    text = training_text(reference.tokenizer, documents, 32, 0.2, tmp_path / "training" / "text.safetensors")
    ids = text.held_out.long()
    with torch.no_grad():
        loss = float(loaded.model(ids, labels=ids, num_steps=3).loss)
    assert loss == pytest.approx(report.looks[-1].held_out[3], abs=0.05)  # stored in bfloat16
    ids = reference.tokenizer("Question:", return_tensors="pt").input_ids
    assert loaded.model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4
    card = (tmp_path / "README.md").read_text()
    assert f"{report.looks[-1].held_out[3]:.3f}" in card
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [look["step"] for look in json.loads((tmp_path / "losses.json").read_text())] == [20, 40, 60, 80]


def test_a_deep_equilibrium_model_trains(reference, documents, tmp_path):
    steps = {"max_tokens": 40 * 4 * 32, "learning_rate": 2e-2, "evaluate_every": 20}
    report = train(reference, documents, tmp_path, kind="deq", solver_steps=8, **steps)
    assert report.looks[-1].held_out[8] < report.looks[0].held_out[8] - 0.5
    config = load(str(tmp_path)).model.config
    assert isinstance(config, DeepEquilibriumConfig)
    assert (config.max_steps, config.adjoint_max_steps, config.tolerance) == (8, 8, 1e-2)


def test_a_longer_training_goes_on_from_a_finished_one(reference, documents, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    seen = []
    report = train(
        reference, documents, tmp_path, max_tokens=14 * 4 * 32, progress=lambda stage, done, _: seen.append(done)
    )
    assert 13 in seen
    assert 12 not in seen
    assert report.looks[-1].step == 14


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.004, not 0.001"),
        ({"mean_recurrence": 4}, "mean_recurrence 3, not 4"),
        ({"batch": 2}, "batch 4, not 2"),
        ({"seed": 1}, "seed 0, not 1"),
    ],
)
def test_a_state_of_other_options_is_refused(reference, documents, finished, change, said):
    with pytest.raises(RestpointError, match="output: .* holds an unfinished training with " + said):
        train(reference, documents, finished[0], **change)


def test_a_state_of_another_text_or_a_damaged_one_is_refused(reference, documents, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(RestpointError, match="unfinished training with text_sha256"):
        train(reference, documents[1:], tmp_path)
    state = tmp_path / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(RestpointError, match="is no training state"):
        train(reference, documents, tmp_path)


def test_a_gradient_that_is_no_number_stops_with_a_remedy(reference, documents, tmp_path):
    with pytest.raises(RestpointError, match=r"learning_rate: at step .* start again in another folder"):
        train(reference, documents, tmp_path, learning_rate=1e30, precision="float32")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("core_layers", 0),
        ("mean_recurrence", 0),
        ("gradient_steps", 0),
        ("batch", 0),
        ("learning_rate", 0.0),
        ("held_out", 0.0),
        ("held_out", 1.0),
        ("ramp", -0.1),
        ("warm_up", 0.9),
        ("max_tokens", 100),
        ("hidden_size", 30),
        ("solver_tolerance", 0.0),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RestpointError, match=f"^{name} is "):
        TrainOptions(**{**TINY, "heads": 4, name: value})


def test_a_tolerance_below_the_resolution_of_the_products_is_refused():
    with pytest.raises(RestpointError, match=r"solver_tolerance is 0\.001; it must be at least 0\.0039"):
        TrainOptions(**{**TINY, "kind": "deq", "solver_tolerance": 1e-3})
    assert TrainOptions(**{**TINY, "kind": "deq", "solver_tolerance": 1e-3, "precision": "float32"}).kind == "deq"


def test_every_epoch_sees_every_sequence_once_in_an_order_of_its_own(reference, documents, tmp_path):
    text = training_text(reference.tokenizer, documents, 32, 0.2, tmp_path / "text.safetensors")
    count, size = len(text.sequences), 7
    rows = torch.cat([text.batch(step, size, 0) for step in range(2 * count)])[: size * count]
    keys = [tuple(row.tolist()) for row in rows]
    whole = Counter(tuple(row.tolist()) for row in text.sequences)
    epochs = [keys[first : first + count] for first in range(0, len(keys), count)]
    assert all(Counter(epoch) == whole for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert torch.equal(text.batch(5, size, 0), text.batch(5, size, 0))
    assert not torch.equal(text.batch(5, size, 0), text.batch(5, size, 1))


def test_held_out_documents_are_not_trained_on_and_all_others_are(reference, tmp_path):
    tokenizer = reference.tokenizer
    documents = [f"document number {number:04d} of many. " for number in range(200)]
    text = training_text(tokenizer, documents, 16, 0.25, tmp_path / "text.safetensors")
    trained, aside = (tokenizer.decode(rows.flatten()) for rows in (text.sequences, text.held_out))
    sides = [(f"number {number:04d} of" in trained, f"number {number:04d} of" in aside) for number in range(200)]
    assert not any(both == (True, True) for both in sides)
    assert 25 < sum(side[1] for side in sides) < 75  # of 50, five deviations of 6; at most 64 sequences are kept
    assert sum(side[0] for side in sides) > 120
    assert tokenizer.eos_token in trained  # between documents
    again = training_text(tokenizer, documents, 16, 0.25, tmp_path / "text.safetensors")
    assert torch.equal(again.sequences, text.sequences)


def test_text_that_is_too_short_is_refused(reference, tmp_path):
    with pytest.raises(RestpointError, match=r"text: what is .* has fewer than 64 tokens"):
        training_text(reference.tokenizer, ["a word"], 64, 0.5, tmp_path / "text.safetensors")


def test_the_rate_rises_stays_and_falls_to_zero():
    schedule = Schedule(TrainOptions(**{**TINY, "max_tokens": 100 * 128, "warm_up": 0.1, "decay": 0.2}))
    peak = schedule.options.learning_rate
    assert schedule.rate(0) == pytest.approx(peak / 10)
    assert schedule.rate(9) == pytest.approx(peak)
    assert schedule.rate(60) == pytest.approx(peak)
    assert schedule.rate(90) == pytest.approx(peak / 2)
    assert schedule.rate(99) == pytest.approx(peak / 20)


def test_iterations_rise_with_the_ramp_and_keep_their_mean():
    schedule = Schedule(TrainOptions(**{**TINY, "max_tokens": 100 * 128, "mean_recurrence": 9, "ramp": 0.5}))
    torch.manual_seed(0)

    def mean(step):
        return torch.tensor([float(schedule.iterations(step)) for _ in range(4000)]).mean().item()

    # 1 + Poisson(rate), the rate of mean 1, 5, 9: deviations below 5.6, so standard errors below 0.09
    assert mean(0) == pytest.approx(2, abs=0.1)
    assert mean(25) == pytest.approx(6, abs=0.3)
    assert mean(80) == pytest.approx(10, abs=0.4)
    fixed = Schedule(TrainOptions(**{**TINY, "mean_recurrence": 1, "fixed_recurrence": True}))
    assert {fixed.iterations(step) for step in range(12)} == {1}


def test_every_parameter_has_one_optimiser_and_embeddings_are_no_matrices(reference):
    options = TrainOptions(**TINY)
    model = new_model(options, reference.tokenizer)
    muon, adam = optimisers(model, options)
    ours = [[id(p) for group in optimiser.param_groups for p in group["params"]] for optimiser in (muon, adam)]
    assert sorted(ours[0] + ours[1]) == sorted(id(p) for p in model.parameters())
    assert id(model.model.embed_tokens.weight) in ours[1]
    assert id(model.model.adapter.weight) in ours[0]


def test_embeddings_to_begin_with(reference):
    own = reference.model.get_input_embeddings().weight
    model = new_model(TrainOptions(), reference.tokenizer, own)
    assert torch.equal(model.model.embed_tokens.weight, own)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float((own * model.config.embedding_scale).std()) == pytest.approx(model.config.state_std, rel=1e-3)
    with pytest.raises(RestpointError, match=r"start_embeddings: .*set hidden_size to 256"):
        new_model(TrainOptions(**TINY), reference.tokenizer, own)


def test_the_verb_trains_and_prints(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text\n" * 300 for n in range(60)))
    words = ["--max-tokens", "512", "--hidden-size", "16", "--heads", "2", "--key-value-heads", "1", "--batch", "2"]
    words += ["--sequence-length", "32", "--held-out", "0.3", "--mean-recurrence", "2", "-o", str(tmp_path / "model")]
    assert cli.main(["train-recurrent", "--text", str(text), "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["step"] == 8
    assert cli.main(["train-recurrent", "--text", str(text), *words]) == 0
    assert "the model is in" in capsys.readouterr().out
    assert cli.main(["train-recurrent", *words]) == 2
    assert "text: none is given" in capsys.readouterr().err
