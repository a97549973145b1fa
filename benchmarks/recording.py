"""What it costs to survey a model: beside the plain forward pass, and beside storing all states first.

    python benchmarks/recording.py [--tokens 20000] [--repeats 5] [--sets geometry lens] [--model reference] [--growth]

Times the forward pass by itself (the stack without its head, and the whole model), then the same passes of the stack
with states recorded and measured, for each set of measures, in turn on the same batches; medians over repeats, the
first left out. Ratios are to the stack alone. "stored first" is
`output_hidden_states=True` for every batch and the same measures afterwards from what was stored. With --growth, the
peak memory of surveys of 10,000 up to 1,000,000 tokens by geometry alone, each in a process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from restpoint import bundled
from restpoint.model.load import load
from restpoint.model.watch import WatchedLayers
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.measures import allowed
from restpoint.trajectory.options import SurveyOptions
from restpoint.trajectory.reading import Cut, Piece, Reader, Sample, batches
from restpoint.trajectory.survey import survey
from restpoint.trajectory.surveyed import Surveyed

SETS = {
    "nothing": (),
    "geometry": ("geometry",),
    "geometry, pairs": ("geometry", "pairs"),
    "geometry, pairs, transport": ("geometry", "pairs", "transport"),
    "lens": ("lens",),
    "saturation": ("saturation",),
    "bounds": ("bounds",),
}


def samples() -> list[Sample]:
    """The bundled text."""
    return [Sample(text, kind) for kind, text in bundled.documents()]


def seconds(work: Callable[[], object]) -> float:
    """How long a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def grow(tokens: int) -> None:
    """Survey so many tokens and print the peak resident memory in MB."""
    loaded = load()
    subject = Surveyed("reference", loaded.model, loaded.tokenizer)
    texts = samples()

    def endless() -> Iterator[Sample]:
        while True:
            yield from texts

    options = SurveyOptions(max_tokens=tokens, measures=("geometry",), scenes=0)
    survey(subject, endless(), options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    """Time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grow:
        grow(arguments.grow)
        return
    loaded = load(arguments.model)
    subject = Surveyed(arguments.model, loaded.model, loaded.tokenizer)
    options = SurveyOptions(max_tokens=arguments.tokens)
    cut = Cut(samples(), loaded.tokenizer, options.sequence_length, arguments.tokens)
    groups = list(batches(cut, options.batch))
    layers = WatchedLayers(loaded.model)
    reader = Reader(layers)
    backbone = loaded.model.base_model
    inputs = [torch.tensor([piece.ids for piece in group]) for group in groups]

    @torch.inference_mode()
    def plain() -> None:
        for ids in inputs:
            backbone(input_ids=ids, use_cache=False)

    @torch.inference_mode()
    def whole() -> None:
        for ids in inputs:
            loaded.model(input_ids=ids, use_cache=False)

    def measured(names: tuple[str, ...]) -> Callable[[], None]:
        def work() -> None:
            measures = allowed(subject, layers, SurveyOptions(measures=names))[0] if names else []
            for group in groups:
                for trajectory in reader.read(group):
                    for measure in measures:
                        measure.add(trajectory)
            for measure in measures:
                measure.results()

        return work

    @torch.inference_mode()
    def stored() -> None:
        (measure,) = allowed(subject, layers, SurveyOptions(measures=("geometry",)))[0]
        held: list[tuple[Sequence[Piece], tuple[torch.Tensor, ...]]] = []
        for group, ids in zip(groups, inputs, strict=True):
            out = backbone(input_ids=ids, use_cache=False, output_hidden_states=True)
            held.append((group, out.hidden_states))
        for group, states in held:
            for row, piece in enumerate(group):
                one = torch.stack([state[row] for state in states])
                measure.add(Trajectory(one, piece.index, torch.tensor(piece.ids), piece.domain))
        measure.results()

    works = {
        "forward pass": plain,
        "forward pass and head": whole,
        **{f"with {name}": measured(SETS[name]) for name in arguments.sets},
    }
    works["stored first, geometry"] = stored
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    base = times["forward pass"][1:]
    print(f"{arguments.model}, {cut.tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':32} {'seconds':>8} {'times forward':>14}")
    for name, own in times.items():
        ratio = statistics.median(one / other for one, other in zip(own[1:], base, strict=True))
        print(f"{name:32} {statistics.median(own[1:]):8.2f} {ratio:14.2f}")
    if arguments.growth:
        for tokens in (10_000, 100_000, 1_000_000):
            command = [sys.executable, __file__, "--grow", str(tokens)]
            peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            print(f"peak memory, {tokens:9,} tokens: {peak} MB")


if __name__ == "__main__":
    main()
