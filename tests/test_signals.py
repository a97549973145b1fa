"""Signals of early exit: against SciPy, a linear programme, scikit-learn, closed forms and promised coverage."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import optimize, special, stats
from scipy.spatial import distance
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from restpoint import bundled
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.predictors import AffinePredictor
from restpoint.errors import RestpointError
from restpoint.exit.gate import Gate, fit_gate, gate_inputs
from restpoint.exit.radius import conformal_quantile, fit_radius, overtaking_distance, rest_distance
from restpoint.exit.recorded import blocks_of
from restpoint.exit.registry import FITTED, SIGNALS
from restpoint.exit.signals import RelativeStep, Signal
from restpoint.exit.task_signal import TaskSaturation
from restpoint.exit.transport_signal import TransportCost, second_law, top_transport
from restpoint.exit.view import Readout, View, views
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.record import pack, states_of
from restpoint.trajectory.task_probe import Probe

HIDDEN, DEPTH, VOCABULARY = 6, 8, 20
LAYERS = (3, 5, 7)


class Toy(Readout):
    """Logits are the state times a matrix. With a predictor at every layer, unless told to read the lens."""

    def __init__(self, weight: Tensor, layers: tuple[int, ...] = LAYERS):
        self.weight = weight
        unembedding = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        unembedding.weight.data = weight
        head = SimpleNamespace(unembedding=unembedding)
        self.layered = cast("Any", SimpleNamespace(depth=DEPTH, head=head, logits=self.logits))
        self.vocabulary = None
        turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(5))).Q
        shift = torch.linspace(-0.2, 0.2, HIDDEN)
        self.predictors = {
            layer: AffinePredictor((layer,), AffineMap(torch.eye(HIDDEN) + 0.3 * turn, shift)) for layer in layers
        }

    def logits(self, rest: Tensor) -> Tensor:
        return rest.float() @ self.weight.T


def toy(seed: int = 0, layers: tuple[int, ...] = LAYERS) -> Toy:
    return Toy(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(seed)), layers)


def resting(rows: int, seed: int = 0, shared: float = 0.0) -> Tensor:
    """States that come to rest: h_l = h_L + noise 0.6^l; ``shared`` of the noise's size is common to all rows."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(rows, 1, HIDDEN, generator=generator)
    noise = torch.randn(rows, DEPTH + 1, HIDDEN, generator=generator)
    noise = noise * (1 + shared * torch.randn(1, generator=generator).abs())
    states = rest + 3 * noise * 0.6 ** torch.arange(DEPTH + 1)[:, None]
    states[:, -1:] = rest
    return states


def hand_made(states: list[list[list[float]]], layer: int | None = None) -> View:
    """A view of rows whose states are given layer by layer, read by the lens."""
    levels = [torch.tensor(level) for level in states]
    return View(len(levels) - 1 if layer is None else layer, levels, Toy(torch.eye(len(states[0][0])), ()))


def with_laws(laws: list[Tensor]) -> View:
    """Views one after another with these laws, read by the lens."""
    logits = torch.stack([law.log() for law in laws], 1)
    return views(logits, range(len(laws)), Toy(torch.eye(logits.shape[-1]), ()))[-1]


def random_laws(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).softmax(-1)


def fitted() -> dict[str, Signal]:
    """One of each kind that takes a fit."""
    readout = toy()
    texts = [resting(16, seed) for seed in range(30)]
    generator = torch.Generator().manual_seed(1)
    task = TaskSaturation(
        torch.randn(HIDDEN, generator=generator),
        torch.randn(HIDDEN, 3, generator=generator),
        torch.randn(3, generator=generator),
    )
    gate = fit_gate(texts, LAYERS, readout).gate
    radius = fit_radius(texts, LAYERS, readout, alpha=0.2, bins=2).signal
    return {signal.kind: signal for signal in (task, gate, radius)}


# --- all of them ---


@pytest.mark.parametrize("name", [*SIGNALS, *(kind.kind for kind in FITTED)])
def test_every_signal_is_a_confidence_whatever_the_states(name: str) -> None:
    signal = (SIGNALS | fitted())[name]
    still = resting(1)[:, -1:].expand(1, DEPTH + 1, HIDDEN)
    cases = {
        "moving": resting(50),
        "still": still,
        "zero": torch.zeros(2, DEPTH + 1, HIDDEN),
        "one-hot laws": 1e4 * resting(5),
        "tiny": 1e-30 * resting(5),
        "half": resting(5).bfloat16().float(),
    }
    for case, states in cases.items():
        for layers in (LAYERS, (0, 1, 2, 3)):
            for readout in (toy(), toy(layers=())):
                for view in views(states, layers, readout):
                    found = signal.confidence(view)
                    assert found.shape == (len(states),), (case, view.layer)
                    assert bool(((found >= 0) & (found <= 1)).all()), (case, view.layer, found)


def test_every_kind_comes_back_from_its_saved_state(tmp_path: Path) -> None:
    view = views(resting(40, 9), LAYERS, toy())[-1]
    for name, signal in (SIGNALS | fitted()).items():
        config, tensors = signal.state()
        if tensors:
            save_file(tensors, tmp_path / "signal.safetensors")
            tensors = load_file(tmp_path / "signal.safetensors")
        again = Signal.from_state(config, tensors)
        assert type(again) is type(signal)
        assert torch.equal(again.confidence(view), signal.confidence(view)), name
        assert again.kind == name
        assert again.papers or name == "logit-margin"
    with pytest.raises(RestpointError, match="nonsense"):
        Signal.from_state({"kind": "nonsense"}, {})


def test_those_that_need_no_law_read_none() -> None:
    for name, signal in (SIGNALS | fitted()).items():
        view = views(resting(4), LAYERS, toy())[-1]
        signal.confidence(view)
        assert ("logits" in view.__dict__) == signal.reads_law, name


def test_a_row_says_the_same_alone() -> None:
    states = resting(7, 4)
    for name, signal in (SIGNALS | fitted()).items():
        together = signal.confidence(views(states, LAYERS, toy())[-1])
        alone = torch.cat([signal.confidence(views(one[None], LAYERS, toy())[-1]) for one in states])
        torch.testing.assert_close(alone, together, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["relative-step", "cosine", "acceleration"])
def test_too_few_layers_tell_nothing(name: str) -> None:
    least = 3 if name == "acceleration" else 1
    for layer in range(DEPTH):
        found = SIGNALS[name].confidence(views(resting(5), (layer,), toy())[0])
        assert bool((found == 0).all()) == (layer < least)


@pytest.mark.parametrize("name", ["entropy-difference", "kl", "disagreement", "transport"])
def test_the_first_candidate_has_none_to_compare_with(name: str) -> None:
    first, second = views(resting(5), (3, 5), toy(layers=()))
    assert SIGNALS[name].confidence(first).tolist() == [0] * 5
    assert bool((SIGNALS[name].confidence(second) > 0).all())


# --- states ---


def test_relative_step_and_cosine_against_scipy() -> None:
    view = views(resting(30), (5,), toy())[0]
    before, state = view.states[4].double().numpy(), view.state.double().numpy()
    turns = [distance.cosine(a, b) for a, b in zip(before, state, strict=True)]
    np.testing.assert_allclose(SIGNALS["cosine"].confidence(view), 1 - np.array(turns) / 2, rtol=1e-5)
    moved = np.linalg.norm(state - before, axis=1) / np.linalg.norm(before, axis=1)
    np.testing.assert_allclose(SIGNALS["relative-step"].confidence(view), 1 / (1 + moved), rtol=1e-5)


def test_acceleration_remembers_a_turn_for_one_layer() -> None:
    way = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0], [3.0, 3.0], [3.0, 2.0]]
    turn = 1 / (1 + math.sqrt(2) / 2)  # steps of length 1 at a right angle
    expected = {3: 1.0, 4: turn, 5: turn, 6: 1.0, 7: 0.5}
    for layer, value in expected.items():
        found = SIGNALS["acceleration"].confidence(hand_made([[state] for state in way], layer))
        assert float(found) == pytest.approx(value, rel=1e-6), layer


def test_acceleration_is_that_of_the_definition() -> None:
    states = resting(20).double().numpy()
    steps = np.diff(states, axis=1)
    sizes = np.linalg.norm(steps, axis=-1)
    size = np.linalg.norm(np.diff(steps, axis=1), axis=-1) / (sizes[:, 1:] + sizes[:, :-1])
    for layer in range(3, DEPTH):
        found = SIGNALS["acceleration"].confidence(views(resting(20), (layer,), toy())[0])
        np.testing.assert_allclose(found, 1 / (1 + np.maximum(size[:, layer - 2], size[:, layer - 3])), rtol=1e-5)


def test_smaller_steps_are_safer() -> None:
    steps = [0.0, 0.1, 0.5, 2.0]
    states = [[[3.0, 0.0]] * 4, [[3.0, step] for step in steps]]
    for name in ("relative-step", "cosine"):
        found = SIGNALS[name].confidence(hand_made(states)).tolist()
        assert found == sorted(found, reverse=True)
        assert found[0] == 1
        assert len(set(found)) == 4


# --- laws ---


def test_signals_of_one_law_against_scipy() -> None:
    law = random_laws(40, 0)
    view = with_laws([law])
    ordered = np.sort(law.numpy(), axis=1)
    np.testing.assert_allclose(SIGNALS["max-p"].confidence(view), ordered[:, -1], rtol=1e-4)
    np.testing.assert_allclose(SIGNALS["margin"].confidence(view), ordered[:, -1] - ordered[:, -2], atol=1e-6)
    np.testing.assert_allclose(SIGNALS["logit-margin"].confidence(view), 1 - ordered[:, -2] / ordered[:, -1], atol=1e-6)
    entropy = stats.entropy(law.double().numpy(), axis=1) / math.log(VOCABULARY)
    np.testing.assert_allclose(SIGNALS["entropy"].confidence(view), 1 - entropy, atol=1e-5)


def test_signals_of_two_laws_against_scipy() -> None:
    before, law = random_laws(40, 0), random_laws(40, 1)
    p, q = law.double().numpy(), before.double().numpy()
    view = with_laws([before, law])
    np.testing.assert_allclose(SIGNALS["kl"].confidence(view), np.exp(-stats.entropy(p, q, axis=1)), rtol=1e-4)
    change = np.abs(stats.entropy(p, axis=1) - stats.entropy(q, axis=1))
    np.testing.assert_allclose(SIGNALS["entropy-difference"].confidence(view), np.exp(-change), rtol=1e-4)
    np.testing.assert_allclose(SIGNALS["disagreement"].confidence(view), np.minimum(p, q).sum(1), atol=1e-5)


def test_the_ends_of_the_scale() -> None:
    uniform = torch.full((1, VOCABULARY), 1 / VOCABULARY)
    sure = torch.full((1, VOCABULARY), 1e-30)
    sure[0, 3] = 1
    other = sure.roll(1, -1)
    for name, none, all_ in (("max-p", 1 / VOCABULARY, 1), ("margin", 0, 1), ("logit-margin", 0, 1), ("entropy", 0, 1)):
        assert float(SIGNALS[name].confidence(with_laws([uniform]))) == pytest.approx(none, abs=1e-6)
        assert float(SIGNALS[name].confidence(with_laws([sure]))) == pytest.approx(all_, abs=1e-6)
    for name in ("kl", "disagreement"):
        assert float(SIGNALS[name].confidence(with_laws([sure, other]))) == pytest.approx(0, abs=1e-6)
        assert float(SIGNALS[name].confidence(with_laws([sure, sure]))) == pytest.approx(1, abs=1e-6)
    # Laws of one entropy: the difference sees nothing where the divergence sees all.
    assert float(SIGNALS["entropy-difference"].confidence(with_laws([sure, other]))) == pytest.approx(1)


def test_the_second_law_is_the_lens_beside_a_predictor() -> None:
    readout = toy(layers=(5,))
    first, second = views(resting(6), (3, 5), readout)
    assert second_law(first) is None
    found = second_law(second)
    assert found is not None
    torch.testing.assert_close(found, readout.logits(second.state).log_softmax(-1))
    assert not torch.allclose(found, second.log_law, atol=0.1)


# --- transport ---


def least_cost(p: np.ndarray, q: np.ndarray, cost: np.ndarray) -> float:
    """The transport programme over all pairs, by a solver of its own."""
    rows, columns = cost.shape
    sums = np.zeros((rows + columns, rows * columns))
    for i in range(rows):
        sums[i, i * columns : (i + 1) * columns] = 1
    for j in range(columns):
        sums[rows + j, j::columns] = 1
    found = optimize.linprog(cost.ravel(), A_eq=sums[:-1], b_eq=np.concatenate([p, q])[:-1], method="highs")
    return float(found.fun)


@pytest.mark.parametrize("support", [1, 4, VOCABULARY, VOCABULARY + 5])
def test_transport_against_a_linear_programme(support: int) -> None:
    p, q = random_laws(6, 2), random_laws(6, 3)
    places = torch.randn(VOCABULARY, HIDDEN)
    found = top_transport(p.log(), q.log(), places, support)
    for row in range(len(p)):
        chosen = [np.argsort(-law[row].numpy())[:support] for law in (p, q)]
        masses = [law[row].double().numpy()[own] for law, own in zip((p, q), chosen, strict=True)]
        cost = distance.cdist(places.double().numpy()[chosen[0]], places.double().numpy()[chosen[1]])
        expected = least_cost(masses[0] / masses[0].sum(), masses[1] / masses[1].sum(), cost)
        assert float(found[row]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_transport_signal_forgives_near_synonyms() -> None:
    places = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0]])
    near = torch.tensor([[0.0, 1, 0]]), torch.tensor([[0.0, 0, 1]])
    costs = [
        float(top_transport((torch.tensor([[1.0, 0, 0]]) + 1e-30).log(), (law + 1e-30).log(), places, 1))
        for law in near
    ]
    assert costs == pytest.approx([0.1, 5.0])
    same, earlier = random_laws(3, 0), random_laws(3, 1)
    signal = SIGNALS["transport"]
    assert signal.confidence(with_laws([same, same])).tolist() == pytest.approx([1.0] * 3)
    view = with_laws([earlier, same])
    cost = top_transport(same.log(), earlier.log(), torch.eye(VOCABULARY), 8)  # the unembedding of these views
    np.testing.assert_allclose(signal.confidence(view), 1 / (1 + cost), rtol=1e-5)
    with pytest.raises(RestpointError, match="support"):
        TransportCost(0)


# --- the task probe ---


def test_task_saturation_is_the_probes_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    empty = torch.zeros(2, dtype=torch.float64)
    for tasks in (2, 4):
        probe = Probe(
            50 * draw(HIDDEN),
            draw(HIDDEN).abs() + 0.1,
            draw(HIDDEN, tasks),
            draw(tasks),
            empty,
            empty,
            1 / tasks,
            torch.zeros(tasks, tasks, dtype=torch.int64),
        )
        states = (probe.mean + probe.scale * draw(60, HIDDEN)).float()
        view = View(0, [states], toy())
        found = TaskSaturation.of(probe).confidence(view)
        logits = (states.double().numpy() - probe.mean.numpy()) / probe.scale.numpy() @ probe.weights.numpy()
        weights = np.exp(logits + probe.bias.numpy())
        np.testing.assert_allclose(found, 1 - weights[:, 0] / weights.sum(1), atol=2e-4)
        if tasks == 2:
            sure = (found - 0.5).abs() > 1e-3
            assert torch.equal((found > 0.5)[sure], (probe.tasks(states) == 2)[sure])


# --- the gate ---


def gate_data(texts: int, tokens: int = 24) -> list[Tensor]:
    return [resting(tokens, 100 + seed) for seed in range(texts)]


def test_without_the_state_the_gate_is_scikit_learns_regression() -> None:
    readout, texts = toy(), gate_data(20)
    fit = fit_gate(texts, (5,), readout, penalties=(math.inf,))
    states = torch.cat(texts)
    view = views(states, (5,), readout)[0]
    right = (view.tokens == readout.logits(states[:, -1]).argmax(-1)).numpy()
    x = gate_inputs(view)[:, :3].double().numpy()
    standard = (x - x.mean(0)) / x.std(0)
    oracle = LogisticRegression(C=1 / (1e-6 * len(x)), tol=1e-10, max_iter=10000).fit(standard, right)
    np.testing.assert_allclose(fit.gate.confidence(view), oracle.predict_proba(standard)[:, 1], atol=2e-3)
    assert not bool(fit.gate.weights[:, 3:].any())
    assert fit.tokens == len(states)


def test_the_gate_is_calibrated_where_it_was_fitted_and_beats_the_largest_probability() -> None:
    readout, texts = toy(), gate_data(40)
    gate = fit_gate(texts, LAYERS, readout).gate
    for states, same in ((torch.cat(texts), True), (torch.cat([resting(24, 900 + seed) for seed in range(40)]), False)):
        target = readout.logits(states[:, -1]).argmax(-1)
        for view in views(states, LAYERS, readout):
            right = (view.tokens == target).double()
            found, largest = gate.confidence(view).double(), SIGNALS["max-p"].confidence(view).double()
            if same:  # the bias is free: at the optimum, sums agree
                assert float(found.mean()) == pytest.approx(float(right.mean()), abs=1e-4)
            assert float((found - right).square().mean()) < float((largest - right).square().mean())


def test_the_state_is_taken_where_it_pays() -> None:
    """Readouts err where the first coordinate is positive, which no law shows."""
    readout, texts = toy(layers=()), gate_data(40)
    for text in texts:
        text[:, 5] = text[:, -1]
        text[:, 5, 0] *= 1.0
        wrong = text[:, 5, 0] > 0
        text[wrong, -1] = -text[wrong, -1]
    fit = fit_gate(texts, (5,), readout)
    assert fit.chosen[0] < math.inf
    assert float(fit.log_loss[0, 0]) > 1.5 * float(fit.log_loss[0].min())
    without = fit_gate(texts, (5,), readout, penalties=(math.inf, 1e6))
    assert float(without.log_loss[0, 0]) == pytest.approx(float(without.log_loss[0, 1]), rel=1e-3)


def test_the_gate_reads_two_logits_their_mass_and_the_state() -> None:
    view = views(resting(12), (3, 5), toy())[1]
    logits = view.logits.double().numpy()
    ordered = np.sort(logits, -1)
    expected = np.concatenate([ordered[:, -2:][:, ::-1], special.logsumexp(logits, -1, keepdims=True), view.state], -1)
    np.testing.assert_allclose(gate_inputs(view), expected, rtol=1e-5, atol=1e-5)


def test_a_layers_gate_does_not_depend_on_the_other_candidates() -> None:
    readout, texts = toy(), gate_data(20)
    alone, among = fit_gate(texts, (5,), readout).gate, fit_gate(texts, LAYERS, readout).gate
    torch.testing.assert_close(alone.weights[0], among.weights[1])
    seen = [views(texts[0], layers, readout)[-1] for layers in ((5,), (3, 5))]
    assert torch.equal(among.confidence(seen[0]), among.confidence(seen[1]))


def test_a_gate_that_another_version_saved_is_refused() -> None:
    config, tensors = fitted()["gate"].state()
    del tensors["bias"]
    with pytest.raises(RestpointError, match=r"lacks 'bias'; fit and calibrate again"):
        Signal.from_state(config, tensors)


def test_the_gate_refuses_what_teaches_nothing() -> None:
    still = [resting(8, seed)[:, -1:].expand(8, DEPTH + 1, HIDDEN) for seed in range(6)]
    with pytest.raises(RestpointError, match="layer 5 all"):
        fit_gate(still, (5,), toy(layers=()))
    with pytest.raises(RestpointError, match="sequences"):
        fit_gate(gate_data(3), (5,), toy())
    with pytest.raises(RestpointError, match="penalties"):
        fit_gate(gate_data(6), (5,), toy(), penalties=(0.0,))
    with pytest.raises(RestpointError, match="held_out_every"):
        fit_gate(gate_data(6), (5,), toy(), held_out_every=1)


def test_recorded_texts_are_checked() -> None:
    for layers in ((), (5, 3), (DEPTH,), (-1, 2)):
        with pytest.raises(RestpointError, match="layers"):
            list(blocks_of(gate_data(1), layers, toy()))
    with pytest.raises(RestpointError, match="sequences"):
        list(blocks_of([resting(4)[:, :-1]], (5,), toy()))
    with pytest.raises(RestpointError, match="sequences"):
        list(blocks_of([], (5,), toy()))
    long = [resting(1300, 0), resting(3, 1)]
    blocks = list(blocks_of(long, (3, 5), toy()))
    assert [index for index, _, _ in blocks] == [0, 0, 0, 1]
    assert torch.equal(torch.cat([views[1].state for _, views, _ in blocks]), torch.cat(long)[:, 5])


# --- the rest radius ---


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_conformal_quantile_covers_the_value_left_out(alpha: float) -> None:
    """Exchangeable means each of n + 1 values is the new one equally often: coverage by enumeration."""
    for count in range(1, 60):
        values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        covered = [
            bool(values[new] <= conformal_quantile(torch.cat([values[:new], values[new + 1 :]]), alpha))
            for new in range(count)
        ]
        assert sum(covered) / count >= 1 - alpha - 1e-12
        # And no more than one value too many.
        assert sum(covered) / count <= 1 - alpha + 1 / count + 1e-12
    assert float(conformal_quantile(torch.zeros(0, dtype=torch.float64), alpha)) == math.inf


def test_the_rest_distance_is_the_smallest_over_all_constants() -> None:
    a, b = torch.randn(5, VOCABULARY), torch.randn(5, VOCABULARY)
    for row in range(5):
        gap = (b - a)[row].double().numpy()
        best = optimize.minimize_scalar(lambda constant, gap=gap: np.abs(gap - constant).max(), bounds=(-9, 9))
        assert float(rest_distance(a, b)[row]) == pytest.approx(best.fun, rel=1e-4)
    assert bool((rest_distance(a, b) <= (a - b).abs().amax(-1)).all())


def test_the_radius_covers_new_texts_in_every_bin() -> None:
    """Tokens of a text share their noise's size, so that counting each of them would overrate what is known."""
    readout, alpha, bins = toy(), 0.2, 3
    trials = 8
    outside, drawn = torch.zeros(len(LAYERS), bins), torch.zeros(len(LAYERS), bins)
    for trial in range(trials):
        fit = fit_radius(
            [resting(6, 10_000 * (trial + 1) + seed, shared=2.0) for seed in range(120)],
            LAYERS,
            readout,
            alpha=alpha,
            bins=bins,
            seed=trial,
        )
        new = torch.cat([resting(1, 5_000_000 + 10_000 * trial + seed, shared=2.0) for seed in range(300)])
        final = readout.logits(new[:, -1])
        assert fit.counts.sum(-1).tolist() == [96] * len(LAYERS)
        for place, view in enumerate(views(new, LAYERS, readout)):
            over = (rest_distance(view.logits, final) > fit.signal.radius(view)).float()
            bin_of = torch.bucketize(RelativeStep().confidence(view), fit.signal.edges[place])
            outside[place] += torch.bincount(bin_of, over, bins)
            drawn[place] += torch.bincount(bin_of, minlength=bins)
    share = outside / drawn
    # Two sources of chance: the new texts, and about 96 / bins texts behind each of the trials' radii.
    error = (alpha * (1 - alpha) * (1 / drawn + 1 / (trials * 96 / bins))).sqrt()
    assert bool((share <= alpha + 3 * error).all()), share
    assert bool((share >= alpha - 1 / (96 / bins) - 4 * error).all()), share


@pytest.mark.parametrize("keeps", ["law", "token"])
def test_within_the_radius_a_safe_margin_keeps_the_token_and_bounds_the_variation(keeps: Any) -> None:
    readout = toy()
    texts = [resting(6, seed) for seed in range(120)]
    signal = fit_radius(texts, LAYERS, readout, alpha=0.3, bins=2, keeps=keeps).signal
    states = torch.cat([resting(50, 7000 + seed) for seed in range(40)])
    final = readout.logits(states[:, -1])
    safe = 0
    for view in views(states, LAYERS, readout):
        radius = signal.radius(view)
        whole, token = rest_distance(view.logits, final), overtaking_distance(view.logits, final)
        assert bool(((token >= 0) & (token <= whole + 1e-6)).all())
        within = (whole if keeps == "law" else token) <= radius
        exits = signal.confidence(view) > 0.5
        top = view.logits.topk(2).values
        assert torch.equal(exits, top[:, 0] - top[:, 1] > 2 * radius)
        assert torch.equal(view.tokens[within & exits], final.argmax(-1)[within & exits])
        variation = (view.logits.softmax(-1) - final.softmax(-1)).abs().sum(-1) / 2
        if keeps == "law":
            assert bool((variation[within] <= (radius[within] / 2).tanh() + 1e-6).all())
        safe += int((within & exits).sum())
    assert safe > 40


def test_a_token_is_overtaken_exactly_beyond_its_distance() -> None:
    """The largest gain upon the top token is what a rival needs: brute force over all."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        predicted, final = torch.randn(2, VOCABULARY, generator=generator)
        top = int(predicted.argmax())
        gains = [float((final[v] - predicted[v]) - (final[top] - predicted[top])) for v in range(VOCABULARY)]
        assert float(overtaking_distance(predicted, final)) == pytest.approx(max(gains) / 2, abs=1e-6)


def test_bins_with_too_few_texts_never_stop() -> None:
    texts = [resting(4, seed) for seed in range(10)]
    fit = fit_radius(texts, LAYERS, toy(), alpha=0.1, bins=4)
    assert bool(fit.signal.radii.isinf().all())
    view = views(resting(9), LAYERS, toy())[1]
    assert fit.signal.confidence(view).tolist() == [0] * 9
    elsewhere = views(resting(9), (4,), toy())[0]
    assert fit.signal.confidence(elsewhere).tolist() == [0] * 9
    assert bool(fit.signal.radius(elsewhere).isinf().all())
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"bins": 0}):
        with pytest.raises(RestpointError, match=next(iter(wrong))):
            fit_radius(texts, LAYERS, toy(), **cast("Any", wrong))


def test_the_radius_can_be_binned_by_another_signal() -> None:
    fit = fit_radius([resting(6, seed) for seed in range(60)], (5,), toy(), bins=2, binned_by=SIGNALS["max-p"])
    view = views(resting(40, 3), (5,), toy())[0]
    sure = SIGNALS["max-p"].confidence(view) > fit.signal.edges[0, 0]
    assert torch.equal(fit.signal.radius(view), fit.signal.radii[0][sure.long()])
    assert bool(sure.any())
    assert not bool(sure.all())


# --- the bundled model ---


def recorded(reference: Any, texts: int, length: int) -> tuple[LayeredModel, Tensor]:
    layered = LayeredModel(reference.model)
    encoded = (reference.tokenizer(text)["input_ids"] for text in bundled.fit_texts())
    ids = torch.tensor([row for row, _ in zip(pack(encoded, length), range(texts), strict=False)])
    states = [states_of(layered, block, tuple(range(layered.depth))) for block in ids.split(32)]
    return layered, torch.cat(states)[:, 1:]


def test_signals_on_the_bundled_model(reference: Any) -> None:
    layered, states = recorded(reference, 30, 24)
    readout, layers = Readout(layered), (8, 12, 15)
    gate = fit_gate(states, layers, readout, penalties=(math.inf,)).gate
    radius = fit_radius(states, layers, readout, alpha=0.2, bins=1).signal
    rows = states.flatten(0, 1)
    with torch.no_grad():
        target = readout.logits(rows[:, -1]).argmax(-1)
        for view in views(rows, layers, readout)[1:]:
            right = (view.tokens == target).double()
            for name, signal in (SIGNALS | {"gate": gate, "rest-radius": radius}).items():
                found = signal.confidence(view).double()
                assert bool(((found >= 0) & (found <= 1)).all()), name
                if name in ("max-p", "margin", "logit-margin", "entropy", "kl", "gate"):
                    ranks = stats.mannwhitneyu(found[right == 1], found[right == 0], alternative="greater")
                    assert ranks.pvalue < 1e-3, (name, view.layer)
    assert isinstance(gate, Gate)


@pytest.mark.slow
def test_the_radius_covers_over_random_splits_of_the_bundled_models_states(reference: Any) -> None:
    layered, states = recorded(reference, 400, 32)
    readout, layers, alpha = Readout(layered), (8, 12, 15), 0.1
    generator = torch.Generator().manual_seed(0)
    outside = torch.zeros(len(layers))
    tested = kept = 0
    splits, fitted_on = 6, 300
    for split in range(splits):
        order = torch.randperm(len(states), generator=generator)
        signal = fit_radius(
            (states[index] for index in order[:fitted_on]), layers, readout, alpha=alpha, bins=4, seed=split
        ).signal
        rest = order[fitted_on:]
        drawn = states[rest, torch.randint(states.shape[1], (len(rest),), generator=generator)]
        tested += len(rest)
        with torch.no_grad():
            final = readout.logits(drawn[:, -1])
            for place, view in enumerate(views(drawn, layers, readout)):
                beyond = rest_distance(view.logits, final) > signal.radius(view)
                outside[place] += beyond.sum()
                safe = ~beyond & (signal.confidence(view) > 0.5)
                assert torch.equal(view.tokens[safe], final.argmax(-1)[safe])
                kept += int(safe.sum())
    # Splits share texts: no more is known than one split's worth of new texts, and of those fitted on, tells.
    error = math.sqrt(alpha * (1 - alpha) * (1 / (len(states) - fitted_on) + 1 / (0.8 * fitted_on)))
    assert bool((outside / tested <= alpha + 3 * error).all()), outside / tested
    assert bool((outside / tested >= alpha / 4).all()), outside / tested
