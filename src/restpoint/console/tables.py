"""What was found, as a table for the terminal, or as JSON for other programs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # these import torch, which a help text can do without
    from restpoint.calibrate.run import CalibrateReport
    from restpoint.calibrate.sweeping import SweepReport
    from restpoint.exit.rules import Rule
    from restpoint.fit.run import FitReport
    from restpoint.model.check import Capabilities
    from restpoint.model.load import Loaded
    from restpoint.theory.study import Study
    from restpoint.train.run import TrainReport
    from restpoint.trajectory.atlas import Atlas
    from restpoint.trajectory.comparison import Comparison


def capability_table(loaded: "Loaded", capabilities: "Capabilities", depth: int) -> RenderableType:
    """What a model can do, with the differences that say so."""
    table = Table(title=f"{loaded.name}: {loaded.model.config.model_type}, {depth} layers", title_justify="left")
    table.add_column("capability")
    table.add_column("supported")
    table.add_column("difference", justify="right")
    table.add_column("tolerance", justify="right")
    table.add_column("reason")
    for name, found in capabilities.table():
        difference = "–" if found.difference is None else f"{found.difference:.1e}"
        mark = Text("yes", "green") if found.supported else Text("no", "red")
        table.add_row(name, mark, difference, f"{found.tolerance:.1e}", Text(found.reason))
    return table


def verdict(capabilities: "Capabilities") -> str:
    """What the capabilities mean for decoding, in one line."""
    if not capabilities.drafts:
        return "Drafts cannot be verified: this model is decoded plainly, by its own forward."
    if not capabilities.resume.supported:
        return "Drafts can be verified, from layer 0 only: verification cannot resume at a later layer."
    return "Drafts can be verified, from any layer."


def capability_json(loaded: "Loaded", capabilities: "Capabilities", depth: int) -> str:
    """The same for programs."""
    content = {
        "model": loaded.name,
        "model_type": loaded.model.config.model_type,
        "layers": depth,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "drafts": capabilities.drafts,
        "capabilities": {name: asdict(found) for name, found in capabilities.table()},
    }
    return json.dumps(content, indent=1)


def fit_table(report: "FitReport") -> RenderableType:
    """How well each predictor does, by layer, best expected speed first."""
    table = Table(title=f"Fitted on {report.tokens:,} tokens", title_justify="left")
    table.add_column("predictor")
    for heading in (
        "layer",
        "acceptance",
        "top-1",
        "own text:\nacceptance",
        "top-1",
        "Mmul\na draft",
        "expected\nspeed",
    ):
        table.add_column(heading, justify="right")
    for row in report.rows:
        chosen = row.predictor == report.profile.chosen
        table.add_row(
            row.predictor + (" (chosen)" if chosen else ""),
            str(row.exit_layer),
            f"{row.acceptance:.3f}",
            f"{row.top1:.3f}",
            _share(row.own_acceptance),
            _share(row.own_top1),
            f"{row.multiplications / 1e6:.2f}",
            "–" if row.expected_speed is None else f"{row.expected_speed:.2f}",
            style="bold" if chosen else "",
        )
    return table


_TOLD = {
    "relative step": ("geometry", "relative_step.mean"),
    "angle of steps": ("geometry", "angle.mean"),
    "effective rank": ("geometry", "effective_rank"),
    "clusters": ("geometry", "clusters.components"),
    "KL to the end": ("lens", "logit.kl"),
    "agreement": ("lens", "logit.agreement"),
    "sink rate": ("sinks", "sink_rate"),
    "distance to go": ("transport", "unit.gaussian.to_final.relative"),
}
"""Columns of an atlas's table: measure and result."""


def calibrate_table(report: "CalibrateReport") -> RenderableType:
    """Settings that were decoded with, and what is promised of the one that was kept."""
    selection, control = report.selection, report.selection.control
    table = Table(title=f"{_exits(report.policy.rule)}, from safe to fast", title_justify="left", pad_edge=False)
    for heading in (report.setting, "mean loss", "p-value", f"at most {control.epsilon:g}", "mean depth"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = zip(report.settings, report.mean_losses, selection.p_values, report.depths, strict=True)
    for number, (setting, loss, p_value, ran) in enumerate(rows):
        kept = number == selection.index
        verdict = "shown" if p_value <= control.delta else "not shown"
        table.add_row(
            f"{setting:.4f}" if report.setting == "threshold" else f"{setting:.0f}",
            f"{loss:.4f}",
            f"{p_value:.2g}",
            verdict,
            f"{ran:.1f}",
            style="bold" if kept else "",
        )
    certificate = report.policy.certificate
    if certificate is None:
        needed = selection.needed_sequences
        said = (
            f"no {'setting' if report.setting != 'threshold' else report.setting} qualifies: {selection.status.remedy}"
        )
        said += f" (about {needed:,} texts would do at this mean loss)" if needed else ""
    else:
        said = f"kept: {certificate.promise}; certified on text from {report.sources} documents"
    expected = "expected speed: measure it with restpoint bench --exits"
    if report.choice is not None:
        expected = f"expected by measured times, one text at a time: {report.choice.speed:.2f} times plain decoding"
    return Group(table, Text(said), Text(expected, style="dim"))


def _exits(rule: "Rule") -> str:
    """Which exits a table of calibration is about."""
    from restpoint.exit.rules import LayerSkipRule, PositionRule

    if isinstance(rule, LayerSkipRule):
        return "Evenly spaced layers left out"
    if isinstance(rule, PositionRule):
        return f"Depth falls to the last layer over {rule.length} tokens"
    return f"Exits after layer {' or '.join(str(layer) for layer in rule.candidates(sys.maxsize))}"


def train_table(report: "TrainReport") -> RenderableType:
    """Losses as training went on, and where the model is."""
    last = report.looks[-1]
    title = f"{report.parameters / 1e6:.2f}M parameters, {report.tokens:,} tokens; nats per token"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading in ("steps", "training", *(f"held out, {number} iterations" for number in last.held_out)):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = [*report.looks[:: max(1, len(report.looks) // 10)], last]
    for look in sorted({look.step: look for look in shown}.values(), key=lambda look: look.step):
        table.add_row(str(look.step), f"{look.training:.3f}", *(f"{loss:.3f}" for loss in look.held_out.values()))
    return Group(table, Text(f"the model is in {report.output}, its losses in {report.output / 'losses.png'}"))


def calibrate_json(report: "CalibrateReport") -> str:
    """The same for other programs."""
    certificate = report.policy.certificate
    found = {
        "status": str(report.selection.status),
        "setting": report.setting,
        "settings": report.settings,
        "mean_losses": report.mean_losses,
        "p_values": report.selection.p_values,
        "depths": report.depths,
        "needed_sequences": report.selection.needed_sequences,
        "rule": report.policy.rule.described(),
        "certificate": None if certificate is None else asdict(certificate),
        "expected_speed": None if report.choice is None else report.choice.speed,
    }
    return json.dumps(found, indent=1)


def sweep_table(found: "SweepReport") -> RenderableType:
    """Layers that signals save where at most so many tokens differ, best first."""
    tables: list[RenderableType] = []
    for most in dict.fromkeys(row.disagreement for row in found.comparisons):
        table = Table(
            title=f"At most {most:.0%} of tokens differ", title_justify="left", pad_edge=False, show_edge=False
        )
        table.add_column("signal", no_wrap=True)
        for heading in ("layers saved", "95%", "more than max-p", "95%", "fastest at layers", "expected speed"):
            table.add_column(heading, justify="right", no_wrap=True)
        rows = [row for row in found.comparisons if row.disagreement == most]
        for row in sorted(rows, key=lambda row: -row.layers_saved.value):
            more, choice = row.difference, found.choices[most].get(row.name)
            table.add_row(
                row.name,
                _plain(row.layers_saved.value),
                f"{_plain(row.layers_saved.low)}–{_plain(row.layers_saved.high)}",
                "" if more is None else f"{more.value:+.2f}",
                "" if more is None else f"{more.low:+.2f}–{more.high:+.2f}",
                "" if choice is None else ", ".join(map(str, choice.layers)) or "none",
                "" if choice is None else f"{choice.speed:.2f}",
            )
        ceiling = next(point for point in found.oracle.points() if point.setting == most)
        table.add_row("oracle", f"{found.depth - ceiling.layers_seen.value:.2f}", style="dim")
        tables.append(table)
    layers = ", ".join(str(layer) for layer in found.layers)
    about = (
        f"{found.model}, {found.depth} layers; looks after {layers}; {found.sequences} texts of {found.new_tokens} "
        "tokens that the full model wrote. Speed, over plain decoding, is what measured times let expect of the best "
        "one or two of these layers, one text at a time."
    )
    return Group(*tables, Text(about, style="dim"))


def _plain(value: float | None) -> str:
    """Two decimals, and no sign before a zero; a dash for what could not be told."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def atlas_table(atlas: "Atlas") -> RenderableType:
    """What tells most of an atlas, by layer."""
    depth = atlas.subject.layers + 1
    title = f"{atlas.subject.model}: {atlas.corpus['tokens']:,} tokens in {atlas.corpus['texts']:,} texts"
    table = Table(title=title, title_justify="left")
    table.add_column("state" if atlas.subject.depths else "layer", justify="right")
    columns = []
    for heading, (measure, name) in _TOLD.items():
        values = atlas.results.get(measure, {}).get(name)
        if values is not None:
            table.add_column(heading, justify="right")
            columns.append(["–"] * (depth - len(values)) + [f"{value:.3g}" for value in values.tolist()])
    for layer in range(depth):
        table.add_row(atlas.subject.depth(layer), *(column[layer] for column in columns))
    facts = []
    for name, (measure, result) in {
        "tau of saturation order": ("saturation", "tau"),
        "p-value": ("saturation", "tau.p"),
        "task probe's accuracy": ("tasks", "probe.accuracy"),
        "with shuffled labels": ("tasks", "probe.control"),
        "tokens above the softmax bound": ("bounds", "violations"),
    }.items():
        value = atlas.results.get(measure, {}).get(result)
        if value is not None:
            facts.append(f"{name} {float(value.sum() if measure == 'bounds' else value.mean()):.3g}")
    skipped = atlas.corpus["skipped"]
    if skipped:
        facts.append(f"texts of fewer than two tokens, left out: {skipped}")
    return Group(table, Text("; ".join(facts)))


def atlas_json(atlas: "Atlas") -> str:
    """The same for programs, with everything that was measured but the largest tables."""
    content = {
        "subject": asdict(atlas.subject),
        "corpus": atlas.corpus,
        "conditions": atlas.conditions,
        "results": {
            measure: {name: value.tolist() for name, value in own.items() if value.numel() <= 10_000}
            for measure, own in atlas.results.items()
        },
        "papers": {measure: list(papers) for measure, papers in atlas.papers.items()},
    }
    return json.dumps(content, indent=1)


def comparison_table(found: "Comparison") -> RenderableType:
    """Profiles of two atlases at equal shares of the depth."""
    table = Table(title=f"{found.names[0]} / {found.names[1]}", title_justify="left")
    table.add_column("at this share of the depth")
    for share in ("0", "1/4", "1/2", "3/4", "1"):
        table.add_column(share, justify="right")
    table.add_column("mean\ndifference", justify="right")
    for own in found.profiles:
        pairs = [f"{one:.3g} / {other:.3g}" for one, other in zip(own.first, own.second, strict=True)]
        table.add_row(own.name, *pairs, f"{own.distance:.3g}")
    return Group(table, *(Text(note, "dim") for note in found.notes))


def comparison_json(found: "Comparison") -> str:
    """The same for programs."""
    return json.dumps(asdict(found), indent=1)


def study_table(study: "Study") -> RenderableType:
    """What a simulation comes to."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in study.facts.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:.4g}")
    return Group(Text(f"{study.name}: {study.title}", "bold"), table, *(Text(paper, "dim") for paper in study.papers))


def study_json(studies: "list[Study]", folder: Path) -> str:
    """The same for programs, with the files that hold the rest."""
    content = [
        {
            "study": study.name,
            "title": study.title,
            "facts": study.facts,
            "papers": study.papers,
            "table": str(folder / f"{study.name}.csv"),
            "picture": str(folder / f"{study.name}.png"),
        }
        for study in studies
    ]
    return json.dumps(content, indent=1)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
