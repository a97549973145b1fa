"""Extrapolation along depth, exact where the sequence is linear; dynamic modes; refinement by descent."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from restpoint.equilibrium import (
    AffineMap,
    AffinePredictor,
    Anderson,
    Chunk,
    DynamicModePredictor,
    ExtrapolationPredictor,
    FitSettings,
    GramAccumulator,
    ModeSettings,
    Predictor,
    RefineProgress,
    RefineSettings,
    dynamic_modes,
    fit_affine,
    fit_dynamic_modes,
    fit_extrapolation,
    refine,
)
from restpoint.errors import RestpointError

HIDDEN = 6


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def few_eigenvalues(values: tuple[float, ...], seed: int = 0) -> torch.Tensor:
    """A matrix with these eigenvalues, repeated, and no others: its minimal polynomial has as many roots."""
    basis = random(HIDDEN, HIDDEN, seed=seed)
    spectrum = torch.tensor([values[index % len(values)] for index in range(HIDDEN)], dtype=torch.float64)
    return basis @ torch.diag(spectrum) @ torch.linalg.inv(basis)


def sequence(matrix: torch.Tensor, offset: torch.Tensor, start: torch.Tensor, length: int) -> list[torch.Tensor]:
    """x, A x + a, .. of every row."""
    states = [start]
    while len(states) < length:
        states.append(states[-1] @ matrix.T + offset)
    return states


# --- extrapolation --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["reduced-rank", "minimal-polynomial"])
@pytest.mark.parametrize("values", [(0.5,), (0.9, -0.7), (1.6, 0.8, -1.1)])
def test_the_fixed_point_of_a_linear_sequence_is_found_exactly(weighting, values):
    """Of order as many as there are distinct eigenvalues; also where the sequence itself runs away."""
    matrix, offset = few_eigenvalues(values), random(HIDDEN, seed=1)
    rest = torch.linalg.solve(torch.eye(HIDDEN, dtype=torch.float64) - matrix, offset)
    states = sequence(matrix, offset, random(2, 5, HIDDEN, seed=2), len(values) + 2)
    layers = tuple(range(3, 3 + len(states)))
    predictor = ExtrapolationPredictor(layers, HIDDEN, weighting, regularisation=0.0)
    assert predictor.order == len(values)
    torch.testing.assert_close(predictor.predict(states), rest.expand(2, 5, HIDDEN), atol=1e-6, rtol=1e-6)
    if len(values) > 1:
        short = ExtrapolationPredictor(layers[1:], HIDDEN, weighting, regularisation=0.0)
        assert not torch.allclose(short.predict(states[1:]), rest.expand(2, 5, HIDDEN), atol=1e-2)


@pytest.mark.parametrize("mixing", [0.0, 0.4, 1.0])
def test_weights_are_those_of_constrained_least_squares(mixing):
    """Against a Lagrange system for RRE and numpy's least squares for MPE, on states of no linear sequence."""
    states = list(random(6, 4, HIDDEN, seed=3))  # six layers, four tokens
    points = torch.stack(states, 1).numpy()
    reduced = ExtrapolationPredictor(tuple(range(6)), HIDDEN, "reduced-rank", mixing, 0.0).predict(states)
    minimal = ExtrapolationPredictor(tuple(range(6)), HIDDEN, "minimal-polynomial", mixing, 0.0).predict(states)
    for row, token in enumerate(points):
        steps = np.diff(token, axis=0)
        moved = token[:-1] + mixing * steps
        size = len(steps)
        system = np.block([[steps @ steps.T, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
        weights = np.linalg.solve(system, np.eye(size + 1)[-1])[:-1]
        np.testing.assert_allclose(reduced[row], weights @ moved, atol=1e-9)
        coefficients = np.append(np.linalg.lstsq(steps[:-1].T, -steps[-1], rcond=None)[0], 1.0)
        np.testing.assert_allclose(minimal[row], coefficients / coefficients.sum() @ moved, atol=1e-9)


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("regularisation", [1e-10, 1e-2])
def test_anderson_extrapolation_is_the_solvers_next_point(damping, regularisation):
    """The solver, told that the states are its iterates."""
    states = list(random(6, 4, HIDDEN, seed=4))
    solver = Anderson(window=4, damping=damping, regularisation=regularisation)
    history = solver.init(states[0])
    following = states[0]
    keep = torch.zeros(4, dtype=torch.bool)
    for value, after in pairwise(states):
        following = solver.step(history, value, after - value, keep)
    predictor = ExtrapolationPredictor(tuple(range(6)), HIDDEN, "reduced-rank", damping, regularisation)
    torch.testing.assert_close(predictor.predict(states), following, atol=1e-9, rtol=0)


def test_anderson_is_one_more_application_of_an_affine_map_to_reduced_rank():
    matrix, offset = random(HIDDEN, HIDDEN, seed=5) / 3, random(HIDDEN, seed=6)
    states = sequence(matrix, offset, random(7, HIDDEN, seed=7), 4)
    reduced, anderson = (ExtrapolationPredictor((0, 1, 2, 3), HIDDEN, mixing=mixing) for mixing in (0.0, 1.0))
    expected = reduced.predict(states) @ matrix.T + offset
    torch.testing.assert_close(anderson.predict(states), expected, atol=1e-9, rtol=0)


def test_strong_regularisation_keeps_the_last_states_and_so_do_rows_without_an_answer():
    states = list(random(4, 3, HIDDEN, seed=8))
    for mixing, expected in ((0.0, states[2]), (1.0, states[3])):
        predictor = ExtrapolationPredictor((0, 1, 2, 3), HIDDEN, mixing=mixing, regularisation=1e12)
        torch.testing.assert_close(predictor.predict(states), expected, atol=1e-9, rtol=0)
    still = [states[0]] * 4  # no step at all: it rests already
    for weighting in ("reduced-rank", "minimal-polynomial"):
        predictor = ExtrapolationPredictor((0, 1, 2, 3), HIDDEN, weighting)
        assert torch.equal(predictor.predict(still), states[0])
    line = [states[0] + index * states[1] for index in range(3)]  # equal steps: no limit, and MPE's weights sum to 0
    minimal = ExtrapolationPredictor((0, 1, 2), HIDDEN, "minimal-polynomial", regularisation=0.0)
    assert torch.equal(minimal.predict(line), line[-1])


def test_half_precision_is_computed_in_float32():
    states = [state.bfloat16() for state in random(4, 3, HIDDEN, seed=9)]
    predictor = ExtrapolationPredictor((0, 1, 2, 3), HIDDEN, regularisation=1e-3)
    found = predictor.predict(states)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, predictor.predict([state.float() for state in states]).bfloat16())


def depth(rule, seed: int, layers: int = 5, chunks: int = 3, further: int = 3):
    """Chunks whose states follow a rule from layer to layer; the rest state is some layers further on."""

    def start() -> Iterator[Chunk]:
        for number in range(chunks):
            states = [random(4, 20, HIDDEN, seed=100 * seed + number) + 1]
            for _ in range(layers + further - 1):
                states.append(rule(states[-1]))
            yield Chunk(torch.stack(states[:layers], 2), states[-1])

    return start


MATRIX, OFFSET = few_eigenvalues((0.9, 0.6, -0.5, 0.8), seed=10), random(HIDDEN, seed=11) / 2


def linear(state: torch.Tensor) -> torch.Tensor:
    return state @ MATRIX.T + OFFSET


def test_the_regularisation_is_chosen_by_the_score():
    settings = FitSettings(strengths=(0.0, 1e3), chunk_rows=64)

    def to_limit(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        limit = torch.linalg.solve(torch.eye(HIDDEN, dtype=torch.float64) - MATRIX, OFFSET)
        return -(predicted - limit).square().sum(-1)

    fit = fit_extrapolation(depth(linear, 0, layers=6), (0, 1, 2, 3, 4, 5), settings, score=to_limit)
    assert (fit.chosen, fit.scores.shape, fit.held_out_rows) == ((0.0,), (1, 2), (240,))
    assert fit.predictor.regularisation == 0.0
    held = fit_extrapolation(
        depth(linear, 0), (2, 3, 4), settings, mixing=1.0, score=lambda p, t: -(p - 9).abs().sum(-1)
    )
    values = [
        ExtrapolationPredictor((2, 3, 4), HIDDEN, mixing=1.0, regularisation=r).predict(
            [torch.cat([chunk.states[:, :, layer] for chunk in depth(linear, 0)()]) for layer in (2, 3, 4)]
        )
        for r in settings.strengths
    ]
    expected = torch.stack([-(value - 9).abs().sum(-1).mean() for value in values])
    torch.testing.assert_close(held.scores[0], expected)


# --- dynamic modes --------------------------------------------------------------------------------


def test_dynamic_modes_recover_the_map_and_its_powers():
    """On an affine sequence, in the whole space: K is the map, and n steps of it reach the rest state."""
    start = depth(linear, 0)
    settings = ModeSettings(dimensions=(HIDDEN,), regularisation=0.0)
    fit = fit_dynamic_modes(start, depth(linear, 1), (0, 1, 2), 5, modes=settings)
    power, offset = torch.eye(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    for _ in range(5):
        power, offset = power @ MATRIX.T, offset @ MATRIX.T + OFFSET
    torch.testing.assert_close(fit.predictor.affine.matrix, power, atol=1e-8, rtol=0)
    torch.testing.assert_close(fit.predictor.affine.offset, offset, atol=1e-8, rtol=0)
    held = next(depth(linear, 2)())
    torch.testing.assert_close(fit.predictor.predict([held.states[:, :, 2]]), held.rest, atol=1e-8, rtol=0)
    assert (fit.predictor.exit_layer, fit.predictor.dimension, fit.predictor.name) == (2, HIDDEN, "dmd@2")
    assert fit.predictor.spectral_radius == pytest.approx(0.9, abs=1e-8)
    assert fit.rows == (3 * 80 * 2,)
    early = fit_dynamic_modes(start, depth(linear, 1), (0, 1, 2, 3, 4), 6, exit_layer=1, modes=settings).predictor
    torch.testing.assert_close(early.predict([held.states[:, :, 1]]), held.rest, atol=1e-8, rtol=0)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("standardise", [True, False])
def test_dynamic_modes_are_least_squares_in_principal_coordinates(offset, standardise):
    """Against numpy: principal directions by SVD, the operator by lstsq on the projected pairs."""
    x = random(300, HIDDEN, seed=20) @ random(HIDDEN, HIDDEN, seed=21) + 2
    y = torch.tanh(x @ random(HIDDEN, HIDDEN, seed=22)) + x
    gram = GramAccumulator(HIDDEN, HIDDEN)
    gram.update(x, y)
    settings = ModeSettings(offset=offset, standardise=standardise, regularisation=0.0)
    found = dynamic_modes(gram, 3, settings)
    a, b = x.numpy(), y.numpy()
    mean = a.mean(0) if offset else np.zeros(HIDDEN)
    scale = np.sqrt(((a - mean) ** 2).mean(0)) if standardise else np.ones(HIDDEN)
    _, _, directions = np.linalg.svd((a - mean) / scale)
    basis = directions[:3].T
    before, after = (a - mean) / scale @ basis, (b - mean) / scale @ basis
    design = np.column_stack((before, np.ones(len(a)))) if offset else before
    solution = np.linalg.lstsq(design, after, rcond=None)[0]
    drift = solution[3] if offset else np.zeros(3)
    assert found.spectral_radius == pytest.approx(np.abs(np.linalg.eigvals(solution[:3])).max())
    advanced = before
    for _ in range(4):
        advanced = advanced @ solution[:3] + drift
    held = a + (advanced - before) @ basis.T * scale
    np.testing.assert_allclose(found.advance(4)(x), held, atol=1e-8)
    np.testing.assert_allclose(found.advance(4, "drop")(x), mean + advanced @ basis.T * scale, atol=1e-8)


def test_a_low_dimension_is_enough_where_the_states_move_in_one():
    """States that vary in two directions only: K of dimension 2 advances them exactly, and more is cut to 2."""
    plane = random(2, HIDDEN, seed=30)
    turn = torch.tensor([[0.6, -0.7], [0.7, 0.6]], dtype=torch.float64)

    def start() -> Iterator[Chunk]:
        coordinates = [random(4, 20, 2, seed=31)]
        for _ in range(7):
            coordinates.append(coordinates[-1] @ turn)
        states = [each @ plane + OFFSET for each in coordinates]
        yield Chunk(torch.stack(states[:4], 2), states[-1])

    modes = ModeSettings(dimensions=(1, 2, 5), regularisation=0.0)
    fit = fit_dynamic_modes(start, start, (0, 1, 2, 3), 4, modes=modes)
    assert fit.predictor.dimension == 2
    assert fit.chosen[0] in (2.0, 5.0)
    assert fit.predictor.spectral_radius == pytest.approx(np.hypot(0.6, 0.7))
    assert float(fit.scores.max()) == pytest.approx(0.0, abs=1e-15)
    assert float(fit.scores[0, 0]) < -1e-2
    eigenvalues = np.sort_complex(scipy.linalg.eigvals(turn.numpy()))
    gram = GramAccumulator(HIDDEN, HIDDEN)
    chunk = next(start())
    gram.update(chunk.states[:, :, 0].flatten(0, 1), chunk.states[:, :, 1].flatten(0, 1))
    found = np.sort_complex(scipy.linalg.eigvals(dynamic_modes(gram, 2).operator.numpy()))
    np.testing.assert_allclose(found, eigenvalues, atol=1e-5)


def test_ridge_is_no_worse_than_dynamic_modes_on_the_text_both_are_fitted_on():
    def bent(state: torch.Tensor) -> torch.Tensor:
        return torch.tanh(linear(state)) + 0.3 * state

    start = depth(bent, 0)
    ridge = fit_affine(start, start, (4,), FitSettings(strengths=(0.0,), features=0))
    modes = fit_dynamic_modes(start, start, (0, 1, 2, 3, 4), 3)
    assert float(ridge.scores.max()) > float(modes.scores.max())


# --- refining -------------------------------------------------------------------------------------

VOCABULARY = 12
UNEMBED = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(40))


def head(rest: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(rest, rest.shape[-1:]) @ UNEMBED.to(rest.dtype) * 1.5


def noisy(seed: int, chunks: int = 4):
    """A rest state of which an affine map tells half, in coordinates of very different sizes."""
    sizes = torch.tensor([100.0, 10.0, 1.0, 1.0, 0.1, 1.0], dtype=torch.float64)

    def start() -> Iterator[Chunk]:
        for number in range(chunks):
            x = random(4, 40, HIDDEN, seed=1000 * seed + number)
            rest = torch.tanh(x @ MATRIX.T * 2) + OFFSET + 0.5 * random(4, 40, HIDDEN, seed=1000 * seed + number + 500)
            yield Chunk((x * sizes).unsqueeze(2).float() + 3, rest.float())

    return start


def divergence(predictor: AffinePredictor, start) -> float:
    """KL in nats, from probabilities by numpy."""
    total, rows = 0.0, 0
    for chunk in start():
        p, q = (
            torch.softmax(head(rest.flatten(0, 1).double()), -1).numpy()
            for rest in (chunk.rest, predictor.predict([chunk.states[:, :, 0]]))
        )
        total += float((p * np.log(p / q)).sum())
        rows += len(p)
    return total / rows


RIDGE = fit_affine(noisy(0), noisy(1), (0,), FitSettings(strengths=(1e-4, 1e-2), features=0)).predictor


def test_refining_lowers_the_divergence_and_says_by_how_much():
    seen: list[RefineProgress] = []
    settings = RefineSettings(steps=300, learning_rate=1e-2, rows=64, every=50)
    found = refine(RIDGE, noisy(0), noisy(1), head, settings, progress=seen.append)
    assert found.after < 0.97 * found.before
    assert found.before == pytest.approx(divergence(RIDGE, noisy(1)), rel=1e-4)
    assert found.after == pytest.approx(divergence(found.predictor, noisy(1)), rel=1e-4)
    assert found.trace == tuple(seen)
    assert [look.step for look in seen] == list(range(0, seen[-1].step + 1, 50))
    assert (found.predictor.name, found.held_out_rows) == (RIDGE.name, 640)
    assert not UNEMBED.requires_grad
    again = refine(RIDGE, noisy(0), noisy(1), head, settings)
    assert torch.equal(again.predictor.affine.matrix, found.predictor.affine.matrix)
    state = Predictor.from_state(*found.predictor.state())
    assert torch.equal(state.predict([torch.ones(1, HIDDEN)]), found.predictor.predict([torch.ones(1, HIDDEN)]))


def test_refining_comes_near_the_optimum_that_scipy_finds():
    """Of the same objective on the same rows, full batches, from the same start."""
    chunks = list(noisy(0)())
    x = torch.cat([chunk.states[:, :, 0].flatten(0, 1) for chunk in chunks]).double()
    y = torch.cat([chunk.rest.flatten(0, 1) for chunk in chunks]).double()
    z = torch.cat(((x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=torch.float64)), 1)
    law = torch.log_softmax(head(y), -1)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).reshape(HIDDEN + 1, HIDDEN).requires_grad_()
        loss = (law.exp() * (law - torch.log_softmax(head(z @ weights), -1))).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        return float(loss.detach()), gradient.flatten().numpy()

    initial = torch.linalg.lstsq(z, y).solution.flatten().numpy()
    optimum = scipy.optimize.minimize(objective, initial, jac=True, method="L-BFGS-B").fun
    settings = RefineSettings(steps=400, learning_rate=1e-2, rows=640, every=100)
    found = refine(RIDGE, noisy(0), noisy(0), head, settings)
    assert found.before - optimum > 0.01
    assert -1e-5 < found.after - optimum < 0.05 * (found.before - optimum)


def test_refining_is_never_worse_than_its_start():
    """A learning rate that only does harm: the map that was given comes back, and it stops early."""
    settings = RefineSettings(steps=400, learning_rate=30.0, rows=64, every=10, patience=3)
    found = refine(RIDGE, noisy(0), noisy(1), head, settings)
    assert (found.step, found.after) == (0, found.before)
    assert [look.step for look in found.trace] == [0, 10, 20, 30]
    assert found.predictor.affine is RIDGE.affine


def test_refining_with_features_and_inside_no_grad():
    start = fit_affine(noisy(0), noisy(1), (0,), FitSettings(strengths=(1e-2,), features=10)).predictor
    weight = UNEMBED.clone().requires_grad_()
    with torch.no_grad():
        settings = RefineSettings(steps=100, learning_rate=1e-2, rows=64)
        found = refine(start, noisy(0), noisy(1), lambda rest: head(rest) + 0 * (rest @ weight), settings)
    assert found.after < 0.97 * found.before
    assert weight.grad is None
    assert start.features is not None
    assert found.predictor.features is start.features


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    for layers in ((0, 1), (0, 1, 3)):
        with pytest.raises(RestpointError, match="at least three layers"):
            ExtrapolationPredictor(layers, HIDDEN)
    for wrong in ({"weighting": "best"}, {"mixing": 1.5}, {"regularisation": -1.0}):
        with pytest.raises((RestpointError, TypeError), match=next(iter(wrong))):
            ExtrapolationPredictor((0, 1, 2), HIDDEN, **wrong)
    start = depth(linear, 0)
    with pytest.raises(RestpointError, match="as far from the last"):
        fit_dynamic_modes(start, start, (0, 1, 3), 1)
    with pytest.raises(RestpointError, match="steps is 0"):
        fit_dynamic_modes(start, start, (0, 1), 0)
    with pytest.raises(RestpointError, match="layer 8"):
        fit_dynamic_modes(start, start, (8, 9), 1)
    for wrong in ({"dimensions": ()}, {"dimensions": (0,)}, {"regularisation": -1.0}):
        with pytest.raises(RestpointError, match=next(iter(wrong))):
            ModeSettings(**wrong)
    with pytest.raises(RestpointError, match="keeps the width"):
        dynamic_modes(GramAccumulator(2, 3), 1)
    constant = GramAccumulator(2, 2)
    constant.update(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(RestpointError, match="do not vary"):
        dynamic_modes(constant, 1)
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}, {"patience": 0}):
        with pytest.raises(RestpointError, match=next(iter(wrong))):
            RefineSettings(**wrong)
    with pytest.raises(RestpointError, match="held_out gave no row"):
        refine(RIDGE, noisy(0), noisy(0, chunks=0), head)
    with pytest.raises(RestpointError, match="the stream gave no row"):
        refine(RIDGE, noisy(0, chunks=0), noisy(0), head)
    broken = replace(RIDGE, affine=AffineMap(RIDGE.affine.matrix * float("nan"), RIDGE.affine.offset))
    with pytest.raises(RestpointError, match="held-out divergence after 0 steps is nan"):
        refine(broken, noisy(0), noisy(1), head)


def test_predictors_of_both_kinds_are_read_back_whole():
    modes = DynamicModePredictor((4,), AffineMap(random(HIDDEN, HIDDEN, seed=60), random(HIDDEN, seed=61)), 3, 0.5)
    again = Predictor.from_state(*modes.state())
    assert isinstance(again, DynamicModePredictor)
    assert (again.dimension, again.spectral_radius) == (3, 0.5)
    extrapolation = ExtrapolationPredictor((2, 4, 6), HIDDEN, "minimal-polynomial", 0.25, 1e-3, name="mine")
    assert Predictor.from_state(*extrapolation.state()).state() == extrapolation.state()
    assert extrapolation.parameters_read() == 3 * HIDDEN  # two inner products, and a sum of one vector
