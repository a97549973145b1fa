"""When ranks settle and in what order: against SciPy, brute force and trajectories made by hand."""

import itertools
import math

import pytest
import torch
from scipy import stats

from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import states_of
from restpoint.trajectory.saturation import (
    Saturation,
    permuted_tau,
    ranks_in_play,
    saturation_layers,
    settles_early,
    strict_tau,
    top_tokens,
)


def by_definition(top: torch.Tensor) -> torch.Tensor:
    """The definition, one token and rank at a time."""
    depth, tokens, k = top.shape
    layers = torch.zeros(tokens, k, dtype=torch.long)
    for token, rank in itertools.product(range(tokens), range(k)):
        layers[token, rank] = next(
            layer
            for layer in range(depth)
            if all(int(top[later, token, rank]) == int(top[-1, token, rank]) for later in range(layer, depth))
        )
    return layers


def tau_by_definition(values: tuple[int, ...]) -> float:
    pairs = list(itertools.combinations(values, 2))
    concordant = sum(a < b for a, b in pairs)
    return (concordant - (len(pairs) - concordant)) / len(pairs)


def identity(states: torch.Tensor) -> torch.Tensor:
    """A readout whose logits are the states themselves."""
    return states


def ladder(orders: list[list[int]], vocabulary: int = 8) -> torch.Tensor:
    """States of one token whose ranking at each layer is given."""
    states = torch.zeros(len(orders), 1, vocabulary)
    for layer, order in enumerate(orders):
        for rank, token in enumerate(order):
            states[layer, 0, token] = 10.0 - rank
    return states


def test_known_layers() -> None:
    orders = [[3, 1, 2], [1, 3, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    top = top_tokens(ladder(orders), identity, 3)
    assert top[:, 0].tolist() == orders
    assert saturation_layers(top).tolist() == [[1, 2, 2]]


def test_a_rank_that_never_mismatches_saturates_at_0_and_one_that_comes_last_at_the_end() -> None:
    orders = [[1, 2, 3]] * 4 + [[1, 3, 2]]
    assert saturation_layers(top_tokens(ladder(orders), identity, 3)).tolist() == [[0, 4, 4]]
    # Right before, wrong once: what counts is the last change.
    orders = [[1, 2, 3], [1, 2, 3], [2, 1, 3], [1, 2, 3], [1, 2, 3]]
    assert saturation_layers(top_tokens(ladder(orders), identity, 3)).tolist() == [[3, 3, 0]]


def test_the_token_must_stand_at_that_exact_rank() -> None:
    # Token 2 is in the top three all along; at the second rank only from layer 2 on.
    orders = [[2, 1, 0], [1, 0, 2], [1, 2, 0]]
    assert saturation_layers(top_tokens(ladder(orders), identity, 3)).tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_layers_match_the_definition(depth: int) -> None:
    top = torch.randint(0, 3, (depth, 200, 4))
    assert torch.equal(saturation_layers(top), by_definition(top))


def test_filter_and_trailing_ranks() -> None:
    assert settles_early(torch.tensor([[17, 0], [18, 0]]), 20).tolist() == [True, False]
    assert settles_early(torch.tensor([[13, 0], [14, 0]]), 16).tolist() == [True, False]  # floor(13.6)
    layers = torch.tensor([[1, 2, 3, 9, 9], [1, 9, 3, 9, 9], [9, 9, 9, 9, 9], [1, 2, 3, 4, 5]])
    assert ranks_in_play(layers, 9).tolist() == [3, 3, 0, 5]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_tau_of_all_small_cases(m: int) -> None:
    cases = list(itertools.product(range(m + 1), repeat=m))
    found = strict_tau(torch.tensor(cases), torch.full((len(cases),), m))
    assert found.tolist() == pytest.approx([tau_by_definition(case) for case in cases], abs=1e-15)


def test_tau_is_scipys_where_there_are_no_ties() -> None:
    cases = list(itertools.permutations(range(5)))
    found = strict_tau(torch.tensor(cases), torch.full((len(cases),), 5))
    expected = [float(stats.kendalltau(range(5), case).statistic) for case in cases]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_only_ranks_in_play_count() -> None:
    layers = torch.tensor([[1, 2, 3, 0, 0]])
    assert strict_tau(layers, torch.tensor([3])).item() == 1
    assert strict_tau(layers, torch.tensor([5])).item() == pytest.approx(tau_by_definition((1, 2, 3, 0, 0)))
    assert math.isnan(strict_tau(layers, torch.tensor([1])).item())


@pytest.mark.parametrize("values", [(0, 1, 2, 3), (0, 0, 2, 1), (5, 1, 1, 1)])
def test_null_is_that_of_all_permutations(values: tuple[int, ...]) -> None:
    """Drawn permutations give each tau as often as the enumeration of all of them does."""
    exact: dict[float, int] = {}
    for labels in itertools.permutations(range(4)):
        tau = tau_by_definition(tuple(value for _, value in sorted(zip(labels, values, strict=True))))
        exact[round(tau, 9)] = exact.get(round(tau, 9), 0) + 1
    # The last rank is out of play and must change nothing.
    layers = torch.tensor([(*values, 9)])
    drawn = permuted_tau(layers, torch.tensor([4]), 20_000, torch.Generator().manual_seed(0))[:, 0]
    seen = {tau: int((drawn - tau).abs().lt(1e-6).sum()) for tau in exact}
    assert sum(seen.values()) == 20_000
    if len(exact) > 1:
        expected = [count / 24 * 20_000 for count in exact.values()]
        assert stats.chisquare(list(seen.values()), expected).pvalue > 1e-3


def random_measure(parts: list[range], **settings: int) -> list[Saturation]:
    measures = []
    for part in parts:
        measure = Saturation(identity, k=4, permutations=50, **settings)
        for index in part:
            generator = torch.Generator().manual_seed(index)
            steps = torch.randn(7, 30, 12, generator=generator) * torch.linspace(2, 0.2, 7)[:, None, None]
            measure.add(Trajectory(steps.cumsum(0), index))
        measures.append(measure)
    return measures


@pytest.mark.parametrize("every", [1, 3])
def test_halves_merge_to_one_pass(every: int) -> None:
    whole, first, second = random_measure([range(12), range(5), range(5, 12)], every=every, tokens=17)
    first.merge(second)
    for name, value in whole.results().items():
        torch.testing.assert_close(first.results()[name], value, rtol=1e-10, atol=1e-10)
    assert whole.results()["tokens"] == 17 * len(range(0, 12, every))


def test_results_come_from_the_sums_alone() -> None:
    whole, empty = random_measure([range(4), range(0)])
    assert empty.results() == {}
    empty.restore(whole.sums)
    for name, value in whole.results().items():
        torch.testing.assert_close(empty.results()[name], value, rtol=0, atol=0)


def test_results_of_known_layers() -> None:
    measure = Saturation(identity, k=3, permutations=400)
    layers = torch.tensor([[0, 1, 2], [1, 2, 3], [1, 1, 1], [18, 1, 2], [1, 20, 20]])
    measure.observe(layers, 21, 0)  # the last two: too late, and one rank in play
    found = measure.results()
    assert found["layer.mean"].tolist() == pytest.approx([21 / 5, 25 / 5, 28 / 5])
    assert found["layer.histogram"].shape == (3, 21)
    assert found["layer.histogram"][0].nonzero()[:, 0].tolist() == [0, 1, 18]
    assert found["share.early"] == pytest.approx(4 / 5)
    assert found["share.ranked"] == pytest.approx(3 / 5)
    assert found["share.ordered"] == pytest.approx(2 / 3)
    assert found["tau"] == pytest.approx(1 / 3)
    # Both ordered tokens must draw their one best labelling of six: 1/36, and the tie is discordant under all.
    assert found["tau.p"] == pytest.approx(1 / 36, abs=0.03)
    assert float(found["tau.null"].max()) == pytest.approx(1 / 3)
    assert float(found["tau.null"].min()) == pytest.approx(-1)


def test_order_is_found_significant_and_disorder_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    ordered, random = Saturation(identity), Saturation(identity)
    for index in range(5):
        draws = torch.stack([torch.randperm(15, generator=generator)[:5] for _ in range(40)])
        ordered.observe(draws.sort(-1).values, 17, index)
        random.observe(draws, 17, index)
    assert ordered.results()["tau"] == 1
    assert ordered.results()["tau.p"] == pytest.approx(1 / 1001)
    assert random.results()["tau.p"] > 0.01


def test_texts_draw_their_own_permutations() -> None:
    """Were they the same ones, the null of a corpus would be as wide as that of one text."""
    layers = torch.tensor([[0, 1, 2, 3, 4]] * 8)
    first, second = Saturation(identity), Saturation(identity)
    first.observe(layers, 17, 0)
    second.observe(layers, 17, 1)
    assert not torch.equal(first.sums["null"], second.sums["null"])


@pytest.mark.parametrize("argument", ["k", "every", "tokens", "permutations"])
def test_arguments_are_refused_by_name(argument: str) -> None:
    with pytest.raises(RestpointError, match=f"^{argument} is 0"):
        Saturation(identity, **{argument: 0})


def test_k_above_the_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(RestpointError, match=r"^k is 9 and the vocabulary has 8 tokens"):
        Saturation(identity, k=9).add(Trajectory(ladder([[0], [1]]), 0))


def test_bundled_model_settles_in_order(reference) -> None:
    layered = LayeredModel(reference.model)
    ids = torch.tensor([reference.tokenizer(bundled.prompts()[0].text)["input_ids"][:48]])
    states = states_of(layered, ids, tuple(range(layered.depth)))[0].transpose(0, 1).float()
    measure = Saturation(lambda state: layered.logits(state[None])[0])
    measure.add(Trajectory(states, 0))
    found = measure.results()
    own = torch.stack([layered.logits(state[None])[0].topk(5).indices for state in states])
    assert found["layer.mean"].tolist() == pytest.approx(by_definition(own).double().mean(0).tolist())
    assert float(found["tau"]) > float(found["tau.null"].max())
