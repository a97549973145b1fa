import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

from restpoint.errors import RestpointError
from restpoint.transport.tokens import nearest_distances, token_transport
from restpoint.transport.variation import total_variation

VOCABULARY = 24


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def laws(count: int, seed: int, peak: float = 2.0) -> torch.Tensor:
    return (peak * normal(count, VOCABULARY, seed=seed)).softmax(-1)


def exact(p: torch.Tensor, q: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    cost = cdist(embeddings.numpy(), embeddings.numpy())
    return torch.tensor([ot.emd2(x.numpy(), y.numpy(), cost) for x, y in zip(p, q, strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("peak", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("support", [1, 3, 8])
@pytest.mark.parametrize("with_nearest", [True, False])
def test_the_full_cost_lies_between_the_bounds(peak, support, with_nearest):
    p, q, embeddings = laws(40, 0, peak), laws(40, 1, peak), normal(VOCABULARY, 5, seed=2) + 3
    truth = exact(p, q, embeddings)
    found = token_transport(
        p, q, embeddings, support=support, nearest=nearest_distances(embeddings) if with_nearest else None
    )
    assert bool((found.lower <= truth + 1e-10).all())
    assert bool((truth <= found.upper + 1e-10).all())
    assert bool((found.lower > 0).all())
    torch.testing.assert_close(found.moved, total_variation(p, q))
    assert bool((found.upper <= found.moved * torch.pdist(embeddings).max() * 2**0.5).all())
    assert bool(((found.covered > 0) & (found.covered < 1 + 1e-12)).all())


def test_bounds_meet_with_the_whole_vocabulary_and_close_in_as_the_support_grows():
    p, q, embeddings = laws(30, 3), laws(30, 4), normal(VOCABULARY, 5, seed=5)
    truth, nearest = exact(p, q, embeddings), nearest_distances(embeddings)
    gaps = []
    for support in (1, 2, 4, 8, 16, VOCABULARY, 99):
        found = token_transport(p, q, embeddings, support=support, nearest=nearest)
        gaps.append(float((found.upper - found.lower).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05
    torch.testing.assert_close(found.lower, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.upper, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.covered, torch.ones(30, dtype=torch.float64))


def test_the_nearest_distances_raise_the_lower_bound():
    """Far tokens that all have one mean embedding: only the distances between them show that mass moves."""
    embeddings = torch.cat([normal(VOCABULARY // 2, 40, seed=6)] * 2)
    embeddings[VOCABULARY // 2 :] *= -1
    even = torch.cat([torch.ones(6), torch.zeros(6), torch.ones(6), torch.zeros(6)]).double() / 12
    other = even.roll(6)
    nearest = nearest_distances(embeddings)
    without = token_transport(even, other, embeddings, support=2)
    having = token_transport(even, other, embeddings, support=2, nearest=nearest)
    truth = float(exact(even[None], other[None], embeddings))
    assert float(without.lower) < 0.5 * truth
    assert 0.7 * truth < float(having.lower) <= truth
    assert float(having.upper) == float(without.upper)


def test_one_token_to_another_costs_their_distance():
    embeddings = normal(VOCABULARY, 7, seed=7)
    one = torch.eye(VOCABULARY, dtype=torch.float64)
    found = token_transport(one[3], one[9], embeddings, support=1)
    assert float(found.lower) == pytest.approx(float((embeddings[3] - embeddings[9]).norm()), rel=1e-12)
    assert float(found.upper) == pytest.approx(float(found.lower), rel=1e-12)
    same = token_transport(one[3], one[3], embeddings)
    assert [float(x) for x in (same.lower, same.upper, same.moved, same.covered)] == [0, 0, 0, 1]


def test_tiny_differences_and_float32_keep_their_digits():
    embeddings = normal(VOCABULARY, 5, seed=8)
    p = laws(6, 9)
    q = p + 1e-9 * (laws(6, 10) - p)
    whole = token_transport(p, q, embeddings, support=VOCABULARY)
    # Transport is linear in p - q: the same as for the laws a step of 1 apart.
    torch.testing.assert_close(whole.upper, 1e-9 * exact(p, laws(6, 10), embeddings), rtol=1e-5, atol=0)
    q = laws(6, 11)
    single = token_transport(p.float(), q.float(), embeddings.float(), support=4)
    double = token_transport(p, q, embeddings, support=4)
    torch.testing.assert_close(single.lower, double.lower, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single.upper, double.upper, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_distances_are_never_above_the_truth(dtype):
    embeddings = (normal(50, 6, seed=12) + 100).to(dtype)
    embeddings[7] = embeddings[31]
    distances = cdist(embeddings.double().numpy(), embeddings.double().numpy())
    np.fill_diagonal(distances, np.inf)
    found = nearest_distances(embeddings, block=13)
    assert bool((found.numpy() <= distances.min(1)).all())
    np.testing.assert_allclose(found.numpy(), distances.min(1), atol=1e-2 if dtype == torch.float32 else 1e-6)
    assert float(found[7]) == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda p, e: token_transport(2 * p, p, e), "p"),
        (lambda p, e: token_transport(p, -p, e), "q"),
        (lambda p, e: token_transport(p, p * float("nan"), e), "q"),
        (lambda p, e: token_transport(p, p, e[1:]), "embeddings"),
        (lambda p, e: token_transport(p, p, e, support=0), "support"),
        (lambda p, e: nearest_distances(e[:1]), "embeddings"),
        (lambda p, e: nearest_distances(e, 0), "block"),
    ],
)
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(RestpointError, match=f"^{name}[: ]"):
        call(laws(2, 0), normal(VOCABULARY, 3, seed=0))
