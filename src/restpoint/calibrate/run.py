"""Calibrate early exits: fit, choose, certify, and write the rule with its certificate into the profile."""

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers

from restpoint.calibrate.certify import decode_with_exits, full_scores, losses_of, scored
from restpoint.calibrate.kept import Kept
from restpoint.calibrate.kept_readout import forget_readout
from restpoint.calibrate.ladders import check_rule, ladder_of
from restpoint.calibrate.options import CalibrateOptions, ReadOptions
from restpoint.calibrate.passages import Passages, deal
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice
from restpoint.exit.losses import Loss, Score, ScoreDrop
from restpoint.exit.losses import loss as named_loss
from restpoint.exit.names import named
from restpoint.exit.policy import Certificate, ExitPolicy
from restpoint.exit.registry import FITTED, SIGNALS
from restpoint.exit.risk import RiskControl, Selection, minimum_sequences, select
from restpoint.exit.rules import LayerSkipRule, Rule, ThresholdRule
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
        profile: what was written; its exits have a certificate only where a setting qualified.
        policy: the exits that were certified, or the safest that were tried.
        selection: what the tests came to.
        choice: layers and threshold that the tuning text suggested, with the expected speed; None of rules that ask no
            signal.
        setting: what was varied: ``threshold``, ``last layer`` or ``layers left out``.
        settings: that were decoded with, from safe to fast.
        mean_losses: of each.
        depths: of each, layers behind the law of a new token, on average.
        sources: documents that the certified texts come from.
    """

    profile: Profile
    policy: ExitPolicy
    selection: Selection
    choice: LayerChoice | None
    setting: str
    settings: tuple[float, ...]
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
    score: Score | None = None,
) -> CalibrateReport:
    """Calibrate early exits of a model and write them into a profile.

    Documents are dealt out three ways. On some, predictors of the rest state are fitted. On others the model writes
    text of its own, on which the signal is fitted, the layers are chosen by expected speed, and thresholds from safe to
    fast are named. The third part certifies: every threshold in turn *decodes* with exits for real, each token is held
    against the full model after the same prefix, and testing stops at the first threshold that fails.

    Rules that ask no signal are certified by the same test, over the last layer or the number of layers left out;
    documents that nothing is fitted or tuned on certify too.

    Args:
        loaded: model and tokenizer.
        texts: documents.
        profile: of this model; its exits are replaced.
        options: what to calibrate.
        output: folder of the profile; an interrupted calibration resumes there.
        progress: called as work proceeds.
        loss: any function of an outcome with values in [0, 1], instead of the one that the options name.
        score: of a task, in [0, 1], of a prompt and its new tokens, for the loss ``score-drop`` or one of your own: it
            scores the text that was decoded with exits, and the full model's own greedy text of the same prompt.

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
    loss_name = _loss_name(options, loss, score)
    loss = loss or named_loss(options.loss)
    named("signal", options.signal, {**SIGNALS, **{kind.kind: kind for kind in FITTED}})
    layered = layered_model(loaded.model)
    check_rule(layered.depth, options)
    _check_model(loaded, layered, options)
    tune = _TUNED if options.rule == ThresholdRule.kind else 0
    dealing = options if tune or options.fits else ReadOptions(prompt_tokens=options.prompt_tokens, fit_tokens=0)
    passages = deal(texts, loaded.tokenizer, dealing, tune=tune, judge=options.sequences)
    output = Path(output)
    mark = fingerprint(loaded.model, loaded.tokenizer)
    kept = Kept(output, {**asdict(options), "text": passages.text, "model": mark, "loss": loss_name})
    ladder = ladder_of(loaded, layered, passages, options, output, kept, report)

    ends = loaded.end_tokens()
    if score is not None and kept.full_scores is None:
        report("score full texts", 0, 1)
        kept.add_scores(full_scores(layered, passages.judge, options.new_tokens, ends, options.batch, score))
        report("score full texts", 1, 1)

    def run(setting: float) -> tuple[np.ndarray, float]:
        if setting not in kept.done:
            target = ladder.policy(setting).target(layered)
            decoded = decode_with_exits(target, passages.judge, options.new_tokens, ends, options.batch)
            if score is not None:
                assert kept.full_scores is not None
                decoded = scored(decoded, passages.judge, kept.full_scores, score)
            kept.add(setting, losses_of(decoded, loss), decoded.mean_depth)
        return kept.done[setting]

    columns, depths, selection = _test(run, ladder.settings, control, report)
    tried = tuple(columns)
    chosen = 0 if selection.index is None else selection.index
    policy = ladder.policy(tried[chosen])
    exits = None
    if selection.index is not None:
        certificate = _certificate(
            layered, policy, selection, passages, options, loss_name, ladder.setting, tried, depths[chosen]
        )
        monitor = None if policy.signal is None else _monitor(layered, policy, passages.judge, options.batch)
        exits = policy = replace(policy, certificate=certificate, monitor=monitor)
    profile = replace(profile, exits=exits)
    profile.save(output)
    kept.remove()
    forget_readout(output)
    means = tuple(float(losses.mean()) for losses in columns.values())
    return CalibrateReport(
        profile, policy, selection, ladder.choice, ladder.setting, tried, means, depths, passages.sources
    )


def _loss_name(options: CalibrateOptions, loss: Loss | None, score: Score | None) -> str:
    """What the certificate calls the loss.

    Raises:
        RestpointError: the loss needs a score and there is none, or there is one that nobody reads.
    """
    drops = isinstance(loss, ScoreDrop) or (loss is None and options.loss == "score-drop")
    if drops and score is None:
        raise RestpointError(
            "loss: score-drop needs a score of each text, which only Python can give: calibrate_exits(.., score=..)"
        )
    if score is not None and loss is None and not drops:
        raise RestpointError(f"score: the loss {options.loss} reads none; choose score-drop, or leave the score out")
    name = options.loss if loss is None else getattr(loss, "__name__", type(loss).__name__)
    return name if score is None else f"{name} of {getattr(score, '__name__', type(score).__name__)}"


def _check_model(loaded: Loaded, layered: LayeredModel, options: CalibrateOptions) -> None:
    """Refuse a model that cannot be decoded by such a rule, in batches."""
    capabilities = check(layered)
    kind: type[Rule] = LayerSkipRule if options.rule == LayerSkipRule.kind else ThresholdRule
    for name in (*kind.needed, "ragged"):
        found = getattr(capabilities, name)
        if not found.supported:
            raise RestpointError(f"model: {loaded.name} cannot exit early ({name}: {found.reason})")


def _test(
    run: Callable[[float], tuple[np.ndarray, float]],
    settings: Sequence[float],
    control: RiskControl,
    report: Progress,
) -> tuple[dict[float, np.ndarray], tuple[float, ...], Selection]:
    """Decode with one setting after the other, until one fails: losses, mean depths, and the outcome.

    Args:
        run: decodes with a setting: losses of all texts, and mean depth of a token.
        settings: from safe to fast, at least one.
        control: what is to be shown.
        report: told of the progress.
    """
    columns: dict[float, np.ndarray] = {}
    depths: list[float] = []
    while True:
        report("certify", len(columns), len(settings))
        setting = settings[len(columns)]
        columns[setting], depth = run(setting)
        depths.append(depth)
        selection = select(np.stack(list(columns.values()), 1), control)
        passed = selection.index == len(columns) - 1
        if not passed or len(columns) == len(settings):
            report("certify", len(settings), len(settings))
            return columns, tuple(depths), selection


def _certificate(
    layered: LayeredModel,
    policy: ExitPolicy,
    selection: Selection,
    passages: Passages,
    options: CalibrateOptions,
    loss: str,
    setting: str,
    settings: tuple[float, ...],
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
        setting=setting,
        settings=settings,
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
