"""The studies of `restpoint simulate` without a model: phases, clusters, causal centres, spectrum of V, mean field."""

import math

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.theory.attention import SelfAttention, identity_attention
from restpoint.theory.evolve import RungeKutta, System, evolve, record
from restpoint.theory.maps import Heads
from restpoint.theory.options import SimulateOptions
from restpoint.theory.sphere import uniform_start
from restpoint.theory.study import Study
from restpoint.trajectory import observables as seen

PERSPECTIVE = "Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, A mathematical perspective on transformers"
CAUSAL = "Karagodin, Polyanskiy, Rigollet 2024, Clustering in causal attention masking"

STEP = 0.1
"""Of the Runge-Kutta scheme, where none is given."""

SPECTRA: dict[str, tuple[float, ...]] = {
    "1, 1, 1": (1.0, 1.0, 1.0),
    "1, 1, -1": (1.0, 1.0, -1.0),
    "1, 0, 0": (1.0, 0.0, 0.0),
    "1, -1, -1": (1.0, -1.0, -1.0),
    "-0.2, -1, -1": (-0.2, -1.0, -1.0),
    "-0.2, -0.2, -1": (-0.2, -0.2, -1.0),
    "-1, -1, -1": (-1.0, -1.0, -1.0),
}
"""Eigenvalues of V in three dimensions: leading one positive or negative, simple or repeated."""


def phase(options: SimulateOptions) -> Study:
    """Share of pairs with <x_i, x_j> > 0.999 over time and inverse temperature, d = 2, V = QᵀK = I.

    Small beta: one cluster, soon. Large beta: several clusters that last for times exponential in beta.
    """
    n, seeds, end = options.particles or 32, options.seeds or 4, options.time or 30.0
    betas = torch.tensor(options.betas or [0.1 + 8.9 * k / 23 for k in range(24)], dtype=torch.float64)
    times = times_until(end, 60)
    start = uniform_start(1, seeds, n, 2, seed=options.seed).expand(len(betas), seeds, n, 2)
    system = identity_attention(betas[:, None], 2)
    measured = [
        (seen.clustered_share(now).mean(1), seen.cluster_count(now).double().mean(1))
        for now in evolve(system, start, times, RungeKutta(options.step or STEP))
    ]
    shares, clusters = (torch.stack(column).numpy() for column in zip(*measured, strict=True))
    rows = [
        (beta, time, float(shares[at, row]), float(clusters[at, row]))
        for row, beta in enumerate(betas.tolist())
        for at, time in enumerate(times)
    ]
    return Study(
        "phase",
        f"Pairs with inner product above 0.999: n = {n} particles on the circle, {seeds} starts",
        {
            f"share at beta {float(betas.min()):g}, time {end:g}": float(shares[-1, int(betas.argmin())]),
            f"share at beta {float(betas.max()):g}, time {end:g}": float(shares[-1, int(betas.argmax())]),
        },
        ("beta", "time", "share_of_pairs", "clusters"),
        rows,
        {"betas": betas.numpy(), "times": np.array(times), "shares": shares},
        (PERSPECTIVE,),
    )


def strip(options: SimulateOptions) -> Study:
    """Where every particle is over time, on the circle and on the sphere, V = QᵀK = I."""
    n, beta, end = options.particles or 32, options.one_beta(9.0), options.time or 30.0
    times = times_until(end, 120)
    rows, arrays, facts = [], {"times": np.array(times)}, {}
    for name, dim in (("circle", 2), ("sphere", 3)):
        start = uniform_start(n, dim, seed=options.seed)
        states = record(identity_attention(beta, dim), start, times, RungeKutta(options.step or STEP))
        arrays[name] = states.numpy()
        facts[f"clusters on the {name}, time 0"] = float(seen.cluster_count(states[0]))
        facts[f"clusters on the {name}, time {end:g}"] = float(seen.cluster_count(states[-1]))
        for time, now in zip(times, states.tolist(), strict=True):
            rows += [(name, time, k, *([*x, ""])[:3]) for k, x in enumerate(now)]
    title = f"Clusters of n = {n} particles, beta = {beta:g}"
    return Study("strip", title, facts, ("on", "time", "particle", "x", "y", "z"), rows, arrays, (PERSPECTIVE,))


def causal(options: SimulateOptions) -> Study:
    """Causal particles on the circle with their Renyi centres, delta = 4 / sqrt(beta), V = QᵀK = I.

    Strong centres (far from all earlier particles) hardly move; Renyi centres (far from earlier centres) catch more
    of the clusters, but move and merge.
    """
    n, seeds, beta, end = options.particles or 200, options.seeds or 4, options.one_beta(64.0), options.time or 100.0
    delta = 4 * beta**-0.5
    times = times_until(end, 100)
    start = uniform_start(seeds, n, 2, seed=options.seed)
    strong, centres = seen.strong_renyi_centres(start, delta), seen.renyi_centres(start, delta)
    system, scheme = identity_attention(beta, 2, causal=True), RungeKutta(options.step or STEP)
    drawn = int((centres & ~strong).sum(-1).argmax())
    rows, kept, held, shift = [], [], [], torch.zeros(seeds, n)
    for time, now in zip(times, evolve(system, start, times, scheme), strict=True):
        shift = seen.geodesic_distance(now, start)
        held.append([_held(now, chosen, delta) for chosen in (strong, centres)])
        kept.append(now[drawn].numpy())
        count = float(seen.cluster_count(now).double().mean())
        rows.append((time, count, *held[-1], float(shift[strong].mean()), float(shift[centres].mean())))
    share = delta / math.pi
    return Study(
        "causal",
        f"Causal attention: n = {n} particles on the circle, beta = {beta:g}, delta = {delta:.3g}, {seeds} starts",
        {
            "strong Renyi centres": float(strong.sum(-1).double().mean()),
            "expected number": (1 - (1 - share) ** n) / share,
            "Renyi centres": float(centres.sum(-1).double().mean()),
            f"clusters, time {end:g}": rows[-1][1],
            "largest move of a strong centre": float(shift[strong].max()),
            "largest move of a Renyi centre": float(shift[centres].max()),
        },
        ("time", "clusters", "held_by_strong", "held_by_renyi", "move_of_strong", "move_of_renyi"),
        rows,
        {
            "times": np.array(times),
            "states": np.stack(kept),
            "strong": strong[drawn].numpy(),
            "centres": centres[drawn].numpy(),
            "held": np.array(held),
        },
        (CAUSAL,),
    )


def spectrum(options: SimulateOptions) -> Study:
    """Where causal particles end in three dimensions, by the leading eigenvalue of a symmetric V, QᵀK = I.

    The first particle follows dx/dt = P_x V x, so it ends in the leading eigenspace of V whatever the sign; the
    others are drawn to earlier ones where the eigenvalue is positive and driven away where it is negative.
    """
    n, seeds, beta, end = options.particles or 32, options.seeds or 4, options.one_beta(9.0), options.time or 300.0
    values = torch.tensor(list(SPECTRA.values()), dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    maps = Heads(eye[None], torch.diag_embed(values)[None, :, None])
    start = uniform_start(1, seeds, n, 3, seed=options.seed).expand(len(values), seeds, n, 3)
    scheme = RungeKutta(options.step or 0.25)
    now = record(SelfAttention(beta, maps, causal=True), start, [0.0, end], scheme)[-1]
    leading = (values == values.amax(-1, keepdim=True)).double()[:, None, None]
    inside = (now * leading).norm(dim=-1)
    to_first = (now @ now[..., :1, :].mT)[..., 0]
    loose = seen.cluster_count(now, 0.01).double()
    rows = [
        (
            name,
            float(values[row].max()),
            int(leading[row].sum()),
            float(loose[row].mean()),
            float(inside[row, :, 0].mean()),
            float((inside[row] > 0.999).double().mean()),
            float((to_first[row] > 0.999).double().mean()),
            float((to_first[row] < -0.999).double().mean()),
        )
        for row, name in enumerate(SPECTRA)
    ]
    return Study(
        "spectrum",
        f"Causal attention by the spectrum of V: n = {n}, d = 3, beta = {beta:g}, time {end:g}, {seeds} starts",
        {f"clusters, V = diag({row[0]})": row[3] for row in rows},
        (
            "eigenvalues",
            "leading",
            "multiplicity",
            "clusters",
            "first_in_eigenspace",
            "share_in_eigenspace",
            "share_at_first",
            "share_opposite",
        ),
        rows,
        {"states": now[:, 0].numpy()},
        (CAUSAL,),
    )


def mean_field(options: SimulateOptions) -> Study:
    """How fast n particles approach their limit, a density on the circle: W1 at the end, over n.

    Particles start independently with the density (1 + cos(angle) / 2) / 2 pi. The limit is a system of many particles
    that start at that density's quantiles. Dobrushin's estimate carries the rate of the start, n^-1/2, through time.
    """
    most, seeds, beta, end = options.particles or 512, options.seeds or 16, options.one_beta(4.0), options.time or 1.0
    counts = [count for count in (32, 64, 128, 256, 512, 1024, 2048) if count < most] + [most]
    if len(counts) < 2:
        raise RestpointError(f"particles is {most}; a limit needs at least 33")
    system, scheme = identity_attention(beta, 2), RungeKutta(options.step or STEP)
    quantiles = (torch.arange(4 * most, dtype=torch.float64) + 0.5) / (4 * most)
    limit = _angles_at(system, _quantile(quantiles), end, scheme)
    generator = torch.Generator().manual_seed(options.seed)
    rows = []
    for count in counts:
        uniform = torch.rand(seeds, count, generator=generator, dtype=torch.float64)
        ends = _angles_at(system, _quantile(uniform), end, scheme)
        distances = [_circle_distance(angles, limit) for angles in ends.numpy()]
        rows.append((count, float(np.mean(distances)), float(np.std(distances, ddof=1)) if seeds > 1 else 0.0))
    logs = np.log([row[:2] for row in rows])
    slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return Study(
        "mean-field",
        f"Distance of n particles on the circle to their limit at time {end:g}: beta = {beta:g}, {seeds} starts",
        {"exponent of n": slope, "expected exponent": -0.5},
        ("particles", "wasserstein1", "standard_deviation"),
        rows,
        {"counts": logs[:, 0], "distances": logs[:, 1]},
        (PERSPECTIVE,),
    )


RUN = {"phase": phase, "strip": strip, "causal": causal, "spectrum": spectrum, "mean-field": mean_field}
"""Studies that need no model, by name."""


def times_until(end: float, count: int) -> list[float]:
    """So many equal steps of time up to the end, from 0 on."""
    return [end * k / count for k in range(count + 1)]


def _held(states: Tensor, chosen: Tensor, delta: float) -> float:
    """Share of particles nearer than delta to one of the chosen."""
    near = seen.cosines(states) > math.cos(delta)
    return float((near & chosen.unsqueeze(-2)).any(-1).double().mean())


def _quantile(uniform: Tensor) -> Tensor:
    """Angles in [-pi, pi] at which the distribution function 1/2 + (a + sin(a) / 2) / 2 pi has these values."""
    low, high = torch.full_like(uniform, -math.pi), torch.full_like(uniform, math.pi)
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 + (middle + middle.sin() / 2) / (2 * math.pi) < uniform
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _angles_at(system: System, angles: Tensor, end: float, scheme: RungeKutta) -> Tensor:
    states = record(system, torch.stack((angles.cos(), angles.sin()), -1), [0.0, end], scheme)[-1]
    return torch.atan2(states[..., 1], states[..., 0])


def _circle_distance(angles: np.ndarray, limit: Tensor) -> float:
    """W1 between two clouds of angles; no mass of either passes pi, where the limit has least of it."""
    return float(wasserstein_distance(angles, limit.numpy()))
