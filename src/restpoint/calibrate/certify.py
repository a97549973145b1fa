"""Decode with exits for real, and hold every token against the full model on the same text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.exit.engine import ExitTarget
from restpoint.exit.losses import Loss, Outcome, checked
from restpoint.model.layered import LayeredModel


@dataclass(frozen=True, eq=False)
class Decoded:
    """Texts that were decoded with exits.

    Attributes:
        outcomes: of each text, beside the full model; None where the text ended before any token could exit.
        layer_calls: layers run after the prompts, for all texts of a batch at once.
        tokens: new tokens that could exit: all but the first ones, and these too where prompts leave out layers.
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

    The first new token of a text comes with the prompt's own pass. It is left out where that runs at full depth, and
    counts where layers are left out of prompts too.

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
                if number or target.skip:
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
