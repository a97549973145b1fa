"""Decode with exits for real, and hold every token against the full model on the same text."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.exit.choice import LayerChoice
from restpoint.exit.engine import ExitTarget
from restpoint.exit.losses import Loss, Outcome, checked
from restpoint.model.layered import LayeredModel
from restpoint.tensors import save

_PARTIAL = "calibration.safetensors"


@dataclass(frozen=True, eq=False)
class Decoded:
    """Texts that were decoded with exits.

    Attributes:
        outcomes: of each text, beside the full model; None where the text ended before any token could exit.
        layer_calls: layers run after the prompts, for all texts of a batch at once.
        tokens: new tokens after the first ones.
        mean_depth: layers behind the law of a token, on average.
    """

    outcomes: list[Outcome | None]
    layer_calls: int
    tokens: int
    mean_depth: float


@torch.inference_mode()
def decode_with_exits(
    target: ExitTarget, prompts: Sequence[Sequence[int]], new_tokens: int, ends: frozenset[int], batch: int
) -> Decoded:
    """Continue prompts greedily with exits, then score each text once with the full model.

    The first new token of a text comes with the prompt's own pass, at full depth, and is left out.

    Args:
        target: decodes.
        prompts: token ids.
        new_tokens: of each text, unless it ends before.
        ends: tokens that end a text.
        batch: texts decoded at once.
    """
    outcomes: list[Outcome | None] = []
    calls = tokens = depths = 0
    for first in range(0, len(prompts), batch):
        texts = [
            Text(list(prompt), Sampler(SamplingSettings(), None, target.layered.device), Stopping(new_tokens, ends))
            for prompt in prompts[first : first + batch]
        ]
        logs: list[list[Tensor]] = [[] for _ in texts]
        for text in texts:
            text.logits = []
        for number, rounds in enumerate(decode_batch(target, texts)):
            for row, turn in rounds.items():
                kept = texts[row].logits
                assert kept is not None
                if number:
                    logs[row].append(kept[-1].float().log_softmax(-1)[turn.tokens[-1]])
                    tokens += 1
                    depths += turn.depth
                kept.clear()
            calls += next(iter(rounds.values())).layer_calls if number else 0
        outcomes += _outcomes(target.layered, texts, logs)
    return Decoded(outcomes, calls, tokens, depths / max(1, tokens))


def _outcomes(layered: LayeredModel, texts: Sequence[Text], logs: Sequence[list[Tensor]]) -> list[Outcome | None]:
    """Texts beside the full model, which reads them in one pass; shorter ones are filled up behind their end."""
    longest = max(len(text.path.tokens) for text in texts)
    ids = torch.tensor(
        [[*text.path.tokens, *[0] * (longest - len(text.path.tokens))] for text in texts], device=layered.device
    )
    states = layered.run(layered.plan(ids))
    outcomes: list[Outcome | None] = []
    for row, (text, own) in enumerate(zip(texts, logs, strict=True)):
        if not own:
            outcomes.append(None)
            continue
        end = len(text.path.tokens)
        tokens = ids[row, end - len(own) : end]
        full = layered.logits(states[row : row + 1, end - len(own) - 1 : end - 1])[0].float().log_softmax(-1)
        outcomes.append(
            Outcome(
                tokens=tokens.cpu().numpy(),
                full_tokens=full.argmax(-1).cpu().numpy(),
                log_probability=torch.stack(own).cpu().numpy(),
                full_log_probability=full.gather(-1, tokens[:, None])[:, 0].cpu().numpy(),
            )
        )
    return outcomes


def losses_of(decoded: Decoded, loss: Loss) -> np.ndarray:
    """The loss of every text; a text without a token that could exit loses nothing."""
    return np.array([0.0 if outcome is None else checked(loss, outcome) for outcome in decoded.outcomes])


class Kept:
    """A calibration that is under way, on disk: it goes on from there after an interruption.

    Args:
        folder: of the profile.
        recipe: of the calibration; what another one left is refused.

    Attributes:
        choice: of layers; None where none was made yet.
        done: by threshold, losses of all texts and mean depth.

    Raises:
        RestpointError: the folder holds an unfinished calibration of something else.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.path = folder / _PARTIAL
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.choice: LayerChoice | None = None
        self.done: dict[float, tuple[np.ndarray, float]] = {}
        self._readers = ""
        if not self.path.exists():
            return
        with safe_open(self.path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            if about["recipe"] != self.recipe:
                raise self._other()
            choice = about["choice"]
            self.choice = LayerChoice(**{**choice, "layers": tuple(choice["layers"])})
            self._readers = about["readers"]
            for threshold, depth in about["done"]:
                self.done[threshold] = file.get_tensor(repr(threshold)), depth

    def begin(self, choice: LayerChoice, readers: str) -> None:
        """Keep what all thresholds have in common.

        Raises:
            RestpointError: what was begun read states in another way.
        """
        if self._readers not in ("", readers):
            raise self._other()
        self.choice, self._readers = choice, readers
        self._write()

    def add(self, threshold: float, losses: np.ndarray, depth: float) -> None:
        """Keep what a threshold came to."""
        self.done[threshold] = losses, depth
        self._write()

    def remove(self) -> None:
        """The calibration is finished."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        assert self.choice is not None
        about = {
            "recipe": self.recipe,
            "choice": asdict(self.choice),
            "readers": self._readers,
            "done": [[threshold, depth] for threshold, (_, depth) in self.done.items()],
        }
        tensors = {repr(threshold): torch.from_numpy(losses) for threshold, (losses, _) in self.done.items()}
        save(self.path, tensors, {"about": json.dumps(about)})

    def _other(self) -> RestpointError:
        return RestpointError(
            f"output: {self.path.parent} holds an unfinished calibration of other text, options or model; finish that "
            f"one, remove {_PARTIAL}, or give another folder"
        )
