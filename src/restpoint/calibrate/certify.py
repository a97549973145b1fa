"""Decode with exits for real, and hold every token against the full model on the same text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.exit.engine import ExitTarget
from restpoint.exit.losses import Loss, Outcome, Score, checked
from restpoint.model.layered import LayeredModel


@dataclass(frozen=True, eq=False)
class Decoded:
    """Texts that were decoded with exits.

    Attributes:
        outcomes: of each text, beside the full model; None where the text ended before any token could exit.
        texts: all new tokens of each.
        layer_calls: layers run after the prompts, for all texts of a batch at once.
        tokens: new tokens that could exit: all but the first ones, and these too where prompts leave out layers.
        mean_depth: layers behind the law of a token, on average.
    """

    outcomes: list[Outcome | None]
    texts: list[list[int]]
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
    written: list[list[int]] = []
    calls = tokens = depths = 0
    for first in range(0, len(prompts), batch):
        texts = _begun(target.layered, prompts[first : first + batch], new_tokens, ends)
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
        written += [text.path.tokens[len(text.prompt) :] for text in texts]
    return Decoded(outcomes, written, calls, tokens, depths / max(1, tokens))


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


def _begun(
    layered: LayeredModel, prompts: Sequence[Sequence[int]], new_tokens: int, ends: frozenset[int]
) -> list[Text]:
    """Texts that are to be continued greedily."""
    return [
        Text(list(prompt), Sampler(SamplingSettings(), None, layered.device), Stopping(new_tokens, ends))
        for prompt in prompts
    ]


@torch.inference_mode()
def full_scores(
    layered: LayeredModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    batch: int,
    score: Score,
) -> np.ndarray:
    """Scores of the full model's own greedy continuations. Arguments as `decode_with_exits`.

    Raises:
        RestpointError: a score is outside [0, 1].
    """
    scores: list[float] = []
    for first in range(0, len(prompts), batch):
        texts = _begun(layered, prompts[first : first + batch], new_tokens, ends)
        for _ in decode_batch(LayeredTarget(layered), texts):
            pass
        scores += [_score(score, text.prompt, text.path.tokens[len(text.prompt) :]) for text in texts]
    return np.array(scores)


def scored(decoded: Decoded, prompts: Sequence[Sequence[int]], full: np.ndarray, score: Score) -> Decoded:
    """The same with the scores of these texts, beside those of the full model's.

    Raises:
        RestpointError: a score is outside [0, 1].
    """
    outcomes = [
        None if outcome is None else replace(outcome, score=_score(score, prompt, text), full_score=float(own))
        for outcome, prompt, text, own in zip(decoded.outcomes, prompts, decoded.texts, full, strict=True)
    ]
    return replace(decoded, outcomes=outcomes)


def _score(score: Score, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    value = float(score(list(prompt), list(tokens)))
    if not 0 <= value <= 1:
        name = getattr(score, "__name__", type(score).__name__)
        raise RestpointError(f"score: {name} gave {value}; scores must lie in [0, 1]: divide by the largest")
    return value


def losses_of(decoded: Decoded, loss: Loss) -> np.ndarray:
    """The loss of every text; a text without a token that could exit loses nothing."""
    return np.array([0.0 if outcome is None else checked(loss, outcome) for outcome in decoded.outcomes])
