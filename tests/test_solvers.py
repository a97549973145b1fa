import itertools
import math
import statistics
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixed_points import Affine, affine, tanh_layer
from restpoint.equilibrium import Anderson, Broyden, Method, Picard, Status, solve
from restpoint.equilibrium.solvers.anderson import mixing_weights
from restpoint.equilibrium.solvers.method import State
from restpoint.errors import RestpointError

METHODS = [Picard(), Anderson(), Broyden()]
BY_NAME = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


class Recorder:
    """f, and the points at which it was called."""

    def __init__(self, f):
        self.f, self.points, self.rows = f, [], []

    def __call__(self, z, rows=None):
        self.points.append(z.clone())
        self.rows.append(rows)
        return self.f(z) if rows is None else self.f(z, rows)


# --- fixed points ---


@BY_NAME
@pytest.mark.parametrize(
    ("kind", "rho"), list(itertools.product(("symmetric", "general", "triangular"), (0.5, 0.9, 0.99)))
)
def test_contractions_reach_the_closed_form(method, kind, rho):
    f = affine(kind, rho)
    found = solve(f, torch.zeros_like(f.offset), method, tolerance=1e-10, max_steps=4000)
    assert bool(found.converged.all()), found.message
    difference = (f(found.value) - found.value).norm(dim=-1)
    torch.testing.assert_close(found.residual, difference / f(found.value).norm(dim=-1))
    assert bool(((found.value - f.solution).norm(dim=-1) <= f.error_bound(difference) * (1 + 1e-6) + 1e-12).all())


@pytest.mark.parametrize("method", [Anderson(window=20), Broyden()], ids=["Anderson", "Broyden"])
@pytest.mark.parametrize("kind", ["symmetric", "general", "triangular"])
def test_repelling_fixed_points_are_reached_with_memory_only(method, kind):
    f = affine(kind, 1.5, dim=12)
    start = torch.zeros_like(f.offset)
    found = solve(f, start, method, tolerance=1e-10, max_steps=200)
    assert bool(found.converged.all()), found.message
    torch.testing.assert_close(found.value, f.solution, rtol=1e-6, atol=1e-6)
    plain = solve(f, start, Picard(), tolerance=1e-10, max_steps=200)
    assert not bool(plain.converged.any())


@BY_NAME
def test_tanh_layers_agree_with_scipy(method):
    f = tanh_layer(0.7)
    start = torch.zeros(6, 24, dtype=torch.float64)
    found = solve(f, start, method, tolerance=1e-11, max_steps=400)
    assert bool(found.converged.all())
    flat = lambda x: f(torch.from_numpy(x).view(6, 24)).numpy().reshape(-1)  # noqa: E731
    root = scipy.optimize.root(lambda x: flat(x) - x, start.numpy().reshape(-1), method="krylov", tol=1e-11)
    np.testing.assert_allclose(found.value.numpy().reshape(-1), root.x, atol=1e-8)
    iterated = scipy.optimize.fixed_point(flat, start.numpy().reshape(-1), xtol=1e-12, maxiter=1000, method="iteration")
    np.testing.assert_allclose(found.value.numpy().reshape(-1), iterated, atol=1e-8)


# --- the methods against plain implementations of their formulas ---


def test_anderson_takes_the_steps_of_the_least_squares_formula():
    f, window, damping = tanh_layer(0.9, rows=1), 3, 0.8
    seen = Recorder(f)
    solve(
        seen,
        torch.zeros(1, 24).double(),
        Anderson(window=window, damping=damping, regularisation=0.0, safeguard=math.inf),
        tolerance=1e-12,
        max_steps=12,
    )
    points = [np.zeros(24)]
    changes = []
    for _ in range(11):
        z = points[-1]
        changes.append(f(torch.from_numpy(z)[None])[0].numpy() - z)
        step = z + damping * changes[-1]
        if len(points) > 1:
            dz = np.diff(np.stack(points), axis=0)[-window:].T
            dg = np.diff(np.stack(changes), axis=0)[-window:].T
            weights = np.linalg.lstsq(dg, changes[-1], rcond=None)[0]
            step = step - (dz + damping * dg) @ weights
        points.append(step)
    np.testing.assert_allclose(torch.cat(seen.points).numpy(), np.stack(points), atol=1e-7)


@pytest.mark.parametrize("memory", [1, 4, 30])
def test_broyden_takes_the_steps_of_the_dense_update(memory):
    f = tanh_layer(0.9, rows=1)
    seen = Recorder(f)
    solve(seen, torch.zeros(1, 24).double(), Broyden(memory=memory, safeguard=math.inf), tolerance=1e-12, max_steps=15)
    inverse, z = -np.eye(24), np.zeros(24)
    g = f(torch.from_numpy(z)[None])[0].numpy() - z
    points = [z]
    for step in range(14):
        new = z - inverse @ g
        change = f(torch.from_numpy(new)[None])[0].numpy() - new - g
        move = new - z
        if step % memory == 0:
            inverse = -np.eye(24)
        row = move @ inverse
        inverse = inverse + np.outer(move - inverse @ change, row) / (row @ change)
        z, g = new, g + change
        points.append(z)
    np.testing.assert_allclose(torch.cat(seen.points).numpy(), np.stack(points), atol=1e-9)


@pytest.mark.parametrize("method", [Anderson(damping=0.7), Broyden(damping=0.7)], ids=["Anderson", "Broyden"])
def test_rows_that_forget_go_on_as_if_they_had_just_begun(method):
    f = tanh_layer(0.9, rows=2)
    z = torch.randn(2, 24).double()
    state, never = method.init(z), torch.zeros(2, dtype=torch.bool)
    for _ in range(5):
        z = method.step(state, z, f(z) - z, never)
    z[1] = torch.randn(24)
    onwards = method.step(state, z, f(z) - z, torch.tensor([False, True]))
    plain = z + 0.7 * (f(z) - z)
    torch.testing.assert_close(onwards[1], plain[1])
    assert not torch.allclose(onwards[0], plain[0], rtol=1e-3)
    fresh = method.init(z)
    method.step(fresh, z, f(z) - z, never)
    for _ in range(3):
        z, difference = onwards, f(onwards) - onwards
        onwards, anew = method.step(state, z, difference, never), method.step(fresh, z, difference, never)
        torch.testing.assert_close(onwards[1], anew[1])
        assert not torch.allclose(onwards[0], anew[0], rtol=1e-6)


def test_anderson_takes_plain_steps_where_the_small_system_cannot_be_solved():
    method = Anderson(window=2)
    z, never = torch.randn(2, 3), torch.zeros(2, dtype=torch.bool)
    state = method.init(z)
    for step in range(3):
        z = method.step(state, z, torch.randn(2, 3), never)
        state.gram[0] += 10.0 * (1 - torch.eye(2)) * step  # row 0: what overflow or rounding might leave, indefinite
    difference = torch.randn(2, 3)
    state.holds[:] = True
    weights = mixing_weights(state.gram, torch.randn(2, 2), state.holds, method.regularisation)
    assert weights[0].tolist() == [0.0, 0.0]
    assert bool(weights[1].all())
    assert bool(method.step(state, z, difference, never).isfinite().all())


def test_affine_maps_take_as_many_steps_as_theory_says():
    f = affine("general", 0.95, dim=8)
    start = torch.zeros_like(f.offset)
    # Type II with full memory is GMRES, which ends in dim steps: one more to begin with, one to see that it is there.
    assert solve(f, start, Anderson(window=8, regularisation=0.0), tolerance=1e-8).evaluations <= 8 + 2
    assert solve(f, start, Broyden(), tolerance=1e-8).evaluations <= 2 * 8 + 1  # Gay 1979


# --- rows ---


@BY_NAME
def test_rows_do_not_know_of_each_other(method):
    f = affine("general", 0.9)
    settings = {"tolerance": 1e-8, "max_steps": 300}
    together = solve(f, torch.zeros_like(f.offset), method, **settings)
    for row in range(6):
        alone = solve(
            lambda z, row=row: z @ f.matrix.T + f.offset[row], torch.zeros(1, 16).double(), method, **settings
        )
        torch.testing.assert_close(together.value[row], alone.value[0], rtol=1e-6, atol=1e-6)
        assert int(together.steps[row]) == int(alone.steps[0])


def uneven(z, rows):
    """Contractions from easy to hard: row r multiplies by 0.1 r in turned coordinates."""
    return 0.1 * rows.to(z)[:, None] * z.roll(1, -1) + torch.linspace(1, 2, z.shape[-1]).to(z)


@BY_NAME
@pytest.mark.parametrize("check_every", [1, 3])
def test_frozen_rows_stay_as_they_are(method, check_every):
    seen = Recorder(lambda z: uneven(z, torch.arange(9)))
    start = torch.zeros(9, 5)
    found = solve(seen, start, method, tolerance=1e-5, max_steps=200, check_every=check_every)
    assert bool(found.converged.all())
    assert len(set(found.steps.tolist())) > 2
    assert len(seen.points) == found.evaluations
    for row, steps in enumerate(found.steps.tolist()):
        for point in seen.points[steps - 1 :]:
            assert torch.equal(point[row], found.value[row])
    eager = solve(seen, start, method, tolerance=1e-5, max_steps=200, check_every=1)
    assert torch.equal(found.value, eager.value)
    assert found.evaluations < eager.evaluations + check_every


@BY_NAME
def test_a_map_that_knows_its_rows_is_called_with_fewer(method):
    seen = Recorder(uneven)
    found = solve(seen, torch.zeros(9, 5), method, tolerance=1e-5, max_steps=200, row_aware=True)
    counts = [point.shape[0] for point in seen.points]
    assert counts == [int((found.steps > step).sum()) for step in range(found.evaluations)]
    assert counts[-1] < counts[0] == 9
    assert found.row_evaluations == sum(counts) == int(found.steps.sum())
    whole = solve(lambda z: uneven(z, torch.arange(9)), torch.zeros(9, 5), method, tolerance=1e-5, max_steps=200)
    torch.testing.assert_close(found.value, whole.value)
    assert whole.row_evaluations == 9 * whole.evaluations


def test_any_leading_axes_are_rows():
    f = affine("general", 0.8, rows=6)
    shaped = lambda z: f(z.view(6, 16)).view(2, 3, 16)  # noqa: E731
    found = solve(shaped, torch.zeros(2, 3, 16).double())
    assert found.residual.shape == found.status.shape == found.steps.shape == (2, 3)
    flat = solve(f, torch.zeros(6, 16).double())
    assert torch.equal(found.value.view(6, 16), flat.value)
    single = solve(lambda z: z @ f.matrix.T + f.offset[0], torch.zeros(16).double())
    assert single.residual.shape == ()
    torch.testing.assert_close(single.value, flat.value[0])


def test_a_batch_without_rows_calls_nothing():
    found = solve(lambda z: 1 / 0, torch.zeros(0, 4))
    assert found.value.shape == (0, 4)
    assert found.evaluations == 0
    assert found.message == ""


# --- failure ---


@BY_NAME
@pytest.mark.parametrize("max_steps", [3, 20, 300])
def test_expanding_maps_give_the_best_point_that_was_seen(method, max_steps):
    f = affine("general", 30.0, dim=64)
    seen = Recorder(f)
    found = solve(seen, torch.zeros_like(f.offset), method, tolerance=1e-12, max_steps=max_steps)
    assert bool(found.value.isfinite().all() & found.residual.isfinite().all())
    assert not bool(found.converged.any())
    sizes = torch.stack([(f(point) - point).norm(dim=-1) for point in seen.points])
    torch.testing.assert_close((f(found.value) - found.value).norm(dim=-1), sizes.min(0).values)
    assert "spectral_radius" in Status.DIVERGED.message
    assert "max_steps" in Status.MAX_STEPS.message


def test_a_row_that_keeps_growing_has_diverged():
    calls = Recorder(lambda z: 4 * z + 1)
    found = solve(calls, torch.zeros(2, 3), Picard(), max_steps=500)
    assert found.status.tolist() == [Status.DIVERGED] * 2
    assert found.evaluations < 100
    assert torch.equal(found.value, torch.zeros(2, 3))
    assert "2 rows diverged" in found.message


def test_overshooting_rows_are_caught_by_smaller_steps():
    f = lambda z: 1 - 1.5 * z  # noqa: E731
    start = torch.zeros(2, 3).double()
    assert not bool(solve(f, start, Picard(safeguard=math.inf)).converged.any())
    found = solve(f, start, Picard(safeguard=2.0))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, torch.full((2, 3), 0.4).double(), atol=1e-3, rtol=0)
    damped = solve(f, start, Picard(damping=0.4), tolerance=1e-12)
    assert damped.evaluations <= 3  # 1 + 0.4 (-1.5 - 1) = 0


@BY_NAME
def test_values_that_are_not_finite_are_stepped_back_from(method):
    def f(z):
        inside = z.abs().amax(-1, keepdim=True) < 1.2
        return torch.where(inside, 2 - 1.4 * z, math.nan)

    found = solve(f, torch.full((3, 4), 0.3).double(), method, tolerance=1e-6, max_steps=200)
    assert bool(found.converged.all()), found.message
    torch.testing.assert_close(found.value, torch.full((3, 4), 2 / 2.4).double(), atol=1e-5, rtol=0)


@BY_NAME
def test_rows_that_never_are_finite_leave_the_others_alone(method):
    f = affine("general", 0.9, rows=3)
    broken = torch.tensor([0.0, math.nan, 0.0]).double()[:, None]
    found = solve(lambda z: f(z) + broken, torch.ones(3, 16).double(), method, max_steps=200)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert torch.equal(found.value[1], torch.ones(16).double())
    assert found.residual[1] == math.inf
    assert found.steps[1] == 1
    clean = solve(f, torch.ones(3, 16).double(), method, max_steps=200)
    torch.testing.assert_close(found.value[[0, 2]], clean.value[[0, 2]])


@dataclass(frozen=True, kw_only=True)
class Stumbling(Method[State]):
    """Picard, but for one point that is not finite, in row 0 at the third step."""

    calls: list[int] = field(default_factory=lambda: [0])

    def init(self, value):
        return State()

    def step(self, state, value, difference, forget):
        self.calls[0] += 1
        proposal = value + difference
        if self.calls[0] == 3:
            proposal[0, 0] = math.inf
        return proposal


def test_f_is_not_called_at_points_that_are_not_finite():
    f = affine("symmetric", 0.5)
    seen = Recorder(f)
    found = solve(seen, torch.zeros_like(f.offset), Stumbling())
    assert bool(found.converged.all())
    assert bool(torch.stack(seen.points).isfinite().all())
    torch.testing.assert_close(seen.points[3][0], (seen.points[2] + f(seen.points[2]))[0] / 2)  # half a step instead


# --- the record ---


def test_the_trace_records_what_ran():
    seen = Recorder(lambda z: uneven(z, torch.arange(9)))
    found = solve(seen, torch.zeros(9, 5), Picard(), tolerance=1e-5, max_steps=200)
    assert [check.step for check in found.trace] == list(range(1, found.evaluations + 1))
    for check, point in zip(found.trace, seen.points, strict=True):
        rows = (found.steps >= check.step).nonzero()[:, 0]
        image = uneven(point, torch.arange(9))
        residual = ((image - point).norm(dim=-1) / image.norm(dim=-1))[rows]
        assert (check.rows, check.live) == (len(rows), int((found.steps > check.step).sum()))
        assert check.median == pytest.approx(float(residual.median()), rel=1e-4)
        assert check.largest == pytest.approx(float(residual.max()), rel=1e-4)
    assert found.trace[-1].live == 0
    short = solve(seen, torch.zeros(9, 5), Picard(), tolerance=1e-5, max_steps=7, check_every=3)
    assert [check.step for check in short.trace] == [3, 6, 7]


@BY_NAME
def test_trivial_maps_end_at_once(method):
    start = torch.randn(3, 4)
    found = solve(lambda z: z, start, method)
    assert found.evaluations == 1
    assert torch.equal(found.value, start)
    zero = solve(lambda z: 0 * z, start, method)
    assert zero.evaluations == 2
    assert torch.equal(zero.value, torch.zeros(3, 4))


@BY_NAME
def test_half_precision_maps_are_solved_to_their_rounding(method):
    f = tanh_layer(0.7, dtype=torch.float32)
    half = lambda z: f(z.float()).bfloat16()  # noqa: E731
    found = solve(half, torch.zeros(6, 24, dtype=torch.bfloat16), method, tolerance=1e-2)
    assert found.value.dtype == torch.bfloat16
    assert bool(found.converged.all())
    point = found.value.float()
    residual = (half(found.value).float() - point).norm(dim=-1) / half(found.value).float().norm(dim=-1)
    torch.testing.assert_close(found.residual, residual)


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a device."""

    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "item")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket.__name__ in ("index", "index_put_") else ()
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += masks or func.overloadpacket.__name__ in self.waiting
        return func(*args, **(kwargs or {}))


@BY_NAME
@pytest.mark.parametrize("row_aware", [False, True])
def test_the_device_is_waited_for_only_where_the_driver_looks(method, row_aware):
    f = uneven if row_aware else lambda z: uneven(z, torch.arange(9))
    with HostReads() as reads:
        found = solve(f, torch.zeros(9, 5), method, tolerance=1e-5, max_steps=200, check_every=5, row_aware=row_aware)
    assert found.evaluations >= 10
    shrinking = sum(check.live < check.rows for check in found.trace)
    # A look reads three numbers of one tensor, and finds the rows that go on where some are done; one more for start.
    assert reads.count <= 3 * len(found.trace) + shrinking + 1


def test_no_graph_is_recorded():
    weight = torch.full((4, 4), 0.1, requires_grad=True)
    found = solve(lambda z: torch.tanh(z @ weight) + 1, torch.zeros(2, 4, requires_grad=True))
    assert not found.value.requires_grad


# --- arguments ---


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Picard(damping=0.0), "damping"),
        (lambda: Picard(damping=1.5), "damping"),
        (lambda: Anderson(damping=math.nan), "damping"),
        (lambda: Picard(safeguard=1.0), "safeguard"),
        (lambda: Anderson(window=0), "window"),
        (lambda: Anderson(regularisation=-1e-3), "regularisation"),
        (lambda: Anderson(regularisation=math.inf), "regularisation"),
        (lambda: Broyden(memory=0), "memory"),
        (lambda: solve(torch.tanh, torch.zeros(2, 2), tolerance=0.0), "tolerance"),
        (lambda: solve(torch.tanh, torch.zeros(2, 2), tolerance=math.nan), "tolerance"),
        (lambda: solve(torch.tanh, torch.zeros(2, 2), max_steps=0), "max_steps"),
        (lambda: solve(torch.tanh, torch.zeros(2, 2), check_every=0), "check_every"),
        (lambda: solve(torch.tanh, torch.full((2, 2), math.nan)), "start"),
        (lambda: solve(lambda z: z[:1], torch.zeros(2, 2)), "f"),
    ],
)
def test_arguments_out_of_range_are_named(build, name):
    with pytest.raises(RestpointError, match=f"^{name} "):
        build()


# --- against torchdeq ---


def test_no_more_evaluations_than_torchdeq():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchdeq")
        from torchdeq.solver import get_solver
    ours, theirs = [], []
    maps = [affine(kind, rho, dim=32) for kind in ("symmetric", "general", "triangular") for rho in (0.5, 0.9, 0.99)]
    for f in [*maps, *(tanh_layer(gain, dim=32) for gain in (0.5, 0.9, 1.2))]:
        start, seen = torch.zeros(6, 32).double(), Recorder(f)
        found = solve(f, start, Anderson(), tolerance=1e-6, max_steps=400)
        value, _, _ = get_solver("anderson")(seen, start, max_iter=400, tol=1e-6, stop_mode="rel")
        assert bool(found.converged.all())
        gaps = (f(value) - value).norm(dim=-1), (f(found.value) - found.value).norm(dim=-1)
        apart = (found.value - value).norm(dim=-1)
        if isinstance(f, Affine):  # exact, also where theirs did not converge
            assert bool((apart <= f.error_bound(gaps[0] + gaps[1]) * (1 + 1e-6)).all())
        else:
            assert bool((apart <= 30 * (gaps[0] + gaps[1])).all())
        ours.append(found.evaluations)
        theirs.append(len(seen.points))
    assert statistics.median(ours) <= statistics.median(theirs)
