"""Where tokens begin, and whether steps are extrapolated: what either saves, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.equilibrium.exits import RelativeStep
from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.solvers.method import Method
from restpoint.evaluate.looped.criteria import fewest_steps, spread
from restpoint.evaluate.looped.curves import LoopCurve, Matched, compare_at
from restpoint.evaluate.looped.passes import Passed, token_by_token
from restpoint.exit.bootstrap import Estimate, estimates, resampled_shares
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.starts import PredictedStart, PreviousStart, Start, ZeroStart
from restpoint.progress import Progress

NOISE = "noise"
_POINTS = 6


@dataclass(frozen=True)
class Way:
    """How a token is brought to rest.

    Attributes:
        start: where it begins; as trained if None.
        solver: extrapolation; plain iteration if None.
        budget: steps of which keys are kept; all if None.
    """

    start: Start | None = None
    solver: Method | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Rested:
    """What a way needs to bring the relative step below the tolerance.

    Attributes:
        name: of the way.
        steps: per token; one that never gets there counts with the full count.
        fewer: share of the steps of noise that it does without.
        capped: share of tokens that ran the full count.
    """

    name: str
    steps: Estimate
    fewer: Estimate | None
    capped: float


@dataclass(frozen=True, eq=False)
class WarmReport:
    """Ways compared.

    Attributes:
        tolerance: relative step at which a token is at rest.
        rested: steps to that tolerance.
        matched: steps where perplexity may rise by so much; ``setting`` is the tolerance.
        curves: of each way.
    """

    tolerance: float
    rested: tuple[Rested, ...]
    matched: tuple[Matched, ...]
    curves: Mapping[str, LoopCurve]


def ways(predicted: Sequence[tuple[str, PredictedStart]]) -> dict[str, Way]:
    """What is compared. All but the first see earlier tokens at their last step, as solvers need it."""
    starts: dict[str, Start | None] = {NOISE: None, "zero": ZeroStart(), "previous": PreviousStart(), **dict(predicted)}
    found = {NOISE: Way()}
    for name, start in starts.items():
        found[f"{name}, last keys" if start is None else name] = Way(start, budget=1)
    for name in [own for own in starts if own != "zero"]:
        found[f"{name} + Anderson"] = Way(starts[name], Anderson(), budget=1)
    return found


def compare_starts(
    model: RecurrentDepthForCausalLM,
    ids: Int[Tensor, "texts length"],
    full: Passed,
    lowest: Float[Tensor, "steps rows"],
    compared: Mapping[str, Way],
    num_steps: int,
    increase: float,
    tolerance: float,
    progress: Progress,
) -> WarmReport:
    """Run every way at a range of tolerances over texts that are given, and compare with noise.

    Args:
        model: the model.
        ids: texts.
        full: their pass at the full count, as trained.
        lowest: of the relative step, see `Watch.lowest`, to spread tolerances by.
        compared: by name; one of them is `NOISE`.
        num_steps: the full count.
        increase: share by which perplexity may rise.
        tolerance: where steps are counted.
        progress: called after each run.
    """
    means = torch.linspace(fewest_steps(lowest), num_steps, _POINTS + 1)[:-1].tolist()
    settings = sorted({0.0, tolerance, *spread(lowest, means)})
    curves: dict[str, LoopCurve] = {}
    at_rest: dict[str, Passed] = {}
    for done, (name, way) in enumerate(compared.items()):
        passed = {}
        for place, setting in enumerate(settings):
            progress("compare starts", done * len(settings) + place, len(compared) * len(settings))
            exits = RelativeStep(threshold=setting)
            passed[setting] = token_by_token(model, ids, num_steps, exits, way.start, way.solver, way.budget)
        at_rest[name] = passed[tolerance]
        curves[name] = LoopCurve.of(name, full, num_steps, passed)
    progress("compare starts", len(compared) * len(settings), len(compared) * len(settings))
    matched = compare_at(list(curves.values()), increase, NOISE)
    return WarmReport(tolerance, tuple(_rested(at_rest, num_steps)), tuple(matched), curves)


def _rested(at_rest: Mapping[str, Passed], num_steps: int) -> list[Rested]:
    count = next(iter(at_rest.values())).steps.shape[0]
    whole = torch.full((count, 1), 1 / count, dtype=torch.float64)
    shares = torch.cat([whole, resampled_shares(count)], 1)

    def estimate(values: Tensor) -> Estimate:
        return estimates(values[:1], values[None, 1:], count)[0]

    reference = at_rest[NOISE].mean_steps() @ shares
    found = []
    for name, passed in at_rest.items():
        steps = passed.mean_steps() @ shares
        fewer = None if name == NOISE else estimate(1 - steps / reference)
        capped = float((passed.steps == num_steps).double().mean())
        found.append(Rested(name, estimate(steps), fewer, capped))
    return found
