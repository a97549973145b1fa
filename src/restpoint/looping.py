"""How a model that iterates a block goes through its loop: when tokens leave it, and where they begin, by name."""

from dataclasses import dataclass

from restpoint.decode.looped import LoopedTarget
from restpoint.equilibrium.criteria import criterion
from restpoint.equilibrium.exits import ExitCriterion
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM
from restpoint.model.recurrent.starts import PredictedStart, PreviousStart, Start, ZeroStart
from restpoint.model.unrolled import SolvedModel, UnrolledModel
from restpoint.profile import Profile

STARTS = ("zero", "previous", "predicted")
"""Where a token may begin instead of where the model was trained to."""


@dataclass(frozen=True)
class Looping:
    """How tokens go through the loop; what is left out is as the model was trained.

    Attributes:
        exits: when a token leaves.
        start: where it begins.
        steps: at most so many; the config's mean recurrence if None.
        keys: steps of which keys and values are kept; if None, all, or with a start 1.
        named: all of it in words; made from the above if empty.

    Raises:
        RestpointError: the number of steps, or of those whose keys are kept, is below 1.
    """

    exits: ExitCriterion | None = None
    start: Start | None = None
    steps: int | None = None
    keys: int | None = None
    named: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "keys"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RestpointError(f"loop_{name} is {value}; it must be at least 1, or left out")
        if not self.named:
            given = {name: getattr(self, name) for name in ("exits", "start", "steps", "keys")}
            named = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            object.__setattr__(self, "named", named or "all steps")

    def target(self, layered: LayeredModel) -> LoopedTarget:
        """The model, decoded so.

        Raises:
            RestpointError: it has no loop that tokens could leave.
        """
        if not isinstance(layered, UnrolledModel) or isinstance(layered, SolvedModel):
            raise _no_loop(type(layered.model).__name__, isinstance(layered, SolvedModel))
        keys = 1 if self.keys is None and self.start is not None else self.keys
        return LoopedTarget(layered, self.exits, self.start, layered.steps if self.steps is None else self.steps, keys)

    @property
    def said(self) -> str:
        """What is promised of the text, for the notes."""
        return f"tokens go through the loop by {self.named}: the text may differ from the model's own, uncertified"


def looping(
    loaded: Loaded,
    *,
    exits: str | None = None,
    start: str | None = None,
    steps: int | None = None,
    keys: int | None = None,
    profile: Profile | None = None,
) -> Looping:
    """What these names ask for.

    Args:
        loaded: a recurrent-depth model.
        exits: ``NAME`` or ``NAME=SETTING``, see `restpoint.equilibrium.criteria.criterion`.
        start: one of `STARTS`.
        steps: at most so many.
        keys: steps of which keys and values are kept.
        profile: holds the predicted start.

    Raises:
        RestpointError: a name is unknown, a setting makes no sense, the profile has no start or is another model's, or
            the model has no loop that tokens could leave.
    """
    model = loaded.model
    if not isinstance(model, RecurrentDepthForCausalLM) or isinstance(model, DeepEquilibriumForCausalLM):
        raise _no_loop(loaded.name, isinstance(model, DeepEquilibriumForCausalLM))
    named: list[str] = []
    stops = None
    if exits is not None:
        said, stops = criterion(exits, model.lm_head.weight.detach())
        named.append(said)
    if start is not None:
        named.append(f"start={start}")
    named += [f"{name}={value}" for name, value in (("steps", steps), ("keys", keys)) if value is not None]
    return Looping(stops, None if start is None else _start(loaded, start, profile), steps, keys, ", ".join(named))


def _start(loaded: Loaded, name: str, profile: Profile | None) -> Start:
    if name not in STARTS:
        raise RestpointError(f"loop_start={name!r} is not known: choose one of {', '.join(STARTS)}")
    if name == "zero":
        return ZeroStart()
    if name == "previous":
        return PreviousStart()
    if profile is None or profile.start is None:
        without = "no profile is given" if profile is None else "the profile has none"
        raise RestpointError(
            f"loop_start: predicted needs a fitted start and {without}; fit one with: "
            f"restpoint fit {loaded.name} --start --output FOLDER"
        )
    profile.require(loaded)
    return PredictedStart(profile.start.predictor.to(device=loaded.model.device))


def _no_loop(name: str, solved: bool) -> RestpointError:
    reason = "is solved, and stops by its tolerance" if solved else "iterates no block"
    return RestpointError(f"looping: {name} {reason}: leave out loop_exit and its like")
