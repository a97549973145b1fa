import math

import pytest
import torch
from torch import nn

from fixed_points import affine, tanh_layer
from restpoint.equilibrium import Adjoint, Anderson, Broyden, Picard, implicit, solve, spectral_radius
from restpoint.errors import RestpointError

EXACT = Adjoint(tolerance=1e-12, max_steps=300)


class Cell(nn.Module):
    """z -> tanh(W z + U x + b), contractive."""

    def __init__(self, dim=8, gain=0.6):
        super().__init__()
        self.inner = nn.Linear(dim, dim).double()
        self.outer = nn.Linear(dim, dim).double()
        nn.init.orthogonal_(self.inner.weight, gain)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + self.outer(x))


def gradients(loss, cell, x):
    return torch.autograd.grad(loss, [*cell.parameters(), x])


# --- implicit ---


@pytest.mark.parametrize("method", [Picard(), Anderson(), Broyden()], ids=lambda method: type(method).__name__)
def test_gradients_equal_those_of_the_unrolled_iteration(method):
    cell, x = Cell(), torch.randn(5, 8).double().requires_grad_()
    target = torch.randn(5, 8).double()
    z = torch.zeros(5, 8).double()
    for _ in range(100):
        z = cell(z, x)
    unrolled = gradients((z - target).square().sum(), cell, x)
    f = lambda z: cell(z, x)  # noqa: E731
    found = solve(f, torch.zeros(5, 8).double(), method, tolerance=1e-12, max_steps=300)
    seen = []
    how = Adjoint(method, tolerance=1e-12, max_steps=300)
    z = implicit(f, found.value, adjoint=how, report=seen.append)
    torch.testing.assert_close(z.detach(), found.value)
    for ours, theirs in zip(gradients((z - target).square().sum(), cell, x), unrolled, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert len(seen) == 1
    assert bool(seen[0].converged.all())


def test_gradients_of_an_affine_map_have_a_closed_form():
    f = affine("triangular", 0.9, dim=6)
    matrix, offset = f.matrix.clone().requires_grad_(), f.offset.clone().requires_grad_()
    weights = torch.randn(6, 6).double()
    map_ = lambda z: z @ matrix.T + offset  # noqa: E731
    (weights * implicit(map_, f.solution, adjoint=EXACT)).sum().backward()
    u = torch.linalg.solve((torch.eye(6).double() - f.matrix).T, weights.T).T  # (I - Mᵀ)^-1 g
    torch.testing.assert_close(offset.grad, u)
    torch.testing.assert_close(matrix.grad, u.T @ f.solution)


def test_finite_differences_agree():
    cell = Cell(dim=3)

    def through(x, weight):
        f = lambda z: torch.tanh(z @ weight.T + cell.outer(x))  # noqa: E731
        found = solve(f, torch.zeros_like(x), tolerance=1e-13, max_steps=300)
        return implicit(f, found.value, adjoint=EXACT)

    x = torch.randn(2, 3).double().requires_grad_()
    weight = cell.inner.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(through, (x, weight), atol=1e-6)


def test_maps_that_couple_rows_have_the_gradient_of_the_whole():
    mixing, offset = torch.rand(4, 4).double() / 8, torch.randn(4, 3).double().requires_grad_()
    f = lambda z: mixing @ z + offset  # noqa: E731
    whole = torch.linalg.inv(torch.eye(4).double() - mixing)
    z = implicit(f, (whole @ offset).detach(), adjoint=EXACT)
    weights = torch.randn(4, 3).double()
    (gradient,) = torch.autograd.grad((weights * z).sum(), offset)
    torch.testing.assert_close(gradient, whole.T @ weights)


def test_one_step_is_the_gradient_of_one_evaluation():
    cell, x = Cell(), torch.randn(5, 8).double().requires_grad_()
    f = lambda z: cell(z, x)  # noqa: E731
    found = solve(f, torch.zeros(5, 8).double(), tolerance=1e-12, max_steps=300).value
    weights = torch.randn(5, 8).double()
    ours = gradients((weights * implicit(f, found, gradient="one_step")).sum(), cell, x)
    single = gradients((weights * cell(found, x)).sum(), cell, x)
    exact = gradients((weights * implicit(f, found, adjoint=EXACT)).sum(), cell, x)
    for one, same, right in zip(ours, single, exact, strict=True):
        assert torch.equal(one, same)
        assert not torch.allclose(one, right, rtol=1e-2)


def test_memory_does_not_depend_on_the_iterations():
    cell, x = Cell(), torch.randn(5, 8).double()
    f = lambda z: cell(z, x)  # noqa: E731

    def saved(run):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            run()
        return sum(held)

    def deep(steps):
        found = solve(f, torch.zeros(5, 8).double(), Picard(), tolerance=1e-30, max_steps=steps)
        assert found.evaluations == steps
        how = Adjoint(Picard(), tolerance=1e-30, max_steps=steps)
        implicit(f, found.value, adjoint=how).sum().backward()

    def unrolled(steps):
        z = torch.zeros(5, 8).double()
        for _ in range(steps):
            z = f(z)
        z.sum().backward()

    once = saved(lambda: f(torch.zeros(5, 8).double().requires_grad_()))
    assert saved(lambda: deep(3)) == saved(lambda: deep(20)) == once
    assert saved(lambda: unrolled(20)) > 5 * saved(lambda: unrolled(3)) / 2


def test_gradients_may_be_tiny_zero_or_broken():
    cell, x = Cell(), torch.randn(5, 8).double().requires_grad_()
    f = lambda z: cell(z, x)  # noqa: E731
    found = solve(f, torch.zeros(5, 8).double(), tolerance=1e-12, max_steps=300).value
    z = implicit(f, found, adjoint=EXACT)
    weights = torch.randn(5, 8).double()
    (plain,) = torch.autograd.grad(z, x, weights, retain_graph=True)
    (tiny,) = torch.autograd.grad(z, x, weights * 1e-200, retain_graph=True)
    torch.testing.assert_close(tiny * 1e200, plain)
    (zero,) = torch.autograd.grad(z, x, torch.zeros_like(z), retain_graph=True)
    assert not bool(zero.any())
    (broken,) = torch.autograd.grad(z, x, torch.full_like(z, math.inf))
    assert not bool(broken.isfinite().any())


def test_without_gradients_it_is_one_evaluation():
    cell, x = Cell(), torch.randn(5, 8).double()
    with torch.no_grad():
        z = implicit(lambda z: cell(z, x), torch.zeros(5, 8).double())
    assert not z.requires_grad
    assert torch.equal(z, cell(torch.zeros(5, 8).double(), x).detach())


def test_second_derivatives_are_refused():
    x = torch.zeros(2, 3, requires_grad=True)
    z = implicit(lambda z: torch.tanh(0.5 * z + x), torch.zeros(2, 3))
    with pytest.raises(RestpointError, match=r"^create_graph is set"):
        torch.autograd.grad(z.sum(), x, create_graph=True)
    one = implicit(lambda z: torch.tanh(0.5 * z + x), torch.zeros(2, 3), gradient="one_step")
    (first,) = torch.autograd.grad(one.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert not bool(second.any())  # tanh'' (0) = 0


def test_wrong_arguments_are_named():
    with pytest.raises(RestpointError, match=r"^f maps"):
        implicit(lambda z: z[:1], torch.zeros(2, 3))
    with pytest.raises(RestpointError, match=r"^f maps"):
        spectral_radius(lambda z: z[:1], torch.zeros(2, 3))
    with pytest.raises(RestpointError, match=r"^tolerance is -1.0"):
        Adjoint(tolerance=-1.0)
    with pytest.raises(RestpointError, match=r"^f gives a result without a graph"):
        spectral_radius(lambda z: z.detach(), torch.zeros(2, 3))
    with pytest.raises(RestpointError, match=r"^iterations is 0"):
        spectral_radius(torch.tanh, torch.zeros(2, 3), iterations=0)
    with pytest.raises(RestpointError, match=r"^window is 5"):
        spectral_radius(torch.tanh, torch.zeros(2, 3), iterations=4, window=5)


# --- spectral radius ---


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.4])
def test_spectral_radius_agrees_with_the_eigenvalues_of_every_row(gain):
    f = tanh_layer(gain, dim=12, rows=4)
    z = solve(f, torch.zeros(4, 12).double(), max_steps=30).value
    jacobian = torch.autograd.functional.jacobian(f, z)
    exact = torch.stack([torch.linalg.eigvals(jacobian[row, :, row]).abs().max() for row in range(4)])
    estimate = spectral_radius(f, z, iterations=400)
    assert estimate.shape == (4,)
    torch.testing.assert_close(estimate, exact, rtol=1e-2, atol=0)


def test_complex_pairs_are_averaged_over():
    turn, scale = 0.7, torch.tensor([1.0, 4.0]).double()
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]).double()
    matrix = 0.8 * scale.diag() @ rotation @ (1 / scale).diag()
    single = [
        float(spectral_radius(lambda z: z @ matrix.T, torch.ones(2).double(), iterations=n, window=1))
        for n in range(20, 30)
    ]
    assert max(single) > 1.2 * min(single)  # a single growth factor says nothing
    assert float(spectral_radius(lambda z: z @ matrix.T, torch.ones(2).double(), iterations=400)) == pytest.approx(
        0.8, rel=0.01
    )


def test_coupled_rows_have_one_radius():
    mixing = torch.rand(5, 5).double()
    estimate = spectral_radius(lambda z: mixing @ z, torch.zeros(5, 3).double(), per_row=False, iterations=60)
    assert estimate.shape == ()
    torch.testing.assert_close(estimate, torch.linalg.eigvals(mixing).abs().max(), rtol=1e-6, atol=0)


def test_nilpotent_and_constant_maps_have_radius_zero():
    shift = torch.diag(torch.ones(3), 1)
    assert spectral_radius(lambda z: z @ shift.T, torch.ones(2, 4)).tolist() == [0.0, 0.0]
    assert spectral_radius(lambda z: 0 * z, torch.ones(2, 4)).tolist() == [0.0, 0.0]


def test_the_radius_is_the_rate_of_picard():
    f = affine("symmetric", 0.9)
    found = solve(f, torch.zeros_like(f.offset), Picard(), tolerance=1e-30, max_steps=200)
    start = (f.solution).norm(dim=-1)
    rate = ((found.value - f.solution).norm(dim=-1) / start) ** (1 / 199)
    torch.testing.assert_close(spectral_radius(f, found.value, iterations=400), rate, rtol=2e-2, atol=0)
