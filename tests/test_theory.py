"""The particle system against closed forms, SciPy, theorems and a model's own attention."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from families import build
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.attention import Perceptron, SelfAttention, identity_attention
from restpoint.theory.evolve import Adaptive, Layers, RungeKutta, evolve, record
from restpoint.theory.maps import Heads, LayerMaps
from restpoint.theory.sphere import uniform_start
from restpoint.theory.state_space import SelectiveStateSpace
from restpoint.theory.weights import read_heads
from restpoint.trajectory import observables as seen

DOUBLE = torch.float64
FINE = RungeKutta(0.05)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def simple_velocity(x, beta, query_key, value, *, causal, normalised):
    """The right-hand side in loops over particles."""
    n = len(x)
    rows = []
    for k in range(n):
        seen_by = range(k + 1) if causal else range(n)
        force = np.zeros(x.shape[1])
        for q, v in zip(query_key, value, strict=True):
            weights = {j: math.exp(beta * x[k] @ q @ x[j]) for j in seen_by}
            total = sum(weights.values()) if normalised else n
            force += sum(weights[j] * (v @ x[j]) for j in seen_by) / total
        rows.append(force - (x[k] @ force) * x[k])
    return np.stack(rows)


def solved(right, start, times):
    found = solve_ivp(right, (times[0], times[-1]), start, t_eval=times, rtol=1e-11, atol=1e-13)
    assert found.success
    return found.y


# --- the velocity ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_velocity_is_its_definition(causal, normalised, monkeypatch):
    x, heads = uniform_start(2, 7, 3), Heads(normal(2, 3, 3, seed=1), normal(2, 3, 3, seed=2))
    system = SelfAttention(1.3, heads, causal=causal, normalised=normalised)
    whole = system.velocity(x, 0.0)
    for one, velocity in zip(x, whole, strict=True):
        expected = simple_velocity(
            one.numpy(), 1.3, heads.query_key.numpy(), heads.value.numpy(), causal=causal, normalised=normalised
        )
        np.testing.assert_allclose(velocity.numpy(), expected, rtol=1e-12, atol=1e-13)
    monkeypatch.setattr("restpoint.theory.attention._BLOCK", 30)  # rows come two at a time
    torch.testing.assert_close(system.velocity(x, 0.0), whole, rtol=1e-13, atol=1e-14)


def test_every_system_of_a_batch_has_its_own_beta():
    betas = torch.tensor([[0.1], [4.0], [50.0]], dtype=DOUBLE)
    x = uniform_start(3, 2, 6, 3)
    together = identity_attention(betas, 3, causal=True).velocity(x, 0.0)
    for row, beta in enumerate((0.1, 4.0, 50.0)):
        torch.testing.assert_close(together[row], identity_attention(beta, 3, causal=True).velocity(x[row], 0.0))
    with pytest.raises(RestpointError, match=r"beta has shape .* expand the states"):
        identity_attention(betas, 3).velocity(x[:1], 0.0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_an_mlp_is_a_drift(activation):
    x = uniform_start(5, 3)
    mlp = Perceptron(normal(8, 3), normal(8, seed=1), normal(3, 8, seed=2), activation)
    pure, with_drift = (SelfAttention(1.0, Heads.identity(3), drift=drift) for drift in (None, mlp))
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}[activation]
    drift = act(x @ normal(8, 3).T + normal(8, seed=1)) @ normal(3, 8, seed=2).T
    tangential = drift - (drift * x).sum(-1, keepdim=True) * x
    torch.testing.assert_close(with_drift.velocity(x, 0.0) - pure.velocity(x, 0.0), tangential)


def test_maps_change_with_time_and_by_layer():
    x, layers = uniform_start(4, 2), [Heads(normal(1, 2, 2, seed=s), normal(1, 2, 2, seed=s + 9)) for s in range(3)]
    by_layer = SelfAttention(1.0, LayerMaps(layers, 0.5))
    for time, layer in ((0.0, 0), (0.49, 0), (0.5, 1), (1.4999999999999998, 2), (9.0, 2)):
        assert torch.equal(by_layer.velocity(x, time), SelfAttention(1.0, layers[layer]).velocity(x, time))
    turning = SelfAttention(1.0, lambda time: Heads(layers[0].query_key, layers[0].value * math.cos(time)))
    torch.testing.assert_close(turning.velocity(x, 1.0), math.cos(1.0) * turning.velocity(x, 0.0))


# --- (a), (b): exact equations ---


@pytest.mark.parametrize("scheme", [RungeKutta(0.05), Adaptive()])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0, 9.0])
def test_equiangular_particles_follow_their_equation(beta, scheme):
    """rho' = 2 e^{b rho} (1 - rho) ((n - 1) rho + 1) / (e^b + (n - 1) e^{b rho})."""
    n, rho0, times = 6, 0.05, [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    gram = torch.full((n, n), rho0, dtype=DOUBLE).fill_diagonal_(1.0)
    x = torch.linalg.cholesky(gram)
    states = record(identity_attention(beta, n), x, times, scheme)

    def right(_t, rho):
        e = np.exp(beta * (rho - 1))
        return 2 * e * (1 - rho) * ((n - 1) * rho + 1) / (1 + (n - 1) * e)

    found = (states @ states.mT)[:, 1, 4].numpy()
    np.testing.assert_allclose(found, solved(right, [rho0], times)[0], atol=1e-6)
    assert found[-1] > found[0] + 1e-3


@pytest.mark.parametrize("beta", [0.0, 1.0, 9.0])
def test_two_causal_tokens_follow_their_equation(beta):
    """phi' = -e^{b cos phi} sin phi / (e^b + e^{b cos phi})."""
    times = [0.0, 1.0, 3.0, 10.0]
    x = torch.tensor([[1.0, 0.0], [math.cos(2.0), math.sin(2.0)]], dtype=DOUBLE)
    states = record(identity_attention(beta, 2, causal=True), x, times, FINE)

    def right(_t, phi):
        e = np.exp(beta * (np.cos(phi) - 1))
        return -e * np.sin(phi) / (1 + e)

    found = seen.distance_to_first(states)[:, 1].numpy()
    np.testing.assert_allclose(found, solved(right, [2.0], times)[0], atol=1e-6)


# --- (c), (d): theorems ---


def test_energy_never_decreases():
    betas = torch.tensor([0.1, 1.0, 4.0, 9.0, 64.0], dtype=DOUBLE)[:, None]
    times = [0.2 * k for k in range(100)]
    states = record(identity_attention(betas, 3), uniform_start(5, 4, 16, 3), times, RungeKutta(0.1))
    energy = torch.stack([seen.log_energy(state, betas) for state in states])
    assert float(energy.diff(dim=0).min()) > -1e-12
    assert float((energy[-1] - energy[0]).min()) > 0.01
    repelled = SelfAttention(betas, Heads(Heads.identity(3).query_key, -Heads.identity(3).value))
    states = record(repelled, uniform_start(5, 4, 16, 3), [0.0, 0.1], RungeKutta(0.1))
    assert float((seen.log_energy(states[1], betas) - seen.log_energy(states[0], betas)).max()) < 0


def test_sequential_energy_never_decreases_where_earlier_tokens_rest():
    """Tokens 1 to 3 sit together, which is rest; token 4 climbs in their landscape."""
    x = uniform_start(20, 4, 3)
    x[:, 1:3] = x[:, :1]
    states = record(identity_attention(9.0, 3, causal=True), x, [0.5 * k for k in range(60)], RungeKutta(0.1))
    energies = torch.stack([seen.log_sequential_energies(state, 9.0) for state in states])[..., 1:]
    assert float(energies.diff(dim=0).min()) > -1e-12
    assert float((energies[-1, :, -1] - energies[0, :, -1]).mean()) > 0.1


def test_causal_tokens_collapse_to_the_first_whatever_q_and_k():
    """V = I and 20 random (Q, K): every token ends at x_1(0)."""
    eye = torch.eye(3, dtype=DOUBLE)
    drawn = [Heads.random(3, torch.Generator().manual_seed(seed), value=eye) for seed in range(20)]
    maps = Heads(torch.stack([one.query_key for one in drawn], 1), eye[None])
    x = uniform_start(20, 8, 3)
    states = record(SelfAttention(1.0, maps, causal=True), x, [0.0, 200.0], RungeKutta(0.5))
    torch.testing.assert_close(states[-1], x[:, :1].expand_as(x), atol=1e-6, rtol=0)
    assert float(seen.distance_to_first(x).amax(-1).min()) > 0.5


def test_strong_centres_stay_while_others_move():
    """n = 200, d = 2, beta = 64, delta = 4 / sqrt(beta): strong Renyi centres are nearly at rest."""
    x = uniform_start(4, 200, 2)
    strong = seen.strong_renyi_centres(x, 0.5)
    states = record(identity_attention(64.0, 2, causal=True), x, [0.0, 10.0], RungeKutta(0.1))
    moved = seen.geodesic_distance(states[1], states[0])
    assert float(moved[strong].max()) < 0.05
    assert float(moved[~strong].mean()) > 0.15


# --- (f): phase diagrams ---


def test_phase_diagram_is_that_of_the_angles():
    """n = 32, d = 2: share of pairs above 0.999, against the equation of the angles solved by SciPy."""
    n, times = 32, [0.0, 2.0, 5.0, 10.0, 30.0]
    betas = torch.tensor([0.1, 1.0, 5.0, 9.0], dtype=DOUBLE)
    x = uniform_start(1, n, 2).expand(4, n, 2)
    states = record(identity_attention(betas, 2), x, times, RungeKutta(0.05))
    shares = torch.stack([seen.clustered_share(state) for state in states])
    angles = torch.atan2(x[0, :, 1], x[0, :, 0]).numpy()
    for column, beta in enumerate(betas.tolist()):

        def right(_t, theta, beta=beta):
            gap = theta[None] - theta[:, None]
            weights = np.exp(beta * (np.cos(gap) - 1))
            return (weights * np.sin(gap)).sum(1) / weights.sum(1)

        for row, theta in enumerate(solved(right, angles, times).T):
            near = np.cos(theta[None] - theta[:, None]) > 0.999
            assert float(shares[row, column]) == pytest.approx((near.sum() - n) / (n * (n - 1)), abs=2 / (n * (n - 1)))
    assert float(shares[-1, 0]) == 1  # beta = 0.1: one cluster
    assert float(shares[-1, -1]) < 0.6  # beta = 9: several that last


def test_transition_in_high_dimension_is_that_of_the_equiangular_equation():
    """Random particles in d = 512 are almost orthogonal, so all pairs cross 0.999 together, when rho(t) does."""
    n, dim, betas = 32, 512, torch.tensor([0.1, 2.0, 5.0], dtype=DOUBLE)
    times = [0.25 * k for k in range(81)]
    start = uniform_start(1, n, dim).expand(3, n, dim)
    shares = torch.stack(
        [
            seen.clustered_share(state)
            for state in evolve(identity_attention(betas, dim), start, times, RungeKutta(0.25))
        ]
    )
    crossed = [times[int((column > 0.5).nonzero()[0])] for column in shares.T]
    for time, beta in zip(crossed, betas.tolist(), strict=True):

        def right(_t, rho, beta=beta):
            e = np.exp(beta * (rho - 1))
            return 2 * e * (1 - rho) * ((n - 1) * rho + 1) / (1 + (n - 1) * e)

        rho = solved(right, [0.0], [0.0, *np.arange(0.05, 20, 0.05)])[0]
        expected = 0.05 * int(np.argmax(rho > 0.999))
        assert time == pytest.approx(expected, rel=0.05)
    assert crossed[0] < crossed[1] < crossed[2]


# --- schemes ---


def test_runge_kutta_is_of_fourth_order():
    system, x = identity_attention(4.0, 3), uniform_start(8, 3)
    exact = record(system, x, [0.0, 2.0], Adaptive(1e-12, 1e-13))[-1]
    errors = [float((record(system, x, [0.0, 2.0], RungeKutta(h))[-1] - exact).norm()) for h in (0.2, 0.1)]
    assert 12 < errors[0] / errors[1] < 22
    assert errors[1] < 1e-5


def test_adaptive_steps_say_what_they_lack(monkeypatch):
    system, x = ssm(1.0, 1.0), torch.ones(1, 1, dtype=DOUBLE)
    with pytest.raises(RestpointError, match=r"scheme: dopri5 cannot go on between times 0 and 1 .*underflow"):
        record(system, x, [0.0, 1.0], Adaptive())  # infinite before 0.38
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(RestpointError, match=r"torchdiffeq; run `pip install restpoint\[theory\]`"):
        record(system, x, [0.0, 0.1], Adaptive())


def test_layers_become_the_flow():
    """Euler's error halves with the step."""
    system, x = identity_attention(4.0, 3), uniform_start(8, 3)
    exact = record(system, x, [0.0, 2.0], Adaptive())[-1]
    errors = [float((record(system, x, [0.0, 2.0], Layers(h))[-1] - exact).norm()) for h in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_a_layer_is_residual_and_norm():
    system, x = identity_attention(2.0, 3), uniform_start(5, 3)
    force = system.force(x, 0.0)
    summed = x + 0.5 * force
    unit = summed / summed.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(record(system, x, [0.0, 0.5], Layers(0.5))[-1], unit)
    second = summed + 0.5 * system.force(unit, 0.5)
    torch.testing.assert_close(record(system, x, [0.0, 1.0], Layers(0.5, "pre"))[-1], second)
    torch.testing.assert_close(record(system, x, [0.0, 0.5], Layers(0.5, "none"))[-1], summed)


def test_unnormalised_attention_is_the_gradient_flow_of_the_energy():
    """USA: n dx_k/dt = n^2 P grad_k E_b, with E_b's own factor 1/(2b)."""
    beta, x = 1.5, uniform_start(6, 3).requires_grad_()
    energy = (beta * x @ x.mT).exp().mean() / (2 * beta)
    (gradient,) = torch.autograd.grad(energy, x)
    gradient = gradient - (gradient * x).sum(-1, keepdim=True) * x
    system = SelfAttention(beta, Heads.identity(3), normalised=False)
    torch.testing.assert_close(system.velocity(x.detach(), 0.0), 6 * gradient.detach())


def test_without_a_sphere_particles_follow_the_values():
    """beta = 0: every particle is driven by the mean, m' = V m."""
    value = normal(3, 3)
    system = SelfAttention(0.0, Heads(torch.eye(3, dtype=DOUBLE)[None], value[None]), sphere=False)
    x = normal(5, 3, seed=1)
    end = record(system, x, [0.0, 1.0], RungeKutta(0.01))[-1]
    torch.testing.assert_close(end.mean(0), torch.linalg.matrix_exp(value) @ x.mean(0), atol=1e-7, rtol=0)


# --- state-space layers ---


def ssm(mu: float, step: float, bias: float = 0.0) -> SelectiveStateSpace:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([[value]], dtype=DOUBLE)

    return SelectiveStateSpace(one(mu), one(1.0), one(step), one(bias)[0], torch.ones(1, dtype=DOUBLE))


def test_state_space_force_is_the_recurrence(monkeypatch):
    """h_k = exp(-a D_k) h_{k-1} + D_k x_k (S_B x_k)ᵀ, y_k = h_k S_C x_k."""
    inputs, outputs, steps, bias = normal(4, 3), normal(4, 3, seed=1), normal(3, 3, seed=2), normal(3, seed=3)
    decay, x = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE), normal(2, 9, 3, seed=4)
    system = SelectiveStateSpace(inputs, outputs, steps, bias, decay)
    expected = torch.zeros_like(x)
    for row in range(2):
        hidden = torch.zeros(3, 4, dtype=DOUBLE)
        for k, token in enumerate(x[row]):
            size = torch.nn.functional.softplus(steps @ token + bias)
            hidden = (-decay * size).exp()[:, None] * hidden + (size * token)[:, None] * (inputs @ token)
            expected[row, k] = hidden @ (outputs @ token)
    torch.testing.assert_close(system.force(x, 0.0), expected)
    monkeypatch.setattr("restpoint.theory.state_space._BLOCK", 150)
    torch.testing.assert_close(system.force(x, 0.0), expected)


def softplus(x):
    return np.log1p(np.exp(x))


def test_negative_mu_converges_like_one_over_the_root_of_time():
    """One token: x' = mu D x^3, and D -> log 2, so that x sqrt(t) -> (-2 mu log 2)^-1/2."""
    times = [0.0, 250.0, 1000.0]
    end = record(ssm(-1.0, 1.0), torch.ones(1, 1, dtype=DOUBLE), times, RungeKutta(0.5))[:, 0, 0]
    exact = solved(lambda _t, x: -softplus(x) * x**3, [1.0], times)[0]
    np.testing.assert_allclose(end.numpy(), exact, rtol=1e-3)
    assert float(end[2]) * 1e3**0.5 == pytest.approx((2 * math.log(2)) ** -0.5, rel=0.05)


def test_positive_mu_diverges_fast_or_slowly():
    one = torch.ones(1, 1, dtype=DOUBLE)
    with pytest.raises(RestpointError, match=r"step: one of 0.001 at time 0\.[0-9]+ "):
        record(ssm(1.0, 1.0), one, [0.0, 1.0], RungeKutta(0.001))  # blows up before 1 / (2 log(1 + e)) = 0.38
    times = [0.0, 10.0, 100.0, 1000.0]
    slow = record(ssm(1.0, -1.0), one, times, RungeKutta(0.5))[:, 0, 0]
    exact = solved(lambda _t, x: softplus(-x) * x**3, [1.0], times)[0]
    np.testing.assert_allclose(slow.numpy(), exact, rtol=1e-3)
    assert float(slow[3]) < 20


# --- bad input ---


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_beta_must_be_a_temperature(beta):
    with pytest.raises(RestpointError, match=r"beta is .* finite and at least 0"):
        identity_attention(beta, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_a_huge_beta_is_hard_attention(causal):
    """Every particle then attends to itself alone, and rests."""
    x = uniform_start(9, 3)
    states = record(identity_attention(1e6, 3, causal=causal), x, [0.0, 5.0], RungeKutta(0.1))
    torch.testing.assert_close(states[-1], x)
    with pytest.raises(RestpointError, match=r"beta: exp\(1e\+06\) is no float64 number.*normalised=True"):
        SelfAttention(1e6, Heads.identity(3), normalised=False).velocity(x, 0.0)


def test_zero_vectors_live_off_the_sphere_only():
    x = uniform_start(4, 3)
    x[2] = 0
    with pytest.raises(RestpointError, match=r"states: one is zero .* set sphere=False"):
        evolve(identity_attention(1.0, 3), x, [0.0, 1.0], FINE)
    free = SelfAttention(1.0, Heads.identity(3), sphere=False)
    assert bool(record(free, x, [0.0, 1.0], FINE).isfinite().all())
    assert float(record(free, torch.zeros(4, 3, dtype=DOUBLE), [0.0, 1.0], FINE).abs().max()) == 0


def test_nothing_moves_in_one_dimension():
    x = uniform_start(9, 1)
    assert set(x.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(record(identity_attention(3.0, 1), x, [0.0, 5.0], FINE)[-1], x)


def test_maps_must_be_square_and_fit():
    square, long = normal(1, 3, 3), normal(1, 2, 3)
    with pytest.raises(RestpointError, match=r"value is 2 x 3; it must be square"):
        Heads(square, long)
    with pytest.raises(RestpointError, match=r"query_key has shape .* as many heads of the same size"):
        Heads(normal(2, 3, 3), square)
    with pytest.raises(RestpointError, match=r"maps act on 3 coordinates, states have 2"):
        identity_attention(1.0, 3).velocity(uniform_start(4, 2), 0.0)
    with pytest.raises(RestpointError, match=r"outer is \(2, 3\); .* must be \(3, 8\)"):
        Perceptron(normal(8, 3), normal(8), normal(2, 3))


@pytest.mark.parametrize(
    ("step", "system", "says"),
    [
        (0.3, SelfAttention(1.0, Heads(normal(1, 2, 2), torch.diag(torch.tensor([10.0, -10.0], dtype=DOUBLE))[None])),
         "step: one of 0.299 at time .* outside the stability region, which ends at 2.785; give a step below"),
        (50.0, identity_attention(1.0, 2), "step: one of 50 at time 0 moves a particle by .* give a step below"),
        (0.01, SelfAttention(9.0, Heads.identity(2), normalised=False), "step: .* give a step below"),
    ],
)  # fmt: skip
def test_a_step_outside_the_stability_region_is_named(step, system, says):
    near_rest = torch.tensor([[1.0, 1e-3], [1.0, -1e-3], [1.0, 2e-3]], dtype=DOUBLE)
    start = uniform_start(6, 2) if step == 50.0 else near_rest
    with pytest.raises(RestpointError, match=says) as error:
        record(system, start, [0.0, 100.0], RungeKutta(step))
    remedy = float(str(error.value).rsplit(" ", 1)[1])
    assert bool(record(system, start, [0.0, 20 * remedy], RungeKutta(0.5 * remedy)).isfinite().all())


@pytest.mark.parametrize(
    ("times", "scheme", "says"),
    [
        ([], FINE, "times must increase"),
        ([0.0, 0.0], FINE, "times must increase"),
        ([0.0, 1.0], RungeKutta(0.0), "step is 0.0; give a positive time"),
        ([0.0, 1.0], RungeKutta(math.nan), "step is nan"),
        ([0.0, 1.0], Layers(0.3), "times: from 0 to 1 is no whole number of layers of 0.3"),
        ([0.0, 1.0], Adaptive(0.0), "relative and absolute: a tolerance is not positive"),
    ],
)
def test_times_and_steps_that_make_no_sense(times, scheme, says):
    with pytest.raises(RestpointError, match=says):
        record(identity_attention(1.0, 2), uniform_start(3, 2), times, scheme)


def test_a_flow_that_leaves_all_bounds_is_named():
    wild = SelfAttention(
        0.0, Heads(torch.eye(2, dtype=DOUBLE)[None], 100 * torch.eye(2, dtype=DOUBLE)[None]), sphere=False
    )
    with pytest.raises(RestpointError, match=r"states: one is not finite"):
        record(wild, torch.ones(3, 2, dtype=DOUBLE), [0.0, 10.0], RungeKutta(0.005))


# --- a model's own heads ---

READABLE = [
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon_rope",
    "llama",
    "qwen2",
    "phi3",
    "mixtral",
    "granite",
    "cohere2",
]


@pytest.mark.parametrize("family", READABLE)
def test_scores_are_those_of_the_model(family):
    """Weights of two tokens at one position, where rotations cancel, against the model's own attention."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter.data)
    layered, layer = LayeredModel(model), 1
    ids = torch.tensor([[5, 9]])
    positions = None if family in ("bloom", "opt") else torch.zeros(1, 2, dtype=torch.long)
    keywords = {} if positions is None else {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False, **keywords)
    own = output.attentions[layer][0, :, 1].double()
    states = output.hidden_states[layer][0].double()
    if family in ("gpt2", "gpt_neox", "opt", "bloom", "falcon_rope", "cohere2"):
        states = states - states.mean(-1, keepdim=True)
    units = states / states.norm(dim=-1, keepdim=True)
    maps = read_heads(layered, layer).maps
    scores = units[1] @ maps.query_key @ units.mT
    if family == "bloom":  # its distance bias favours the later of two neighbours by its slope
        slopes = torch.tensor([2.0 ** (-8 * (head + 1) / 4) for head in range(4)], dtype=DOUBLE)
        scores[:, 1] += slopes
    torch.testing.assert_close(torch.softmax(scores, -1), own, atol=2e-4, rtol=0)
    assert float((own - 0.5).abs().max()) > 0.05


def test_one_head_of_a_grouped_model(reference):
    layered = LayeredModel(reference.model)
    everything, one = read_heads(layered, 3), read_heads(layered, 3, [2])
    assert torch.equal(one.maps.query_key[0], everything.maps.query_key[2])
    assert torch.equal(one.maps.value[0], everything.maps.value[2])
    assert "rotary positions" in one.left_out
    x = uniform_start(6, layered.hidden_size)
    states = record(SelfAttention(1.0, everything.maps, causal=True), x, [0.0, 0.05], Layers(0.05))
    assert float((states[1] - states[0]).norm()) > 1e-3


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("mamba", "no self-attention"),
        ("qwen3", "its q_norm"),
        ("gemma2", "its attn_logit_softcapping"),
        ("gpt_oss", "its sinks"),
        ("gpt_neo", "its GPTNeoSelfAttention does not say by what its scores are scaled"),
    ],
)
def test_a_model_without_such_maps_is_refused_by_part(family, part):
    with pytest.raises(RestpointError, match=f"layer 1 of {family}: Q, K, V cannot be extracted, because .*{part}"):
        read_heads(LayeredModel(build(family)), 1)


def test_a_wrong_arrangement_of_weights_is_noticed(monkeypatch):
    monkeypatch.setattr("restpoint.theory.weights._SEPARATE", (("q_proj", "v_proj", "k_proj"),))
    with pytest.raises(RestpointError, match=r"its value and output maps differ from its own attention"):
        read_heads(LayeredModel(build("llama")), 1)


def test_layers_and_heads_that_are_not_there(reference):
    layered = LayeredModel(reference.model)
    with pytest.raises(RestpointError, match=r"layer is 16; the model has layers 0 to 15"):
        read_heads(layered, 16)
    with pytest.raises(RestpointError, match=r"head: \[99\] is not among heads"):
        read_heads(layered, 0, [99])
