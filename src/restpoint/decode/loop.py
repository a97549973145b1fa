"""The one decode loop: draft, score, verify, commit."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restpoint.decode.draft import Draft, Drafter, TokenPath
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import Target
from restpoint.decode.verify import Outcome, verify
from restpoint.errors import RestpointError

_NO_DRAFT = Draft()


@dataclass(frozen=True)
class Stopping:
    """When to stop."""

    max_tokens: int = 128
    """Largest number of new tokens."""
    end_tokens: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end the text; they are emitted as the last token."""
    context_length: int | None = None
    """Largest number of tokens, prompt included, that the model can hold; None for no limit."""

    def __post_init__(self) -> None:
        """Refuse a request for nothing."""
        if self.max_tokens < 1:
            raise RestpointError(f"max_tokens is {self.max_tokens}; ask for at least 1 new token")

    def limit(self, prompt: list[int]) -> int:
        """Largest length of the text, prompt included."""
        asked = len(prompt) + self.max_tokens
        return asked if self.context_length is None else min(asked, self.context_length)

    def room(self, length: int, prompt: list[int]) -> int:
        """How many tokens are worth drafting after a text of ``length`` tokens."""
        return self.limit(prompt) - length - 1

    def cut(self, tokens: list[int], length: int, prompt: list[int]) -> tuple[list[int], str]:
        """Cut new tokens where the text must end, and say why it does (empty where it goes on)."""
        limit = self.limit(prompt)
        tokens = tokens[: limit - length]
        end = next((index for index, token in enumerate(tokens) if token in self.end_tokens), None)
        if end is not None:
            return tokens[: end + 1], "end"
        if length + len(tokens) < limit:
            return tokens, ""
        return tokens, "length" if limit == len(prompt) + self.max_tokens else "context"


@dataclass(frozen=True)
class Round:
    """One turn of the loop: what it emitted and what it cost.

    Attributes:
        tokens: tokens emitted, in order.
        drafted: tokens that were drafted and verified.
        accepted: drafted tokens that stood (before any cut by a stop rule).
        layer_calls: layers run, in drafting and verification together, counted where they run.
        draft_seconds: time spent drafting.
        verify_seconds: time spent in the pass of the full model and the verification; the prefill's, in round 0.
        finished: ``end`` (an end token), ``length`` (max_tokens), ``context`` (the model is full), or empty.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    layer_calls: int
    draft_seconds: float
    verify_seconds: float
    finished: str = ""


def decode(
    target: Target, prompt: list[int], sampler: Sampler, stopping: Stopping, drafter: Drafter | None = None
) -> Iterator[Round]:
    """Continue a prompt, exactly as the model by itself would, in fewer passes.

    Greedy output is the target's own; sampled output follows the target's law under the sampler's processors,
    whatever the drafter proposes. Without a drafter every round emits one token: plain decoding.

    Args:
        target: the model.
        prompt: token ids, at least one, each below the vocabulary size.
        sampler: how tokens are chosen from logits.
        stopping: when to stop.
        drafter: who proposes tokens; None decodes plainly.

    Yields:
        One :class:`Round` for the prompt and then one for each pass of the full model.

    Raises:
        RestpointError: the prompt is empty, fills the context or has a token out of range; logits are NaN.
    """
    _check_prompt(prompt, target.layered.vocabulary_size, stopping.context_length)
    work = target.layered.work
    path = TokenPath(list(prompt), None)
    calls, began = work.layer_calls, time.perf_counter()
    turn = _read_prompt(target, path, sampler)
    while True:
        draft, outcome = turn.draft, turn.outcome
        new = [*draft.tokens[: outcome.accepted], outcome.next_token]
        tokens, finished = stopping.cut(new, len(path.tokens), prompt)
        path.tokens.extend(tokens)
        path.rest = turn.rest
        drafting, verifying = turn.drafted_at - began, time.perf_counter() - turn.drafted_at
        layers = work.layer_calls - calls
        yield Round(tuple(tokens), len(draft.tokens), outcome.accepted, layers, drafting, verifying, finished)
        if finished:
            return
        calls, began = work.layer_calls, time.perf_counter()
        turn = _speculate(target, path, sampler, drafter, stopping.room(len(path.tokens), prompt))


@dataclass(frozen=True)
class _Turn:
    draft: Draft
    outcome: Outcome
    rest: Tensor | None
    drafted_at: float


@torch.inference_mode()
def _read_prompt(target: Target, path: TokenPath, sampler: Sampler) -> _Turn:
    began = time.perf_counter()
    scored = target.prefill(path.tokens)
    return _Turn(_NO_DRAFT, verify(scored.logits, _NO_DRAFT, path.tokens, sampler), scored.rest, began)


@torch.inference_mode()
def _speculate(target: Target, path: TokenPath, sampler: Sampler, drafter: Drafter | None, room: int) -> _Turn:
    """Draft, score, verify, commit."""
    draft = _NO_DRAFT if drafter is None else drafter.propose(path, room)
    drafted_at = time.perf_counter()
    scored = target.score(path.pending, draft)
    outcome = verify(scored.logits, draft, path.tokens + draft.tokens, sampler)
    target.commit(outcome.accepted + 1)
    if drafter is not None:
        drafter.observe(draft, outcome.accepted)
    rest = None if scored.rest is None else scored.rest[:, outcome.accepted : outcome.accepted + 1]
    return _Turn(draft, outcome, rest, drafted_at)


def _check_prompt(prompt: list[int], vocabulary: int, context: int | None) -> None:
    if not prompt:
        raise RestpointError("prompt: it is empty; give at least one token (many models want their start token)")
    wrong = [token for token in prompt if not 0 <= token < vocabulary]
    if wrong:
        raise RestpointError(f"prompt: token id {wrong[0]} is out of range; ids go from 0 to {vocabulary - 1}")
    if context is not None and len(prompt) >= context:
        raise RestpointError(
            f"prompt: its {len(prompt)} tokens fill the context of {context}; shorten it to leave room for new ones"
        )
