"""Record a model's states on text and on its own continuations of it, resumably."""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from restpoint.equilibrium.streaming import Chunk
from restpoint.errors import RestpointError
from restpoint.fit.options import FitOptions
from restpoint.model.fingerprint import fingerprint
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.progress import Progress
from restpoint.trajectory.record import continue_texts, pack, states_of
from restpoint.trajectory.store import StateStore, StoreLayout
from restpoint.transport.variation import acceptance

_SCORED = 16
"""Held-out sequences that ridge strengths are compared on."""


class Recording:
    """A recording, split into what is fitted on and what is held out."""

    def __init__(self, layered: LayeredModel, store: StateStore, natural: int, options: FitOptions, text_hash: str):
        self.layered = layered
        self.store = store
        self.natural = natural
        self.text_hash = text_hash
        self.tokens = store.count * store.layout.length
        every = max(2, round(1 / options.held_out))
        self.held_out = [index for index in range(natural) if index % every == every - 1]
        self.held_out += [index for index in range(natural, store.count) if (index - natural) % 8 < _OWN_HELD_OUT]
        aside = set(self.held_out)
        self.fitted = [index for index in range(store.count) if index not in aside]

    def own(self, index: int) -> Literal["greedy", "sampled"] | None:
        """How the model wrote a sequence by itself; None where it is text."""
        if index < self.natural:
            return None
        return "greedy" if (index - self.natural) % 2 == 0 else "sampled"

    @property
    def has_own_text(self) -> bool:
        """Whether text of the model's own, of either kind, is held out."""
        return {self.own(index) for index in self.held_out} >= {"greedy", "sampled"}

    @property
    def prompt_length(self) -> int:
        """Tokens of text that the model's own sequences begin with."""
        return _prompt_length(self.store.layout.length)

    def held_out_tokens(self) -> Iterator[tuple[int, list[int]]]:
        """Index and token ids of every held-out sequence."""
        for index in self.held_out:
            ids, _states = next(self.store.read([index]))
            yield index, ids[0].tolist()

    def held_out_chunk(self, index: int) -> Chunk:
        """One sequence; of the model's own ones only what follows the prompt, which is text fitted on elsewhere."""
        chunk = next(self.chunks([index]))
        if self.own(index) is None:
            return chunk
        start = self.prompt_length
        return Chunk(chunk.states[:, start:], chunk.rest[:, start:], chunk.layers)

    def set_aside(self, most: int | None = None) -> Iterator[Chunk]:
        """Those of the held-out sequences, each by itself: of all, or of about ``most``, evenly spaced."""
        every = 1 if most is None else max(1, len(self.held_out) // most)
        return (self.held_out_chunk(index) for index in self.held_out[::every])

    def chunks(self, indices: list[int]) -> Iterator[Chunk]:
        """States in float32; the first position, often an attention sink, is left out."""
        layers = self.store.layout.layers
        for _ids, states in self.store.read(indices):
            wide = states[:, 1:].to(self.layered.device, torch.float32)
            yield Chunk(wide[:, :, :-1], wide[:, :, -1], layers)

    def scored(self) -> Iterator[Chunk]:
        """Those of a few of the held-out sequences, evenly spaced: enough to choose by."""
        return self.chunks(self.held_out[:: max(1, len(self.held_out) // _SCORED)])

    def frequent_tokens(self, count: int) -> Tensor:
        """The most frequent tokens of the text fitted on."""
        counts: Counter[int] = Counter()
        for ids, _states in self.store.read(self.fitted, batch=64):
            counts.update(ids.flatten().tolist())
        return torch.tensor([token for token, _ in counts.most_common(count)])

    def laws(self, rest: Tensor) -> Tensor:
        """Next-token distributions of rest states."""
        logits = self.layered.logits(rest[None].to(self.layered.dtype))
        return torch.softmax(logits[0].float(), -1)

    def head(self, vocabulary: Tensor | None) -> Callable[[Tensor], Tensor]:
        """From rest states to the logits of some tokens (None for all) in float32; they have a gradient."""
        head, dtype = self.layered.head, self.layered.dtype
        if vocabulary is None:
            return lambda rest: head.logits(rest[None].to(dtype))[0].float()
        rows = head.rows(vocabulary.to(self.layered.device))
        return lambda rest: head.unembed(head.rest_state(rest[None].to(dtype)), *rows)[0].float()

    def rests(self, index: int) -> Tensor:
        """h_L of every token of a sequence, in the model's dtype."""
        _ids, states = next(self.store.read([index]))
        return states[0, :, -1].to(self.layered.device, self.layered.dtype)

    def score(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Acceptance 1 - TV of each row, the vocabulary in blocks of rows."""
        rows = max(1, 4_000_000 // self.layered.vocabulary_size)
        blocks = zip(predicted.split(rows), true.split(rows), strict=True)
        return torch.cat([acceptance(self.laws(p), self.laws(t)) for p, t in blocks])


_OWN_HELD_OUT = 2
"""Of every eight sequences that the model writes, how many are held out: calibration rests on them."""


def _prompt(sequences: list[list[int]], number: int) -> list[int]:
    """What the model continues to its own sequence of that number.

    Once every sequence has been begun with, the next lap begins with later parts: a greedy text would come twice.
    """
    count = len(sequences)
    stride = next(stride for stride in itertools.count(7) if math.gcd(stride, count) == 1)
    sequence = sequences[number * stride % count]
    length = _prompt_length(len(sequence))
    start = number // count * length % (len(sequence) - length + 1)
    return sequence[start : start + length]


def _prompt_length(length: int) -> int:
    """Tokens of text that the model continues to a sequence of ``length`` tokens."""
    return length // 4


def record(
    loaded: Loaded,
    layered: LayeredModel,
    texts: Iterable[str],
    options: FitOptions,
    exits: tuple[int, ...],
    folder: Path,
    report: Progress,
) -> Recording:
    """Read text and let the model continue some of it, or pick up where an interrupted recording stopped."""
    length = options.sequence_length
    if loaded.context_length is not None and length > loaded.context_length:
        raise RestpointError(f"sequence_length is {length}, above the model's context of {loaded.context_length}")
    wanted = options.max_tokens // length
    own_wanted = int(wanted * options.own_share)
    digest = hashlib.sha256()
    sequences: list[list[int]] = []
    for sequence in pack(_documents(loaded, texts, digest), length):
        sequences.append(sequence)
        if len(sequences) >= wanted - own_wanted:
            break
    if len(sequences) < 40:
        raise RestpointError(
            f"text: it has only {len(sequences)} sequences of {length} tokens; at least 40 are needed, give more text"
        )
    own_wanted = min(own_wanted, int(len(sequences) * options.own_share / (1 - options.own_share)))
    layers = tuple(sorted({0, *exits}))
    layout = StoreLayout(
        fingerprint(loaded.model, loaded.tokenizer),
        hashlib.sha256(json.dumps([digest.hexdigest(), asdict(options)]).encode()).hexdigest(),
        length,
        layers,
        layered.hidden_size,
        "float32" if layered.dtype == torch.float32 else "bfloat16",
    )
    store = StateStore(folder, layout)
    total = len(sequences) + own_wanted
    report("record", store.count, total)
    while store.count < len(sequences):
        ids = torch.tensor(sequences[store.count : store.count + options.batch], device=layered.device)
        store.append(ids, states_of(layered, ids, layers))
        report("record", store.count, total)
    while store.count < total:
        done = store.count - len(sequences)
        count = min(8 * options.batch, total - store.count)
        prompts = [_prompt(sequences, done + row) for row in range(count)]
        ids, states = continue_texts(
            layered,
            torch.tensor(prompts, device=layered.device),
            length,
            layers,
            greedy=lambda row, done=done: (done + row) % 2 == 0,
            seed=options.seed + done,
        )
        store.append(ids, states)
        report("record", store.count, total)
    return Recording(layered, store, len(sequences), options, digest.hexdigest())


def _documents(loaded: Loaded, texts: Iterable[str], digest: "hashlib._Hash") -> Iterator[list[int]]:
    """Token ids of each document, with a separator where the tokenizer adds none."""
    tokenizer = loaded.tokenizer
    separator = tokenizer.eos_token_id
    for text in texts:
        digest.update(text.encode())
        ids = list(tokenizer(text).input_ids)
        if ids and separator is not None and ids[0] != tokenizer.bos_token_id:
            ids = [*ids, separator]
        yield ids
