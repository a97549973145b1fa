import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from restpoint.equilibrium import GramAccumulator, solve_ridge, solve_ridge_path
from restpoint.errors import RestpointError

INPUTS, OUTPUTS = 7, 3


def rows(count: int, seed: int = 0, mean: float = 5.0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, dtype=torch.float64, generator=generator)
    x = x * torch.linspace(0.5, 3, INPUTS, dtype=torch.float64) + mean
    y = x @ torch.randn(INPUTS, OUTPUTS, dtype=torch.float64, generator=generator)
    y = y + torch.randn(count, OUTPUTS, dtype=torch.float64, generator=generator) - mean
    return x.to(dtype), y.to(dtype)


def accumulate(x: torch.Tensor, y: torch.Tensor, chunk: int, **options) -> GramAccumulator:
    gram = GramAccumulator(x.shape[1], y.shape[1], **options)
    for part in zip(x.split(chunk), y.split(chunk), strict=True):
        gram.update(*part)
    return gram


def assert_same(a: GramAccumulator, b: GramAccumulator, tolerance: float) -> None:
    assert a.count == b.count
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


# --- second moments -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 13, 500])
def test_moments_match_numpy_whatever_the_chunks(chunk):
    x, y = rows(500)
    moments = accumulate(x, y, chunk, with_yy=True).moments()
    joint = np.cov(np.hstack([x, y]).T, bias=True)
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean_x, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance_xx, joint[:INPUTS, :INPUTS], atol=1e-11)
    np.testing.assert_allclose(moments.covariance_xy, joint[:INPUTS, INPUTS:], atol=1e-11)
    np.testing.assert_allclose(moments.covariance_yy, joint[INPUTS:, INPUTS:], atol=1e-11)


@pytest.mark.parametrize("with_yy", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 200, 500])
def test_merging_equals_one_pass(cut, with_yy):
    x, y = rows(500)
    whole = accumulate(x, y, 500, with_yy=with_yy)
    left = accumulate(x[:cut], y[:cut], 64, with_yy=with_yy)
    right = accumulate(x[cut:], y[cut:], 64, with_yy=with_yy)
    before = left.xx.clone()
    assert_same(left + right, whole, 1e-10)
    assert_same(right + left, whole, 1e-10)
    assert torch.equal(left.xx, before)


def test_resuming_from_bytes_continues_exactly():
    x, y = rows(300, dtype=torch.float32)
    through = accumulate(x, y, 50, with_yy=True, product_dtype=torch.float32)
    config, tensors = accumulate(x[:150], y[:150], 50, with_yy=True, product_dtype=torch.float32).state()
    resumed = GramAccumulator.from_state(json.loads(json.dumps(config)), load(save(tensors)))
    for part in zip(x[150:].split(50), y[150:].split(50), strict=True):
        resumed.update(*part)
    assert resumed.product_dtype is torch.float32
    assert_same(resumed, through, 0.0)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_float32_products_keep_six_digits_even_far_from_the_origin(mean):
    x, y = rows(20_000, mean=mean, dtype=torch.float32)
    exact = accumulate(x, y, 4096)
    fast = accumulate(x, y, 4096, product_dtype=torch.float32)
    spread = exact.xx.diagonal().sqrt()
    error = ((fast.xx - exact.xx) / (spread[:, None] * spread)).abs().max()
    assert float(error) < 1e-6
    naive = (x.T @ x).double() - 20_000 * torch.outer(exact.mean_x, exact.mean_x)
    if mean:  # what the centring is for
        assert float(((naive - exact.xx) / (spread[:, None] * spread)).abs().max()) > 1e-3


def test_half_precision_rows_are_taken_as_they_are():
    x, y = rows(64)
    half = accumulate(x.bfloat16(), y.bfloat16(), 16)
    assert_same(half, accumulate(x.bfloat16().double(), y.bfloat16().double(), 64), 1e-12)


def test_bad_rows_are_counted_and_leave_no_trace():
    x, y = rows(20)
    gram = accumulate(x, y, 20)
    before = gram.xx.clone()
    x[3, 1], x[3, 2], y[7, 0] = float("nan"), float("inf"), float("inf")
    with pytest.raises(RestpointError, match=r"2 of 20 rows.*dtype"):
        gram.update(x, y)
    assert torch.equal(gram.xx, before)
    assert gram.count == 20
    huge = GramAccumulator(1, 1, product_dtype=torch.float32)
    with pytest.raises(RestpointError, match="overflow"):
        huge.update(torch.tensor([[1e25], [-1e25]]), torch.zeros(2, 1))


def test_gram_errors():
    with pytest.raises(RestpointError, match="inputs=0"):
        GramAccumulator(0, 1)
    with pytest.raises(RestpointError, match="product_dtype"):
        GramAccumulator(1, 1, product_dtype=torch.bfloat16)
    gram = GramAccumulator(INPUTS, OUTPUTS)
    with pytest.raises(RestpointError, match="no row"):
        gram.moments()
    with pytest.raises(RestpointError, match="7 and 3 columns"):
        gram.update(torch.zeros(2, 4), torch.zeros(2, OUTPUTS))
    with pytest.raises(RestpointError, match="same arguments"):
        gram + GramAccumulator(INPUTS, OUTPUTS, with_yy=True)
    with pytest.raises(RestpointError, match="lacks mean_x, xx"):
        GramAccumulator.from_state(
            *[{"count": 0, "product_dtype": "float64"}, {"mean_y": torch.zeros(1), "xy": torch.zeros(1, 1)}]
        )
    gram.update(torch.zeros(0, INPUTS), torch.zeros(0, OUTPUTS))
    assert gram.count == 0


# --- ridge ----------------------------------------------------------------------------------------


def test_no_penalty_is_least_squares():
    x, y = rows(400)
    found = solve_ridge(accumulate(x, y, 100), 0.0)
    design = np.hstack([x.numpy(), np.ones((400, 1))])
    oracle = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.matrix, oracle[:-1], atol=1e-10)
    np.testing.assert_allclose(found.offset, oracle[-1], atol=1e-9)
    np.testing.assert_allclose(found(x), design @ oracle, atol=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
def test_the_path_solves_the_augmented_least_squares_problem(standardise):
    """Ridge is least squares with one more row per input: sqrt(n penalty_i) e_i -> 0."""
    x, y = rows(60)
    strengths = (1e-3, 1e-1, 10.0)
    found = solve_ridge_path(accumulate(x, y, 16), strengths, standardise=standardise)
    variance = x.numpy().var(0)
    for strength, affine in zip(strengths, found, strict=True):
        penalty = strength * (variance if standardise else np.full(INPUTS, variance.mean()))
        above = np.hstack([x.numpy(), np.ones((60, 1))])
        below = np.hstack([np.diag(np.sqrt(60 * penalty)), np.zeros((INPUTS, 1))])
        target = np.vstack([y.numpy(), np.zeros((INPUTS, OUTPUTS))])
        oracle = np.linalg.lstsq(np.vstack([above, below]), target, rcond=None)[0]
        np.testing.assert_allclose(affine.matrix, oracle[:-1], atol=1e-10)
        np.testing.assert_allclose(affine.offset, oracle[-1], atol=1e-9)


def test_rescaling_inputs_changes_nothing_in_the_standardised_fit():
    x, y = rows(80)
    scale = torch.tensor([1.0, 1e3, 1e-3, 1, 1, 1, 50], dtype=torch.float64)
    for strength in (1e-2, 1.0):
        plain = solve_ridge(accumulate(x, y, 80), strength, standardise=True)
        scaled = solve_ridge(accumulate(x * scale, y, 80), strength, standardise=True)
        torch.testing.assert_close(scaled.matrix * scale.unsqueeze(1), plain.matrix, rtol=1e-5, atol=1e-7)


def test_singular_systems_are_solved():
    x, y = rows(200)
    twice = torch.cat((x, x, torch.ones(200, 1, dtype=torch.float64)), 1)
    found = solve_ridge(accumulate(twice, y, 200), 0.0)
    plain = solve_ridge(accumulate(x, y, 200), 0.0)
    torch.testing.assert_close(found(twice), plain(x), atol=1e-6, rtol=0)
    constant = solve_ridge(accumulate(torch.ones_like(x), y, 200), 0.0, standardise=True)
    torch.testing.assert_close(constant(x), y.mean(0).expand_as(y), atol=1e-10, rtol=0)


def test_ridge_errors():
    gram = accumulate(*rows(20), 20)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RestpointError, match="strengths"):
            solve_ridge(gram, strength)
    with pytest.raises(RestpointError, match="no row"):
        solve_ridge(GramAccumulator(2, 2), 0.1)
