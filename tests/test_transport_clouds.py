import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import wasserstein_distance

from restpoint.errors import RestpointError
from restpoint.transport.bounds import contraction_estimate, softmax_variation_bound
from restpoint.transport.divergence import sinkhorn_divergence, sinkhorn_within, squared_distances
from restpoint.transport.sinkhorn import sinkhorn
from restpoint.transport.sliced import (
    between_quantiles,
    quantiles,
    random_projections,
    sliced_wasserstein2_squared,
)
from restpoint.transport.variation import total_variation


def cloud(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, seed: int) -> torch.Tensor:
    return (2 * cloud(*shape, seed=seed)).softmax(-1)


# --- sliced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(12, 12), (12, 7), (5, 15), (1, 4)])
def test_sliced_equals_pot_along_the_same_lines(rows):
    a, b = cloud(2, 3, rows[0], 6, seed=0), 2 * cloud(2, 3, rows[1], 6, seed=1) + 1
    lines = random_projections(6, 20, torch.Generator().manual_seed(2))
    found = sliced_wasserstein2_squared(a, b, lines)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = ot.sliced_wasserstein_distance(a[i, j].numpy(), b[i, j].numpy(), projections=lines.numpy(), p=2)
            assert float(found[i, j]) ** 0.5 == pytest.approx(float(expected), rel=1e-9)


def test_unequal_rows_couple_quantiles_exactly():
    """Along one line, rows repeated to a common number have the same quantile function and are matched in order."""
    a, b = cloud(6, 1, seed=3), cloud(4, 1, seed=4)
    line = torch.ones(1, 1, dtype=torch.float64)
    matched = a.sort(0).values.repeat_interleave(2, 0) - b.sort(0).values.repeat_interleave(3, 0)
    assert float(sliced_wasserstein2_squared(a, b, line)) == pytest.approx(float(matched.square().mean()), rel=1e-12)
    # Far apart, W2 squared is SciPy's W1 squared and a variance that stays bounded.
    far = 1e4
    first = wasserstein_distance((a[:, 0] + far).numpy(), b[:, 0].numpy())
    assert float(sliced_wasserstein2_squared(a + far, b, line)) == pytest.approx(first**2, rel=1e-6)


def test_sliced_of_translated_clouds_is_the_translation_along_the_lines():
    a = cloud(3, 50, 8, seed=5)
    shift = cloud(8, seed=6)
    lines = random_projections(8, 30, torch.Generator().manual_seed(7))
    expected = (shift @ lines).square().mean()
    torch.testing.assert_close(sliced_wasserstein2_squared(a, a + shift, lines), expected.expand(3), rtol=1e-10, atol=0)


def test_sliced_forgets_the_order_of_rows_and_takes_float32_and_gradients():
    a, b = cloud(20, 5, seed=8), cloud(20, 5, seed=9)
    lines = random_projections(5, 10)
    torch.testing.assert_close(lines.norm(dim=0), torch.ones(10, dtype=torch.float64))
    value = sliced_wasserstein2_squared(a, b, lines)
    assert torch.equal(sliced_wasserstein2_squared(a.flip(0), b, lines), value)
    torch.testing.assert_close(
        sliced_wasserstein2_squared(a.float(), b.float(), lines).double(), value, rtol=1e-5, atol=0
    )
    half = sliced_wasserstein2_squared(a.bfloat16(), b.bfloat16(), lines)
    assert half.dtype == torch.bfloat16
    assert float(half) == pytest.approx(float(value), rel=0.1)
    moving = a.clone().requires_grad_()
    sliced_wasserstein2_squared(moving, b, lines).backward()
    order = (a @ lines).argsort(0).argsort(0)
    matched = (b @ lines).sort(0).values.gather(0, order)
    torch.testing.assert_close(moving.grad, 2 * ((a @ lines) - matched) @ lines.T / (20 * 10))


def test_quantiles_are_made_once_and_drawn_lines_repeat():
    states = cloud(5, 9, 4, seed=10)
    lines = random_projections(4, 16, torch.Generator().manual_seed(0))
    along = quantiles(states, lines)
    torch.testing.assert_close(
        between_quantiles(along[:-1], along[1:]), sliced_wasserstein2_squared(states[:-1], states[1:], lines)
    )
    drawn = sliced_wasserstein2_squared(states[:-1], states[1:], 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, between_quantiles(along[:-1], along[1:]))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sliced_wasserstein2_squared(cloud(0, 3, seed=0), cloud(2, 3, seed=0)), "points"),
        (lambda: quantiles(cloud(2, 3, seed=0), random_projections(4, 2)), "projections"),
        (lambda: random_projections(3, 0), "count"),
    ],
)
def test_sliced_refuses_by_name(call, name):
    with pytest.raises(RestpointError, match=f"^{name}"):
        call()


# --- Sinkhorn -------------------------------------------------------------------------------------


def problems(count: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cost = squared_distances(cloud(count, rows, 3, seed=11), cloud(count, columns, 3, seed=12) + 0.5)
    return cost, weights(count, rows, seed=13), weights(count, columns, seed=14)


@pytest.mark.parametrize("regularisation", [0.05, 0.5, 5.0])
def test_sinkhorn_equals_pot(regularisation):
    cost, a, b = problems(4, 9, 7)
    found = sinkhorn(cost, regularisation, a, b, max_iterations=20_000, tolerance=1e-9)
    assert bool(found.converged.all())
    for i in range(4):
        problem = a[i].numpy(), b[i].numpy(), cost[i].numpy()
        plan = ot.sinkhorn(*problem, regularisation, method="sinkhorn_log", numItermax=20_000, stopThr=1e-10)
        own = torch.exp(
            (found.potential_a[i, :, None] + found.potential_b[i] - cost[i]) / regularisation
        ) * torch.outer(a[i], b[i])
        np.testing.assert_allclose(own.numpy(), plan, atol=1e-7)
        assert float(found.value[i]) == pytest.approx(float((plan * cost[i].numpy()).sum()), rel=1e-6)
        entropic = (plan * cost[i].numpy()).sum() + regularisation * (
            plan * np.log(plan / np.outer(problem[0], problem[1]))
        ).sum()
        assert float(found.entropic_value[i]) == pytest.approx(float(entropic), rel=1e-6)
        np.testing.assert_allclose(own.sum(1).numpy(), problem[0], atol=1e-12)
        assert float((own.sum(0) - b[i]).abs().sum()) == pytest.approx(float(found.marginal_error[i]), abs=1e-12)


def test_sinkhorn_tends_to_the_exact_cost_from_both_sides():
    cost, a, b = problems(3, 8, 8)
    exact = torch.tensor([ot.emd2(*(x[i].numpy() for x in (a, b, cost))) for i in range(3)], dtype=torch.float64)
    gap = torch.full((3,), math.inf, dtype=torch.float64)
    for regularisation in (1.0, 0.1, 0.01, 0.003):
        found = sinkhorn(cost, regularisation, a, b, max_iterations=100_000, tolerance=1e-7)
        assert bool(found.converged.all())
        # KL(P | a b) is between 0 and the entropy of a, which is at most log 8.
        assert bool((found.value <= found.entropic_value + 1e-5).all())
        assert bool((found.entropic_value <= exact + regularisation * math.log(8)).all())
        before, gap = gap, found.value - exact
        assert bool((gap > -1e-5).all())
        assert bool((gap < before + 1e-5).all())
    assert bool((gap < 1e-5).all())


def test_a_tiny_regularisation_neither_overflows_nor_loses_the_plan():
    """Potentials move by thousands of times the regularisation: the kernel alone would be all zeros."""
    cost, a, b = problems(3, 6, 6)
    cost = cost + 50 * torch.arange(6.0, dtype=torch.float64)  # shifts of columns cost the same for every plan
    found = sinkhorn(cost, 2e-3, a, b, max_iterations=50_000, tolerance=1e-6)
    assert float(torch.exp(-cost / 2e-3).max()) < 1e-30
    assert bool(found.converged.all())
    for i in range(3):
        exact = ot.emd2(a[i].numpy(), b[i].numpy(), cost[i].numpy())
        assert float(found.value[i]) == pytest.approx(exact, abs=1e-2)
    # Here even ten iterations move them beyond what exponentials hold.
    early = sinkhorn(cost, 1e-5, a, b, max_iterations=11, tolerance=1e-9)
    plan = torch.exp((early.potential_a[..., None] + early.potential_b[:, None] - cost) / 1e-5)
    plan = plan * a[..., None] * b[:, None]
    torch.testing.assert_close((plan.sum(-2) - b).abs().sum(-1), early.marginal_error, rtol=1e-4, atol=1e-6)


def test_converged_problems_freeze_and_a_batch_equals_its_parts():
    cost, a, b = problems(5, 9, 7)
    strengths = torch.tensor([10.0, 0.02, 1.0, 0.05, 0.3], dtype=torch.float64)
    together = sinkhorn(cost, strengths, a, b, max_iterations=5000, tolerance=1e-8)
    assert len(set(together.iterations.tolist())) > 2
    for i in range(5):
        alone = sinkhorn(cost[i], float(strengths[i]), a[i], b[i], max_iterations=5000, tolerance=1e-8)
        assert int(alone.iterations) == int(together.iterations[i])
        torch.testing.assert_close(alone.potential_a, together.potential_a[i], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(alone.value, together.value[i], rtol=1e-11, atol=0)


def test_what_has_not_converged_says_so():
    cost, a, b = problems(2, 9, 7)
    for iterations in (1, 7, 25):
        found = sinkhorn(cost, 0.01, a, b, max_iterations=iterations, tolerance=1e-12)
        assert not bool(found.converged.any())
        assert found.iterations.tolist() == [iterations] * 2
        plan = torch.exp((found.potential_a[..., None] + found.potential_b[:, None] - cost) / 0.01)
        plan = plan * a[..., None] * b[:, None]
        torch.testing.assert_close((plan.sum(-2) - b).abs().sum(-1), found.marginal_error, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(plan.sum(-1), a, rtol=1e-10, atol=1e-14)


def test_weights_of_zero_and_shared_weights_and_empty_batches():
    cost, a, b = problems(3, 5, 4)
    a = a[0].clone()
    a[2] = 0
    a = a / a.sum()
    found = sinkhorn(cost, 0.1, a, b[0], tolerance=1e-9, max_iterations=5000)
    kept = torch.tensor([0, 1, 3, 4])
    smaller = sinkhorn(cost[:, kept], 0.1, a[kept], b[0], tolerance=1e-9, max_iterations=5000)
    torch.testing.assert_close(found.value, smaller.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.entropic_value, smaller.entropic_value, rtol=1e-9, atol=0)
    assert sinkhorn(cost[:0], 0.1).value.shape == (0,)
    assert float(sinkhorn(torch.full((1, 1), 3.0), 0.5).value) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"regularisation": -1.0}, "regularisation"),
        ({"regularisation": math.nan}, "regularisation"),
        ({"cost": torch.tensor([[math.nan, 1.0]])}, "cost"),
        ({"cost": torch.zeros(0, 3)}, "cost"),
        ({"a": torch.tensor([0.5, 0.6])}, "a"),
        ({"b": torch.tensor([1.5, -0.5, 0.0])}, "b"),
        ({"b": torch.tensor([0.5, 0.5])}, "b"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_sinkhorn_refuses_by_name(arguments, name):
    with pytest.raises(RestpointError, match=f"^{name}[: ]"):
        sinkhorn(**({"cost": torch.zeros(2, 3), "regularisation": 1.0} | arguments))


def entropic_cost(x: torch.Tensor, y: torch.Tensor, regularisation: float) -> float:
    """By a quasi-Newton method on the dual: no Sinkhorn iteration in it."""
    cost = squared_distances(x, y).numpy()
    rows, columns = cost.shape

    def dual(potentials):
        f, g = potentials[:rows], potentials[rows:]
        plan = np.exp((f[:, None] + g - cost) / regularisation) / (rows * columns)
        value = f.mean() + g.mean() - regularisation * (plan.sum() - 1)
        return -value, -np.concatenate([1 / rows - plan.sum(1), 1 / columns - plan.sum(0)])

    # From potentials with which no exponential overflows.
    start = np.concatenate([cost.min(1), np.zeros(columns)])
    return -minimize(dual, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).fun


def test_divergence_is_the_debiased_entropic_value():
    a, b = cloud(2, 10, 3, seed=15), cloud(2, 8, 3, seed=16) + 1
    found = sinkhorn_divergence(a, b, 0.5, max_iterations=10_000, tolerance=1e-9)
    assert bool((found.between.converged & found.within_a.converged & found.within_b.converged).all())
    for i in range(2):
        parts = [entropic_cost(x, y, 0.5) for x, y in ((a[i], b[i]), (a[i], a[i]), (b[i], b[i]))]
        assert float(found.value[i]) == pytest.approx(parts[0] - (parts[1] + parts[2]) / 2, abs=1e-6)
    nothing = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_divergence(a, a, 5.0, tolerance=1e-9).value, nothing, atol=1e-7, rtol=0)
    with pytest.raises(RestpointError, match=r"^b:"):
        sinkhorn_divergence(a, b[..., :2], 0.5)


def test_divergence_of_translated_clouds_is_the_translation_squared():
    """Translating adds |shift|^2 and a term that all plans share, whatever the regularisation."""
    a, shift = cloud(3, 15, 4, seed=17), cloud(4, seed=18)
    for regularisation in (2.0, 10.0):
        found = sinkhorn_divergence(a, a + shift, regularisation, max_iterations=5000, tolerance=1e-9)
        assert bool(found.between.converged.all())
        torch.testing.assert_close(found.value, shift.square().sum().expand(3), rtol=1e-6, atol=0)


def test_transport_to_itself_is_what_alternating_updates_find_later():
    points, even = cloud(3, 12, 4, seed=22), weights(3, 12, seed=23)
    cost = squared_distances(points, points)
    slow = sinkhorn(cost, 2.0, even, even, max_iterations=20_000, tolerance=1e-10)
    fast = sinkhorn_within(cost, 2.0, even, tolerance=1e-10)
    assert bool((slow.converged & fast.converged & (4 * fast.iterations < slow.iterations)).all())
    torch.testing.assert_close(fast.value, slow.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(fast.entropic_value, slow.entropic_value, rtol=1e-8, atol=0)
    assert torch.equal(fast.potential_a, fast.potential_b)
    alone = sinkhorn_within(cost[1], 2.0, even[1], tolerance=1e-10)
    torch.testing.assert_close(alone.potential_a, fast.potential_a[1], rtol=1e-11, atol=1e-12)
    stopped = sinkhorn_within(cost, 2.0, even, max_iterations=3, tolerance=1e-12)
    assert stopped.iterations.tolist() == [3] * 3
    assert not bool(stopped.converged.any())
    with pytest.raises(RestpointError, match=r"^cost: it is not symmetric"):
        sinkhorn_within(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 1.0)


# --- bounds ---------------------------------------------------------------------------------------


def test_the_softmax_bound_holds_and_is_attained():
    generator = torch.Generator().manual_seed(19)
    scale = 10 ** (4 * torch.rand(2000, 1, dtype=torch.float64, generator=generator) - 3)
    a, b = 3 * cloud(2000, 12, seed=20), cloud(2000, 12, seed=21)
    b = a + scale * b
    bound = softmax_variation_bound(a, b)
    variation = total_variation(a.softmax(-1), b.softmax(-1))
    assert bool((variation <= bound + 1e-12).all())
    assert float((variation / bound).max()) > 0.5
    for gap in (1e-3, 1.0, 10.0):
        mass = 1 / (1 + math.exp(gap / 2))
        base = torch.tensor([mass / 3, 2 * mass / 3, 1 - mass], dtype=torch.float64).log()
        raised = base + torch.tensor([gap, gap, 0.0], dtype=torch.float64)
        exact = total_variation(base.softmax(-1), raised.softmax(-1))
        assert float(exact) == pytest.approx(math.tanh(gap / 4), rel=1e-9)
        assert float(softmax_variation_bound(base, raised)) == pytest.approx(math.tanh(gap / 4), rel=1e-9)
    torch.testing.assert_close(
        softmax_variation_bound(a, a + 5), torch.zeros(2000, dtype=torch.float64), atol=1e-14, rtol=0
    )


def test_the_contraction_estimate_sums_a_geometric_series():
    ratio = torch.tensor([0.0, 0.3, 0.9, 1.0, 2.0], dtype=torch.float64)
    expected = sum(2.0 * ratio[:3] ** k for k in range(400))
    found = contraction_estimate(torch.tensor(2.0, dtype=torch.float64), ratio)
    torch.testing.assert_close(found[:3], expected, rtol=1e-12, atol=0)
    assert found[3:].tolist() == [math.inf, math.inf]
