"""Seconds and memory of the particle system at a size that a study of long contexts would use.

    python benchmarks/particles.py
    python benchmarks/particles.py --scheme runge-kutta --causal --threads 2

A layer costs one velocity, a Runge-Kutta step four. The rate is of the two matrix products of a velocity alone; the
exponentials between them are not counted.
"""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from restpoint.theory.attention import identity_attention
from restpoint.theory.evolve import Layers, RungeKutta, evolve
from restpoint.theory.sphere import uniform_start
from restpoint.trajectory.observables import effective_rank


@dataclass(frozen=True)
class Options:
    """What is simulated."""

    particles: int = 2048
    """Particles n."""
    dim: int = 64
    """Coordinates d."""
    steps: int = 1000
    """Layers, or Runge-Kutta steps."""
    scheme: Literal["layers", "runge-kutta"] = "layers"
    """Discrete layers (one velocity each) or the flow (four)."""
    beta: float = 8.0
    """Inverse temperature."""
    causal: bool = False
    """Causal attention, which is half the work."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    device: str = "cpu"
    """Where it runs."""


def main(options: Options) -> None:
    """Simulate and print."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    n, dim, length = options.particles, options.dim, 0.1
    start = uniform_start(n, dim, device=options.device)
    beta = torch.tensor(options.beta, dtype=torch.float64, device=options.device)
    system = identity_attention(beta, dim, causal=options.causal)
    scheme = Layers(length) if options.scheme == "layers" else RungeKutta(length)
    system.velocity(start, 0.0)
    before, began = _peak(), time.perf_counter()
    *_, end = evolve(system, start, [0.0, length * options.steps], scheme)
    rank = float(effective_rank(end))  # which waits for the device
    seconds = time.perf_counter() - began
    velocities = options.steps * (1 if options.scheme == "layers" else 4)
    products = velocities * 4 * n * n * dim * (0.5 if options.causal else 1)
    kind = "causal" if options.causal else "full"
    print(
        f"{n} particles, d = {dim}, {options.steps} {options.scheme} steps, {kind}, {torch.get_num_threads()} threads"
    )
    print(f"{seconds:.1f} s, {seconds / velocities * 1e3:.2f} ms a velocity, {products / seconds / 1e9:.1f} GFLOP/s")
    print(f"peak memory {_peak():.0f} MiB, of which {before:.0f} MiB before the first step")
    print(f"effective rank at the end {rank:.2f}")


def _peak() -> float:
    """The largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
