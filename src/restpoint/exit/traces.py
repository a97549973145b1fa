"""Traces: what every signal would have said of every token that the full model wrote, at every candidate layer.

A rule with exact catch-up sees, as long as its text agrees with the full model's, the very states that the full model
has. So its exits can be told from one recording at full depth, for all thresholds, before anything is decoded early.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from restpoint import files
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.exit.signals import Signal
from restpoint.exit.view import Readout, View, views
from restpoint.model.layered import LayeredModel
from restpoint.model.load import context_length
from restpoint.progress import Progress
from restpoint.tensors import content_hash, save

FORMAT = 2
_JSON, _TENSORS = "traces.json", "traces.safetensors"
_CONFIDENCE = "confidence/"
_PLAIN = ("tokens", "agrees", "log_probability", "full_log_probability", "margin")
_NUMBERS = 2**24
"""Entries of all laws that are held at once: candidate layers x tokens x vocabulary."""

_NOT_EMITTED = -20.0
"""Logarithm of the probability of a token that an exit cannot emit: finite, so that means are."""


@dataclass(frozen=True, eq=False)
class Traces:
    """New tokens of sequences that the full model continued greedily, as seen from candidate layers.

    Token t is the one that follows new token t: the first new token comes from the prompt's own pass, which runs in
    full, and is not among them. So ``restpoint.exit.rules`` count token t's place as t + 1.

    Attributes:
        depth: layers of the model.
        layers: candidate layers, ascending, each below the depth.
        confidences: of each signal by name, in float32.
        tokens: the full model's.
        agrees: whether the most probable token of the exit's law is the full model's.
        log_probability: of the full model's token under the exit's law, in nats; -20 where exits do not emit it.
        full_log_probability: of it under the full law.
        margin: by how many nats it leads the second most probable token under the full law; where that is about
            rounding, no exit can be blamed for another token.
        comparing: signals that look at the candidate layer before, so that their confidences hold for these layers
            and no others.
        about: JSON-able facts, such as the model's name and how states were read.

    Raises:
        RestpointError: shapes do not agree, layers do not ascend below the depth, or a confidence is outside [0, 1].
    """

    depth: int
    layers: tuple[int, ...]
    confidences: Mapping[str, Float[Tensor, "sequences tokens layers"]]
    tokens: Int[Tensor, "sequences tokens"]
    agrees: Bool[Tensor, "sequences tokens layers"]
    log_probability: Float[Tensor, "sequences tokens layers"]
    full_log_probability: Float[Tensor, "sequences tokens"]
    margin: Float[Tensor, "sequences tokens"]
    comparing: frozenset[str] = frozenset()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        _check_layers(self.layers, self.depth)
        shape = (*self.tokens.shape, len(self.layers))
        if self.tokens.ndim != 2 or 0 in shape:
            raise RestpointError(f"tokens is {tuple(self.tokens.shape)}; give sequences x tokens, at least one of each")
        shapes = {"full_log_probability": shape[:2], "margin": shape[:2], "agrees": shape, "log_probability": shape}
        of_all = {name: (getattr(self, name), own) for name, own in shapes.items()}
        of_all |= {name: (own, shape) for name, own in self.confidences.items()}
        for name, (own, wanted) in of_all.items():
            if tuple(own.shape) != wanted:
                raise RestpointError(f"{name} is {tuple(own.shape)}, and tokens and layers make {wanted}; record again")
        for name, own in self.confidences.items():
            if not bool(((own >= 0) & (own <= 1)).all()):
                raise RestpointError(f"{name}: a confidence is outside [0, 1] or NaN; correct the signal")

    def confidence(self, signal: str) -> Float[Tensor, "sequences tokens layers"]:
        """Of a signal.

        Raises:
            RestpointError: it was not recorded.
        """
        if signal not in self.confidences:
            known = ", ".join(sorted(self.confidences)) or "none"
            raise RestpointError(f"signal: {signal!r} was not recorded; recorded are {known}")
        return self.confidences[signal]

    def save(self, folder: Path | str) -> None:
        """Write ``traces.json`` and ``traces.safetensors``, each complete or not at all.

        Raises:
            RestpointError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {name: getattr(self, name) for name in _PLAIN}
        tensors |= {f"{_CONFIDENCE}{name}": own for name, own in self.confidences.items()}
        tensors = {name: own.cpu().contiguous() for name, own in tensors.items()}
        described: dict[str, Any] = {
            "format": FORMAT,
            "depth": self.depth,
            "layers": list(self.layers),
            "comparing": sorted(self.comparing),
            "about": dict(self.about),
        }
        described = json.loads(json.dumps(described))  # as it will be read: names are strings then
        text = json.dumps({**described, "sha256": _sha256(described, tensors)}, indent=1)
        save(folder / _TENSORS, tensors)
        files.write(folder / _JSON, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path | str) -> "Traces":
        """Read what :meth:`save` wrote.

        Raises:
            RestpointError: there are none, they are damaged, or a newer restpoint wrote them.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            if described["format"] != FORMAT:
                raise RestpointError(
                    f"traces: {folder} has format {described['format']}, this version reads {FORMAT}; "
                    "update restpoint or record again"
                )
            with safe_open(folder / _TENSORS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if described.pop("sha256") != _sha256(described, tensors):
                raise RestpointError(f"traces: {folder} was changed, or holds files of two recordings; record again")
            confidences = {
                name.removeprefix(_CONFIDENCE): own for name, own in tensors.items() if name.startswith(_CONFIDENCE)
            }
            return cls(
                depth=described["depth"],
                layers=tuple(described["layers"]),
                confidences=confidences,
                comparing=frozenset(described["comparing"]),
                about=described["about"],
                **{name: tensors[name] for name in _PLAIN},
            )
        except FileNotFoundError as error:
            raise RestpointError(f"traces: {folder} holds none; record some first") from error
        except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise RestpointError(f"traces: {folder} is damaged ({error}); record again") from error


@torch.inference_mode()
def record_traces(
    layered: LayeredModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    layers: Sequence[int],
    readout: Readout,
    signals: Mapping[str, Signal],
    *,
    batch: int = 16,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> Traces:
    """Continue prompts greedily at full depth, and write down what an exit at each layer would have done.

    Decodes token by token, as early exits do, so that numbers are those of decoding to rounding. End tokens do not
    end a text. No state is kept: memory is that of one step and of the traces.

    Args:
        layered: the model; it must have the ``cached`` capability, and ``ragged`` where prompts differ in length.
        prompts: token ids.
        new_tokens: tokens to trace of each, after the first new one.
        layers: candidate layers, ascending.
        readout: how states are read.
        signals: by name.
        batch: prompts that are continued together.
        progress: told of tokens recorded, of all.
        about: kept with the traces.

    Raises:
        RestpointError: there is no prompt, one is empty or too long for the model, a layer is not below the depth, a
            number is below 1, or a signal gives no confidence in [0, 1].
    """
    layers = tuple(layers)
    _check_layers(layers, layered.depth)
    _check_prompts(layered, prompts, new_tokens, batch)
    shape = (len(prompts), new_tokens, len(layers))
    plain = {
        "tokens": torch.empty(shape[:2], dtype=torch.int64),
        "agrees": torch.empty(shape, dtype=torch.bool),
        "log_probability": torch.empty(shape),
        "full_log_probability": torch.empty(shape[:2]),
        "margin": torch.empty(shape[:2]),
    }
    confidences = {name: torch.empty(shape) for name in signals}
    comparing: set[str] = set()
    rows = max(1, _NUMBERS // (layered.vocabulary_size * (len(layers) + 1)))
    total = len(prompts) * new_tokens
    for first in range(0, len(prompts), batch):
        texts = prompts[first : first + batch]
        for step, (levels, logits) in enumerate(_continue(layered, texts, new_tokens)):
            for start in range(0, len(texts), rows):
                some = levels[start : start + rows]
                at = (slice(first + start, first + start + len(some)), step)
                seen = views(some, layers, readout)
                if step == 0:
                    comparing |= {name for name, signal in signals.items() if _compares(signal, seen)}
                own = _full(logits[start : start + rows].float())
                own |= _exits(seen, own["tokens"])
                for name, value in own.items():
                    plain[name][at] = value.cpu()
                for name, signal in signals.items():
                    confidences[name][at] = torch.stack([signal.confidence(view).float() for view in seen], -1).cpu()
            if progress is not None:
                progress("traces", first * new_tokens + (step + 1) * len(texts), total)
    return Traces(layered.depth, layers, confidences, **plain, comparing=frozenset(comparing), about=dict(about or {}))


def _continue(
    layered: LayeredModel, prompts: Sequence[Sequence[int]], steps: int
) -> Iterator[tuple[Float[Tensor, "rows depth hidden"], Float[Tensor, "rows vocab"]]]:
    """States h_0 .. h_L of each further token and the full law's logits, while the model continues prompts greedily."""
    target = LayeredTarget(layered)
    logits = torch.cat([scored.logits for scored in target.prefill(prompts)])
    for _ in range(steps):
        plan = layered.plan(logits.float().argmax(-1)[:, None], target.cache)
        levels = [plan.hidden]
        layered.run(plan, keep=levels)
        target.cache.commit([1] * len(prompts))
        logits = layered.logits(levels[-1])[:, 0]
        yield torch.cat(levels, 1), logits


def _full(logits: Float[Tensor, "rows vocab"]) -> dict[str, Tensor]:
    """The full model's tokens and what it thinks of them."""
    tokens = logits.argmax(-1)
    two = logits.topk(2, -1).values
    log_probability = two[:, 0] - logits.logsumexp(-1)
    return {"tokens": tokens, "full_log_probability": log_probability, "margin": two[:, 0] - two[:, 1]}


def _exits(seen: Sequence[View], tokens: Int[Tensor, " rows"]) -> dict[str, Tensor]:
    """What exits at each layer would do."""
    places = seen[0].readout.places(tokens)
    laws = [
        torch.where(places < 0, _NOT_EMITTED, view.log_law.gather(-1, places.clamp_min(0)[:, None])[:, 0])
        for view in seen
    ]
    return {
        "agrees": torch.stack([view.tokens == tokens for view in seen], -1),
        "log_probability": torch.stack(laws, -1),
    }


def _compares(signal: Signal, seen: Sequence[View]) -> bool:
    """Whether a signal says something else of views that know nothing of the candidate layer before."""
    for view in seen[1:]:
        alone = View(view.layer, view.states, view.readout)
        if not torch.equal(signal.confidence(alone), signal.confidence(view)):
            return True
    return False


def _check_layers(layers: tuple[int, ...], depth: int) -> None:
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise RestpointError(
            f"layers is {layers}; name at least one, ascending, each once, from 0 to {depth - 1} of a model of {depth}"
        )


def _check_prompts(layered: LayeredModel, prompts: Sequence[Sequence[int]], new_tokens: int, batch: int) -> None:
    for name, value in (("new_tokens", new_tokens), ("batch", batch), ("prompts", len(prompts))):
        if value < 1:
            raise RestpointError(f"{name}: {value} is too few; give at least 1")
    limit = context_length(layered.model)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RestpointError(f"prompts: number {number} is empty; give at least one token")
        if limit is not None and len(prompt) + new_tokens > limit:
            raise RestpointError(
                f"prompts: number {number} has {len(prompt)} tokens, which with new_tokens = {new_tokens} is above "
                f"the model's context of {limit}; shorten it"
            )


def _sha256(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps([described, content_hash(tensors)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
