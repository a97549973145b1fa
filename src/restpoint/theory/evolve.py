"""Particles through time: fixed Runge-Kutta steps, adaptive ones, or layers."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.theory.sphere import retract

_STABLE = 2.785  # the real end of the stability region of the classical Runge-Kutta scheme
_LARGEST_MOVE = 1.0  # of one step, in units of the largest particle (on the sphere: radians)
_ROUNDING = 1e-8  # slopes that differ by less say nothing about rates


@runtime_checkable
class System(Protocol):
    """What moves particles."""

    @property
    def sphere(self) -> bool:
        """Whether particles live on the unit sphere."""
        ...

    def velocity(self, states: Tensor, time: float) -> Tensor:
        """dx/dt."""
        ...

    def force(self, states: Tensor, time: float) -> Tensor:
        """The same before the projection to the sphere."""
        ...


@dataclass(frozen=True)
class RungeKutta:
    """The classical fourth-order scheme in equal steps; on the sphere, each step ends with a division by the norm.

    Use it for large batches: every system takes the same steps, four velocities each. The two middle slopes of a step
    measure how fast the system reacts, h rate = 2 |k3 - k2| / |k2 - k1|; beyond 2.785 the scheme amplifies what the
    system damps, and the step is refused instead of giving noise.
    """

    step: float = 0.1
    """Largest step in time; it is made smaller so that whole steps lead to every recorded time."""


@dataclass(frozen=True)
class Adaptive:
    """Steps as small as the tolerances ask for, by torchdiffeq (the extra `theory`).

    Use it for accuracy on few systems: a batch shares its steps, so the fastest system sets them for all.
    """

    relative: float = 1e-9
    """Relative tolerance of a step."""
    absolute: float = 1e-11
    """Absolute tolerance of a step."""
    method: str = "dopri5"
    """A method of torchdiffeq with adaptive steps: dopri5, dopri8, bosh3, .."""


@dataclass(frozen=True)
class Layers:
    """Discrete layers, x <- norm(x + step force(x)): what a transformer does, and Euler's scheme of the flow.

    ``post`` divides by the norm after every residual sum; ``pre`` lets the residual stream grow and shows the layer
    x / |x|; ``none`` does neither.
    """

    step: float = 1.0
    """Time that a layer lasts, which scales what it adds to the residual stream."""
    norm: Literal["post", "pre", "none"] = "post"
    """Where the norm is."""


Scheme = RungeKutta | Adaptive | Layers


def evolve(
    system: System, start: Float64[Tensor, "*batch n dim"], times: Sequence[float], scheme: Scheme
) -> Iterator[Float64[Tensor, "*batch n dim"]]:
    """The states at every recorded time, one after another: nothing else is kept.

    Args:
        system: what moves the particles.
        start: where they are at the first of the times; brought to the sphere by a division if the system lives there.
        times: increasing; in units of the flow's time.
        scheme: how to get from one time to the next.

    Yields:
        One tensor for each time, the start included.

    Raises:
        RestpointError: at once, where times, step, tolerances or start make no sense; later, where the step is too
            large for the system, or a state stops being finite.
    """
    if len(times) == 0 or any(not later > earlier for earlier, later in itertools.pairwise(times)):
        raise RestpointError("times must increase and hold one time at least")
    if not isinstance(scheme, Adaptive) and not (math.isfinite(scheme.step) and scheme.step > 0):
        raise RestpointError(f"step is {scheme.step}; give a positive time")
    if isinstance(scheme, Adaptive) and not (scheme.relative > 0 and scheme.absolute > 0):
        raise RestpointError("relative and absolute: a tolerance is not positive; 1e-9 and 1e-11 are usual")
    keep = retract if system.sphere and not (isinstance(scheme, Layers) and scheme.norm != "post") else _finite
    advance = {RungeKutta: _runge_kutta, Adaptive: _adaptive, Layers: _layers}[type(scheme)]
    first = (retract if system.sphere else _finite)(start)

    def states() -> Iterator[Tensor]:
        now = first
        yield now
        for earlier, later in itertools.pairwise(times):
            now = advance(system, now, earlier, later, scheme, keep)
            yield now

    return states()


def record(
    system: System, start: Float64[Tensor, "*batch n dim"], times: Sequence[float], scheme: Scheme
) -> Float64[Tensor, "times *batch n dim"]:
    """What `evolve` yields in one tensor."""
    return torch.stack(list(evolve(system, start, times, scheme)))


def _finite(states: Tensor) -> Tensor:
    if not bool(states.isfinite().all()):
        raise _diverged()
    return states


def _diverged() -> RestpointError:
    return RestpointError(
        "states: one is not finite; particles that are not on a sphere can diverge: end earlier or take smaller steps"
    )


Keep = Callable[[Tensor], Tensor]


def _runge_kutta(system: System, states: Tensor, start: float, stop: float, scheme: RungeKutta, keep: Keep) -> Tensor:
    count = max(1, math.ceil((stop - start) / scheme.step - 1e-9))
    step = (stop - start) / count
    middle = 0.5 * step
    for number in range(count):
        time = start + number * step
        k1 = system.velocity(states, time)
        _check_move(states, k1, time, step)
        k2 = system.velocity(states + middle * k1, time + middle)
        k3 = system.velocity(states + middle * k2, time + middle)
        _check_reaction(states, k1, k2, k3, time, step)
        k4 = system.velocity(states + step * k3, time + step)
        states = keep(states + step / 6 * (k1 + 2 * (k2 + k3) + k4))
    return states


def _check_move(states: Tensor, k1: Tensor, time: float, step: float) -> None:
    size = states.norm(dim=-1).amax(-1).clamp_min(torch.finfo(states.dtype).tiny)
    move = float((step * k1.norm(dim=-1).amax(-1) / size).max())
    if not math.isfinite(move):
        raise _diverged()
    if move > _LARGEST_MOVE:
        what = f"moves a particle by {move:.3g} times its length, more than {_LARGEST_MOVE:g}"
        raise _too_large(step, time, what, _LARGEST_MOVE / move)


def _check_reaction(states: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, time: float, step: float) -> None:
    turn = (k2 - k1).flatten(-2).norm(dim=-1)
    bend = (k3 - k2).flatten(-2).norm(dim=-1)
    tells = step * turn > _ROUNDING * states.flatten(-2).norm(dim=-1)
    reaction = float(torch.where(tells, 2 * bend / turn.clamp_min(torch.finfo(states.dtype).tiny), 0).max())
    if not math.isfinite(reaction):
        raise _diverged()
    if reaction > _STABLE:
        what = (
            f"times the rate {reaction / step:.3g} at which the system reacts is {reaction:.3g}, outside the stability "
            f"region, which ends at {_STABLE}"
        )
        raise _too_large(step, time, what, _STABLE / reaction)


def _too_large(step: float, time: float, what: str, share: float) -> RestpointError:
    return RestpointError(
        f"step: one of {step:.3g} at time {time:.4g} {what}; give a step below {0.9 * share * step:.2g}"
    )


def _layers(system: System, states: Tensor, start: float, stop: float, scheme: Layers, keep: Keep) -> Tensor:
    count = round((stop - start) / scheme.step)
    if abs(count * scheme.step - (stop - start)) > 1e-6 * scheme.step:
        raise RestpointError(
            f"times: from {start:g} to {stop:g} is no whole number of layers of {scheme.step:g}; record between layers"
        )
    for number in range(count):
        shown = retract(states) if scheme.norm == "pre" else states
        states = keep(states + scheme.step * system.force(shown, start + number * scheme.step))
    return states


def _adaptive(system: System, states: Tensor, start: float, stop: float, scheme: Adaptive, keep: Keep) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise RestpointError(
            "scheme: adaptive steps need torchdiffeq; run `pip install restpoint[theory]`, or use RungeKutta(step)"
        ) from error
    span = torch.tensor([start, stop], dtype=states.dtype, device=states.device)
    try:
        ends: Any = odeint(
            lambda time, x: system.velocity(x, float(time)),
            states,
            span,
            rtol=scheme.relative,
            atol=scheme.absolute,
            method=scheme.method,
        )
    except AssertionError as error:  # torchdiffeq's way of saying that the steps became too small
        raise RestpointError(
            f"scheme: {scheme.method} cannot go on between times {start:g} and {stop:g} ({error}); end earlier, or "
            "allow larger tolerances"
        ) from error
    return keep(ends[-1])
