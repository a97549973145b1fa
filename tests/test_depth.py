"""Sweeps over the depth: against the plain pass, autograd's Jacobians, dense Newton steps and least squares."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from restpoint.equilibrium import Anderson, Broyden, Method, Picard
from restpoint.equilibrium.depth import images_of, solve_depth, sweep_depth
from restpoint.equilibrium.depth_starts import StartFit, start_from_first, start_from_previous
from restpoint.equilibrium.slopes import SlopeFit, Slopes
from restpoint.errors import RestpointError

DEPTH, ROWS, DIM = 6, 3, 5
Stack = list[Callable[[Tensor], Tensor]]
METHODS = [None, Picard(), Picard(damping=0.5), Anderson(), Broyden()]


def tanh_stack(gain: float = 1.0, *, coupled: bool = False) -> Stack:
    """Residual layers h + tanh(h W) V; coupled ones add the mean of the earlier rows, as causal attention does."""
    generator = torch.Generator().manual_seed(1)

    def layer() -> Callable[[Tensor], Tensor]:
        inner, outer = gain * torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)

        def run(state: Tensor) -> Tensor:
            mixed = state
            if coupled:
                counts = torch.arange(1, state.shape[0] + 1, dtype=state.dtype)[:, None]
                mixed = state.cumsum(0) / counts
            return state + torch.tanh(mixed @ inner) @ outer

        return run

    return [layer() for _ in range(DEPTH)]


def affine_stack() -> tuple[Stack, Tensor]:
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(DEPTH, DIM, DIM, generator=generator, dtype=torch.float64)
    offsets = torch.randn(DEPTH, DIM, generator=generator, dtype=torch.float64)
    return [lambda x, m=m, c=c: x @ m + c for m, c in zip(matrices, offsets, strict=True)], matrices


def plain(layers: Stack, first: Tensor) -> Tensor:
    states = []
    for layer in layers:
        first = layer(first)
        states.append(first)
    return torch.stack(states)


def first_state(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_start(seed: int = 5) -> Tensor:
    return torch.randn(DEPTH, ROWS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_slopes() -> dict[str, Slopes]:
    generator = torch.Generator().manual_seed(7)
    one = torch.zeros(1, dtype=torch.float64)
    return {
        "identity": Slopes.identity(DEPTH, one),
        "zero": Slopes.zero(DEPTH, one),
        "scaled": Slopes(torch.rand(DEPTH, generator=generator, dtype=torch.float64)),
        "diagonal": Slopes(torch.randn(DEPTH, DIM, generator=generator, dtype=torch.float64)),
        "dense": Slopes(torch.randn(DEPTH, DIM, DIM, generator=generator, dtype=torch.float64)),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["identity", "zero", "scaled", "diagonal", "dense"])
@pytest.mark.parametrize("coupled", [False, True])
def test_after_k_sweeps_the_first_k_layers_are_exact(method: Method | None, kind: str, coupled: bool) -> None:
    layers, first = tanh_stack(coupled=coupled), first_state()
    expected = plain(layers, first)
    calls = []
    counted = [lambda x, layer=layer: calls.append(1) or layer(x) for layer in layers]
    found = list(sweep_depth(counted, first, random_start(), some_slopes()[kind], method))
    assert [swept.exact for swept in found] == list(range(1, DEPTH + 1))
    assert [swept.layer_calls for swept in found] == list(range(DEPTH, 0, -1))
    assert len(calls) == DEPTH * (DEPTH + 1) // 2
    for swept in found:
        torch.testing.assert_close(swept.states[: swept.exact], expected[: swept.exact], rtol=0, atol=1e-12)
    assert not torch.allclose(found[0].states[1:], expected[1:])  # the start was wrong, so there was something to do


def test_a_sweep_is_the_newton_step_by_autograd() -> None:
    """The true Jacobians, and a dense linear solve of the whole stacked system, give the same step."""
    layers, first, start = tanh_stack(0.7), first_state()[0], random_start()[:, 0]
    inputs = [first, *start[:-1]]
    jacobians = [torch.autograd.functional.jacobian(layer, x) for layer, x in zip(layers, inputs, strict=True)]

    def equations(flat: Tensor) -> Tensor:
        states = flat.view(DEPTH, DIM)
        return torch.cat([state - f(x) for state, f, x in zip(states, layers, (first, *states[:-1]), strict=True)])

    flat = start.flatten()
    whole = torch.autograd.functional.jacobian(equations, flat)
    expected = flat - torch.linalg.solve(whole, equations(flat))
    slopes = Slopes(torch.stack([jacobian.T for jacobian in jacobians]))
    swept = next(sweep_depth(layers, first, start, slopes))
    torch.testing.assert_close(swept.states.flatten(), expected, rtol=1e-9, atol=1e-9)


def test_newton_solves_affine_layers_in_one_sweep() -> None:
    (layers, matrices), first = affine_stack(), first_state()
    swept = next(sweep_depth(layers, first, random_start(), Slopes(matrices)))
    torch.testing.assert_close(swept.states, plain(layers, first), rtol=1e-9, atol=1e-9)


def test_identity_newton_is_a_prefix_sum_of_residuals() -> None:
    layers, first, start = tanh_stack(), first_state(), random_start()
    inputs = torch.stack([first, *start[:-1]])
    increments = torch.stack([layer(x) - x for layer, x in zip(layers, inputs, strict=True)])
    swept = next(sweep_depth(layers, first, start))
    torch.testing.assert_close(swept.states, first + increments.cumsum(0), rtol=1e-12, atol=1e-12)
    swept = next(sweep_depth(layers, first, start, some_slopes()["zero"]))
    torch.testing.assert_close(swept.states, inputs + increments, rtol=1e-12, atol=1e-12)


def test_newton_converges_quadratically_where_jacobi_needs_the_whole_depth() -> None:
    """Weakly nonlinear layers: Newton's error squares from sweep to sweep; Jacobi's is what is not exact yet."""
    layers, first = tanh_stack(0.25), first_state()[0]
    expected = plain(layers, first)
    states, errors = first.expand(DEPTH, DIM).clone(), []
    for _ in range(3):
        inputs = [first, *states[:-1]]
        jacobians = [torch.autograd.functional.jacobian(layer, x).T for layer, x in zip(layers, inputs, strict=True)]
        states = next(sweep_depth(layers, first, states, Slopes(torch.stack(jacobians)))).states
        errors.append(float((states - expected).norm()))
    assert errors[1] < 10 * errors[0] ** 2
    assert errors[2] < 10 * errors[1] ** 2
    jacobi = list(sweep_depth(layers, first, None, some_slopes()["zero"]))
    assert float((jacobi[2].states - expected).norm()) > 100 * errors[2]


def test_solve_stops_at_the_tolerance_and_counts_what_ran() -> None:
    layers, first = tanh_stack(0.05), first_state()
    found = solve_depth(layers, first, tolerance=1e-3)
    assert found.converged
    assert found.sweeps < DEPTH
    assert found.layer_calls == sum(DEPTH - exact for exact in range(found.sweeps))
    error = (found.states - plain(layers, first)).norm(dim=-1) / plain(layers, first).norm(dim=-1)
    assert float(error.max()) < 1e-3
    short = solve_depth(tanh_stack(), first, random_start(), tolerance=1e-9, max_sweeps=2)
    assert (short.converged, short.sweeps) == (False, 2)
    assert bool((short.residual > 1e-9).any())
    full = solve_depth(tanh_stack(), first, random_start(), tolerance=0.0)
    assert (full.converged, full.sweeps) == (True, DEPTH)
    torch.testing.assert_close(full.states, plain(tanh_stack(), first), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_states_that_overflow_on_the_way_are_mended(method: Method | None) -> None:
    layers = [lambda x: x + x**3] * DEPTH
    first = 0.1 * first_state()
    found = list(sweep_depth(layers, first, 1e200 * random_start(), None, method))
    assert not bool(found[0].states.isfinite().all())
    assert bool(found[0].residual.isinf().all())
    torch.testing.assert_close(found[-1].states, plain(layers, first), rtol=0, atol=1e-12)


def test_slopes_are_least_squares_of_the_chords() -> None:
    layers, generator = tanh_stack(), torch.Generator().manual_seed(3)
    fits = {kind: SlopeFit(DEPTH, DIM, kind) for kind in ("scaled", "diagonal", "dense")}
    pairs: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(DEPTH)]
    for _ in range(3):
        first = torch.randn(40, DIM, generator=generator, dtype=torch.float64)
        states, guess = plain(layers, first), start_from_first(first, DEPTH)
        images = images_of(layers, first, guess)
        for fit in fits.values():
            fit.update(torch.cat((first[None], states)), guess, images)
        for layer in range(1, DEPTH):
            changed = states[layer - 1] - guess[layer - 1]
            pairs[layer].append((changed.numpy(), (layers[layer](states[layer - 1]) - images[layer]).numpy()))
    found = {kind: fit.fit(0.0, torch.float64).value for kind, fit in fits.items()}
    for layer in range(1, DEPTH):
        d, e = (np.concatenate(side) for side in zip(*pairs[layer], strict=True))
        np.testing.assert_allclose(found["dense"][layer], np.linalg.lstsq(d, e, rcond=None)[0], rtol=1e-7, atol=1e-9)
        for channel in range(DIM):
            expected = np.linalg.lstsq(d[:, channel : channel + 1], e[:, channel], rcond=None)[0]
            np.testing.assert_allclose(found["diagonal"][layer, channel], expected[0], rtol=1e-9)
        expected = np.linalg.lstsq(d.reshape(-1, 1), e.reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(found["scaled"][layer], expected[0], rtol=1e-9)
    assert not found["dense"][0].any()


def test_starts() -> None:
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(DEPTH + 1, 60, DIM, generator=generator, dtype=torch.float64)
    start = start_from_previous(text[0, 1:], text[:, :-1])
    for layer in range(DEPTH):
        for token in range(59):
            expected = text[0, token + 1] + text[layer + 1, token] - text[0, token]
            torch.testing.assert_close(start[layer, token], expected)
    fit = StartFit(DEPTH, DIM)
    for half in (text[:, :30], text[:, 30:]):
        fit.update(half)
    fitted = fit.fit(0.0, torch.float64)
    assert fitted.entries == DEPTH * 2 * DIM * DIM
    guessed = fitted(text[0, 1:], text[:, :-1])
    rows = [token for token in range(59) if token != 29]  # the two halves are texts of their own
    for layer in range(DEPTH):
        given = torch.cat((text[0, 1:], text[layer + 1, :-1], torch.ones(59, 1, dtype=torch.float64)), 1).numpy()
        maps = np.linalg.lstsq(given[rows], text[layer + 1, 1:][rows].numpy(), rcond=None)[0]
        np.testing.assert_allclose(guessed[layer], given @ maps, rtol=1e-7, atol=1e-9)


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("layers: there is none", lambda: next(sweep_depth([], first_state()))),
    ("layers: number 1 maps", lambda: next(sweep_depth([torch.tanh, lambda x: x[:1]], first_state()))),
    ("start has shape", lambda: next(sweep_depth([torch.tanh] * 2, first_state(), random_start()))),
    ("slopes: they have shape", lambda: next(sweep_depth(tanh_stack(), first_state(), None, Slopes(torch.ones(2))))),
    ("value has shape", lambda: Slopes(torch.ones(2, 2, 2, 2))),
    ("tolerance is -1", lambda: solve_depth(tanh_stack(), first_state(), tolerance=-1.0)),
    ("max_sweeps is 0", lambda: solve_depth(tanh_stack(), first_state(), max_sweeps=0)),
    ("kind is", lambda: SlopeFit(2, 2, "tangent")),
    ("fit: no changed row", lambda: SlopeFit(2, 2).fit()),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_mistakes_are_told(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(RestpointError, match=rf"^{message}"):
        call()
