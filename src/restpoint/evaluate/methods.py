"""The contestants: one interface, the same prompts, exactly as many new tokens."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from restpoint.decode.settings import SamplingSettings
from restpoint.generate import Decoder


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens: the new tokens.
        prefilled: how many of them the first pass, which reads the prompt, gave.
        prefill_seconds: time until these were there.
        decode_seconds: time of all others.
        passes: passes of the full model after the first one; None where they were not counted.
        layers: layers run after the first pass, drafts included; None where they were not counted.
    """

    tokens: list[int]
    prefilled: int
    prefill_seconds: float
    decode_seconds: float
    passes: int | None = None
    layers: int | None = None

    @property
    def decoded(self) -> int:
        """Tokens that came after the first pass."""
        return len(self.tokens) - self.prefilled

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding; the prompt and its first tokens are not in it."""
        return self.decoded / max(self.decode_seconds, 1e-9)


class Unsupported(Exception):  # noqa: N818  # not an error: the row of this method says so
    """This method does not work with this model, and why."""


class Method(ABC):
    """A way to continue a prompt.

    Attributes:
        name: what rows call it.
        settings: what was chosen in :meth:`prepare`; empty where there was nothing to choose.
        counts: whether :meth:`run` counts passes and layers by itself, at no cost to its time.
        lossy: whether its tokens may be others than the model's own by design.
    """

    name: str
    settings: str = ""
    counts: bool = False
    lossy: bool = False

    @abstractmethod
    def run(self, prompt_ids: list[int], new_tokens: int, seed: int = 0) -> Run:
        """Continue a prompt by exactly ``new_tokens`` tokens and time it.

        Raises:
            Unsupported: this model cannot be decoded so.
        """

    def prepare(self, prompt_ids: list[int], new_tokens: int) -> None:
        """Warm up, and choose the best settings.

        Raises:
            Unsupported: this model cannot be decoded so.
        """
        self.run(prompt_ids, new_tokens)

    def count(self, prompt_ids: list[int], new_tokens: int, seed: int = 0) -> Run:
        """The same run with its passes and layers counted; its times mean nothing."""
        return self.run(prompt_ids, new_tokens, seed)


class Restpoint(Method):
    """Our own decoder; with a profile it drafts, without one it is the plain baseline.

    Time is taken around the public interface, text included. Counters count layers where they run.
    """

    counts = True

    def __init__(self, name: str, decoder: Decoder, temperature: float = 0.0, draft_tokens: int | None = None):
        self.name = name
        self.decoder = decoder
        self.draft_tokens = draft_tokens
        self.settings = ", ".join(decoder.drafting.names) if decoder.drafting is not None else ""
        self.lossy = decoder.exits is not None
        self.sampling = SamplingSettings(temperature=temperature)

    def run(self, prompt_ids: list[int], new_tokens: int, seed: int = 0) -> Run:
        """See :meth:`Method.run`."""
        sampling = replace(self.sampling, seed=seed)
        device = self.decoder.layered.device
        rounds = []
        synchronize(device)
        began = first = time.perf_counter()
        for piece in self.decoder.stream(
            prompt_ids, sampling, max_tokens=new_tokens, ignore_end=True, draft_tokens=self.draft_tokens
        ):
            if not rounds:
                synchronize(device)
                first = time.perf_counter()
            rounds.append(piece.round)
        synchronize(device)
        ended = time.perf_counter()
        tokens = [token for turn in rounds for token in turn.tokens]
        layers = sum(turn.layer_calls for turn in rounds[1:])
        return Run(tokens, len(rounds[0].tokens), first - began, ended - first, len(rounds) - 1, layers)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
