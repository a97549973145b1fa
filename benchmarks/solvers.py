"""Evaluations and seconds of the fixed-point solvers, beside torchdeq's where that is installed.

    python benchmarks/solvers.py
    python benchmarks/solvers.py --rows 1024 --dim 512 --tolerance 1e-5 --threads 2

Every solver starts from zeros and stops when the worst row's |f(z) - z| / |f(z)| is within tolerance. The residual is
computed again at the value that was returned. Maps: affine of a given spectral radius, symmetric or far from normal,
and tanh layers of a given gain.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from restpoint.equilibrium import Anderson, Broyden, Method, Picard, solve


@dataclass(frozen=True)
class Options:
    """What is solved."""

    rows: int = 256
    """Independent rows."""
    dim: int = 256
    """Coordinates of each."""
    tolerance: float = 1e-4
    """Relative residual to reach."""
    max_steps: int = 200
    """Evaluations at most."""
    dtype: str = "float32"
    """Of the maps and the states."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    device: str = "cpu"
    """Where it runs."""


Solver = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def main(options: Options) -> None:
    """Solve every map by every solver and print the table."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{options.rows} rows of {options.dim}, {options.dtype}, {torch.get_num_threads()} threads, {options.device}")
    print(f"tolerance {options.tolerance:g}, at most {options.max_steps} evaluations")
    print(f"{'map':<22}{'method':<22}{'evaluations':>12}{'residual':>12}{'seconds':>10}")
    for map_name, f in _maps(options).items():
        start = torch.zeros(options.rows, options.dim, dtype=getattr(torch, options.dtype), device=options.device)
        for name, solver in {**_ours(options), **_torchdeqs(options)}.items():
            calls = [0]

            def counted(z: Tensor, f: Callable[[Tensor], Tensor] = f, calls: list[int] = calls) -> Tensor:
                calls[0] += 1
                return f(z)

            solver(f, start)  # warm
            began = time.perf_counter()
            value = solver(counted, start)
            residual = float(((f(value) - value).norm(dim=-1) / f(value).norm(dim=-1)).max())  # which waits
            seconds = time.perf_counter() - began
            print(f"{map_name:<22}{name:<22}{calls[0]:>12}{residual:>12.1e}{seconds:>10.3f}")


def _maps(options: Options) -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dim = options.dim
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    inputs = torch.randn(options.rows, dim, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian).Q

    def ready(tensor: Tensor) -> Tensor:
        return tensor.to(options.device, getattr(torch, options.dtype))

    def affine(matrix: Tensor) -> Callable[[Tensor], Tensor]:
        transposed, offset = ready(matrix.mT), ready(inputs)
        return lambda z: torch.addmm(offset, z, transposed)

    def tanh(gain: float) -> Callable[[Tensor], Tensor]:
        weight, offset = ready(gain * dim**-0.5 * gaussian), ready(0.5 * inputs)
        return lambda z: torch.tanh(torch.addmm(offset, z, weight))

    maps = {}
    for rho in (0.5, 0.9, 0.99):
        spectrum = torch.linspace(-rho, rho, dim, dtype=torch.float64).diag()
        maps[f"symmetric, rho {rho}"] = affine(basis @ spectrum @ basis.mT)
        maps[f"triangular, rho {rho}"] = affine(spectrum + gaussian.triu(1) * dim**-0.5)
    for gain in (0.5, 0.9, 1.2):
        maps[f"tanh, gain {gain}"] = tanh(gain)
    return maps


def _ours(options: Options) -> dict[str, Solver]:
    def solver(method: Method) -> Solver:
        settings = {"tolerance": options.tolerance, "max_steps": options.max_steps}
        return lambda f, start: solve(f, start, method, **settings).value

    return {"Picard": solver(Picard()), "Anderson": solver(Anderson()), "Broyden": solver(Broyden())}


def _torchdeqs(options: Options) -> dict[str, Solver]:
    try:
        from torchdeq.solver import get_solver  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}

    def solver(name: str) -> Solver:
        settings = {"tol": options.tolerance, "max_iter": options.max_steps, "stop_mode": "rel"}

        def run(f: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
            with torch.no_grad():
                return get_solver(name)(f, start, **settings)[0]

        return run

    return {f"torchdeq {name}": solver(name) for name in ("fixed_point_iter", "anderson", "broyden")}


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
