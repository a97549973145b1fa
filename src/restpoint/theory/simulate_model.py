"""The studies of `restpoint simulate` with a model: particles under one head, and layers beside their heads."""

import itertools
from collections.abc import Iterable
from dataclasses import astuple, fields

import numpy as np
import torch

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.attention import SelfAttention
from restpoint.theory.confront import Level, Step, confront
from restpoint.theory.evolve import RungeKutta, evolve
from restpoint.theory.maps import Heads
from restpoint.theory.options import HEAD, LAYERS, SimulateOptions
from restpoint.theory.simulate import CAUSAL, PERSPECTIVE, STEP, times_until
from restpoint.theory.sphere import uniform_start
from restpoint.theory.study import Study
from restpoint.theory.weights import ReadHeads
from restpoint.trajectory import observables as seen


def head(options: SimulateOptions, read: ReadHeads, name: str) -> Study:
    """Causal particles under the maps of one attention head, on the sphere of the model's hidden size.

    V is divided by its largest singular value, which changes the unit of time only.
    """
    n, seeds, end = options.particles or 32, options.seeds or 4, options.time or 40.0
    betas = torch.tensor(options.betas or (0.25, 1.0, 4.0), dtype=torch.float64)
    value = read.maps.value
    size = float(torch.linalg.matrix_norm(value.sum(0), 2))
    maps = Heads(read.maps.query_key, value / size)
    eigenvalues, vectors = torch.linalg.eig(maps.value.sum(0))
    leading = int(eigenvalues.real.argmax())
    plane = torch.linalg.qr(torch.stack((vectors[:, leading].real, vectors[:, leading].imag), 1))[0]
    if float(eigenvalues[leading].imag.abs()) < 1e-9:
        plane = vectors[:, leading : leading + 1].real
    times = times_until(end, 80)
    start = uniform_start(1, seeds, n, maps.dim, seed=options.seed).expand(len(betas), seeds, n, maps.dim)
    system = SelfAttention(betas[:, None], maps, causal=True)
    measured, rows = [], []
    for time, now in zip(times, evolve(system, start, times, RungeKutta(options.step or STEP)), strict=True):
        columns = (
            seen.clustered_share(now),
            seen.cluster_count(now).double(),
            seen.effective_rank(now),
            (now @ plane).norm(dim=-1).mean(-1),
        )
        measured.append(torch.stack([column.mean(1) for column in columns]).numpy())
        rows += [(beta, time, *measured[-1][:, row].tolist()) for row, beta in enumerate(betas.tolist())]
    facts: dict[str, float | str] = {
        "largest singular value of V": size,
        "leading eigenvalue of V, real part": float(eigenvalues[leading].real) * size,
        "leading eigenvalue of V, imaginary part": float(eigenvalues[leading].imag) * size,
        "largest singular value of QK": float(torch.linalg.matrix_norm(maps.query_key, 2).max()),
        "left out": ", ".join(read.left_out) or "nothing",
    }
    for row, beta in enumerate(betas.tolist()):
        facts[f"effective rank, beta {beta:g}, time {end:g}"] = float(measured[-1][2, row])
    return Study(
        HEAD,
        f"Particles under {name}: n = {n}, d = {maps.dim}, causal, {seeds} starts",
        facts,
        ("beta", "time", "share_of_pairs", "clusters", "effective_rank", "in_leading_eigenspace"),
        rows,
        {"times": np.array(times), "betas": betas.numpy(), "measured": np.stack(measured)},
        (PERSPECTIVE, CAUSAL),
    )


def layers(options: SimulateOptions, layered: LayeredModel, texts: Iterable[list[int]], name: str) -> Study:
    """Every layer of a model beside the particle system with its own heads: see :func:`confront`.

    Texts are cut to so many tokens; shorter ones than 3 are left out. Full attention with V = QᵀK = I would let the
    energy only rise; causal attention with V = I would send every token to the first.
    """
    length, count = options.particles or 128, options.seeds or 16
    if length < 3:
        raise RestpointError(f"particles is {length}; the layers of a model need texts of at least 3 tokens")
    ids = (torch.tensor([tokens[:length]], device=layered.device) for tokens in texts if len(tokens) >= 3)
    found = confront(layered, itertools.islice(ids, count), beta=options.one_beta(1.0))
    levels, steps = found.levels, found.steps
    alike, known = found.agreeing
    first, last = levels[0], levels[-1]
    facts: dict[str, float | str] = {
        "texts, tokens": f"{found.texts}, {found.tokens}",
        "mean cosine, embeddings and end": f"{first.mean_cosine:.3f}, {last.mean_cosine:.3f}",
        "norm, embeddings and end": f"{first.norm:.3g}, {last.norm:.3g}",
        "clusters, embeddings and end": f"{first.clusters:.1f}, {last.clusters:.1f}",
        "angle to the first token, embeddings and end": f"{first.to_first:.2f}, {last.to_first:.2f}",
        "layers after which the energy is lower": f"{len(found.violations)} of {len(steps)}",
        "layers whose attention contracts or spreads as its particles do": f"{alike} of {known}",
        "left out of the particles": ", ".join(found.left_out) or "nothing",
    }
    step_columns = [field.name for field in fields(Step) if field.name != "layer"]
    rows = [
        (*astuple(level), *(getattr(step, column) if step is not None else None for column in step_columns))
        for level, step in itertools.zip_longest(levels, steps)
    ]
    arrays = {field.name: np.array([getattr(level, field.name) for level in levels]) for field in fields(Level)}
    arrays |= {
        f"step {column}": np.array([getattr(step, column) for step in steps], dtype=float) for column in step_columns
    }
    title = f"The layers of {name} beside their heads as particles"
    columns = (*(field.name for field in fields(Level)), *(f"next_{column}" for column in step_columns))
    return Study(LAYERS, title, facts, columns, rows, arrays, (PERSPECTIVE, CAUSAL))
