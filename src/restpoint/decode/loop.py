"""The one decode loop: draft, score, verify, commit. One text, or several in a batch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from restpoint.decode.draft import Draft, Speculator, TokenPath, Verified
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import NO_DRAFT, Scored, Target
from restpoint.decode.verifiers.base import Verifier
from restpoint.decode.verifiers.registry import VERIFIERS
from restpoint.decode.verify import verify
from restpoint.errors import RestpointError


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
    """One turn of the loop for one text: what it emitted and what it cost.

    Attributes:
        tokens: tokens emitted, in order.
        drafted: nodes of the draft, all verified.
        accepted: drafted tokens that stood (before any cut by a stop rule).
        layer_calls: layers run, in drafting and verification together, counted where they run; in a batch, for all
            rows at once.
        draft_seconds: time spent drafting, for all rows of a batch.
        verify_seconds: time spent in the pass of the full model and the verification; the prefill's, in round 0.
        finished: ``end`` (an end token), ``length`` (max_tokens), ``context`` (the model is full), or empty.
        depth: layers behind the law that each of its tokens was chosen from; the whole model's but for early exits.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    layer_calls: int
    draft_seconds: float
    verify_seconds: float
    finished: str = ""
    depth: int = 0


@dataclass
class Text:
    """One text to decode.

    Attributes:
        prompt: token ids, at least one, each below the vocabulary size.
        sampler: how tokens are chosen from logits.
        stopping: when to stop.
        speculator: who drafts; None decodes plainly.
        stopped: set between rounds to end this text where it is.
        logits: gains the target's unprocessed logits of every token emitted; None, as it begins, keeps none.
    """

    prompt: list[int]
    sampler: Sampler
    stopping: Stopping
    speculator: Speculator | None = None
    stopped: bool = False
    logits: list[torch.Tensor] | None = None
    path: TokenPath = field(init=False)

    def __post_init__(self) -> None:
        """The text so far is the prompt."""
        self.path = TokenPath(list(self.prompt), None)

    @property
    def room(self) -> int:
        """How many tokens are worth drafting."""
        return self.stopping.room(len(self.path.tokens), self.prompt)


def decode(
    target: Target,
    prompt: list[int],
    sampler: Sampler,
    stopping: Stopping,
    speculator: Speculator | None = None,
    verifier: Verifier | None = None,
) -> Iterator[Round]:
    """Continue one prompt; see :func:`decode_batch`."""
    for rounds in decode_batch(target, [Text(prompt, sampler, stopping, speculator)], verifier):
        yield rounds[0]


def decode_batch(target: Target, texts: Sequence[Text], verifier: Verifier | None = None) -> Iterator[dict[int, Round]]:
    """Continue prompts, exactly as the model by itself would, in fewer passes.

    Greedy output is the target's own; sampled output follows the target's law under the sampler's processors,
    whatever is drafted. Without a speculator every round emits one token: plain decoding. Rows accept as many
    tokens as they accept; a finished row leaves the batch.

    Args:
        target: the model.
        texts: what to continue, each with its own settings.
        verifier: couples draft and target where tokens are sampled; token-wise if None.

    Yields:
        By its index, one :class:`Round` for each unfinished text: for the prompts, then for every pass of the model.

    Raises:
        RestpointError: a prompt is empty, fills the context or has a token out of range; logits are NaN.
    """
    if not texts:
        raise RestpointError("prompts: there is none; give at least one")
    for text in texts:
        _check_prompt(text.prompt, target.layered.vocabulary_size, text.stopping.context_length)
    verifier = verifier or VERIFIERS["token-wise"]
    work = target.layered.work
    live = dict(enumerate(texts))
    calls, began = work.layer_calls, time.perf_counter()
    turns, drafted_at = _read_prompts(target, texts), began
    while True:
        rounds: dict[int, Round] = {}
        cuts = [text.stopping.cut(turn.new_tokens, len(text.path.tokens), text.prompt) for text, turn, _ in turns]
        drafting, verifying = drafted_at - began, time.perf_counter() - drafted_at
        layers = work.layer_calls - calls
        for index, (text, turn, depth), (tokens, finished) in zip(live, turns, cuts, strict=True):
            rounds[index] = Round(
                tuple(tokens), len(turn.draft.tokens), len(turn.nodes), layers, drafting, verifying, finished, depth
            )
            text.path.tokens.extend(tokens)
            if text.logits is not None:
                text.logits.extend(turn.logits[[0, *(node + 1 for node in turn.nodes)]][: len(tokens)])
        yield rounds
        going = {index for index, text in live.items() if not (rounds[index].finished or text.stopped)}
        if not going:
            return
        if len(going) < len(live):
            target.retain([row for row, index in enumerate(live) if index in going])
            live = {index: text for index, text in live.items() if index in going}
        calls, began = work.layer_calls, time.perf_counter()
        turns, drafted_at = _speculate(target, list(live.values()), verifier)


_Turns = list[tuple[Text, Verified, int]]
"""Texts, what was verified of each, and the depth of its logits."""


@torch.inference_mode()
def _read_prompts(target: Target, texts: Sequence[Text]) -> _Turns:
    turns: _Turns = []
    for text, scored in zip(texts, target.prefill([text.prompt for text in texts]), strict=True):
        verified = verify(scored.logits, NO_DRAFT, text.path.tokens, text.sampler, VERIFIERS["token-wise"])
        text.path.rest = scored.rest
        turns.append((text, verified, target.layered.depth if scored.depth is None else scored.depth))
        if text.speculator is not None:
            text.speculator.begin(text.prompt)
    return turns


@torch.inference_mode()
def _speculate(target: Target, texts: Sequence[Text], verifier: Verifier) -> tuple[_Turns, float]:
    """Draft, score, verify, commit."""
    drafts = _drafts(texts)
    drafted_at = time.perf_counter()
    scored = target.score([text.path.pending for text in texts], drafts)
    turns: _Turns = []
    for text, draft, row in zip(texts, drafts, scored, strict=True):
        verified = verify(row.logits, draft, text.path.tokens, text.sampler, verifier)
        turns.append((text, verified, target.layered.depth if row.depth is None else row.depth))
        if text.speculator is not None:
            text.speculator.observe(text.path, verified)
        text.path.rest = _rest_after(row, verified)
    target.keep([verified.nodes for _, verified, _ in turns])
    return turns, drafted_at


def _drafts(texts: Sequence[Text]) -> list[Draft]:
    """A draft for every text; those whose speculators belong together are drafted for together."""
    drafts = [NO_DRAFT] * len(texts)
    groups: dict[int, list[tuple[int, Text, Speculator]]] = {}
    for row, text in enumerate(texts):
        if text.speculator is not None:
            groups.setdefault(id(text.speculator.group), []).append((row, text, text.speculator))
    for group in groups.values():
        rows, own, speculators = zip(*group, strict=True)
        made = type(speculators[0]).propose_together(
            speculators, [text.path for text in own], [text.room for text in own]
        )
        for row, draft in zip(rows, made, strict=True):
            drafts[row] = draft
    return drafts


def _rest_after(scored: Scored, verified: Verified) -> torch.Tensor | None:
    """h_L of the last token that stood, whose logits gave the new pending one."""
    if scored.rest is None:
        return None
    last = verified.nodes[-1] + 1 if verified.nodes else 0
    return scored.rest[:, last : last + 1]


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
