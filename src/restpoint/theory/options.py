"""What to simulate; by itself, so that the command line need not import torch to show its help."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from restpoint.errors import RestpointError
from restpoint.flags import Number

STUDIES = ("phase", "strip", "causal", "spectrum", "mean-field")
LAYERS, HEAD = "layers", "head"
MODEL_STUDIES = (LAYERS, HEAD)

Betas = Annotated[tuple[float, ...], arg(metavar="BETA ...", help_behavior_hint="")]
Time = Annotated[float | None, arg(metavar="TIME", help_behavior_hint="")]


@dataclass(frozen=True)
class SimulateOptions:
    """Sizes of the simulations; what is left out is as in the papers."""

    particles: Number = None
    """Tokens of each system (32; causal: 200; mean-field: the largest of several numbers, 512; layers: of each text,
    128)."""
    seeds: Number = None
    """Random starts of each system (4; strip: 1; mean-field: 16; layers: texts, 16)."""
    betas: Betas = ()
    """Inverse temperatures (phase: 24 from 0.1 to 9; strip and spectrum: 9; causal: 64; mean-field: 4; head: 0.25, 1
    and 4, where 1 is the model's own). All but phase and head take one."""
    time: Time = None
    """Time at the end; a layer that adds as much as the state itself lasts 1 (phase and strip: 30; causal: 100;
    spectrum: 300; mean-field: 1; head: 40)."""
    step: Time = None
    """Largest step of the Runge-Kutta scheme (0.1; spectrum: 0.25); refused where the system reacts faster."""
    seed: int = 0
    """Seed of the first start."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        for name, least in (("particles", 2), ("seeds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RestpointError(f"{name} is {value}; it must be at least {least}")
        for name in ("time", "step"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RestpointError(f"{name} is {value}; it must be positive, or be left out")
        wrong = [beta for beta in self.betas if not (math.isfinite(beta) and beta > 0)]
        if wrong:
            raise RestpointError(f"betas: {wrong[0]:g} is none; an inverse temperature is finite and above 0 here")

    def one_beta(self, default: float) -> float:
        """The inverse temperature of a study that takes one.

        Raises:
            RestpointError: several are given.
        """
        if len(self.betas) > 1:
            raise RestpointError("betas: this study takes one; give one, or only the studies phase and head")
        return self.betas[0] if self.betas else default


def chosen(studies: tuple[str, ...], model: bool) -> tuple[str, ...]:
    """The studies to run: those named, else all; with a model, those of a model.

    Raises:
        RestpointError: a name is unknown, or goes only with a model or only without one.
    """
    known = MODEL_STUDIES if model else STUDIES
    for name in studies:
        if name not in (*STUDIES, *MODEL_STUDIES):
            raise RestpointError(f"studies: {name!r} is unknown; choose from {', '.join((*STUDIES, *MODEL_STUDIES))}")
        if name not in known:
            remedy = "leave out --from" if model else "give --from MODEL"
            raise RestpointError(f"studies: {name} is {'not ' if model else ''}a study of a model; {remedy}")
    return tuple(dict.fromkeys(studies)) or known
