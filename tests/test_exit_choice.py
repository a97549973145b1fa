"""The exit layer and length with the most tokens for the cost, from decayed shadow acceptance."""

import itertools
import random

import pytest
import torch

from restpoint.decode.drafters.exit_choice import ExitChoice, ExitCosts, StopThreshold, shadow_hits
from restpoint.errors import RestpointError

COSTS = ExitCosts({4: 0.3, 8: 0.55, 12: 0.8}, lambda layer, drafted: 1 + 0.05 * drafted)


def test_the_choice_is_the_maximum_of_tokens_for_the_cost() -> None:
    choice = ExitChoice((4, 8, 12), longest=5, decay=0.9, prior_weight=1.0)
    for seed in range(20):
        draws = random.Random(seed)
        record = choice.init()
        rates = {layer: draws.random() for layer in choice.layers}
        for _ in range(30):
            record.observe({layer: [draws.random() < rate] for layer, rate in rates.items()})

        def tokens_for_cost(layer: int, drafted: int, record=record) -> float:
            rate = record.acceptance(layer)
            expected = 1 + sum(rate**depth for depth in range(1, drafted + 1))
            return expected / (drafted * COSTS.draft[layer] + COSTS.verify(layer, drafted))

        every = itertools.product(choice.layers, range(6))
        best = max(tokens_for_cost(*one) for one in every)
        assert tokens_for_cost(*record.choose(COSTS)) == pytest.approx(best, rel=1e-12)


def test_a_layer_that_is_right_is_chosen_and_a_useless_one_is_not_drafted_with() -> None:
    choice = ExitChoice((4, 8, 12), longest=6)
    record = choice.init()
    record.observe({4: [False] * 50, 8: [True] * 50, 12: [True] * 50})
    layer, drafted = record.choose(COSTS)
    assert layer == 8
    assert drafted >= 1
    record.observe({layer: [False] * 80 for layer in choice.layers})
    assert record.choose(COSTS)[1] == 0


def test_a_least_length_is_kept_to() -> None:
    for least in range(4):
        record = ExitChoice((4, 8, 12), longest=6, least=least).init()
        record.observe({4: [False] * 50, 8: [True, False] * 25, 12: [False] * 50})
        assert record.choose(COSTS) == (8 if least else 4, least)


def test_old_positions_fade() -> None:
    record = ExitChoice((4,), decay=0.5, prior=1.0, prior_weight=2.0).init()
    record.observe({4: [False]})
    assert record.acceptance(4) == pytest.approx(1 / 2)
    record.observe({4: [True, True]})
    assert record.acceptance(4) == pytest.approx((0.25 + 0.5 + 1) / (0.5 + 0.5 + 1))
    untouched = ExitChoice((4, 8), prior=0.3).init()
    untouched.observe({4: [True]})
    assert untouched.acceptance(8) == pytest.approx(0.3)


def test_shadow_hits_ask_every_layer_at_every_position() -> None:
    states = {2: torch.eye(4)[None, :3], 5: torch.eye(4).flip(0)[None, :3]}
    asked: list[int] = []

    def logits(layer: int, kept: torch.Tensor) -> torch.Tensor:
        asked.append(layer)
        return kept

    assert shadow_hits(states, [0, 2, 1], logits) == {2: [True, False, False], 5: [False, True, True]}
    assert asked == [2, 5]
    ordered = {2: torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]])}
    assert shadow_hits(ordered, [1, 0, 0], lambda _, kept: kept, named=2) == {2: [True, False, True]}


def test_the_threshold_moves_between_both_means() -> None:
    threshold = StopThreshold(stood=0.8, fell=0.2, decay=0.5)
    assert threshold.stops(0.49)
    assert not threshold.stops(0.51)
    threshold.observe([0.6, 0.4, 0.9], accepted=1)
    assert (threshold.stood, threshold.fell) == (pytest.approx(0.7), pytest.approx(0.3))
    threshold.observe([0.7], accepted=1)
    assert threshold.fell == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": (3, 3)}, "layers"),
        ({"layers": (3,), "longest": 0}, "longest"),
        ({"layers": (3,), "least": 9}, "least"),
        ({"layers": (3,), "decay": 0.0}, "decay"),
        ({"layers": (3,), "prior": 2.0}, "prior"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, named: str) -> None:
    with pytest.raises(RestpointError, match=named):
        ExitChoice(**wrong)
    with pytest.raises(RestpointError, match="layer 5"):
        ExitChoice((3,)).init().observe({5: [True]})
