"""Observables of token clouds against brute force, SciPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from restpoint.errors import RestpointError
from restpoint.trajectory import observables as seen

DOUBLE = torch.float64


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def on_circle(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack((angles.cos(), angles.sin()), -1)


# --- energies ---


def test_energies_are_their_definitions():
    states, beta = cloud(2, 5, 3), 1.7
    units = (states / states.norm(dim=-1, keepdim=True)).numpy()
    for found, sequential, x in zip(
        seen.log_energy(states, beta).exp(), seen.log_sequential_energies(states, beta).exp(), units, strict=True
    ):
        pairs = [math.exp(beta * float(a @ b)) for a in x for b in x]
        assert float(found) == pytest.approx(sum(pairs) / len(pairs) / (2 * beta), rel=1e-12)
        for k, value in enumerate(sequential):
            earlier = sum(math.exp(beta * float(x[k] @ x[j])) for j in range(k)) / beta
            assert float(value) == pytest.approx(earlier, rel=1e-12)


def test_energy_of_each_cloud_has_its_own_beta():
    states = cloud(2, 3, 4, 2)
    betas = torch.tensor([[0.5], [8.0]], dtype=DOUBLE)
    together = seen.log_energy(states, betas)
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1], seen.log_energy(states[1], 8.0))


def test_a_huge_beta_does_not_overflow():
    assert float(seen.log_energy(torch.ones(3, 2, dtype=DOUBLE), 1e8)) == pytest.approx(1e8 - math.log(2e8))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_energy_needs_a_positive_beta(beta):
    with pytest.raises(RestpointError, match=r"beta: .* positive inverse temperature"):
        seen.log_energy(cloud(3, 2), beta)


# --- clusters ---


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5])
def test_clusters_are_connected_components(tau):
    states = cloud(6, 12, 3)
    for one, count, labels in zip(
        states, seen.cluster_count(states, tau), seen.cluster_labels(states, tau), strict=True
    ):
        units = (one / one.norm(dim=-1, keepdim=True)).numpy()
        expected, numbered = connected_components(units @ units.T > 1 - tau)
        assert int(count) == expected
        assert len(set(zip(labels.tolist(), numbered.tolist(), strict=True))) == expected
    assert len(set(seen.cluster_count(states, tau).tolist())) > 1  # or the test would see one number only


def test_a_chain_is_one_component_of_higher_rank():
    step = math.acos(1 - 0.01) * 0.9
    chain = on_circle(torch.arange(9, dtype=DOUBLE) * step)
    assert int(seen.cluster_count(chain, 0.01)) == 1
    assert int(seen.cluster_rank(chain, 0.01)) == 9  # eigenvalues 1 + 2 cos(k pi / 10), of which none is 0
    pairs = on_circle(torch.tensor([0.0, 0.001, 2.0, 2.001, 4.0], dtype=DOUBLE))
    assert int(seen.cluster_count(pairs, 0.01)) == int(seen.cluster_rank(pairs, 0.01)) == 3


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 1.0])
def test_the_rank_of_graphs_with_lone_tokens(density):
    drawn = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0)) < density
    graphs = drawn | drawn.mT | torch.eye(14, dtype=torch.bool)
    expected = np.linalg.matrix_rank(graphs.double().numpy(), hermitian=True)
    assert seen.adjacency_rank(graphs).tolist() == expected.tolist()
    assert int(seen.adjacency_rank(graphs[0, 0])) == expected[0, 0]


def test_share_of_pairs():
    states = on_circle(torch.tensor([0.0, 0.001, 0.002, 3.0], dtype=DOUBLE))
    assert float(seen.clustered_share(states)) == pytest.approx(6 / 12)
    assert float(seen.clustered_share(states[:1])) == 1


def test_merging_times():
    times = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=DOUBLE)
    second = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=DOUBLE)  # near at 1, away at 2, near for good from 3
    third = torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=DOUBLE)
    states = on_circle(torch.stack((torch.zeros(4, dtype=DOUBLE), second, third), -1))
    found = seen.merging_times(states, times)
    expected = torch.tensor([[0.0, 3.0, 2.0], [3.0, 0.0, 3.0], [2.0, 3.0, 0.0]], dtype=DOUBLE)
    assert torch.equal(found, expected)
    assert float(seen.merging_time(states, times)) == 3
    assert float(seen.merging_time(states[:3], times[:3])) == math.inf
    both = torch.stack((states, states[:1].expand_as(states)), 1)
    assert seen.merging_time(both, times).tolist() == [3, math.inf]


# --- centres ---


def test_centres_against_the_definition():
    states, delta = cloud(5, 60, 2), 0.5
    for one, centres, strong in zip(
        states, seen.renyi_centres(states, delta), seen.strong_renyi_centres(states, delta), strict=True
    ):
        angles = [math.atan2(float(y), float(x)) for x, y in one]

        def far(a: float, b: float) -> bool:
            return abs((a - b + math.pi) % (2 * math.pi) - math.pi) > delta

        parked: list[int] = []
        for token, angle in enumerate(angles):
            assert bool(strong[token]) == all(far(angle, angles[j]) for j in range(token))
            if all(far(angle, angles[j]) for j in parked):
                parked.append(token)
        assert centres.nonzero()[:, 0].tolist() == parked
        assert bool((centres | ~strong).all())


def test_number_of_strong_centres_is_the_expected_one():
    """Mean (1 - (1 - s)^n) / s = 6.283 for n = 200 tokens on the circle, beta = 64, delta = 4 / sqrt(beta)."""
    tokens, seeds, delta = 200, 200, 4 * 64**-0.5
    share = delta / math.pi
    expected = (1 - (1 - share) ** tokens) / share
    assert expected == pytest.approx(6.283, abs=5e-4)
    counts = seen.strong_renyi_centres(cloud(seeds, tokens, 2), delta).sum(-1).double()
    error = float(counts.std()) / seeds**0.5
    assert error < 0.15  # so that 3 of them tell 6.283 from the 7 to 8 parked centres and from other widths
    assert abs(float(counts.mean()) - expected) < 3 * error
    assert abs(float(seen.renyi_centres(cloud(seeds, tokens, 2), delta).sum(-1).double().mean()) - expected) > 3 * error


@pytest.mark.parametrize("delta", [0.0, -1.0, 4.0])
def test_delta_is_an_angle(delta):
    with pytest.raises(RestpointError, match=r"delta is .* between 0 and pi"):
        seen.strong_renyi_centres(cloud(3, 2), delta)


# --- distances and dimension ---


def test_distance_to_first_keeps_its_digits():
    tiny = 1e-11
    states = on_circle(torch.tensor([0.3, 0.3 + tiny, 0.3 + math.pi], dtype=DOUBLE)) * 5
    assert seen.distance_to_first(states).tolist() == pytest.approx([0.0, tiny, math.pi], rel=1e-4)


def test_effective_rank_is_that_of_the_covariance():
    states = cloud(2, 30, 4) * torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=DOUBLE)
    for one, rank, ratio in zip(states, seen.effective_rank(states), seen.participation_ratio(states), strict=True):
        values = np.linalg.eigvalsh(np.cov(one.numpy().T))
        shares = values / values.sum()
        assert float(rank) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
        assert float(ratio) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-10)


def test_effective_rank_at_its_ends():
    assert float(seen.effective_rank(torch.full((4, 3), 0.7, dtype=DOUBLE))) == 0
    assert float(seen.participation_ratio(torch.full((4, 3), 0.7, dtype=DOUBLE))) == 0
    line = torch.arange(5, dtype=DOUBLE)[:, None] * torch.tensor([1.0, 2.0], dtype=DOUBLE)
    assert float(seen.effective_rank(line)) == pytest.approx(1)
    even = torch.cat((torch.eye(3, dtype=DOUBLE), -torch.eye(3, dtype=DOUBLE)))
    assert float(seen.effective_rank(even)) == pytest.approx(3)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_what_has_no_direction_is_refused(bad):
    states = cloud(3, 2)
    states[1] = bad
    with pytest.raises(RestpointError, match=r"states: one is zero or not finite"):
        seen.cluster_count(states)


@pytest.mark.parametrize("tau", [0.0, -1.0, 2.0])
def test_tau_is_a_distance(tau):
    with pytest.raises(RestpointError, match=r"tau is "):
        seen.cluster_count(cloud(3, 2), tau)
