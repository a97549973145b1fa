"""What is chosen on the model's own text before anything is certified: signal, layers, thresholds."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from restpoint.calibrate.options import CalibrateOptions
from restpoint.calibrate.readers import fit_signal, write_texts
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice, choose_layers
from restpoint.exit.costs import measure_exit_costs
from restpoint.exit.registry import SIGNALS
from restpoint.exit.signals import Signal
from restpoint.exit.sweep import sweep
from restpoint.exit.traces import Traces, record_traces
from restpoint.exit.view import Readout
from restpoint.model.layered import LayeredModel
from restpoint.progress import Progress

_SHARES = (0.25, 0.4, 0.55, 0.7, 0.8, 0.86, 0.92, 0.98)
"""Of epsilon, the losses on the traces that thresholds to certify are taken at, from safe to fast."""
_THRESHOLDS = 400


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
        self._texts: list[Tensor] | None = None

    def choose(self, candidates: tuple[int, ...]) -> LayerChoice:
        """Layers to look at, by expected speed, and what to expect of them."""
        name = self.options.signal
        signal = self.signal(candidates)
        costs = measure_exit_costs(self.layered, self.readout, {name: signal}, candidates)
        # Where layers are chosen for another loss than the share of tokens, that share stands in for it.
        choice = choose_layers(
            self._trace(candidates, signal), costs, name, self.options.epsilon, self.options.most_layers
        )
        if self.options.layers or not choice.layers:
            choice = replace(choice, layers=self.options.layers or candidates[-1:])
        return choice

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

    def signal(self, layers: tuple[int, ...]) -> Signal:
        """What decides, fitted for these layers."""
        name = self.options.signal
        if name not in SIGNALS and self._texts is None:
            self._texts = write_texts(self.layered, self._fitting, self.options, self.report)
        self.report(f"fit {name}", 0, 1)
        signal = fit_signal(name, self._texts or (), layers, self.readout, self.options.seed)
        self.report(f"fit {name}", 1, 1)
        return signal
