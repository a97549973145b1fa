"""A sweep of everything that may stop a loop early, and of where it may begin."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restpoint import files
from restpoint.equilibrium.criteria import ACCELERATION, ARGMAX, CRITERIA
from restpoint.equilibrium.exits import Below, ExitCriterion, RelativeStep
from restpoint.errors import RestpointError
from restpoint.evaluate.looped.criteria import Watch, fewest_steps, spread
from restpoint.evaluate.looped.curves import LoopCurve, Matched, compare_at
from restpoint.evaluate.looped.material import Material, material
from restpoint.evaluate.looped.options import LoopOptions
from restpoint.evaluate.looped.passes import Passed, whole
from restpoint.evaluate.looped.speed import Timed, time_decoding
from restpoint.evaluate.looped.warm import NOISE, WarmReport, Way, compare_starts, ways
from restpoint.exit.names import named
from restpoint.model.load import Loaded
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM
from restpoint.model.recurrent.starts import PredictedStart, fit_start
from restpoint.progress import Progress

STATIC, ORACLE = "static", "oracle"
_REFINED = 2


@dataclass(frozen=True)
class LoopReport:
    """A finished sweep of a model that iterates a block.

    Attributes:
        model: its name.
        steps: the full count.
        perplexity: at the full count.
        texts: how many were judged on.
        text_tokens: of each.
        increase: share by which perplexity may rise where ways are compared.
        curves: of every criterion, and of so many steps for all tokens.
        oracle: the ceiling: each token stops at the first step from which its prediction stays that of the full count.
            Told from passes in which all tokens run on, so no exit changes what others see.
        matched: steps at that rise, and how many fewer than the reference.
        reference: a criterion.
        timed: decoding at the kept settings.
        starts: ways to begin compared; None where they were left out.
    """

    model: str
    steps: int
    perplexity: float
    texts: int
    text_tokens: int
    increase: float
    curves: Mapping[str, LoopCurve]
    oracle: LoopCurve
    matched: tuple[Matched, ...]
    reference: str
    timed: tuple[Timed, ...]
    starts: WarmReport | None

    def json(self) -> str:
        """Every figure, with its intervals."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("model", "steps", "perplexity", "texts", "text_tokens", "increase", "reference")
        }
        found["matched"] = [asdict(row) for row in self.matched]
        found["decoding"] = [asdict(row) for row in self.timed]
        found["curves"] = _points({**self.curves, ORACLE: self.oracle})
        if self.starts is not None:
            found["starts"] = {
                "tolerance": self.starts.tolerance,
                "rested": [asdict(row) for row in self.starts.rested],
                "matched": [asdict(row) for row in self.starts.matched],
                "curves": _points(self.starts.curves),
            }
        return json.dumps(found, indent=1)

    def write(self, path: Path) -> None:
        """Write it as JSON, complete or not at all.

        Raises:
            RestpointError: the file cannot be written.
        """
        text = self.json()
        files.write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sweep_loop(
    loaded: Loaded,
    texts: Iterable[str] | None,
    options: LoopOptions | None = None,
    progress: Progress | None = None,
) -> LoopReport:
    """Hold every exit criterion at a range of thresholds against the full count, on text that is given.

    Args:
        loaded: a recurrent-depth model and its tokenizer.
        texts: documents; bundled text if None.
        options: which criteria, on how much text.
        progress: called as work proceeds.

    Raises:
        RestpointError: a criterion is unknown, the text too short, or the model has no exits.
    """
    options = options or LoopOptions()
    report = progress or (lambda _stage, _done, _total: None)
    model = loaded.model
    if not isinstance(model, RecurrentDepthForCausalLM) or isinstance(model, DeepEquilibriumForCausalLM):
        raise RestpointError(f"model: {loaded.name} has no loop that tokens could leave; give a recurrent-depth model")
    names = [named("criteria", name, dict.fromkeys(CRITERIA, name)) for name in options.criteria] or list(CRITERIA)
    count = model.config.mean_recurrence if options.steps is None else options.steps
    if count < 3:
        raise RestpointError(f"steps: the model's mean recurrence is {count}; exits need at least 3 to choose from")
    given = material(texts, loaded.tokenizer, options)
    ids = given.judge.to(model.device)
    fixed: dict[int, Passed] = {}
    for steps in range(1, count + 1):
        report("fixed counts", steps - 1, count)
        fixed[steps] = whole(model, ids, steps)
    report("fixed counts", count, count)
    full = fixed[count]
    curves = {}
    for done, name in enumerate(names):
        report("criteria", done, len(names))
        curves[name] = _criterion_curve(name, model, ids, full, count, options)
    report("criteria", len(names), len(names))
    curves[STATIC] = LoopCurve.of(STATIC, full, count, {float(steps): own for steps, own in fixed.items()})
    reference = ACCELERATION if ACCELERATION in names else names[0]
    matched = tuple(compare_at(list(curves.values()), options.increase, reference))
    weight = model.lm_head.weight
    plans: dict[str, tuple[float, ExitCriterion, Way]] = {
        row.name: (row.setting, CRITERIA[row.name](row.setting, weight), Way())
        for row in matched
        if row.setting is not None and row.name != STATIC
    }
    starts = None
    if not options.no_starts:
        starts, compared = _starts(model, given, ids, full, count, options, report)
        for row in _timed_starts(starts, compared):
            assert row.setting is not None
            plans[f"start: {row.name}"] = (row.setting, RelativeStep(threshold=row.setting), compared[row.name])
    timed = time_decoding(model, ids[: options.speed_prompts], count, plans, report) if options.speed_prompts else []
    return LoopReport(
        model=loaded.name,
        steps=count,
        perplexity=float(full.mean_loss().mean().exp()),
        texts=len(ids),
        text_tokens=options.text_tokens,
        increase=options.increase,
        curves=curves,
        oracle=LoopCurve.of(ORACLE, full, count, {0.0: oracle(fixed)}),
        matched=matched,
        reference=reference,
        timed=tuple(timed),
        starts=starts,
    )


def oracle(fixed: Mapping[int, Passed]) -> Passed:
    """Each token at the first number of steps from which on its prediction is that of the last one.

    Args:
        fixed: passes at 1, 2, .. steps for all tokens.
    """
    passes = [fixed[steps] for steps in sorted(fixed)]
    best = torch.stack([one.best for one in passes])
    agrees = (best == best[-1]).flip(0).cummin(0).values.flip(0)
    first = agrees.int().argmax(0)
    loss = torch.stack([one.loss for one in passes]).gather(0, first[None])[0]
    return Passed(loss, best.gather(0, first[None])[0], first + 1)


def _criterion_curve(
    name: str, model: RecurrentDepthForCausalLM, ids: Tensor, full: Passed, count: int, options: LoopOptions
) -> LoopCurve:
    """Thresholds spread over the mean number of steps, and a few more around the rise at which curves are compared."""

    def at(setting: float) -> Passed:
        return whole(model, ids, count, CRITERIA[name](setting, model.lm_head.weight))

    if name == ARGMAX:
        return LoopCurve.of(name, full, count, {float(hits): at(float(hits)) for hits in range(1, count - 1)})
    lowest = watched(model, ids, count, CRITERIA[name](1.0, model.lm_head.weight))
    means = torch.linspace(fewest_steps(lowest), count, options.points + 1)[:-1].tolist()
    passed = {setting: at(setting) for setting in spread(lowest, means)}
    target = float(full.mean_loss().mean()) + torch.tensor(options.increase).log1p().item()
    for _ in range(_REFINED):
        reached = sorted(
            (float(own.mean_steps().mean()), float(own.mean_loss().mean()), at_) for at_, own in passed.items()
        )
        kept = [(steps, setting) for steps, loss, setting in reached if loss <= target]
        beyond = [(steps, setting) for steps, loss, setting in reached if loss > target]
        if not beyond:
            break
        low = beyond[-1][1]
        high = min((setting for steps, setting in kept if steps > beyond[-1][0]), default=0.0)
        setting = (low * high) ** 0.5 if high else low / 2
        if setting in passed:
            break
        passed[setting] = at(setting)
    return LoopCurve.of(name, full, count, passed)


def watched(model: RecurrentDepthForCausalLM, ids: Tensor, count: int, criterion: ExitCriterion) -> Tensor:
    """After each step, the least threshold at which each token would have stopped, while all run on."""
    assert isinstance(criterion, Below)
    found = []
    for part in ids.split(20):
        watch = Watch(criterion=criterion)
        whole(model, part, count, watch)
        found.append(watch.lowest())
    return torch.cat(found, 1)


def _starts(
    model: RecurrentDepthForCausalLM,
    given: Material,
    ids: Tensor,
    full: Passed,
    count: int,
    options: LoopOptions,
    report: Progress,
) -> tuple[WarmReport, dict[str, Way]]:
    total = sum(part.numel() for part in given.fit)
    fitted = fit_start(
        model,
        [part.to(model.device) for part in given.fit],
        [part.to(model.device) for part in given.held_out],
        count,
        progress=lambda at: report("fit a start", min(at.rows, total), total) if at.stage == "fit" else None,
    )
    report("fit a start", total, total)
    compared = ways([("predicted", PredictedStart(fitted.predictor))])
    lowest = watched(model, ids, count, RelativeStep())
    found = compare_starts(model, ids, full, lowest, compared, count, options.increase, options.tolerance, report)
    return found, compared


def _timed_starts(starts: WarmReport, compared: Mapping[str, Way]) -> list[Matched]:
    """The ways with the fewest steps, one that iterates plainly and one that extrapolates."""
    found = []
    for solves in (False, True):
        rows = [
            row
            for row in starts.matched
            if row.setting is not None and row.name != NOISE and (compared[row.name].solver is not None) == solves
        ]
        found += sorted(rows, key=lambda row: row.steps.value)[:1]
    return found


def _points(curves: Mapping[str, LoopCurve]) -> dict[str, Any]:
    return {name: [asdict(point) for point in curve.points()] for name, curve in curves.items()}
