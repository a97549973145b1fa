"""The recurrence refined along its drafts: against NumPy's divergence and SciPy's optimum of the same objective."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.descent import RefineProgress, RefineSettings
from restpoint.equilibrium.fitting import fit_recurrence
from restpoint.equilibrium.predictors import RestPointRecurrence
from restpoint.equilibrium.refining_recurrence import refine_recurrence
from restpoint.equilibrium.streaming import Chunk, FitSettings
from restpoint.errors import RestpointError

HIDDEN, TOKENS = 5, 10
generator = torch.Generator().manual_seed(3)
UNEMBED = torch.randn(HIDDEN, TOKENS, generator=generator, dtype=torch.float64)
FROM_STATE = 0.8 * torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
FROM_REST = 0.5 * torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
SETTINGS = RefineSettings(steps=300, learning_rate=1e-2, rows=96, every=50)


def head(rest: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(rest, rest.shape[-1:]) @ UNEMBED.to(rest.dtype) * 1.5


def text(seed: int, chunks: int = 3, length: int = 40, noise: float = 0.4):
    """Rest states that bend away from what a linear recurrence can tell, in coordinates of very different sizes."""
    sizes = torch.tensor([100.0, 10.0, 1.0, 0.1, 1.0], dtype=torch.float64)

    def start() -> Iterator[Chunk]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(chunks):
            states = torch.randn(4, length, HIDDEN, generator=draw, dtype=torch.float64)
            rest = torch.zeros(4, length, HIDDEN, dtype=torch.float64)
            for place in range(length):
                before = rest[:, place - 1] if place else torch.zeros(4, HIDDEN, dtype=torch.float64)
                rest[:, place] = torch.tanh(states[:, place] @ FROM_STATE + before @ FROM_REST)
                rest[:, place] += noise * torch.randn(4, HIDDEN, generator=draw, dtype=torch.float64)
            yield Chunk((states * sizes + 3).unsqueeze(2), rest)

    return start


def fitted(features: int, steps: int) -> RestPointRecurrence:
    settings = FitSettings(strengths=(1e-3,), features=features, steps=steps)
    return fit_recurrence(text(0), text(1), (0,), settings).predictor


def divergence(predictor: RestPointRecurrence, start, length: int) -> float:
    """KL in nats of all drafts of so many tokens, one position after another, from probabilities by NumPy."""
    found = []
    for chunk in start():
        for row in range(chunk.rest.shape[0]):
            for place in range(chunk.rest.shape[1] - length):
                previous = chunk.rest[row, place]
                for step in range(length):
                    previous = predictor.predict([chunk.states[row, place + 1 + step, 0]], previous, step)
                    true = chunk.rest[row, place + 1 + step]
                    p, q = (torch.softmax(head(rest[None])[0], -1).numpy() for rest in (true, previous))
                    found.append(float((p * np.log(p / q)).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize("features", [0, 12])
def test_drafts_tell_the_laws_better_and_it_says_by_how_much(features):
    start = fitted(features, steps=2)
    seen: list[RefineProgress] = []
    with torch.no_grad():
        found = refine_recurrence(start, text(0), text(1), head, SETTINGS, progress=seen.append)
    assert found.after < 0.98 * found.before
    assert found.before == pytest.approx(divergence(start, text(1), 3), rel=1e-6)
    assert found.after == pytest.approx(divergence(found.predictor, text(1), 3), rel=1e-6)
    assert found.trace == tuple(seen)
    assert found.held_out_rows == 3 * 4 * (40 - 3) * 3
    assert found.predictor.name == start.name
    assert found.predictor.parameters_read() == start.parameters_read()
    assert len(found.predictor.maps) == 2
    again = refine_recurrence(start, text(0), text(1), head, SETTINGS)
    assert torch.equal(again.predictor.maps[1].matrix, found.predictor.maps[1].matrix)
    if features:
        assert start.features is not None
        assert found.predictor.features is not None
        assert not torch.equal(found.predictor.features.weight, start.features.weight)


def test_it_comes_near_the_optimum_that_scipy_finds():
    """Of one linear map along drafts of two tokens, on the same rows, full batches, from the same start."""
    start = fitted(0, steps=1)
    chunks = list(text(0)())
    states = torch.cat([chunk.states[:, :, 0] for chunk in chunks])
    rest = torch.cat([chunk.rest for chunk in chunks])
    count = rest.shape[1]
    mean, deviation = states.mean((0, 1)), states.std((0, 1))
    laws = [torch.log_softmax(head(rest[:, 1 + step : count - 1 + step]), -1) for step in range(2)]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).reshape(2 * HIDDEN + 1, HIDDEN).requires_grad_()
        previous, losses = rest[:, : count - 2], []
        for step, law in enumerate(laws):
            z = (states[:, 1 + step : count - 1 + step] - mean) / deviation
            previous = torch.cat((z, previous, torch.ones_like(z[..., :1])), -1) @ weights
            losses.append((law.exp() * (law - torch.log_softmax(head(previous), -1))).sum(-1).mean())
        loss = torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        return float(loss.detach()), gradient.flatten().numpy()

    matrix, offset = start.maps[0].matrix.double(), start.maps[0].offset.double()
    shifted = offset + mean @ matrix[:HIDDEN]
    initial = torch.cat((matrix[:HIDDEN] * deviation[:, None], matrix[HIDDEN:], shifted[None])).flatten().numpy()
    before, optimum = (
        objective(initial)[0],
        scipy.optimize.minimize(objective, initial, jac=True, method="L-BFGS-B").fun,
    )
    settings = RefineSettings(steps=400, learning_rate=1e-2, rows=1024, every=100)
    found = refine_recurrence(start, text(0), text(0), head, settings)
    assert found.before == pytest.approx(before, rel=1e-6)
    assert before - optimum > 0.01
    assert -1e-5 < found.after - optimum < 0.05 * (before - optimum)


def test_it_is_never_worse_than_its_start():
    """A learning rate that only does harm: the recurrence that was given comes back, and it stops early."""
    start = fitted(12, steps=2)
    settings = RefineSettings(steps=400, learning_rate=30.0, rows=96, every=10, patience=3)
    found = refine_recurrence(start, text(0), text(1), head, settings)
    assert found.predictor is start
    assert (found.step, found.after) == (0, found.before)
    assert [look.step for look in found.trace] == [0, 10, 20, 30]


def test_errors():
    start = fitted(0, steps=2)
    with pytest.raises(RestpointError, match="held_out gave no row"):
        refine_recurrence(start, text(0), text(1, length=3), head)
    with pytest.raises(RestpointError, match="the stream gave no row"):
        refine_recurrence(start, text(0, chunks=0), text(1), head)
    with pytest.raises(RestpointError, match="longer than 3 tokens"):
        refine_recurrence(start, text(0, length=3), text(1), head)
    with pytest.raises(RestpointError, match="layer 7"):
        refine_recurrence(replace(start, state_layers=(7,)), text(0), text(1), head)
    maps = tuple(AffineMap(one.matrix * float("nan"), one.offset) for one in start.maps)
    with pytest.raises(RestpointError, match="held-out divergence after 0 steps is nan"):
        refine_recurrence(replace(start, maps=maps), text(0), text(1), head)
