"""Text in, text out: a model with its profile, ready to decode."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from restpoint.decode.compiled import CompiledTarget
from restpoint.decode.fusion import TreeSettings
from restpoint.decode.loop import Round, Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget, Target
from restpoint.decode.verifiers.registry import verifier as named_verifier
from restpoint.drafting import Drafting, Maker
from restpoint.errors import RestpointError
from restpoint.model.check import Capabilities, check
from restpoint.model.compiled import CompiledModel, Progress
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.profile import Profile

DRAFTERS = ("lookup", "recycling", "predictor")
"""Who drafts by a profile, unless told otherwise."""

DEFAULT_VERIFIER = "traversal"
"""How drafts are verified when tokens are sampled, unless told otherwise; where trees cannot be, block."""


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


class Decoder:
    """A loaded model, taken apart into layers, with those who draft for it.

    Output is the model's own: greedy text is identical to plain decoding, sampled text follows the same law. A
    family that cannot verify drafts is decoded plainly, and ``notes`` says why.

    Args:
        loaded: model and tokenizer.
        profile: what was fitted for this model.
        drafters: who drafts, by name (see :class:`restpoint.drafting.Drafting`); if None, lookup, recycling and the
            predictor where there is a profile, and nobody, which is plain decoding, where there is none.
        brought: further drafters by name, each made for a text's target: a draft model, a datastore.
        verifier: how drafts drawn at random are verified; see :data:`restpoint.decode.verifiers.registry.VERIFIERS`.
        tree: limits of the draft tree.
        share: let drafters keep what they learn from one text to the next.
        compile: decode single texts in compiled passes. Compiling takes a while, and less the next time; give a
            :class:`CompiledModel` to share one that is compiled. Batches are decoded without it.
        progress: told of every step of a compilation.

    Raises:
        RestpointError: the profile belongs to another model, a name is unknown, the model has no layers that could
            be found, or it cannot be compiled.
    """

    def __init__(
        self,
        loaded: Loaded,
        profile: Profile | None = None,
        drafters: Sequence[str] | None = None,
        *,
        brought: Mapping[str, Maker] | None = None,
        verifier: str = DEFAULT_VERIFIER,
        tree: TreeSettings | None = None,
        share: bool = False,
        compile: "bool | CompiledModel" = False,
        progress: Progress | None = None,
    ):
        if profile is not None:
            profile.require(loaded)
        self.loaded = loaded
        shared = None if isinstance(compile, bool) else compile
        self.layered = LayeredModel(loaded.model) if shared is None else shared.layered
        self.capabilities: Capabilities = check(self.layered)
        self.compiled = self._compile(progress) if compile is True else shared
        self.profile = profile
        self.verifier = named_verifier(verifier)
        names = DRAFTERS if drafters is None and profile is not None else tuple(drafters or ())
        self.drafting: Drafting | None = None
        self.notes: list[str] = []
        if not self.capabilities.drafts:
            refused = self.capabilities.refused()
            reason = next(refused[name] for name in ("depth", "cached", "rollback") if name in refused)
            self.notes.append(f"decoding plainly, by the model's own forward: {reason}")
        elif names or brought:
            self.drafting = Drafting(
                self.layered, self.capabilities, profile, names, brought, tree, self.verifier, share, self._single
            )
            self.notes = self.drafting.notes

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that its tokenizer adds.

        Raises:
            RestpointError: the prompt is empty.
        """
        if not prompt:
            raise RestpointError("prompt: it is empty; give at least one character of text")
        return list(self.loaded.tokenizer(prompt).input_ids)

    def stream(
        self,
        prompt: str | list[int],
        sampling: SamplingSettings | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        processors: LogitsProcessorList | None = None,
        ignore_end: bool = False,
        draft_tokens: int | None = None,
    ) -> Iterator[Piece]:
        """Generate, yielding the text of each round as it comes.

        Args:
            prompt: text, or token ids.
            sampling: how tokens are chosen; greedy if None.
            max_tokens: largest number of new tokens.
            stop: strings that end the text; they are cut off, and text is held back while it could be one's start.
            processors: further logits processors, applied to draft, target and bonus token alike.
            ignore_end: go on after end tokens.
            draft_tokens: draft this many in every round; None lets the controller choose.

        Raises:
            RestpointError: the prompt is empty, too long or has a token out of range; a setting makes no sense; the
                logits are NaN.
        """
        text = _Words(self, stop)
        for turn in self._rounds(prompt, sampling, max_tokens, processors, ignore_end, draft_tokens):
            piece = text.add(turn)
            yield piece
            if piece.round.finished:
                return

    def generate(
        self,
        prompt: str | list[int],
        sampling: SamplingSettings | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        processors: LogitsProcessorList | None = None,
        ignore_end: bool = False,
        draft_tokens: int | None = None,
    ) -> Generation:
        """Generate to the end. Arguments and errors as :meth:`stream`."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        pieces = list(
            self.stream(
                ids,
                sampling,
                max_tokens=max_tokens,
                stop=stop,
                processors=processors,
                ignore_end=ignore_end,
                draft_tokens=draft_tokens,
            )
        )
        return Generation.of(ids, pieces)

    def generate_batch(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingSettings | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        processors: LogitsProcessorList | None = None,
        ignore_end: bool = False,
        draft_tokens: int | None = None,
    ) -> list[Generation]:
        """Generate from several prompts at once, of any lengths; every pass serves all unfinished texts.

        Each row accepts as many drafted tokens as it accepts, with drafters of its own. Row i draws with the seed
        ``sampling.seed + i``. The seconds in a row's statistics are those of the passes that it shared. Arguments and
        errors as :meth:`stream`. A family whose cache cannot hold rows of different lengths is decoded one by one.
        """
        if not prompts:
            raise RestpointError("prompts: there is none; give at least one")
        batch = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        sampling = sampling or SamplingSettings()
        seeded = [replace(sampling, seed=sampling.seed + row) for row in range(len(batch))]
        if not (self.capabilities.drafts and self.capabilities.ragged.supported):
            return [
                self.generate(
                    ids,
                    own,
                    max_tokens=max_tokens,
                    stop=stop,
                    processors=processors,
                    ignore_end=ignore_end,
                    draft_tokens=draft_tokens,
                )
                for ids, own in zip(batch, seeded, strict=True)
            ]
        target = self._target(len(batch))
        texts = [
            self._text(target, ids, own, max_tokens, processors, ignore_end, draft_tokens, rows=len(batch))
            for ids, own in zip(batch, seeded, strict=True)
        ]
        words = [_Words(self, stop) for _ in batch]
        pieces: list[list[Piece]] = [[] for _ in batch]
        for rounds in decode_batch(target, texts, self.verifier):
            for row, turn in rounds.items():
                pieces[row].append(words[row].add(turn))
                texts[row].stopped = bool(pieces[row][-1].round.finished)
        return [Generation.of(ids, own) for ids, own in zip(batch, pieces, strict=True)]

    def _rounds(
        self,
        prompt: str | list[int],
        sampling: SamplingSettings | None,
        max_tokens: int,
        processors: LogitsProcessorList | None,
        ignore_end: bool,
        draft_tokens: int | None,
    ) -> Iterator[Round]:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        target = self._target()
        text = self._text(target, ids, sampling, max_tokens, processors, ignore_end, draft_tokens)
        for rounds in decode_batch(target, [text], self.verifier):
            yield rounds[0]

    def _target(self, rows: int = 1) -> Target:
        """A cache of its own for each text: several streams may be read in turn."""
        if not self.capabilities.drafts:
            return NativeTarget(self.layered)
        return self._single() if rows == 1 else LayeredTarget(self.layered)

    def _single(self) -> LayeredTarget:
        return LayeredTarget(self.layered) if self.compiled is None else CompiledTarget(self.compiled)

    def _compile(self, progress: Progress | None) -> CompiledModel:
        if not self.capabilities.drafts:
            reason = next(iter(self.capabilities.refused().values()))
            raise RestpointError(f"compile: this model can only be decoded by its own forward ({reason}); leave it out")
        compiled = CompiledModel(self.layered, progress=progress)
        compiled.warm_up()
        return compiled

    def _text(
        self,
        target: Target,
        ids: list[int],
        sampling: SamplingSettings | None,
        max_tokens: int,
        processors: LogitsProcessorList | None,
        ignore_end: bool,
        draft_tokens: int | None,
        rows: int = 1,
    ) -> Text:
        """One text with its settings and whoever drafts for it."""
        if draft_tokens is not None and draft_tokens < 0:
            raise RestpointError(f"draft_tokens is {draft_tokens}; it must be 0 or more, or left out")
        sampler = Sampler(sampling or SamplingSettings(), processors, self.layered.device)
        end = frozenset() if ignore_end else self.end_tokens()
        stopping = Stopping(max_tokens, end, self.loaded.context_length)
        speculator = None
        if self.drafting is not None and draft_tokens != 0 and isinstance(target, LayeredTarget):
            speculator = self.drafting.speculator(target, sampler, draft_tokens, rows)
        return Text(ids, sampler, stopping, speculator)

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, from the model's generation config and its tokenizer."""
        config = self.loaded.model.generation_config
        ends: Any = getattr(config, "eos_token_id", None)
        if ends is None:
            ends = self.loaded.tokenizer.eos_token_id
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


class _Words:
    """Turns rounds into text: whole characters only, nothing of a stop string."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]):
        if any(not string for string in stop):
            raise RestpointError("stop: a stop string is empty; leave it out or give it at least one character")
        self.tokenizer = decoder.loaded.tokenizer
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
                cut = Round(
                    turn.tokens[:count],
                    turn.drafted,
                    turn.accepted,
                    turn.layer_calls,
                    turn.draft_seconds,
                    turn.verify_seconds,
                    "stop",
                )
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


def inference_threads(count: int | None) -> None:
    """Use this many processor threads; None leaves torch's choice."""
    if count is not None:
        if count < 1:
            raise RestpointError(f"threads is {count}; it must be at least 1")
        torch.set_num_threads(count)
