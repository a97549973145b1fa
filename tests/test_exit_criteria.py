"""Criteria against their formulas on whole sequences of iterates, row by row."""

import math

import numpy as np
import ot
import pytest
import torch

from restpoint.equilibrium.exits import (
    Acceleration,
    ArgmaxStability,
    Cosine,
    Divergence,
    EntropyDifference,
    Iterate,
    RelativeStep,
    StepNorm,
)
from restpoint.equilibrium.transport_exit import TransportStep
from restpoint.errors import RestpointError

STEPS, ROWS, HIDDEN, VOCABULARY = 24, 40, 6, 9
PLACES = torch.randn(VOCABULARY, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def iterates():
    """Rows that converge at different rates around different points, some of them drifting; and their logits."""
    generator = np.random.default_rng(0)
    rest, start = generator.normal(size=(2, ROWS, HIDDEN))
    rate, drift = generator.uniform(0.2, 0.9, ROWS)[:, None], generator.normal(scale=0.02, size=(ROWS, HIDDEN))
    states = np.stack([rest + start * rate**step + drift * step for step in range(STEPS + 1)])
    return states, states @ generator.normal(size=(HIDDEN, VOCABULARY))


def first_stop(criterion, states, logits):
    """Step at which every row stops; rows that stopped are dropped, as the models that use criteria do."""
    states, logits = torch.tensor(states), torch.tensor(logits)
    rows, stopped = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    memory = criterion.init(states[0])
    for step in range(1, STEPS + 1):
        here = Iterate(step, states[step, rows], states[step - 1, rows], lambda now=step, live=rows: logits[now, live])
        stop = criterion.stop(memory, here)
        stopped[rows[stop]] = step
        memory.keep((~stop).nonzero().squeeze(-1))
        rows = rows[~stop]
        if not len(rows):
            break
    return stopped.numpy()


def expected_stop(quantity, threshold, hits, first):
    """First step >= first at which the quantity (steps, rows) has been below for ``hits`` steps in a row."""
    stops = np.zeros(ROWS, dtype=int)
    for row in range(ROWS):
        for step in range(first + hits - 1, STEPS + 1):
            if all(quantity[step - back, row] < threshold for back in range(hits)):
                stops[row] = step
                break
    return stops


def carried(p, q, support):
    """The cost of carrying p's largest entries into q's, both scaled to sum to one, by POT's exact programme."""
    some, other = (np.argsort(-law)[:support] for law in (p, q))
    cost = np.linalg.norm(PLACES.numpy()[some][:, None] - PLACES.numpy()[other][None], axis=-1)
    return ot.emd2(p[some] / p[some].sum(), q[other] / q[other].sum(), cost)


def quantities():
    states, logits = iterates()
    none = np.full((1, ROWS), math.nan)
    moves = np.diff(states, axis=0)
    step = np.concatenate((none, np.linalg.norm(moves, axis=-1)))
    size = np.linalg.norm(states, axis=-1)
    acceleration = np.concatenate((none, none, np.linalg.norm(np.diff(moves, axis=0), axis=-1)))
    cosine = np.concatenate((none, 1 - (states[1:] * states[:-1]).sum(-1) / size[1:] / size[:-1]))
    law = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(law * np.log(law)).sum(-1)
    change = np.concatenate((none, none, np.abs(np.diff(entropy, axis=0))[1:]))
    transport, cut = (
        np.array(
            [
                [math.nan if step < 2 else carried(law[step - 1, row], law[step, row], support) for row in range(ROWS)]
                for step in range(STEPS + 1)
            ]
        )
        for support in (VOCABULARY, 3)
    )
    divergence = np.concatenate((none, none, (law[1:-1] * np.log(law[1:-1] / law[2:])).sum(-1)))
    return {
        StepNorm(threshold=0.1): (step, 0.1, 1, 1),
        StepNorm(threshold=0.1, hits=3): (step, 0.1, 3, 1),
        RelativeStep(): (step / size, 0.03, 1, 1),
        Acceleration(threshold=0.02): (acceleration, 0.02, 2, 2),
        Acceleration(threshold=0.02, relative=True, hits=1): (acceleration / size, 0.02, 1, 2),
        Cosine(): (cosine, 1e-3, 1, 1),
        EntropyDifference(threshold=0.01): (change, 0.01, 1, 2),
        Divergence(): (divergence, 1e-3, 1, 2),
        TransportStep(threshold=0.05, embeddings=PLACES, support=VOCABULARY): (transport, 0.05, 1, 2),
        TransportStep(threshold=0.05, embeddings=PLACES, support=3, hits=2): (cut, 0.05, 2, 2),
    }


@pytest.mark.parametrize(("criterion", "definition"), quantities().items(), ids=str)
def test_rows_stop_where_the_formula_says(criterion, definition):
    expected = expected_stop(*definition)
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(first_stop(criterion, *iterates()), expected)


@pytest.mark.parametrize("hits", [1, 2, 5])
def test_argmax_stability(hits):
    states, logits = iterates()
    logits = (
        logits + np.random.default_rng(1).normal(size=logits.shape) * 0.6 ** np.arange(STEPS + 1)[:, None, None] * 20
    )
    best = logits.argmax(-1)
    expected = np.zeros(ROWS, dtype=int)
    for row in range(ROWS):
        for step in range(hits + 1, STEPS + 1):
            if len(set(best[step - hits : step + 1, row])) == 1:
                expected[row] = step
                break
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(first_stop(ArgmaxStability(hits=hits), states, logits), expected)


def test_a_steady_drift_is_at_rest_by_its_acceleration_only():
    states = torch.arange(5.0)[:, None, None] * torch.ones(1, 1, 4)
    steady, moving = Acceleration(threshold=0.1), StepNorm(threshold=0.1)
    memories = [criterion.init(states[0]) for criterion in (steady, moving)]
    seen = [
        [bool(c.stop(m, Iterate(k, states[k], states[k - 1], lambda: states[0]))) for k in range(1, 5)]
        for c, m in zip((steady, moving), memories, strict=True)
    ]
    assert seen == [[False, False, True, True], [False] * 4]


def test_criteria_of_states_never_ask_for_logits():
    def refuse():
        raise AssertionError

    state = torch.ones(2, 3)
    for criterion in (StepNorm(threshold=1.0), RelativeStep(), Acceleration(threshold=1.0), Cosine()):
        criterion.stop(criterion.init(state), Iterate(1, state, state, refuse))


def test_a_law_with_zeros_has_an_entropy():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    criterion = EntropyDifference()
    memory = criterion.init(torch.zeros(1, 2))
    stops = [bool(criterion.stop(memory, Iterate(k, logits, logits, lambda: logits))) for k in (1, 2)]
    assert stops == [False, True]


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_thresholds_that_are_refused(threshold):
    with pytest.raises(RestpointError, match="threshold is"):
        StepNorm(threshold=threshold)
    with pytest.raises(RestpointError, match="hits is 0"):
        ArgmaxStability(hits=0)
    with pytest.raises(RestpointError, match="support is 0"):
        TransportStep(threshold=1.0, embeddings=PLACES, support=0)


def test_a_threshold_of_zero_never_stops():
    states = np.zeros((STEPS + 1, ROWS, HIDDEN))
    for kind in (StepNorm, RelativeStep, Acceleration, EntropyDifference, Divergence):
        assert not first_stop(kind(threshold=0.0), states, np.zeros((STEPS + 1, ROWS, VOCABULARY))).any()
