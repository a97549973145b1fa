"""All signals: those without fitted tensors by name, and every kind made known to `Signal.from_state`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from restpoint.exit.gate import Gate
from restpoint.exit.law_signals import (
    Disagreement,
    Entropy,
    EntropyDifference,
    KullbackLeibler,
    LogitMargin,
    Margin,
    MaxProbability,
)
from restpoint.exit.radius import RestRadius
from restpoint.exit.signals import Acceleration, Cosine, RelativeStep, Signal
from restpoint.exit.task_signal import TaskSaturation
from restpoint.exit.transport_signal import TransportCost

SIGNALS: dict[str, Signal] = {
    signal.kind: signal
    for signal in (
        MaxProbability(),
        Margin(),
        LogitMargin(),
        Entropy(),
        EntropyDifference(),
        KullbackLeibler(),
        Disagreement(),
        TransportCost(),
        RelativeStep(),
        Cosine(),
        Acceleration(),
    )
}
"""Signals that need no fit, by the name that a rule gives."""

FITTED: tuple[type[Signal], ...] = (TaskSaturation, Gate, RestRadius)
"""Those that do."""


def restored(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Signal:
    """The signal that :meth:`Signal.state` described, of whichever kind: here all are known.

    Raises:
        RestpointError: the kind is unknown.
    """
    return Signal.from_state(config, tensors)
