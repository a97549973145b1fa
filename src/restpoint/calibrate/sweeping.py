"""What early exit could give on a model: every signal on the same traces, before anything is decoded early."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from restpoint import files
from restpoint.calibrate.options import SweepOptions
from restpoint.calibrate.passages import deal
from restpoint.calibrate.readers import candidate_layers, fit_readout, fit_signal, write_texts
from restpoint.exit.choice import Comparison, LayerChoice, choose_layers, compare
from restpoint.exit.costs import measure_exit_costs
from restpoint.exit.names import named
from restpoint.exit.radius import RestRadius
from restpoint.exit.registry import FITTED, SIGNALS
from restpoint.exit.sweep import Curve, fixed, oracle, sweeps
from restpoint.exit.traces import record_traces
from restpoint.model.load import Loaded
from restpoint.model.unrolled import layered_model
from restpoint.progress import Progress

_TUNED = 200
"""Prompts to fit signals on."""


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep.

    Attributes:
        model: its name.
        depth: its layers.
        layers: candidate layers.
        curves: of every signal, by name, and of depths fixed beforehand.
        oracle: the ceiling.
        comparisons: layers saved at equal disagreement by looking at all candidate layers, against max-p.
        choices: by disagreement and signal, the few layers with the best expected speed.
        sequences: texts that were traced.
        new_tokens: traced of each.
    """

    model: str
    depth: int
    layers: tuple[int, ...]
    curves: Mapping[str, Curve]
    oracle: Curve
    comparisons: tuple[Comparison, ...]
    choices: Mapping[float, Mapping[str, LayerChoice]]
    sequences: int
    new_tokens: int

    def write(self, path: Path) -> None:
        """Write points and comparisons as JSON, complete or not at all.

        Raises:
            RestpointError: the file cannot be written.
        """
        found: dict[str, Any] = {
            "model": self.model,
            "depth": self.depth,
            "layers": self.layers,
            "sequences": self.sequences,
            "new_tokens": self.new_tokens,
            "comparisons": [asdict(row) for row in self.comparisons],
            "choices": {
                str(most): {name: asdict(choice) for name, choice in found.items()}
                for most, found in self.choices.items()
            },
            "curves": {
                name: [asdict(point) for point in curve.points()]
                for name, curve in {**self.curves, "oracle": self.oracle}.items()
            },
        }
        text = json.dumps(found, indent=1)
        files.write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sweep_exits(
    loaded: Loaded,
    texts: Iterable[str],
    options: SweepOptions | None = None,
    output: Path | str = "sweep",
    progress: Progress | None = None,
) -> SweepReport:
    """Trace text that the model writes at full depth, and sweep every signal over it.

    Args:
        loaded: model and tokenizer.
        texts: documents; predictors and signals are fitted on others than are traced.
        options: which signals, on how much text.
        output: folder that the traces are written to.
        progress: called as work proceeds.

    Raises:
        RestpointError: a signal is unknown, a layer is not the model's, or the text is too short.
    """
    options = options or SweepOptions()
    report = progress or (lambda _stage, _done, _total: None)
    every = [*SIGNALS, *(kind.kind for kind in FITTED)]
    names = [named("signals", name, dict.fromkeys(every, name)) for name in options.signals] or every
    if "max-p" not in names:
        names = ["max-p", *names]
    layered = layered_model(loaded.model)
    layers = candidate_layers(layered.depth, options)
    passages = deal(texts, loaded.tokenizer, options, tune=_TUNED, judge=options.sequences)
    output = Path(output)
    readout = fit_readout(
        loaded, layered, passages.fit, layers, options, output, report, whole_vocabulary=RestRadius.kind in names
    )
    written = write_texts(layered, passages.tune, options, report)
    signals = {}
    for done, name in enumerate(names):
        report("fit signals", done, len(names))
        signals[name] = fit_signal(name, written, layers, readout, options.seed)
    report("fit signals", len(names), len(names))
    traces = record_traces(
        layered,
        passages.judge,
        options.new_tokens - 1,
        layers,
        readout,
        signals,
        batch=options.batch,
        progress=report,
        about={"model": loaded.name, "text": passages.text},
    )
    traces.save(output)
    costs = measure_exit_costs(layered, readout, signals, layers)
    curves = sweeps(traces, costs)
    depths = fixed(traces, costs)
    curves[depths.name] = depths
    choices: dict[float, dict[str, LayerChoice]] = {}
    for done, most in enumerate(options.disagreements):
        report("choose layers", done, len(options.disagreements))
        choices[most] = {name: choose_layers(traces, costs, name, most) for name in names}
    report("choose layers", len(options.disagreements), len(options.disagreements))
    budgets = sorted({0.0, *options.disagreements})
    return SweepReport(
        model=loaded.name,
        depth=layered.depth,
        layers=layers,
        curves=curves,
        oracle=oracle(traces, costs, budgets=budgets),
        comparisons=tuple(compare(curves, options.disagreements, seed=options.seed)),
        choices=choices,
        sequences=len(passages.judge),
        new_tokens=options.new_tokens - 1,
    )
