"""What the parts of a pass that may stop early cost on this machine, and how fast that makes it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from restpoint.decode.costs import device_name, name_of, timed
from restpoint.decode.target import NO_DRAFT, LayeredTarget
from restpoint.errors import RestpointError
from restpoint.exit.signals import Signal
from restpoint.exit.view import Readout, View, views
from restpoint.model.layered import LayeredModel
from restpoint.model.load import context_length

_SIZES = (1, 2, 4, 8, 16, 32)
_LAYERS = "layers"
_HEAD = "head"
_READOUT = "readout"
_JOINING = "joining"
_STEP = "step"
_SIGNAL = "signal "


@dataclass(frozen=True)
class ExitCosts:
    """Measured seconds, for one text.

    Attributes:
        device: name of the device that they were measured on.
        dtype: dtype of the model.
        layer: of one layer over 1, 2, 3, .. tokens; longer blocks go on as the second half of these does.
        head: of the final norm and the unembedding, for one token.
        readout: of a candidate layer's law for one token: a predictor, and the head.
        signals: of one check by each signal, beside the law that it may read.
        reads_law: signals that read it, so that each check costs a readout too. The others pay one where they stop.
        overhead: of one token beside all this: embedding, positions, the loop.
        joining: of taking tokens along that wait at a layer: positions and masks of the longer block.
    """

    device: str
    dtype: str
    layer: tuple[float, ...]
    head: float
    readout: float
    signals: Mapping[str, float]
    reads_law: frozenset[str]
    overhead: float = 0.0
    joining: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no time can be."""
        numbers = [*self.layer, self.head, self.readout, self.overhead, self.joining, *self.signals.values()]
        if not self.layer or not all(0 <= number < float("inf") for number in numbers):
            raise RestpointError("costs: a time is missing, negative or not finite; measure them again")

    def plain(self, depth: int) -> float:
        """Seconds of one token in plain decoding of a model of so many layers."""
        return self.overhead + depth * self.layer[0] + self.head

    def check(self, signal: str | None) -> float:
        """Seconds of one look at a candidate layer; without a signal, nothing.

        Raises:
            RestpointError: the signal was not measured.
        """
        if signal is None:
            return 0.0
        if signal not in self.signals:
            raise RestpointError(f"costs: {signal!r} was not measured; known are {', '.join(sorted(self.signals))}")
        return self.signals[signal] + (self.readout if signal in self.reads_law else 0.0)

    def stop(self, signal: str | None) -> float:
        """Seconds that a token that stops costs beside its checks."""
        return 0.0 if signal in self.reads_law else self.readout

    def blocks(self, largest: int) -> Tensor:
        """Seconds of one layer over 0, 1, .. ``largest`` tokens, in float64; nothing for none."""
        known = torch.tensor([0.0, *self.layer], dtype=torch.float64)[: largest + 1]
        beyond = largest + 1 - len(known)
        if beyond <= 0:
            return known
        half = len(self.layer) // 2
        slope = (self.layer[-1] - self.layer[half - 1]) / (len(self.layer) - half) if half else self.layer[-1]
        return torch.cat([known, self.layer[-1] + slope * torch.arange(1, beyond + 1, dtype=torch.float64)])


@torch.inference_mode()
def measure_exit_costs(
    layered: LayeredModel,
    readout: Readout,
    signals: Mapping[str, Signal],
    layers: Sequence[int],
    *,
    context: int = 128,
    repeats: int = 15,
) -> ExitCosts:
    """Medians of real timings, each right after a pass over the layers, so that no part's weights are at hand already.

    Times of blocks are smoothed so that they rise with length (isotonic regression).

    Args:
        layered: the model; it must have the ``cached`` capability.
        readout: how states are read.
        signals: by name.
        layers: candidate layers, ascending; what differs between them is averaged.
        context: number of tokens in the cache.
        repeats: measurements of each part.
    """
    target = LayeredTarget(layered)
    token = 1 % layered.vocabulary_size
    limit = context_length(layered.model) or context + _SIZES[-1]
    sizes = [size for size in _SIZES if size < limit]
    target.prefill([[token] * min(context, limit - sizes[-1])])
    blocks = {size: torch.full((1, size), token, device=layered.device) for size in sizes}
    samples: dict[str, list[float]] = {}

    def time(name: str, work: Callable[[], object]) -> None:
        samples.setdefault(name, []).append(timed(layered.device, work))

    def step() -> None:
        target.score([token], [NO_DRAFT])[0].logits.argmax(-1).tolist()

    for _ in range(repeats + 1):
        time(_STEP, step)
        for size in sizes:
            plan = layered.plan(blocks[size], target.cache)
            time(f"{_LAYERS} {size}", lambda plan=plan: layered.run(plan))
        plan = layered.plan(blocks[1], target.cache)
        levels = [plan.hidden]
        layered.run(plan, keep=levels)
        states = torch.cat(levels, 1)
        time(_HEAD, lambda states=states: layered.logits(states[:, -1:]))
        time(_JOINING, lambda: layered.plan(blocks[sizes[-1] // 8 or 1], target.cache, offset=-(sizes[-1] // 8)))
        for at in range(len(layers)):
            for name, signal in signals.items():
                layered.run(plan)
                seen = views(states, layers[: at + 1], readout)
                if at:
                    signal.confidence(seen[at - 1])  # a rule that comes here has looked there before
                if signal.reads_law:
                    time(_READOUT, lambda view=seen[at]: view.logits)
                time(f"{_SIGNAL}{name}", lambda signal=signal, view=seen[at]: _look(signal, view))
            if not any(signal.reads_law for signal in signals.values()):
                layered.run(plan)
                seen = views(states, layers[: at + 1], readout)
                time(_READOUT, lambda view=seen[at]: view.logits)
    warm = {name: statistics.median(own[len(own) // (repeats + 1) :]) for name, own in samples.items()}
    passes = [warm[f"{_LAYERS} {size}"] / layered.depth for size in sizes]
    smooth = isotonic_regression(passes).x
    return ExitCosts(
        device=device_name(layered.device),
        dtype=name_of(layered.dtype),
        layer=tuple(float(np.interp(size, sizes, smooth)) for size in range(1, sizes[-1] + 1)),
        head=warm[_HEAD],
        readout=warm[_READOUT],
        signals={name: warm[f"{_SIGNAL}{name}"] for name in signals},
        reads_law=frozenset(name for name, signal in signals.items() if signal.reads_law),
        overhead=max(0.0, warm[_STEP] - layered.depth * float(smooth[0]) - warm[_HEAD]),
        joining=warm[_JOINING],
    )


def _look(signal: Signal, view: View) -> None:
    """What a rule does with a signal."""
    (signal.confidence(view) >= 0.5).tolist()
