"""Calibrate early exits: fit, choose, certify, and write the rule with its certificate into the profile."""

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers

from restpoint.calibrate.certify import Kept, decode_with_exits, losses_of
from restpoint.calibrate.options import CalibrateOptions
from restpoint.calibrate.passages import Passages, deal
from restpoint.calibrate.readers import candidate_layers, fit_readout
from restpoint.calibrate.tuning import Tuning
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice
from restpoint.exit.losses import Loss
from restpoint.exit.losses import loss as named_loss
from restpoint.exit.names import named
from restpoint.exit.policy import Certificate, ExitPolicy
from restpoint.exit.radius import RestRadius
from restpoint.exit.registry import FITTED, SIGNALS
from restpoint.exit.risk import RiskControl, Selection, minimum_sequences, select
from restpoint.exit.rules import CatchUp, ThresholdRule
from restpoint.exit.shift import ShiftMonitor
from restpoint.model.check import check
from restpoint.model.fingerprint import fingerprint
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.model.unrolled import layered_model
from restpoint.profile import Profile
from restpoint.progress import Progress

_TUNED = 400
"""Prompts to fit the signal and to choose layers and thresholds on."""


@dataclass(frozen=True)
class CalibrateReport:
    """A finished calibration.

    Attributes:
        profile: what was written; its exits have a certificate only where a threshold qualified.
        policy: the exits that were certified, or the safest that were tried.
        selection: what the tests came to.
        choice: layers and threshold that the tuning text suggested, with the expected speed.
        thresholds: that were decoded with, from safe to fast.
        mean_losses: of each.
        depths: of each, layers behind the law of a new token, on average.
        sources: documents that the certified texts come from.
    """

    profile: Profile
    policy: ExitPolicy
    selection: Selection
    choice: LayerChoice
    thresholds: tuple[float, ...]
    mean_losses: tuple[float, ...]
    depths: tuple[float, ...]
    sources: int


def calibrate_exits(
    loaded: Loaded,
    texts: Iterable[str],
    profile: Profile,
    options: CalibrateOptions | None = None,
    output: Path | str = "profile",
    progress: Progress | None = None,
    loss: Loss | None = None,
) -> CalibrateReport:
    """Calibrate early exits of a model and write them into a profile.

    Documents are dealt out three ways. On some, predictors of the rest state are fitted. On others the model writes
    text of its own, on which the signal is fitted, the layers are chosen by expected speed, and thresholds from safe to
    fast are named. The third part certifies: every threshold in turn *decodes* with exits for real, each token is held
    against the full model after the same prefix, and testing stops at the first threshold that fails.

    Args:
        loaded: model and tokenizer.
        texts: documents.
        profile: of this model; its exits are replaced.
        options: what to calibrate.
        output: folder of the profile; an interrupted calibration resumes there.
        progress: called as work proceeds.
        loss: any function of an outcome with values in [0, 1], instead of the one that the options name.

    Raises:
        RestpointError: the profile is another model's, a name is unknown, there is too little text or are too few
            sequences, the model cannot exit early, or ``output`` holds an unfinished calibration of something else.
    """
    options = options or CalibrateOptions()
    report = progress or (lambda _stage, _done, _total: None)
    profile.require(loaded)
    control = RiskControl(options.epsilon, options.delta, options.method)
    if options.sequences < (least := minimum_sequences(control)):
        raise RestpointError(
            f"sequences is {options.sequences}; epsilon={options.epsilon} at delta={options.delta} needs {least} at "
            "least, even without a single loss"
        )
    loss_name = options.loss if loss is None else getattr(loss, "__name__", type(loss).__name__)
    loss = loss or named_loss(options.loss)
    named("signal", options.signal, {**SIGNALS, **{kind.kind: kind for kind in FITTED}})
    layered = layered_model(loaded.model)
    capabilities = check(layered)
    for name in ("depth", "exit", "cached", "resume", "rollback", "ragged"):
        found = getattr(capabilities, name)
        if not found.supported:
            raise RestpointError(f"model: {loaded.name} cannot exit early ({name}: {found.reason})")
    passages = deal(texts, loaded.tokenizer, options, tune=_TUNED, judge=options.sequences)
    candidates = candidate_layers(layered.depth, options)
    output = Path(output)
    whole = options.signal == RestRadius.kind
    readout = fit_readout(loaded, layered, passages.fit, candidates, options, output, report, whole_vocabulary=whole)
    tuning = Tuning(layered, readout, passages.tune, options, report)
    mark = fingerprint(loaded.model, loaded.tokenizer)
    kept = Kept(output, {**asdict(options), "text": passages.text, "model": mark, "loss": loss_name})
    # Layers are chosen by measured times, which differ from run to run: what was begun goes on with its own.
    choice = kept.choice or tuning.choose(candidates)
    layers, signal = choice.layers, tuning.signal(choice.layers)
    predictors = {layer: own for layer, own in readout.predictors.items() if layer in layers}
    policy = ExitPolicy(_rule(options, choice.threshold, layers), predictors, signal, readout.vocabulary)
    kept.begin(choice, policy.readers)

    def run(threshold: float) -> tuple[np.ndarray, float]:
        if threshold not in kept.done:
            target = replace(policy, rule=_rule(options, threshold, layers)).target(layered)
            decoded = decode_with_exits(target, passages.judge, options.new_tokens, loaded.end_tokens(), options.batch)
            kept.add(threshold, losses_of(decoded, loss), decoded.mean_depth)
        return kept.done[threshold]

    columns, depths, selection = _test(run, tuning.thresholds(layers, signal), control, report)
    tried = tuple(columns)
    chosen = 0 if selection.index is None else selection.index
    policy = replace(policy, rule=_rule(options, tried[chosen], layers))
    exits = None
    if selection.index is not None:
        exits = policy = replace(
            policy,
            certificate=_certificate(layered, policy, selection, passages, options, loss_name, tried, depths[chosen]),
            monitor=_monitor(layered, policy, passages.judge, options.batch),
        )
    profile = replace(profile, exits=exits)
    profile.save(output)
    kept.remove()
    means = tuple(float(losses.mean()) for losses in columns.values())
    return CalibrateReport(profile, policy, selection, choice, tried, means, depths, passages.sources)


def _test(
    run: Callable[[float], tuple[np.ndarray, float]],
    thresholds: Sequence[float],
    control: RiskControl,
    report: Progress,
) -> tuple[dict[float, np.ndarray], tuple[float, ...], Selection]:
    """Decode with one threshold after the other, until one fails: losses, mean depths, and the outcome.

    Args:
        run: decodes with a threshold: losses of all texts, and mean depth of a token.
        thresholds: from safe to fast, at least one.
        control: what is to be shown.
        report: told of the progress.
    """
    columns: dict[float, np.ndarray] = {}
    depths: list[float] = []
    while True:
        report("certify", len(columns), len(thresholds))
        threshold = thresholds[len(columns)]
        columns[threshold], depth = run(threshold)
        depths.append(depth)
        selection = select(np.stack(list(columns.values()), 1), control)
        passed = selection.index == len(columns) - 1
        if not passed or len(columns) == len(thresholds):
            report("certify", len(thresholds), len(thresholds))
            return columns, tuple(depths), selection


def _rule(options: CalibrateOptions, threshold: float, layers: tuple[int, ...]) -> ThresholdRule:
    return ThresholdRule(options.signal, threshold, layers, catch_up=cast(CatchUp, options.catch_up))


def _certificate(
    layered: LayeredModel,
    policy: ExitPolicy,
    selection: Selection,
    passages: Passages,
    options: CalibrateOptions,
    loss: str,
    thresholds: tuple[float, ...],
    mean_depth: float,
) -> Certificate:
    return Certificate(
        loss=loss,
        epsilon=options.epsilon,
        delta=options.delta,
        method=options.method,
        sequences=len(passages.judge),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        mean_loss=selection.mean_loss,
        upper_bound=selection.upper_bound,
        thresholds=thresholds,
        mean_depth=mean_depth,
        dtype=str(layered.dtype).removeprefix("torch."),
        readers=policy.readers,
        text=passages.text,
        documents=tuple(passages.documents),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions={
            "restpoint": importlib.metadata.version("restpoint"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _monitor(layered: LayeredModel, policy: ExitPolicy, prompts: Sequence[list[int]], batch: int) -> ShiftMonitor:
    """How sure the signal is of the prompts that were certified on."""
    rows = [
        policy.familiarity(layered, torch.tensor(prompts[first : first + batch], device=layered.device))
        for first in range(0, len(prompts), batch)
    ]
    return ShiftMonitor.of(torch.cat(rows).tolist())
