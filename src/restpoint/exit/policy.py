"""What decodes with early exits: a rule, how states are read, the signal, and the certificate of what it may cost."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.exit.engine import ExitTarget
from restpoint.exit.registry import restored
from restpoint.exit.rules import Rule
from restpoint.exit.shift import ShiftMonitor
from restpoint.exit.signals import Signal
from restpoint.exit.view import Readout, View
from restpoint.model.layered import LayeredModel

_FALSE_ALARMS = 0.02
"""Share of prompts like those of the calibration that are warned of."""


@dataclass(frozen=True)
class Certificate:
    """What is promised of a rule: P(E[loss of a text] <= epsilon) >= 1 - delta over the draw of the calibration texts.

    It speaks of texts drawn as the calibration's were: prompts of that kind and length, continued greedily by as many
    tokens, by this model in this dtype, with these predictors.

    Attributes:
        loss: of one text, in [0, 1].
        epsilon: bound of the expected loss.
        delta: how often a calibration may break the promise.
        method: of the p-values.
        sequences: calibration texts.
        prompt_tokens: of each.
        new_tokens: of each.
        mean_loss: that was measured.
        upper_bound: least bound that the test would have passed; at most epsilon.
        setting: what was varied: ``threshold``, ``last layer`` or ``layers left out``.
        settings: tested, from safe to fast; the last one that passed is the rule's.
        mean_depth: layers behind the law of a new token during the calibration; also layers run for it where one text
            is decoded with exact catch-up.
        dtype: of the model.
        readers: SHA-256 of predictors and signal.
        text: SHA-256 of the calibration's text.
        documents: short hashes of its documents, so that nothing is evaluated on them.
        date: of the calibration.
        versions: of restpoint, torch and transformers.
    """

    loss: str
    epsilon: float
    delta: float
    method: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    mean_loss: float
    upper_bound: float
    setting: str
    settings: tuple[float, ...]
    mean_depth: float
    dtype: str
    readers: str
    text: str
    documents: tuple[str, ...]
    date: str
    versions: Mapping[str, str]

    @property
    def promise(self) -> str:
        """In words."""
        return (
            f"expected {self.loss} at most {self.epsilon:g} with probability {1 - self.delta:g} "
            f"({self.sequences} texts of {self.new_tokens} new tokens, measured {self.mean_loss:.4f})"
        )

    def require_unseen(self, texts: Sequence[str], argument: str = "text") -> None:
        """Refuse to evaluate on what was calibrated on.

        Raises:
            RestpointError: one of the texts is a document of the calibration.
        """
        seen = set(self.documents)
        if any(document_hash(text) in seen for text in texts):
            raise RestpointError(
                f"{argument}: a document of it was calibrated on, so it would flatter the exits; evaluate on other text"
            )


def document_hash(text: str) -> str:
    """Tells documents apart: 12 hexadecimal digits of SHA-256, spaces at the ends left out."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class ExitPolicy:
    """How a model exits early. A profile holds one; without a certificate it promises nothing.

    Attributes:
        rule: where tokens stop.
        predictors: of the rest state, by layer; a layer without one is read by the logit lens.
        signal: that the rule asks; None where it asks none.
        vocabulary: tokens that an exit may emit; None for all.
        certificate: what was calibrated; None where nothing was.
        monitor: knows prompts like those of the calibration.
    """

    rule: Rule
    predictors: Mapping[int, Predictor] = field(default_factory=dict)
    signal: Signal | None = None
    vocabulary: Tensor | None = None
    certificate: Certificate | None = None
    monitor: ShiftMonitor | None = None

    def target(self, layered: LayeredModel) -> ExitTarget:
        """The model, to be decoded with these exits.

        Raises:
            RestpointError: the rule does not fit the model, or the certificate speaks of another dtype or of other
                predictors.
        """
        found = self.certificate
        dtype = str(layered.dtype).removeprefix("torch.")
        if found is not None and found.dtype != dtype:
            raise RestpointError(
                f"dtype: the exits were calibrated in {found.dtype} and the model is in {dtype}; load it in "
                f"{found.dtype}, or calibrate it in {dtype}"
            )
        if found is not None and found.readers != self.readers:
            raise RestpointError("profile: its exits were calibrated with other predictors; calibrate anew")
        return ExitTarget(layered, self.rule, self.readout(layered), self.signal)

    def readout(self, layered: LayeredModel) -> Readout:
        """How states are read."""
        return Readout(layered, self.predictors, self.vocabulary)

    @property
    def readers(self) -> str:
        """SHA-256 of what decides and what is emitted, as it is saved: predictors, signal, vocabulary."""
        described, tensors = self.state()
        digest = hashlib.sha256(json.dumps([described["predictors"], described["signal"]]).encode())
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def unfamiliar(self, layered: LayeredModel, prompt: Sequence[int]) -> str | None:
        """A warning where a prompt looks unlike those of the calibration; None where it does not, or is too short."""
        if self.monitor is None or self.certificate is None or len(prompt) < self.certificate.prompt_tokens:
            return None
        ids = torch.tensor([list(prompt[-self.certificate.prompt_tokens :])], device=layered.device)
        least = 2 / (len(self.monitor.calibration) + 1)  # below it, no prompt could ever be unusual
        return self.monitor.check(float(self.familiarity(layered, ids)[0]), max(_FALSE_ALARMS, least))

    @torch.inference_mode()
    def familiarity(self, layered: LayeredModel, ids: Tensor) -> Tensor:
        """Of each row of token ids, the mean confidence of the signal at the first candidate layer, read by itself."""
        if self.signal is None:
            raise RestpointError("signal: this rule asks none, so there is nothing to compare; leave the monitor out")
        layer = self.rule.candidates(layered.depth)[0]
        plan = layered.plan(ids)
        states = [plan.hidden]
        layered.run(plan, stop=layer, keep=states)
        view = View(layer, [state.flatten(0, 1) for state in states], self.readout(layered))
        return self.signal.confidence(view).view(ids.shape).double().mean(1)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-able description and tensors for safetensors; `from_state` reads them."""
        configs, tensors = readout_state(self.predictors, self.vocabulary)
        signal = None
        if self.signal is not None:
            signal, own = self.signal.state()
            tensors |= {f"signal/{name}": value for name, value in own.items()}
        described = {
            "rule": self.rule.described(),
            "predictors": configs,
            "signal": signal,
            "certificate": None if self.certificate is None else asdict(self.certificate),
            "monitor": None if self.monitor is None else self.monitor.to_json(),
        }
        return described, tensors

    @classmethod
    def from_state(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ExitPolicy":
        """The policy that `state` described.

        Raises:
            RestpointError: a part is of an unknown kind or missing.
        """
        certificate = described["certificate"]
        if certificate is not None:
            certificate = dict(certificate)
            if "thresholds" in certificate:  # certificates of before other rules could be certified
                certificate |= {"setting": "threshold", "settings": certificate.pop("thresholds")}
            lists = {name: tuple(certificate[name]) for name in ("settings", "documents")}
            certificate = Certificate(**{**certificate, **lists})
        monitor = described["monitor"]
        predictors, vocabulary = readout_from(described["predictors"], tensors)
        return cls(
            rule=Rule.from_described(described["rule"]),
            predictors=predictors,
            signal=None if described["signal"] is None else restored(described["signal"], _under("signal/", tensors)),
            vocabulary=vocabulary,
            certificate=certificate,
            monitor=None if monitor is None else ShiftMonitor.from_json(monitor),
        )


def readout_state(
    predictors: Mapping[int, Predictor], vocabulary: Tensor | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a `Readout` is made of: JSON-able, by layer, and tensors, maps in bfloat16; `readout_from` reads them."""
    tensors: dict[str, Tensor] = {} if vocabulary is None else {"vocabulary": vocabulary}
    configs: dict[str, Any] = {}
    for layer, predictor in predictors.items():
        configs[str(layer)], own = predictor.state()
        tensors |= {f"predictors/{layer}/{name}": value.to(torch.bfloat16) for name, value in own.items()}
    return configs, tensors


def readout_from(
    configs: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[int, Predictor], Tensor | None]:
    """Predictors by layer, in float32, and vocabulary that `readout_state` described."""
    predictors = {
        int(layer): Predictor.from_state(config, _under(f"predictors/{layer}/", tensors)).to(dtype=torch.float32)
        for layer, config in configs.items()
    }
    return predictors, tensors.get("vocabulary")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def rounded(predictor: Predictor) -> Predictor:
    """The predictor as it is after saving in bfloat16: what is calibrated must be what is used."""
    config, tensors = predictor.state()
    kept = {name: value.to(torch.bfloat16).float() for name, value in tensors.items()}
    return Predictor.from_state(config, kept)
