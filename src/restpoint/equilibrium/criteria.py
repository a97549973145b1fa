"""Exit criteria by name: what stops a loop, and at which setting where none is given."""

import difflib
from collections.abc import Callable, Mapping

from torch import Tensor

from restpoint.equilibrium.exits import (
    Acceleration,
    ArgmaxStability,
    Cosine,
    Divergence,
    EntropyDifference,
    ExitCriterion,
    RelativeStep,
    StepNorm,
)
from restpoint.equilibrium.transport_exit import TransportStep
from restpoint.errors import RestpointError

Maker = Callable[[float, Tensor], ExitCriterion]
"""A criterion of its setting (a threshold, or a count of hits) and the unembedding."""

ACCELERATION, ARGMAX = "acceleration", "argmax-stability"

CRITERIA: Mapping[str, Maker] = {
    ACCELERATION: lambda threshold, _: Acceleration(threshold=threshold),
    "acceleration-once": lambda threshold, _: Acceleration(threshold=threshold, hits=1),
    "step-norm": lambda threshold, _: StepNorm(threshold=threshold),
    "step-norm-twice": lambda threshold, _: StepNorm(threshold=threshold, hits=2),
    "relative-step": lambda threshold, _: RelativeStep(threshold=threshold),
    "cosine": lambda threshold, _: Cosine(threshold=threshold),
    "entropy-difference": lambda threshold, _: EntropyDifference(threshold=threshold),
    "kl": lambda threshold, _: Divergence(threshold=threshold),
    "transport": lambda threshold, weight: TransportStep(threshold=threshold, embeddings=weight),
    ARGMAX: lambda hits, _: ArgmaxStability(hits=int(hits)),
}
"""``acceleration-once`` and ``step-norm-twice`` tell what two hits are worth from what the second difference is."""

RELATIVE: Mapping[str, Callable[[float], ExitCriterion]] = {
    ACCELERATION: lambda share: Acceleration(threshold=share, relative=True),
    "acceleration-once": lambda share: Acceleration(threshold=share, relative=True, hits=1),
    "step-norm": lambda share: RelativeStep(threshold=share),
    "step-norm-twice": lambda share: RelativeStep(threshold=share, hits=2),
}
"""Those whose threshold is in units of the state, with one that is a share of its size instead."""

DEFAULTS: Mapping[str, str] = {
    ACCELERATION: "30%",
    "acceleration-once": "30%",
    "step-norm": "10%",
    "step-norm-twice": "10%",
    "relative-step": "0.1",
    "cosine": "0.005",
    "entropy-difference": "0.01",
    "kl": "0.01",
    "transport": "0.05",
    ARGMAX: "3",
}
"""Settings where none is given."""


def criterion(asked: str, unembedding: Tensor) -> tuple[str, ExitCriterion]:
    """The criterion that ``NAME`` or ``NAME=SETTING`` asks for, and both in full.

    A setting is a threshold, or for ``argmax-stability`` the steps in a row. For those in units of the state,
    ``10%`` is that share of ‖s_k‖.

    Args:
        asked: as `CRITERIA` and `DEFAULTS` name them.
        unembedding: weight, (vocabulary, hidden), which ``transport`` reads.

    Raises:
        RestpointError: the name is unknown, or the setting makes no sense for it; it begins with ``loop_exit``.
    """
    name, equals, setting = (word.strip() for word in asked.partition("="))
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RestpointError(f"loop_exit={name!r} is not known{hint}: choose one of {', '.join(CRITERIA)}")
    setting = setting if equals else DEFAULTS[name]
    share = setting.endswith("%")
    if share and name not in RELATIVE:
        raise RestpointError(f"loop_exit: the setting of {name} has no unit; give a number instead of {setting!r}")
    try:
        value = float(setting.removesuffix("%"))
    except ValueError:
        raise RestpointError(f"loop_exit: {setting!r} is no number; write {name}={DEFAULTS[name]}") from None
    if name == ARGMAX and value != int(min(max(value, -1), 1e9)):
        raise RestpointError(f"loop_exit: {name} counts steps in a row; give a whole number instead of {setting!r}")
    try:
        found = RELATIVE[name](value / 100) if share else CRITERIA[name](value, unembedding)
    except RestpointError as error:
        raise RestpointError(f"loop_exit: {name}={setting}: {error}") from error
    return f"{name}={setting}", found
