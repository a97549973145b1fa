"""Seconds for transport between all neighbouring layers: one batched call against POT, one layer after another.

    python benchmarks/transport.py
    python benchmarks/transport.py --iterations 300 --regularisation 0.02 --threads 2

Both get the bundled model's states of one text, the same random lines, the same cost and regularisation, and as many
Sinkhorn iterations, none of which stops early. POT runs on NumPy, its fastest backend on a processor, in every variant
that solves the same problem: "sinkhorn_log" works in the log domain; "sinkhorn" works with the bare kernel, which
overflows where the regularisation is small beside the cost; "sinkhorn_stabilized" absorbs as ours does. Runs take
turns, the first of each is not counted, and a ratio is one of medians; beside it the ratio of processor seconds, which
hardly depend on what else the machine does.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import ot
import torch
import tyro

from restpoint import bundled
from restpoint.model.layered import LayeredModel
from restpoint.model.load import load
from restpoint.trajectory.record import states_of
from restpoint.transport.divergence import squared_distances
from restpoint.transport.sinkhorn import sinkhorn
from restpoint.transport.sliced import between_quantiles, quantiles, random_projections


@dataclass(frozen=True)
class Options:
    """What is computed."""

    tokens: int = 256
    """Tokens T of the text."""
    projections: int = 64
    """Random lines."""
    iterations: int = 100
    """Sinkhorn iterations of every problem."""
    regularisation: float = 0.1
    """Share of the mean cost between the first two layers."""
    repeats: int = 7
    """Runs of each that are counted."""
    threads: int = 1
    """Processor threads of torch; those of NumPy are set by the environment (OMP_NUM_THREADS)."""


def main(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="ot")  # that it did not converge within the iterations asked for
    states = _states(options.tokens).double()
    clouds = states.numpy()
    layers, tokens, dim = states.shape
    pairs = layers - 1
    lines = random_projections(dim, options.projections, torch.Generator().manual_seed(0))
    even = np.full(tokens, 1 / tokens)
    strength = options.regularisation * float(squared_distances(states[0], states[1]).mean())

    def ours_sliced() -> np.ndarray:
        along = quantiles(states, lines)
        return between_quantiles(along[:-1], along[1:]).numpy()

    def pot_sliced() -> np.ndarray:
        directions = lines.numpy()
        return np.array(
            [
                np.asarray(ot.sliced_wasserstein_distance(clouds[i], clouds[i + 1], projections=directions, p=2)).item()
                ** 2
                for i in range(pairs)
            ]
        )

    def ours_sinkhorn() -> np.ndarray:
        cost = squared_distances(states[:-1], states[1:])
        return sinkhorn(cost, strength, max_iterations=options.iterations, tolerance=1e-300).value.numpy()

    def pot_sinkhorn(method: str) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            found = []
            for i in range(pairs):
                cost = ot.dist(clouds[i], clouds[i + 1])
                with np.errstate(all="ignore"):
                    plan = ot.sinkhorn(
                        even, even, cost, strength, method=method, numItermax=options.iterations, stopThr=0, warn=False
                    )
                found.append(float((np.asarray(plan) * cost).sum()))
            return np.array(found)

        return run

    print(
        f"{pairs} pairs of neighbouring layers, {tokens} tokens, d = {dim}, float64, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, POT {ot.__version__}, load {os.getloadavg()[0]:.2f}")
    print(f"sliced: {options.projections} lines")
    _compare(ours_sliced, {"POT": pot_sliced}, options.repeats)
    print(f"Sinkhorn: {options.iterations} iterations, regularisation {strength:.4g}")
    methods = ("sinkhorn_log", "sinkhorn_stabilized", "sinkhorn")
    _compare(ours_sinkhorn, {f"POT {name}": pot_sinkhorn(name) for name in methods}, options.repeats)
    print(f"load {os.getloadavg()[0]:.2f} at the end")


def _states(tokens: int) -> torch.Tensor:
    loaded = load(dtype="float32", device="cpu")
    layered = LayeredModel(loaded.model)
    for text in bundled.fit_texts():
        ids = loaded.tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            read = torch.tensor([ids[:tokens]])
            return states_of(layered, read, tuple(range(layered.depth)))[0].transpose(0, 1).contiguous()
    raise SystemExit(f"tokens is {tokens}, and no bundled text is as long")


def _compare(ours: Callable[[], np.ndarray], others: dict[str, Callable[[], np.ndarray]], repeats: int) -> None:
    runs = {"ours": ours, **others}
    values = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began, began_busy = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - began_busy)
    wall, processor = ({name: statistics.median(each) for name, each in kind.items()} for kind in (seconds, busy))
    for name, each in seconds.items():
        print(f"  {name}: {wall[name] * 1e3:.1f} ms ({min(each) * 1e3:.1f} to {max(each) * 1e3:.1f})", end="")
        if name != "ours":
            apart = float(np.max(np.abs(values[name] / values["ours"] - 1)))
            print(f", {wall[name] / wall['ours']:.1f} x ours", end="")
            print(
                f" ({processor[name] / processor['ours']:.1f} x in processor time), values within {apart:.1e}", end=""
            )
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
