"""Decode with exits for real, and hold every token against the full model on the same text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from restpoint import files
from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.exit.engine import ExitTarget
from restpoint.exit.losses import Loss, Outcome, checked
from restpoint.model.layered import LayeredModel

Progress = Callable[[str, int, int], None]

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
        outcomes += [_outcome(target.layered, text, own) for text, own in zip(texts, logs, strict=True)]
    return Decoded(outcomes, calls, tokens, depths / max(1, tokens))


def _outcome(layered: LayeredModel, text: Text, logs: list[Tensor]) -> Outcome | None:
    """A text beside the full model, which reads it in one pass."""
    if not logs:
        return None
    ids = torch.tensor([text.path.tokens], device=layered.device)
    states = layered.run(layered.plan(ids))[:, -len(logs) - 1 : -1]
    full = layered.logits(states)[0].float().log_softmax(-1)
    tokens = ids[0, -len(logs) :]
    return Outcome(
        tokens=tokens.cpu().numpy(),
        full_tokens=full.argmax(-1).cpu().numpy(),
        log_probability=torch.stack(logs).cpu().numpy(),
        full_log_probability=full.gather(-1, tokens[:, None])[:, 0].cpu().numpy(),
    )


def losses_of(decoded: Decoded, loss: Loss) -> np.ndarray:
    """The loss of every text; a text without a token that could exit loses nothing."""
    return np.array([0.0 if outcome is None else checked(loss, outcome) for outcome in decoded.outcomes])


class Kept:
    """Losses of the thresholds that are done, on disk: certifying goes on from there after an interruption.

    Args:
        folder: of the profile.
        recipe: of the calibration; another one's losses are refused.

    Raises:
        RestpointError: the folder holds an unfinished calibration of something else.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.path = folder / _PARTIAL
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.done: dict[float, tuple[np.ndarray, float]] = {}
        if not self.path.exists():
            return
        with safe_open(self.path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            if about["recipe"] != self.recipe:
                raise RestpointError(
                    f"output: {folder} holds an unfinished calibration of other text, options or model; finish that "
                    f"one, remove {_PARTIAL}, or give another folder"
                )
            for threshold, layers in about["done"]:
                self.done[threshold] = file.get_tensor(repr(threshold)), layers

    def add(self, threshold: float, losses: np.ndarray, layers: float) -> None:
        """Keep the losses of a threshold, and its layers a token."""
        self.done[threshold] = losses, layers
        about = {"recipe": self.recipe, "done": [[own, layers] for own, (_, layers) in self.done.items()]}
        tensors = {repr(own): losses for own, (losses, _) in self.done.items()}
        files.write(self.path, lambda path: save_file(tensors, path, {"about": json.dumps(about)}))

    def remove(self) -> None:
        """The calibration is finished."""
        self.path.unlink(missing_ok=True)
