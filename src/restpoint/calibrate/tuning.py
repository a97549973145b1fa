"""What is chosen on the model's own text before anything is certified: signal, layers, thresholds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.calibrate.options import CalibrateOptions
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice, choose_layers
from restpoint.exit.costs import measure_exit_costs
from restpoint.exit.gate import Gate, fit_gate
from restpoint.exit.radius import fit_radius
from restpoint.exit.registry import SIGNALS
from restpoint.exit.signals import Signal
from restpoint.exit.sweep import sweep
from restpoint.exit.task_signal import TaskSaturation
from restpoint.exit.traces import Traces, record_traces
from restpoint.exit.view import Readout
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import continue_texts
from restpoint.trajectory.task_examples import TaskExamples
from restpoint.trajectory.task_probe import fit_probe

Progress = Callable[[str, int, int], None]

_SHARES = (0.4, 0.55, 0.7, 0.8, 0.9, 1.0)
"""Of epsilon, the losses on the traces that thresholds to certify are taken at, from safe to fast."""
_THRESHOLDS = 400
_GATE_PARTS = ("weights", "directions", "bias", "centres")


class Tuning:
    """The model continues prompts at full depth: half of its text fits the signal, the other half is traced.

    Args:
        layered: the model.
        readout: how states are read at exits.
        prompts: token ids, all of one length.
        options: of the calibration.
        report: told of the progress.
    """

    def __init__(
        self,
        layered: LayeredModel,
        readout: Readout,
        prompts: Sequence[list[int]],
        options: CalibrateOptions,
        report: Progress,
    ):
        self.layered = layered
        self.readout = readout
        self.options = options
        self.report = report
        half = len(prompts) // 2
        self._fitting, self._tracing = prompts[:half], prompts[half:]
        self._written: list[Tensor] | None = None

    def choose(self, candidates: tuple[int, ...]) -> tuple[LayerChoice, Signal]:
        """Layers to look at by expected speed, and the signal, fitted for these layers."""
        name = self.options.signal
        signal = self._fit(candidates, apart=True)
        costs = measure_exit_costs(self.layered, self.readout, {name: signal}, candidates)
        # Where layers are chosen for another loss than the share of tokens, that share stands in for it.
        choice = choose_layers(
            self._trace(candidates, signal), costs, name, self.options.epsilon, self.options.most_layers
        )
        if self.options.layers or not choice.layers:
            choice = replace(choice, layers=self.options.layers or candidates[-1:])
        return choice, self._fit(choice.layers)

    def thresholds(self, layers: tuple[int, ...], signal: Signal) -> tuple[float, ...]:
        """Those that lose given shares of epsilon on the traces, from safe to fast.

        Raises:
            RestpointError: not even the most cautious exit keeps to epsilon.
        """
        curve = sweep(self._trace(layers, signal), self.options.signal, thresholds=_THRESHOLDS)
        losses = (curve.log_loss if self.options.loss == "perplexity-increase" else curve.disagreement).mean(-1)
        found: list[float] = []
        for share in _SHARES:
            allowed = [
                threshold
                for threshold, own in zip(curve.settings, losses.tolist(), strict=True)
                if own <= share * self.options.epsilon and threshold <= 1
            ]
            if allowed:
                found.append(min(allowed))
        if not found:
            raise RestpointError(
                f"epsilon is {self.options.epsilon}: on the tuning text not even the most cautious exit after layers "
                f"{layers} keeps to it; raise epsilon or give later layers"
            )
        return tuple(sorted(set(found), reverse=True))

    def _trace(self, layers: tuple[int, ...], signal: Signal) -> Traces:
        return record_traces(
            self.layered,
            self._tracing,
            self.options.new_tokens - 1,
            layers,
            self.readout,
            {self.options.signal: signal},
            batch=self.options.batch,
            progress=self.report,
        )

    def _fit(self, layers: tuple[int, ...], apart: bool = False) -> Signal:
        """The signal; with ``apart``, fitted for each layer as if it were the only one, so that any can be chosen."""
        name = self.options.signal
        if name in SIGNALS:
            return SIGNALS[name]
        self.report(f"fit {name}", 0, 1)
        texts = self._texts()
        if name == TaskSaturation.kind:
            signal = _task_saturation(texts, self.layered, self.options.seed)
        elif name == Gate.kind:
            groups = [(layer,) for layer in layers] if apart else [layers]
            gates = [fit_gate(texts, group, self.readout).gate for group in groups]
            signal = Gate(layers, *(torch.cat([getattr(gate, part) for gate in gates]) for part in _GATE_PARTS))
        else:
            signal = fit_radius(texts, layers, self.readout, seed=self.options.seed).signal
        self.report(f"fit {name}", 1, 1)
        return signal

    def _texts(self) -> list[Float[Tensor, "tokens levels hidden"]]:
        """States h_0 .. h_L of tokens that the model wrote, as they are read while the next one is chosen."""
        if self._written is None:
            self._written = list(self._write())
        return self._written

    def _write(self) -> Iterator[Tensor]:
        layers = tuple(range(self.layered.depth))
        start = self.options.prompt_tokens
        for first in range(0, len(self._fitting), self.options.batch):
            prompts = torch.tensor(self._fitting[first : first + self.options.batch], device=self.layered.device)
            _, states = continue_texts(
                self.layered, prompts, start + self.options.new_tokens - 1, layers, lambda _row: True, self.options.seed
            )
            yield from states[:, start:].float().unbind(0)
            self.report("write text", min(first + self.options.batch, len(self._fitting)), len(self._fitting))


def _task_saturation(texts: Sequence[Tensor], layered: LayeredModel, seed: int) -> TaskSaturation:
    """The probe of the atlas, on text that the model wrote."""
    examples = TaskExamples(lambda states: layered.logits(states[None])[0])
    for index, states in enumerate(texts):
        examples.add(Trajectory(states.transpose(0, 1), index))
    return TaskSaturation.of(fit_probe(examples.balanced(), seed=seed))
