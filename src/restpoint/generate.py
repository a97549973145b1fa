"""Text in, text out: a model with its profile, ready to decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from restpoint.decode.control import Controller, Pace
from restpoint.decode.costs import device_name, name_of
from restpoint.decode.draft import Drafter
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.lookup import LookupDrafter
from restpoint.decode.drafters.turns import TakingTurns
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget, Target
from restpoint.errors import RestpointError
from restpoint.fit.measuring import CostMeter
from restpoint.model.check import Capabilities, check
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.profile import Drafting, Profile

SOURCES = ("both", "predictor", "lookup")
"""Who may draft."""


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


class Decoder:
    """A loaded model, taken apart into layers, with the profile that drafts for it.

    Output is the model's own: greedy text is identical to plain decoding, sampled text follows the same law. A
    family that cannot verify drafts is decoded plainly, and ``notes`` says why.

    Args:
        loaded: model and tokenizer.
        profile: what was fitted for this model; None decodes plainly.
        source: who drafts: the profile's ``predictor``, ``lookup`` (copies from the text itself), or ``both`` in turns.

    Raises:
        RestpointError: the profile belongs to another model, or the model has no layers that could be found.
    """

    def __init__(self, loaded: Loaded, profile: Profile | None = None, source: str = "both"):
        if source not in SOURCES:
            raise RestpointError(f"source is {source!r}; choose from {', '.join(SOURCES)}")
        if profile is not None:
            profile.require(loaded)
        self.source = source
        self.loaded = loaded
        self.layered = LayeredModel(loaded.model)
        self.capabilities: Capabilities = check(self.layered)
        self.notes: list[str] = []
        if not self.capabilities.drafts:
            refused = self.capabilities.refused()
            reason = next(refused[name] for name in ("depth", "cached", "rollback") if name in refused)
            self.notes.append(f"decoding plainly, by the model's own forward: {reason}")
            profile = None
        if profile is not None and not self._can_draft(profile):
            profile = None
        self.profile = profile if profile is None else self._with_current_costs(profile)

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
        text = _Text(self, stop)
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
        rounds = [piece.round for piece in pieces]
        return Generation(
            text="".join(piece.text for piece in pieces),
            tokens=[token for turn in rounds for token in turn.tokens],
            prompt_tokens=len(ids),
            finished=rounds[-1].finished,
            statistics=Statistics.of(rounds),
        )

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
        sampler = Sampler(sampling or SamplingSettings(), processors, self.layered.device)
        end = frozenset() if ignore_end else self.end_tokens()
        stopping = Stopping(max_tokens, end, self.loaded.context_length)
        if draft_tokens is not None and draft_tokens < 0:
            raise RestpointError(f"draft_tokens is {draft_tokens}; it must be 0 or more, or left out")
        # a cache of its own for each text: several streams may be read in turn
        target: Target = LayeredTarget(self.layered) if self.capabilities.drafts else NativeTarget(self.layered)
        drafter = None
        if self.profile is not None and draft_tokens != 0 and isinstance(target, LayeredTarget):
            drafter = self.drafter(self.profile, target, sampler, draft_tokens)
        return decode(target, ids, sampler, stopping, drafter)

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, from the model's generation config and its tokenizer."""
        config = self.loaded.model.generation_config
        ends: Any = getattr(config, "eos_token_id", None)
        if ends is None:
            ends = self.loaded.tokenizer.eos_token_id
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)

    def drafter(
        self, profile: Profile, target: LayeredTarget, sampler: Sampler, draft_tokens: int | None = None
    ) -> Drafter:
        """Who drafts one text on one target, with what the profile knows; it learns as the text goes on."""
        pace = Pace()

        def controller(drafting: Drafting) -> Controller:
            calibration = drafting.greedy if sampler.greedy else drafting.sampling
            return Controller(drafting.costs, calibration, fixed=draft_tokens, pace=pace)

        lookup = LookupDrafter(controller(profile.lookup))
        if self.source == "lookup":
            return lookup
        predictor = ExitDrafter(
            target,
            profile.predictors[profile.chosen],
            sampler,
            controller(profile.drafting[profile.chosen]),
            profile.vocabulary,
        )
        return predictor if self.source == "predictor" else TakingTurns(lookup, predictor)

    def _can_draft(self, profile: Profile) -> bool:
        """Whether the chosen predictor's exit layer can be used; says why not."""
        exit_layer = profile.predictors[profile.chosen].exit_layer
        if exit_layer == 0 or self.capabilities.resume.supported:
            return True
        self.notes.append(f"decoding plainly: drafts from layer {exit_layer}: {self.capabilities.resume.reason}")
        return False

    def _with_current_costs(self, profile: Profile) -> Profile:
        """Costs measured again, in about a second, where this device or dtype is not the profile's."""
        costs = profile.drafting[profile.chosen].costs
        here = device_name(self.layered.device), name_of(self.layered.dtype)
        if (costs.device, costs.dtype) == here:
            return profile
        meter = CostMeter(LayeredTarget(self.layered))
        predictor = profile.predictors[profile.chosen]
        return profile.with_costs(meter.of(predictor, profile.vocabulary), meter.of_lookup())


class _Text:
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
