"""Tasks and the probe that reads them: against SciPy, scikit-learn, a closed form and samples drawn the slow way."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import states_of
from restpoint.trajectory.task_examples import Examples, TaskExamples, scattered, task_labels
from restpoint.trajectory.task_probe import fit_probe, multinomial_regression, task_exits


def identity(states: torch.Tensor) -> torch.Tensor:
    return states


# --- labels ---


def test_labels_are_the_intervals_of_the_definition() -> None:
    labels = task_labels(torch.tensor([[2, 3, 5], [0, 4, 6]]), 8)
    assert labels[:, 0].tolist() == [1, 1, 1, 2, 3, 3, 0, 0]
    assert labels[:, 1].tolist() == [1, 2, 2, 2, 2, 3, 3, 0]


def test_labels_of_all_small_cases() -> None:
    depth = 6
    for layers in itertools.product(range(depth), repeat=3):
        found = task_labels(torch.tensor([layers]), depth)[:, 0].tolist()
        for layer, task in enumerate(found):
            # The rank at work is the first one that is not settled together with all before it.
            open_ranks = [rank for rank in range(3) if max(layers[: rank + 1]) >= layer]
            assert task == (open_ranks[0] + 1 if open_ranks else 0)
        if list(layers) == sorted(set(layers)):
            bounds = (-1, *layers)
            intervals = [(i + 1, range(bounds[i] + 1, bounds[i + 1] + 1)) for i in range(3)]
            assert all(found[layer] == task for task, interval in intervals for layer in interval)


# --- the sample ---


def wandering(index: int, length: int = 20) -> Trajectory:
    generator = torch.Generator().manual_seed(index)
    steps = torch.randn(9, length, 12, generator=generator) * torch.linspace(2, 0.3, 9)[:, None, None]
    return Trajectory(steps.cumsum(0), index)


def reading(indices: range, **settings: int) -> TaskExamples:
    sample = TaskExamples(identity, **{"tasks": 3, "capacity": 5, **settings})
    for index in indices:
        sample.add(wandering(index))
    return sample


def same(a: TaskExamples, b: TaskExamples) -> bool:
    parts = (("states", "tasks", "layers", "texts"),)
    return torch.equal(a.hashes, b.hashes) and all(
        torch.equal(getattr(a.held, name), getattr(b.held, name)) for name in parts[0]
    )


def test_sample_is_bounded_and_does_not_depend_on_the_order() -> None:
    whole = reading(range(20))
    assert len(whole.hashes) <= 9 * 3 * 5
    stratum = whole.held.layers * 3 + whole.held.tasks
    assert int(stratum.bincount().max()) == 5
    backwards = TaskExamples(identity, tasks=3, capacity=5)
    for index in reversed(range(20)):
        backwards.add(wandering(index))
    assert same(whole, backwards)


@pytest.mark.parametrize("cut", [0, 7, 20])
def test_halves_merge_to_one_pass(cut: int) -> None:
    whole, first, second = reading(range(20)), reading(range(cut)), reading(range(cut, 20))
    first.merge(second)
    assert same(whole, first)


def test_sample_keeps_the_smallest_hashes_of_all() -> None:
    everything, sample = reading(range(20), capacity=10_000), reading(range(20))
    expected: set[int] = set()
    for layer, task in itertools.product(range(9), range(1, 4)):
        chosen = (everything.held.layers == layer) & (everything.held.tasks == task)
        expected |= set(everything.hashes[chosen].sort().values[:5].tolist())
    assert set(sample.hashes.tolist()) == expected


def test_examples_are_the_states_of_their_text_and_layer() -> None:
    held = reading(range(6)).held
    for state, layer, text in zip(held.states, held.layers, held.texts, strict=True):
        assert (wandering(int(text)).states[layer] == state).all(-1).any()


def test_balanced_has_as_many_of_each_task_at_every_layer() -> None:
    balanced = reading(range(8), capacity=30).balanced()
    table = torch.zeros(9, 3, dtype=torch.long)
    for layer, task in zip(balanced.layers, balanced.tasks, strict=True):
        table[layer, task - 1] += 1
    assert (table == table[:, :1]).all()
    assert int(table.sum()) > 30


def test_hash_is_splitmix64() -> None:
    mask = (1 << 64) - 1

    def expected(number: int) -> int:
        number = (number + 0x9E3779B97F4A7C15) & mask
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
        return number ^ (number >> 31)

    numbers = [0, 1, 12345, (1 << 40) + 7]
    assert [number & mask for number in scattered(torch.tensor(numbers)).tolist()] == [*map(expected, numbers)]


def test_arguments_of_the_sample_are_refused_by_name() -> None:
    for argument, value in (("tasks", 1), ("capacity", 0), ("every", 0), ("tokens", 0)):
        with pytest.raises(RestpointError, match=f"^{argument} is {value}"):
            TaskExamples(identity, **{argument: value})
    with pytest.raises(RestpointError, match=r"^tasks is 3, and no layer"):
        TaskExamples(identity).balanced()
    with pytest.raises(RestpointError, match=r"^other: it has other tasks"):
        TaskExamples(identity).merge(TaskExamples(identity, tasks=4))


# --- the regression ---


def test_regression_of_a_table_has_the_closed_form() -> None:
    """One binary feature without a penalty: the weights are the logarithms of the odds ratios."""
    counts = torch.tensor([[10, 20, 5], [15, 5, 40]])  # feature x class
    rows = [(feature, label) for feature in range(2) for label in range(3) for _ in range(int(counts[feature, label]))]
    features = torch.tensor([[float(feature)] for feature, _ in rows], dtype=torch.float64)
    weights, bias = multinomial_regression(features, torch.tensor([label for _, label in rows]), 3, 0.0)
    logs = counts.double().log()
    expected = logs[1] - logs[0]
    torch.testing.assert_close(weights[0] - weights[0, 0], expected - expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias - bias[0], logs[0] - logs[0, 0], rtol=1e-4, atol=1e-4)


def test_regression_is_scipys_minimum() -> None:
    """The loss, written down once more, is minimised by another method without its gradient."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 2, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)

    def loss(flat: np.ndarray) -> float:
        table = flat.reshape(3, 3)
        scores = features.numpy() @ table[:2] + table[2]
        total = sum(math.log(np.exp(row - row[label]).sum()) for row, label in zip(scores, labels, strict=True))
        return total / 60 + 0.05 / 2 * float((table[:2] ** 2).sum()) + 0.5 * float(table[2].sum() ** 2)

    expected = optimize.minimize(loss, np.zeros(9), method="BFGS", options={"gtol": 1e-7}).x.reshape(3, 3)
    weights, bias = multinomial_regression(features, labels, 3, 0.05)
    np.testing.assert_allclose(weights.numpy(), expected[:2], atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), expected[2], atol=1e-5)


def test_regression_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(300, 10, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (300,), generator=generator)
    weights, _ = multinomial_regression(features, labels, 4, 0.02)
    other = LogisticRegression(C=1 / (0.02 * 300), tol=1e-10, max_iter=5000)
    np.testing.assert_allclose(weights.numpy(), other.fit(features.numpy(), labels.numpy()).coef_.T, atol=1e-5)


# --- the probe ---


def clouds(gap: float, count: int = 900, hidden: int = 6) -> Examples:
    """States of three tasks around three centres, at four layers that shift all of them."""
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(count) % 3 + 1
    layers = torch.arange(count) // 3 % 4
    states = torch.randn(count, hidden, generator=generator)
    states[torch.arange(count), tasks - 1] += gap
    states += 20 * layers[:, None]
    return Examples(states, tasks, layers, torch.arange(count) // 12)


def test_probe_finds_what_is_there_and_nothing_else() -> None:
    probe = fit_probe(clouds(8.0))
    assert probe.chance == pytest.approx(1 / 3)
    assert probe.accuracy.shape == (5,)
    assert float(probe.accuracy.min()) > 0.98
    assert float(probe.control.mean()) == pytest.approx(1 / 3, abs=0.06)
    assert probe.confusion.sum(-1).tolist() == [300] * 3
    assert float(fit_probe(clouds(0.0)).accuracy.mean()) == pytest.approx(1 / 3, abs=0.06)


def test_accuracy_is_near_that_of_the_best_rule() -> None:
    examples = clouds(1.5, 6000)
    centred = examples.states - 20 * examples.layers[:, None]
    best = (centred[:, :3].argmax(-1) + 1 == examples.tasks).double().mean()
    # The shift of the layers costs one direction of the six: the best linear rule ignores it at little expense.
    probe = fit_probe(examples)
    assert float(probe.accuracy.mean()) == pytest.approx(float(best), abs=0.03)
    total = probe.confusion.diagonal().sum() / probe.confusion.sum()
    assert float(probe.accuracy.mean()) == pytest.approx(float(total), abs=5e-3)


def test_held_out_texts_are_unseen() -> None:
    """What marks a text and not its task is of no use: a probe that knew the texts would be right always."""
    examples = clouds(0.0, 600, hidden=40)
    tasks = (examples.texts * 7919) % 3 + 1
    states = torch.nn.functional.one_hot(examples.texts, 64).float() * 10
    probe = fit_probe(Examples(states, tasks, examples.layers, examples.texts))
    assert float(probe.accuracy.mean()) < 0.6
    assert float((probe.tasks(states) == tasks).double().mean()) == 1


def test_task_exit_is_the_first_layer_of_a_later_task() -> None:
    examples = clouds(8.0)
    probe = fit_probe(examples)
    centres = torch.eye(6)[:3] * 8
    path = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 1]]).T  # depth, tokens
    states = centres[path] + 20 * torch.arange(4)[:, None, None]
    assert (probe.tasks(states) - 1).tolist() == path.tolist()
    assert task_exits(probe, states).tolist() == [2, 3, 0, 1]


def test_arguments_of_the_probe_are_refused_by_name() -> None:
    with pytest.raises(RestpointError, match=r"^folds is 76 and the examples are of 75 texts"):
        fit_probe(clouds(1.0), folds=76)
    with pytest.raises(RestpointError, match=r"^penalty is -1"):
        fit_probe(clouds(1.0), penalty=-1.0)


@pytest.mark.slow
def test_bundled_models_tasks_can_be_read(reference) -> None:
    layered = LayeredModel(reference.model)
    sample = TaskExamples(lambda state: layered.logits(state[None])[0], capacity=60)
    for index, text in enumerate(itertools.islice(bundled.fit_texts(), 40)):
        ids = torch.tensor([reference.tokenizer(text)["input_ids"][:64]])
        states = states_of(layered, ids, tuple(range(layered.depth)))[0].transpose(0, 1).float()
        sample.add(Trajectory(states, index))
    probe = fit_probe(sample.balanced(), penalty=0.1)
    noise = (probe.chance * (1 - probe.chance) / float(probe.confusion.sum())) ** 0.5
    assert float(probe.control.mean()) < probe.chance + 3 * noise
    assert float(probe.accuracy.mean()) > probe.chance + 5 * noise
