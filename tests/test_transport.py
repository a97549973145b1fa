import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from restpoint.errors import RestpointError
from restpoint.transport import (
    Gaussian,
    acceptance,
    accepts,
    draw,
    maximal_coupling,
    monge_map,
    residual,
    total_variation,
    wasserstein2_squared,
    wasserstein2_squared_samples,
)


def distribution(*shape: int, seed: int, sparse: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = -torch.rand(*shape, dtype=torch.float64, generator=generator).log()
    weights = weights * (torch.rand(*shape, dtype=torch.float64, generator=generator) >= sparse)
    weights[..., 0] += 1e-3
    return (weights / weights.sum(-1, keepdim=True)).to(dtype)


def spd(dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimension, 2 * dimension, dtype=torch.float64, generator=generator)
    return factor @ factor.T / dimension


# --- total variation and the coupling -------------------------------------------------------------

pairs = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=st.floats(0, 1)) for _ in range(3)])
)


@settings(deadline=None, max_examples=80)
@given(pairs)
def test_total_variation_is_a_metric_and_one_minus_acceptance(weights):
    p, q, r = (torch.from_numpy(w + 1e-6) / (w + 1e-6).sum() for w in weights)
    distance = total_variation(p, q)
    torch.testing.assert_close(acceptance(p, q), 1 - distance, atol=1e-12, rtol=0)
    torch.testing.assert_close(total_variation(q, p), distance, atol=0, rtol=0)
    assert 0 <= float(distance) <= 1
    assert float(total_variation(p, p)) == 0
    assert float(total_variation(p, r)) <= float(distance + total_variation(q, r)) + 1e-12
    law = residual(p, q)
    torch.testing.assert_close(law.sum(), torch.ones((), dtype=torch.float64), atol=1e-12, rtol=0)
    if float(distance) > 1e-12:
        assert bool((law[p <= q] == 0).all())


def test_total_variation_equals_transport_under_the_zero_one_cost():
    p, q = distribution(9, seed=0, sparse=0.3), distribution(9, seed=1, sparse=0.3)
    cost = 1.0 - np.eye(9)
    assert float(total_variation(p, q)) == pytest.approx(ot.emd2(p.numpy(), q.numpy(), cost), abs=1e-12)


@pytest.mark.parametrize("sparse", [0.0, 0.5])
def test_law_of_the_coupling_in_closed_form_is_the_target(sparse):
    """P(token = y) = q(y) P(accept | y) + sum_x q(x) P(reject | x) residual(y)."""
    p, q = distribution(40, 7, seed=2, sparse=sparse), distribution(40, 7, seed=3, sparse=sparse)
    keep = torch.where(q > 0, (p / q).clamp(max=1), torch.zeros_like(p))
    law = q * keep + (q * (1 - keep)).sum(-1, keepdim=True) * residual(p, q)
    torch.testing.assert_close(law, p, atol=1e-12, rtol=0)
    torch.testing.assert_close((q * keep).sum(-1), acceptance(p, q), atol=1e-12, rtol=0)


def test_law_of_the_code_itself_by_enumerating_a_grid_of_uniforms():
    """With probabilities in steps of 1/8 the uniforms' decisions change only on a grid: enumerate it."""
    p = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.125], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert float(acceptance(p, q)) == 0.625
    grid = 24  # p/q is a multiple of 1/2, the residual (2/3, 0, 0, 0, 1/3): both change on multiples of 1/24
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    law = torch.zeros(5, dtype=torch.float64)
    kept = torch.zeros((), dtype=torch.float64)
    for token in range(4):
        first, second = torch.tensor(list(itertools.product(points.tolist(), points.tolist())), dtype=torch.float64).T
        rows = first.shape[0]
        outcome = maximal_coupling(torch.full((rows,), token), p.expand(rows, 5), q.expand(rows, 5), first, second)
        law += q[token] * torch.bincount(outcome.token, minlength=5) / rows
        kept += q[token] * outcome.accepted.double().mean()
        assert bool((outcome.token[outcome.accepted] == token).all())
    torch.testing.assert_close(law, p, atol=1e-12, rtol=0)
    torch.testing.assert_close(kept, acceptance(p, q), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law_by_sampling(dtype):
    generator = torch.Generator().manual_seed(5)
    p, q = (
        distribution(11, seed=6, sparse=0.3, dtype=dtype),
        distribution(11, seed=7, sparse=0.3, dtype=dtype),
    )
    rows = 200_000
    drafts = torch.multinomial(q, rows, replacement=True, generator=generator)
    uniform = torch.rand(rows, dtype=dtype, generator=generator)
    outcome = maximal_coupling(drafts, p.expand(rows, -1), q.expand(rows, -1), uniform, generator=generator)
    counts = torch.bincount(outcome.token, minlength=11).double()
    expected = p.double() * rows
    assert bool((counts[expected == 0] == 0).all())
    used = expected > 0
    statistic = 2 * (counts[used] * (counts[used] / expected[used]).log()).sum()  # G-test
    assert float(statistic) < 36.1  # 1 - 1e-4 quantile of chi2 with 10 degrees; fewer here, so stricter
    assert float(outcome.accepted.double().mean()) == pytest.approx(float(acceptance(p, q)), abs=0.005)


def test_coupling_keeps_batch_shape_and_integer_type():
    p, q = (
        distribution(2, 3, 5, seed=8, dtype=torch.float32),
        distribution(2, 3, 5, seed=9, dtype=torch.float32),
    )
    outcome = maximal_coupling(torch.zeros(2, 3, dtype=torch.int32), p, q, torch.rand(2, 3))
    assert outcome.token.shape == outcome.accepted.shape == (2, 3)
    assert outcome.token.dtype == torch.int32


def test_a_draft_equal_to_the_target_is_always_kept_and_the_residual_falls_back():
    p = distribution(4, 1000, seed=10, dtype=torch.float32)
    noisy = p * (1 + 1e-7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(residual(p, p), p)
    torch.testing.assert_close(residual(p, noisy), p)
    draft = p.argmax(-1)
    outcome = maximal_coupling(draft, p, p.clone(), torch.full((4,), 1 - 2**-24))
    assert bool(outcome.accepted.all())
    assert torch.equal(outcome.token, draft)


def test_degenerate_rows_give_no_nan():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    q = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    top = torch.full((3,), 1 - 2**-24)
    outcome = maximal_coupling(torch.tensor([1, 1, 2]), p, q, torch.zeros(3), top)
    assert outcome.accepted.tolist() == [False, True, False]
    assert outcome.token.tolist() == [0, 1, 1]
    assert bool(residual(p, q).isfinite().all())
    # A token that the draft could not give: a decision all the same, by whether the target allows it.
    assert accepts(torch.tensor([0, 0, 2]), p, q, torch.full((3,), 0.5)).tolist() == [True, False, False]


def test_draw_is_the_inverse_cdf_and_never_draws_weight_zero():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24])
    assert draw(weights.expand(6, 6), uniform).tolist() == [1, 1, 3, 3, 4, 4]
    wide = distribution(100_000, seed=11, sparse=0.5, dtype=torch.float32)
    uniform = torch.linspace(0, 1 - 2**-24, 50)
    tokens = draw(wide.expand(50, -1), uniform)
    assert bool((wide[tokens] > 0).all())
    oracle = np.searchsorted(
        np.cumsum(wide.double().numpy()), uniform.double().numpy() * float(wide.double().sum()), "right"
    )
    assert (tokens.numpy() - oracle == 0).mean() == 1


def test_coupling_refuses_what_is_not_a_pair_of_distributions():
    p = distribution(2, 5, seed=0, dtype=torch.float32)
    uniform = torch.rand(2)
    with pytest.raises(RestpointError, match="one shape and dtype"):
        maximal_coupling(torch.zeros(2, dtype=torch.long), p, p.double(), uniform)
    with pytest.raises(RestpointError, match=r"logits\.float\(\)"):
        maximal_coupling(torch.zeros(2, dtype=torch.long), p.bfloat16(), p.bfloat16(), uniform)


# --- Gaussians ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 3, 24])
def test_gaussian_transport_matches_pot(dimension):
    generator = torch.Generator().manual_seed(dimension)
    means = torch.randn(2, dimension, dtype=torch.float64, generator=generator)
    a, b = Gaussian(means[0], spd(dimension, 1)), Gaussian(means[1], spd(dimension, 2))
    numpy = [tensor.numpy() for tensor in (a.mean, b.mean, a.covariance, b.covariance)]
    distance = ot.gaussian.bures_wasserstein_distance(*numpy)
    assert float(wasserstein2_squared(a, b)) == pytest.approx(float(distance) ** 2, abs=1e-6)
    matrix, offset = ot.gaussian.bures_wasserstein_mapping(*numpy)
    found = monge_map(a, b)
    np.testing.assert_allclose(found.matrix.numpy(), matrix, atol=1e-6)
    np.testing.assert_allclose(found.offset.numpy(), np.ravel(offset), atol=1e-6)


def test_monge_map_carries_the_moments_and_costs_the_distance():
    a = Gaussian(torch.ones(6, dtype=torch.float64), spd(6, 3))
    b = Gaussian(torch.arange(6, dtype=torch.float64), spd(6, 4))
    found = monge_map(a, b)
    torch.testing.assert_close(found.matrix @ a.covariance @ found.matrix, b.covariance, atol=1e-10, rtol=0)
    torch.testing.assert_close(found(a.mean.unsqueeze(0))[0], b.mean, atol=1e-10, rtol=0)
    shift = torch.eye(6, dtype=torch.float64) - found.matrix
    cost = (a.mean - b.mean).square().sum() + (shift @ a.covariance @ shift).trace()
    torch.testing.assert_close(cost, wasserstein2_squared(a, b), atol=1e-10, rtol=0)


def test_singular_gaussians():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64, generator=generator)).Q
    a = Gaussian(torch.zeros(8, dtype=torch.float64), basis @ spd(3, 5) @ basis.T)
    b = Gaussian(torch.zeros(8, dtype=torch.float64), basis @ spd(3, 6) @ basis.T)
    small = [Gaussian(torch.zeros(3, dtype=torch.float64), spd(3, seed)) for seed in (5, 6)]
    torch.testing.assert_close(wasserstein2_squared(a, b), wasserstein2_squared(*small), atol=1e-7, rtol=0)
    assert float(wasserstein2_squared(a, a)) == pytest.approx(0, abs=1e-12)
    found = monge_map(a, b)
    torch.testing.assert_close(basis.T @ found.matrix @ basis, monge_map(*small).matrix, atol=1e-5, rtol=0)


def test_batched_gaussians_and_the_small_gram_form_agree():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 4, 7, 20, generator=generator)
    y = y[:, :5] * 2 + 1
    batched = wasserstein2_squared(Gaussian.from_samples(x), Gaussian.from_samples(y))
    single = torch.stack(
        [wasserstein2_squared(Gaussian.from_samples(a), Gaussian.from_samples(b)) for a, b in zip(x, y, strict=True)]
    )
    torch.testing.assert_close(batched, single, atol=1e-9, rtol=0)
    torch.testing.assert_close(wasserstein2_squared_samples(x, y), batched, atol=1e-6, rtol=0)


def test_gaussian_errors():
    a, b = Gaussian.from_samples(torch.randn(9, 3)), Gaussian.from_samples(torch.randn(9, 4))
    with pytest.raises(RestpointError, match="3 and 4 dimensions"):
        wasserstein2_squared(a, b)
    with pytest.raises(RestpointError, match="regularisation"):
        monge_map(a, a, regularisation=0.0)
    with pytest.raises(RestpointError, match="zero variance"):
        monge_map(Gaussian.from_samples(torch.ones(4, 3)), a)
    with pytest.raises(RestpointError, match="no row"):
        Gaussian.from_samples(torch.zeros(0, 3))
