import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import ot
import pytest
import torch
from safetensors.torch import load, save

from restpoint.equilibrium import (
    AffineMap,
    AffinePredictor,
    Chunk,
    DynamicModePredictor,
    ExtrapolationPredictor,
    FitProgress,
    FitSettings,
    IdentityPredictor,
    MongePredictor,
    Predictor,
    RandomFeatures,
    RestPointRecurrence,
    fit_affine,
    fit_monge,
    fit_recurrence,
)
from restpoint.errors import RestpointError

HIDDEN, REST = 5, 5
Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def stream(rule: Rule, seed: int, layers: int = 2, chunks: int = 4, length: int = 60, dtype=torch.float64):
    """Sequences whose rest state follows ``rest(t) = rule([states(t)], rest(t-1))``, from random states."""

    def chunk(number: int) -> Chunk:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        states = torch.randn(6, length, layers, HIDDEN, dtype=torch.float64, generator=generator) + 0.5
        rest = [torch.randn(6, REST, dtype=torch.float64, generator=generator)]
        for t in range(1, length):
            rest.append(rule(states[:, t].flatten(1), rest[-1]))
        return Chunk(states.to(dtype), torch.stack(rest, 1).to(dtype))

    def start() -> Iterator[Chunk]:
        yield from (chunk(number) for number in range(chunks))

    return start


def parameters(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


DEPTH, TIME, OFFSET = (
    parameters(2 * HIDDEN, REST, seed=1),
    parameters(REST, REST, seed=2),
    parameters(REST, seed=3),
)


def linear(states: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return states @ DEPTH + rest @ TIME + OFFSET


def curved(states: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.5 * linear(states, rest)) * 2


EXACT = FitSettings(strengths=(0.0, 1e-2), features=0, steps=3, chunk_rows=128)

# --- fitting --------------------------------------------------------------------------------------


def test_linear_dynamics_are_recovered_and_every_position_has_the_same_map():
    fit = fit_recurrence(stream(linear, 0), stream(linear, 1), (0, 1), EXACT)
    assert fit.chosen == (0.0, 0.0, 0.0)
    assert fit.rows == (4 * 6 * 59, 4 * 6 * 58, 4 * 6 * 57)
    assert fit.scores.shape == (3, 2)
    for affine in fit.predictor.maps:
        torch.testing.assert_close(affine.matrix, torch.cat((DEPTH, TIME)), atol=1e-6, rtol=0)
        torch.testing.assert_close(affine.offset, OFFSET, atol=1e-6, rtol=0)
    held = next(stream(linear, 2)())
    known = held.rest[:, 0]
    for step in range(5):  # drafts five tokens from one known rest state, past the last map
        known = fit.predictor.predict([held.states[:, step + 1, 0], held.states[:, step + 1, 1]], known, step)
        torch.testing.assert_close(known, held.rest[:, step + 1], atol=1e-5, rtol=0)


def test_later_maps_are_fitted_on_the_earlier_maps_predictions():
    """Against a direct least squares on the predictions, computed without any streaming."""
    fit = fit_recurrence(stream(curved, 0), stream(curved, 1), (1,), replace(EXACT, strengths=(0.0,), steps=3))
    states = torch.cat([chunk.states[:, :, 1] for chunk in stream(curved, 0)()])
    rest = torch.cat([chunk.rest for chunk in stream(curved, 0)()])
    known = rest
    for step, affine in enumerate(fit.predictor.maps, start=1):
        x = torch.cat((states[:, step:], known[:, :-1]), -1)
        design = torch.cat((x, torch.ones_like(x[..., :1])), -1).flatten(0, 1)
        oracle = torch.linalg.lstsq(design, rest[:, step:].flatten(0, 1)).solution
        torch.testing.assert_close(affine.matrix, oracle[:-1], atol=1e-8, rtol=0)
        torch.testing.assert_close(affine.offset, oracle[-1], atol=1e-8, rtol=0)
        known = (design @ oracle).unflatten(0, x.shape[:2])
    assert not torch.allclose(fit.predictor.maps[0].matrix, fit.predictor.maps[1].matrix, atol=1e-3)


def test_random_features_beat_the_linear_map_on_a_curved_one():
    def folded(states: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return linear(states, rest).abs()

    settings = FitSettings(strengths=(1e-4, 1e-2), steps=2, chunk_rows=512)
    streams = stream(folded, 0, chunks=8, dtype=torch.float32), stream(folded, 1, dtype=torch.float32)
    fits = {f: fit_recurrence(*streams, (0, 1), replace(settings, features=f)) for f in (0, 300)}
    best = {features: fit.scores.max(1).values for features, fit in fits.items()}
    assert bool((best[300] > 0.6 * best[0]).all())  # scores are negative squared errors
    assert fits[300].predictor.maps[0].offset.dtype is torch.float32


def test_random_features_are_those_of_the_standardised_input():
    x = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 - 3
    x[:, 5] = 2.0  # constant: has no standardised value
    features = RandomFeatures.draw(x.mean(0), x.std(0, correction=0), 3000, seed=4)
    z = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-3)
    projection = features.weight * x.std(0, correction=0).unsqueeze(1)
    shift = features.bias + x.mean(0) @ features.weight
    torch.testing.assert_close(features(x), (z @ projection + shift).relu(), atol=1e-9, rtol=0)
    assert float(projection[:5].var()) == pytest.approx(1 / 6, rel=0.05)
    assert float(shift.var()) == pytest.approx(1 / 4, rel=0.1)
    assert bool((features.weight[5] == 0).all())
    again = RandomFeatures.draw(x.mean(0), x.std(0, correction=0), 3000, seed=4)
    assert torch.equal(again.weight, features.weight)


def test_affine_fit_reads_the_named_layers():
    def rule(states: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return states[:, HIDDEN:] @ DEPTH[:HIDDEN] + OFFSET

    def skip_first(start):
        return lambda: (Chunk(c.states[:, 1:], c.rest[:, 1:], layers=(2, 4)) for c in start())

    fit = fit_affine(skip_first(stream(rule, 0)), skip_first(stream(rule, 1)), (4,), EXACT)
    torch.testing.assert_close(fit.predictor.affine.matrix, DEPTH[:HIDDEN], atol=1e-6, rtol=0)
    assert (fit.predictor.exit_layer, fit.predictor.name, fit.chosen) == (4, "affine@4", (0.0,))
    both = fit_affine(skip_first(stream(rule, 0)), skip_first(stream(rule, 1)), (2, 4), EXACT).predictor
    expected = torch.cat((torch.zeros_like(DEPTH[:HIDDEN]), DEPTH[:HIDDEN]))
    torch.testing.assert_close(both.affine.matrix, expected, atol=1e-6, rtol=0)
    held = next(skip_first(stream(rule, 2))())
    torch.testing.assert_close(both.predict([held.states[:, :, 0], held.states[:, :, 1]]), held.rest, atol=1e-6, rtol=0)


def test_monge_fit_matches_pot():
    start = stream(linear, 0)
    fit = fit_monge(start, stream(linear, 1), 1, replace(EXACT, monge_regularisation=1e-12))
    x = torch.cat([chunk.states[:, :, 1].flatten(0, 1) for chunk in start()])
    y = torch.cat([chunk.rest.flatten(0, 1) for chunk in start()])
    moments = [x.mean(0), y.mean(0), torch.cov(x.T, correction=0), torch.cov(y.T, correction=0)]
    matrix, offset = ot.gaussian.bures_wasserstein_mapping(*[moment.numpy() for moment in moments])
    torch.testing.assert_close(fit.predictor.affine.matrix, torch.from_numpy(matrix), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.predictor.affine.offset, torch.from_numpy(offset).flatten(), atol=1e-6, rtol=0)
    assert fit.rows == (x.shape[0],)
    ridge = fit_affine(start, stream(linear, 1), (1,), EXACT)
    assert float(ridge.scores.max()) > float(fit.scores.max())


def test_the_strength_is_chosen_by_the_given_score_on_held_out_rows():
    settings = replace(EXACT, strengths=(1e-4, 1.0, 100.0), steps=1)
    assert fit_recurrence(stream(linear, 0), stream(linear, 1), (0, 1), settings).chosen == (1e-4,)
    seen: list[FitProgress] = []

    def small(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return -(predicted - OFFSET - 0.5).square().sum(-1)  # prefers maps that shrink

    fit = fit_recurrence(stream(linear, 0), stream(linear, 1), (0, 1), settings, score=small, progress=seen.append)
    assert fit.chosen == (100.0,)
    assert int(fit.scores.argmax()) == 2
    assert {entry.stage for entry in seen} == {"fit", "score"}
    assert seen[-1].rows == fit.held_out_rows[0]


def test_chunk_boundaries_and_block_size_change_nothing():
    start = stream(linear, 0)
    pieces = lambda: (Chunk(c.states[i : i + 1], c.rest[i : i + 1]) for c in start() for i in range(6))  # noqa: E731
    settings = replace(EXACT, strengths=(1e-3,))
    whole = fit_recurrence(start, stream(linear, 1), (0,), settings).predictor
    cut = fit_recurrence(pieces, stream(linear, 1), (0,), replace(settings, chunk_rows=7)).predictor
    for a, b in zip(whole.maps, cut.maps, strict=True):
        torch.testing.assert_close(a.matrix, b.matrix, atol=1e-10, rtol=0)


def test_fitting_errors():
    start = stream(linear, 0)
    short = stream(linear, 0, length=2)
    with pytest.raises(RestpointError, match="longer than 2 tokens"):
        fit_recurrence(short, start, (0, 1), EXACT)
    with pytest.raises(RestpointError, match="held_out gave no row"):
        fit_recurrence(start, short, (0, 1), EXACT)
    with pytest.raises(RestpointError, match=r"layer 3.*record it"):
        fit_affine(start, start, (3,), EXACT)
    with pytest.raises(RestpointError, match="one number for each"):
        fit_affine(start, start, (1,), EXACT, score=lambda predicted, true: predicted - true)
    with pytest.raises(RestpointError, match="not finite"):
        fit_affine(start, start, (1,), EXACT, score=lambda predicted, true: predicted[:, 0] * float("nan"))
    for options in ({"strengths": ()}, {"steps": 0}, {"features": -1}, {"product_precision": "half"}):
        with pytest.raises((RestpointError, TypeError)):
            FitSettings(**options)

    def broken() -> Iterator[Chunk]:
        for chunk in start():
            chunk.rest[0, 3] = float("nan")
            yield chunk

    for features in (0, 16):
        with pytest.raises(RestpointError, match=r"\d+ of \d+ rows"):
            fit_recurrence(broken, start, (0, 1), replace(EXACT, features=features))
    with pytest.raises(RestpointError, match="name each one"):
        Chunk(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4), layers=(0, 1))


# --- predictors -----------------------------------------------------------------------------------


def affine(inputs: int, seed: int) -> AffineMap:
    return AffineMap(parameters(inputs, REST, seed=seed), parameters(REST, seed=seed + 50))


def every_predictor() -> list[Predictor]:
    features = RandomFeatures(parameters(3 * HIDDEN, 40, seed=9), parameters(40, seed=10))
    return [
        IdentityPredictor((3,)),
        AffinePredictor((3,), affine(HIDDEN, 1)),
        AffinePredictor((0, 2), affine(2 * HIDDEN, 1), name="two layers"),
        MongePredictor((1,), affine(HIDDEN, 2)),
        DynamicModePredictor((2,), affine(HIDDEN, 6), 3, 0.9),
        ExtrapolationPredictor((1, 2, 3, 4), HIDDEN, "minimal-polynomial", 0.5, 1e-3),
        RestPointRecurrence((0,), (affine(2 * HIDDEN, 3), affine(2 * HIDDEN, 4))),
        RestPointRecurrence((0, 4), (affine(3 * HIDDEN + 40, 5),) * 2, features),
    ]


@pytest.mark.parametrize("predictor", every_predictor(), ids=lambda predictor: predictor.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_predict(predictor, dtype):
    predictor = predictor.to(dtype=dtype)
    config, tensors = predictor.state()
    tensors = load(save(tensors)) if tensors else {}
    again = Predictor.from_state(json.loads(json.dumps(config)), tensors)
    assert type(again) is type(predictor)
    assert (again.name, again.state_layers, again.exit_layer) == (
        predictor.name,
        predictor.state_layers,
        predictor.state_layers[-1],
    )
    states = [torch.randn(2, 3, HIDDEN).to(dtype) for _ in predictor.state_layers]
    previous = torch.randn(2, 3, REST).to(dtype)
    for step in range(4):
        result = predictor.predict(states, previous, step)
        assert result.shape == (2, 3, REST)
        assert result.dtype == dtype
        assert torch.equal(again.predict(states, previous, step), result)
    assert again.parameters_read() == predictor.parameters_read()


def test_recurrence_evaluates_its_formula_with_the_map_of_the_step():
    predictor = every_predictor()[-1]
    assert isinstance(predictor, RestPointRecurrence)
    assert predictor.features is not None
    maps = (affine(3 * HIDDEN + 40, 5), affine(3 * HIDDEN + 40, 6))
    predictor = replace(predictor, maps=maps)
    states, previous = [parameters(4, HIDDEN, seed=i) for i in (20, 21)], parameters(4, REST, seed=22)
    x = torch.cat((*states, previous), 1)
    hidden = (x @ predictor.features.weight + predictor.features.bias).relu()
    for step, used in ((0, 0), (1, 1), (7, 1)):
        first, second = maps[used].matrix.split((3 * HIDDEN, 40))
        expected = x @ first + hidden @ second + maps[used].offset
        torch.testing.assert_close(predictor.predict(states, previous, step), expected, atol=1e-12, rtol=0)
    assert predictor.parameters_read() == (3 * HIDDEN) * 40 + (3 * HIDDEN + 40) * REST


def test_identity_is_the_last_state_and_recurrence_says_so():
    states = [torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)]
    assert torch.equal(IdentityPredictor((0, 5)).predict(states), states[1])
    assert [predictor.recurrent for predictor in every_predictor()] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_memory_order_is_an_optimisation_only(shape, dtype):
    matrix, x = parameters(*shape, seed=1), parameters(3, shape[0], seed=2)
    moved = AffineMap(matrix, parameters(shape[1], seed=3)).to(dtype=dtype)
    assert torch.equal(moved.matrix, matrix.to(dtype))
    torch.testing.assert_close(moved(x.to(dtype)), x.to(dtype) @ moved.matrix + moved.offset)


def test_predictor_errors():
    config, tensors = every_predictor()[-1].state()
    with pytest.raises(
        RestpointError, match="'oracle'; known kinds are affine, dmd, extrapolation, identity, monge, recurrence"
    ):
        Predictor.from_state(config | {"kind": "oracle"}, tensors)
    with pytest.raises(RestpointError, match=r"lacks 'maps\.1\.matrix'"):
        Predictor.from_state(config, {name: value for name, value in tensors.items() if name != "maps.1.matrix"})
    with pytest.raises(RestpointError, match="lacks 'name'"):
        Predictor.from_state({key: value for key, value in config.items() if key != "name"}, tensors)
    with pytest.raises(RestpointError, match="pass previous"):
        every_predictor()[-1].predict([torch.zeros(1, HIDDEN)] * 2)
    for layers in ((), (2, 1), (1, 1), (-1,)):
        with pytest.raises(RestpointError, match="ascending"):
            IdentityPredictor(layers)
    with pytest.raises(RestpointError, match="at least one"):
        RestPointRecurrence((0,), ())
    with pytest.raises(RestpointError, match="different shapes"):
        RestPointRecurrence((0,), (affine(4, 0), affine(5, 0)))
    with pytest.raises(RestpointError, match=r"fit the maps on \[x, features"):
        RestPointRecurrence((0,), (affine(4, 0),), RandomFeatures(torch.zeros(4, 2), torch.zeros(2)))
    with pytest.raises(RestpointError, match="features is 0"):
        RandomFeatures.draw(torch.zeros(2), torch.ones(2), 0, seed=0)
