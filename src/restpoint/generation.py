"""What a generation is made of: the text of its rounds, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from restpoint.decode.loop import Round
from restpoint.errors import RestpointError


@dataclass(frozen=True)
class Piece:
    """Text that one round added, and the round."""

    text: str
    round: Round


@dataclass(frozen=True)
class Statistics:
    """What a generation cost. Prefill is kept apart; a pass is one run of the full model over a block.

    Attributes:
        new_tokens: tokens emitted.
        passes: passes after the prompt's.
        tokens_per_pass: tokens emitted by those passes over their number; 1 for plain decoding.
        layers_per_token: layer calls, drafting included, over the tokens emitted by those passes.
        depth_per_token: mean number of layers behind the laws that those tokens were chosen from.
        drafted: tokens drafted and verified.
        accepted: drafted tokens that stood.
        prefill_seconds: time of the prompt and the first token.
        draft_seconds: time spent drafting.
        verify_seconds: time spent in passes and verification.
        tokens_per_second: tokens after the first one over draft and verify time.
    """

    new_tokens: int
    passes: int
    tokens_per_pass: float
    layers_per_token: float
    depth_per_token: float
    drafted: int
    accepted: int
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    tokens_per_second: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Statistics":
        """Sum up rounds; the first is the prompt's."""
        first, later = rounds[0], rounds[1:]
        decoded = sum(len(turn.tokens) for turn in later)
        draft_seconds = sum(turn.draft_seconds for turn in later)
        verify_seconds = sum(turn.verify_seconds for turn in later)
        seconds = draft_seconds + verify_seconds
        return cls(
            new_tokens=len(first.tokens) + decoded,
            passes=len(later),
            tokens_per_pass=decoded / len(later) if later else 1.0,
            layers_per_token=sum(turn.layer_calls for turn in later) / decoded if decoded else 0.0,
            depth_per_token=sum(turn.depth * len(turn.tokens) for turn in later) / decoded if decoded else 0.0,
            drafted=sum(turn.drafted for turn in later),
            accepted=sum(turn.accepted for turn in later),
            prefill_seconds=first.verify_seconds,
            draft_seconds=draft_seconds,
            verify_seconds=verify_seconds,
            tokens_per_second=decoded / seconds if seconds > 0 else 0.0,
        )


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: what was generated, cut before a stop string.
        tokens: the new tokens, up to and with the one that completed a stop string.
        prompt_tokens: length of the prompt.
        finished: ``end`` (an end token), ``length`` (max_tokens), ``context`` (the model is full) or ``stop`` (a stop
            string).
        statistics: what it cost.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finished: str
    statistics: Statistics

    @classmethod
    def of(cls, prompt: Sequence[int], pieces: Sequence[Piece]) -> "Generation":
        """Put the pieces of a text together."""
        rounds = [piece.round for piece in pieces]
        return cls(
            text="".join(piece.text for piece in pieces),
            tokens=[token for turn in rounds for token in turn.tokens],
            prompt_tokens=len(prompt),
            finished=rounds[-1].finished,
            statistics=Statistics.of(rounds),
        )


class Words:
    """Turns rounds into text: whole characters only, nothing of a stop string.

    Args:
        tokenizer: the model's.
        stop: strings that end the text; they are cut off, and text is held back while it could be one's start.

    Raises:
        RestpointError: a stop string is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        if any(not string for string in stop):
            raise RestpointError("stop: a stop string is empty; leave it out or give it at least one character")
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.tokens: list[int] = []
        self.start = 0
        self.shown = ""
        self.held = ""

    def add(self, turn: Round) -> Piece:
        """The text that a round makes ready to show, and the round, cut at the token that completes a stop string."""
        ready = ""
        for count, token in enumerate(turn.tokens, 1):
            self.tokens.append(token)
            self.held += self._new_characters(last=bool(turn.finished) and count == len(turn.tokens))
            found = min((at for string in self.stop if (at := self.held.find(string)) >= 0), default=-1)
            if found >= 0:
                cut = replace(turn, tokens=turn.tokens[:count], finished="stop")
                return Piece(ready + self.held[:found], cut)
            keep = 0 if turn.finished and count == len(turn.tokens) else self._possible_start()
            ready += self.held[: len(self.held) - keep]
            self.held = self.held[len(self.held) - keep :]
        return Piece(ready, turn)

    def _new_characters(self, last: bool) -> str:
        """Characters completed by the newest token; an unfinished one (a part of its bytes) waits."""
        text = self._decode()
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[len(self.shown) :]
        if len(self.tokens) - self.start > 32 and new:
            self.start = len(self.tokens) - 4
            self.shown = self._decode()
        else:
            self.shown = text
        return new

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.tokens[self.start :], skip_special_tokens=True))

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(string) - 1 for string in self.stop), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(string.startswith(self.held[-length:]) for string in self.stop):
                return length
        return 0
