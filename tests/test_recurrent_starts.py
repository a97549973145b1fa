"""Starts and extrapolation in the loop, against first states given by hand, brute force and closed forms."""

import numpy as np
import pytest
import torch

from looped import Slow, equilibrium, pieces, recurrent, tokens
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.exits import RelativeStep
from restpoint.equilibrium.predictors import RestPointRecurrence
from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.streaming import FitSettings
from restpoint.errors import RestpointError
from restpoint.model.recurrent.starts import PredictedStart, PreviousStart, ZeroStart, fit_start

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
HIDDEN = 32


def affine_start(seed=1):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2 * HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    affine = AffineMap(matrix, torch.randn(HIDDEN, generator=generator, dtype=torch.float64))
    return PredictedStart(RestPointRecurrence((0,), (affine,))), affine


@torch.no_grad()
def one_by_one(model, ids, start, budget=None, **settings):
    cache = model.new_cache(budget=budget)
    outputs = [model(part, cache=cache, start=start, **settings) for part in pieces(ids, (1,) * ids.shape[1])]
    return torch.cat([own.logits for own in outputs], 1), torch.cat([own.steps for own in outputs], 1)


@pytest.mark.parametrize("exits", [None, RelativeStep(threshold=0.3)])
@pytest.mark.parametrize("kind", ["zero", "previous", "predicted"])
@torch.no_grad()
def test_tokens_begin_where_the_start_says(kind, exits):
    """Every start against first states that are given by hand, in a batch, token by token."""
    model, ids = recurrent(mean_recurrence=7, gain=0.3), tokens()
    predicted, affine = affine_start()
    start = {"zero": ZeroStart(), "previous": PreviousStart(), "predicted": predicted}[kind]
    logits, steps = one_by_one(model, ids, start, exits=exits)
    cache, last, expected, ran = model.new_cache(), None, [], []
    for part in pieces(ids, (1,) * 11):
        entering = model.model.embed_tokens(part) * model.config.embedding_scale
        first = None
        if kind == "zero":
            first = torch.zeros_like(entering)
        elif last is not None and kind == "previous":
            first = last
        elif last is not None:
            injected = injected_of(model, ids)[:, len(expected) : len(expected) + 1]
            first = torch.cat((injected, last), -1) @ affine.matrix + affine.offset
        output = model(part, cache=cache, initial_state=first, exits=exits, output_states=True)
        last = output.states[-1]
        expected.append(output.logits)
        ran.append(output.steps)
    torch.testing.assert_close(logits, torch.cat(expected, 1), **CLOSE)
    assert torch.equal(steps, torch.cat(ran, 1))
    plain = one_by_one(model, ids, None, exits=exits)[0]
    assert not torch.allclose(plain, logits, rtol=1e-3)


def injected_of(model, ids):
    seen = []
    hook = model.model.prelude[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(ids, use_cache=False)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_the_first_token_of_a_longer_pass_begins_there_and_the_others_as_trained():
    model, ids = recurrent(gain=0.3), tokens()
    cache, other = model.new_cache(), model.new_cache()
    before = model(ids[:, :4], cache=cache, output_states=True)
    model(ids[:, :4], cache=other)
    noise = model.model.noise.at(torch.arange(4, 11)[None], before.logits).expand(3, -1, -1)
    first = torch.cat((before.states[-1][:, -1:], noise[:, 1:]), 1)
    expected = model(ids[:, 4:], cache=other, initial_state=first).logits
    torch.testing.assert_close(model(ids[:, 4:], cache=cache, start=PreviousStart()).logits, expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_no_previous_token(side):
    model, ids, following = recurrent(gain=0.3), tokens(2), torch.tensor([[5], [7]])
    mask = torch.ones_like(ids)
    gap = slice(0, 4) if side == "left" else slice(7, 11)
    mask[1, gap] = 0
    text = ids[1:, 4:] if side == "left" else ids[1:, :7]
    cache, alone = model.new_cache(), model.new_cache()
    model(ids, attention_mask=mask, cache=cache)
    last = model(text, cache=alone, output_states=True).states[-1][0, -1]
    torch.testing.assert_close(cache.last_state[1], last, **CLOSE)
    grown = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
    found = model(following, attention_mask=grown, cache=cache, start=PreviousStart()).logits[1]
    if side == "left":
        expected = model(following[1:], cache=alone, start=PreviousStart()).logits[0]
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_the_last_state_goes_where_the_rows_go():
    model, ids = recurrent(gain=0.3), tokens()
    cache = model.new_cache()
    model(ids, cache=cache)
    kept = cache.last_state.clone()
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.last_state, kept[[2, 0]])
    cache.crop(-1)
    assert cache.last_state is None
    model(ids[:2], cache=cache)
    cache.reset()
    assert cache.last_state is None


@torch.no_grad()
def test_generate_takes_a_start():
    model, ids = recurrent(gain=0.3, eos_token_id=None), tokens(2)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, start=PreviousStart(), pad_token_id=0)
    cache, part, expected = model.new_cache(), ids, [ids]
    for _ in range(6):
        part = model(part, cache=cache, start=PreviousStart()).logits[:, -1:].argmax(-1)
        expected.append(part)
    assert torch.equal(found, torch.cat(expected, 1))


@torch.no_grad()
def test_a_fitted_start_is_the_least_squares_solution():
    model, ids = recurrent(gain=0.3), tokens(8, 60)
    fitted = fit_start(model, [ids[:4], ids[4:]], [tokens(2, 60, seed=5)], 4, FitSettings(strengths=(0.0,), features=0))
    states = model.model(ids, num_steps=4, use_cache=False, output_states=True).states[-1]
    inputs = torch.cat((injected_of(model, ids)[:, 1:], states[:, :-1], torch.ones(8, 59, 1)), -1).flatten(0, 1)
    solved = np.linalg.lstsq(inputs.numpy(), states[:, 1:].flatten(0, 1).numpy(), rcond=None)[0]
    affine = fitted.predictor.maps[0]
    np.testing.assert_allclose(affine.matrix.numpy(), solved[:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(affine.offset.numpy(), solved[-1], rtol=1e-5, atol=1e-6)


# --- extrapolation ---


@torch.no_grad()
def test_extrapolation_comes_to_where_plain_iteration_comes_in_fewer_steps():
    model, ids = recurrent(gain=0.2), tokens(2, 4)
    exits = RelativeStep(threshold=1e-9)
    logits, steps = one_by_one(model, ids, None, budget=1, solver=Anderson(), exits=exits, num_steps=150)
    _, plain = one_by_one(model, ids, None, budget=1, exits=exits, num_steps=150)
    assert int(steps.max()) < 150
    assert float(steps.double().mean()) < 0.8 * float(plain.double().mean())
    for row in range(2):
        slow = Slow(model, 150, lambda s, _: float((s[-1] - s[-2]).norm() / s[-1].norm()) < 1e-10, budget=1)
        torch.testing.assert_close(logits[row], slow.run(ids[row])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_linear_core_of_low_rank_is_solved_in_as_many_steps_as_its_rank(monkeypatch):
    """s = A s + e, A of rank 3: its rest point is (I - A)^-1 e, which Krylov methods reach in rank + 1 steps."""
    model, ids = recurrent(), tokens(3, 2)
    generator = torch.Generator().manual_seed(4)
    left, _ = torch.linalg.qr(torch.randn(HIDDEN, 3, generator=generator, dtype=torch.float64))
    core = left @ torch.diag(torch.tensor([0.95, 0.8, -0.9], dtype=torch.float64)) @ left.T
    monkeypatch.setattr(model.model, "step", lambda state, injected, passing: state @ core.T + injected)
    injected = injected_of(model, ids)
    expected = torch.linalg.solve(torch.eye(HIDDEN, dtype=torch.float64) - core, injected.flatten(0, 1).T).T
    outputs = {}
    for solver in (None, Anderson()):
        cache, found, ran = model.new_cache(budget=1), [], []
        for part in pieces(ids, (1, 1)):
            output = model(
                part,
                cache=cache,
                solver=solver,
                exits=RelativeStep(threshold=1e-6),
                num_steps=500,
                output_states=True,
            )
            found.append(output.states[-1])
            ran.append(output.steps)
        outputs[solver] = torch.cat(found, 1).flatten(0, 1), torch.cat(ran)
    torch.testing.assert_close(outputs[Anderson()][0], expected, rtol=1e-4, atol=1e-4)
    assert int(outputs[Anderson()][1].max()) <= 7
    assert int(outputs[None][1].min()) > 40


@torch.no_grad()
def test_longer_passes_are_iterated_plainly():
    model, ids = recurrent(gain=0.3), tokens()
    one, other = model.new_cache(budget=1), model.new_cache(budget=1)
    found = model(ids, cache=one, solver=Anderson()).logits
    torch.testing.assert_close(found, model(ids, cache=other).logits, **CLOSE)


def test_what_makes_no_sense_is_refused():
    model, ids = recurrent(), tokens(1, 2)
    with pytest.raises(RestpointError, match="start: it is for decoding"):
        model(ids, start=ZeroStart())
    with pytest.raises(RestpointError, match="solver: it gives no gradients"):
        model(ids, solver=Anderson(), cache=model.new_cache(budget=1))
    with torch.no_grad():
        with pytest.raises(RestpointError, match="start: initial_state"):
            model(ids, start=ZeroStart(), initial_state=torch.zeros(1, 2, HIDDEN))
        with pytest.raises(RestpointError, match=r"solver: the map must be the same.*budget=1"):
            model(ids, solver=Anderson(), cache=model.new_cache())
        with pytest.raises(RestpointError, match="solver: this model has one"):
            equilibrium()(ids, solver=Anderson())
