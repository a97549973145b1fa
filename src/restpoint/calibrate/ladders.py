"""What is certified, from safe to fast: the settings of each rule, and the exits that decode with one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from restpoint.calibrate.kept import Kept
from restpoint.calibrate.kept_readout import readout_once
from restpoint.calibrate.options import CalibrateOptions
from restpoint.calibrate.passages import Passages
from restpoint.calibrate.readers import candidate_layers
from restpoint.calibrate.tuning import Tuning
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice
from restpoint.exit.policy import ExitPolicy
from restpoint.exit.radius import RestRadius
from restpoint.exit.rules import CatchUp, LayerSkipRule, PositionRule, ThresholdRule
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.progress import Progress


@dataclass(frozen=True)
class Ladder:
    """Settings of a rule, and what each means.

    Attributes:
        setting: what is varied, in words.
        settings: from safe to fast, at least one.
        policy: exits by such a setting, without a certificate.
        choice: of layers, by expected speed; None where the rule makes none.
    """

    setting: str
    settings: tuple[float, ...]
    policy: Callable[[float], ExitPolicy]
    choice: LayerChoice | None = None


def ladder_of(
    loaded: Loaded,
    layered: LayeredModel,
    passages: Passages,
    options: CalibrateOptions,
    output: Path,
    kept: Kept,
    report: Progress,
) -> Ladder:
    """The settings of the rule that the options name, with whatever they need fitted.

    - ``threshold``: layers by expected speed, thresholds that lose given shares of epsilon on the tuning text.
    - ``position``: the depth falls over the length of a calibrated text from all layers to a last one, which is each
      of L-1, L-2, .. down to half the depth, or each of the layers that the options name.
    - ``layer-skip``: 1, 2, .. layers are left out, as long as half of them stay, and two.

    Raises:
        RestpointError: a layer is not the model's, the model is too shallow, no threshold keeps to epsilon on the
            tuning text, or what was begun in the folder reads states in another way.
    """
    if options.rule == LayerSkipRule.kind:
        return _skipping(layered.depth, kept)
    if options.rule == PositionRule.kind:
        return _by_position(loaded, layered, passages, options, output, kept, report)
    return _by_threshold(loaded, layered, passages, options, output, kept, report)


def check_rule(depth: int, options: CalibrateOptions) -> None:
    """Refuse, before anything is fitted, a rule that has no setting for a model of so many layers.

    Raises:
        RestpointError: see :func:`ladder_of`.
    """
    if options.rule == LayerSkipRule.kind:
        _counts(depth)
    elif options.rule == PositionRule.kind:
        _last_layers(depth, options)
    else:
        candidate_layers(depth, options)


def _by_threshold(
    loaded: Loaded,
    layered: LayeredModel,
    passages: Passages,
    options: CalibrateOptions,
    output: Path,
    kept: Kept,
    report: Progress,
) -> Ladder:
    candidates = candidate_layers(layered.depth, options)
    whole = options.signal == RestRadius.kind
    readout = readout_once(loaded, layered, passages.fit, candidates, options, output, report, whole_vocabulary=whole)
    tuning = Tuning(layered, readout, passages.tune, options, report)
    # Layers are chosen by measured times, which differ from run to run: what was begun goes on with its own.
    choice = kept.choice or tuning.choose(candidates)
    layers, signal = choice.layers, tuning.signal(choice.layers)
    predictors = {layer: own for layer, own in readout.predictors.items() if layer in layers}

    def policy(threshold: float) -> ExitPolicy:
        rule = ThresholdRule(options.signal, threshold, layers, catch_up=cast(CatchUp, options.catch_up))
        return ExitPolicy(rule, predictors, signal, readout.vocabulary)

    kept.begin(choice, policy(choice.threshold).readers)
    return Ladder("threshold", tuning.thresholds(layers, signal), policy, choice)


def _by_position(
    loaded: Loaded,
    layered: LayeredModel,
    passages: Passages,
    options: CalibrateOptions,
    output: Path,
    kept: Kept,
    report: Progress,
) -> Ladder:
    depth = layered.depth
    lasts = _last_layers(depth, options)
    # Every depth down to the lowest occurs. No token is left to the full depth, so all tokens must be within reach.
    reading = replace(options, vocabulary=options.vocabulary or 0)
    readout = readout_once(loaded, layered, passages.fit, tuple(range(int(lasts[-1]), depth)), reading, output, report)

    def policy(last: float) -> ExitPolicy:
        rule = PositionRule(depth, int(last), options.new_tokens)
        candidates = rule.candidates(depth)
        predictors = {layer: own for layer, own in readout.predictors.items() if layer in candidates}
        return ExitPolicy(rule, predictors, vocabulary=readout.vocabulary)

    kept.begin(None, policy(lasts[-1]).readers)
    return Ladder("last layer", lasts, policy)


def _skipping(depth: int, kept: Kept) -> Ladder:
    def policy(count: float) -> ExitPolicy:
        return ExitPolicy(LayerSkipRule.leaving_out(int(count), depth))

    counts = _counts(depth)
    kept.begin(None, policy(counts[0]).readers)
    return Ladder("layers left out", counts, policy)


def _last_layers(depth: int, options: CalibrateOptions) -> tuple[float, ...]:
    """From the deepest on."""
    if depth < 2:
        raise RestpointError(f"rule is {options.rule}: of {depth} layer there is none to stop after")
    if options.layers and not 1 <= options.layers[0] <= options.layers[-1] < depth:
        raise RestpointError(f"layers is {options.layers}; by position each must lie between 1 and {depth - 1}")
    return tuple(float(layer) for layer in reversed(options.layers or range(max(1, depth // 2), depth)))


def _counts(depth: int) -> tuple[float, ...]:
    """From one on."""
    most = depth - max(2, (depth + 1) // 2)
    if most < 1:
        raise RestpointError(f"rule is {LayerSkipRule.kind}: of {depth} layers none can be left out; two must stay")
    return tuple(float(count) for count in range(1, most + 1))
