"""Text as tokens to train on: documents split by their hashes, laid end to end, cut into sequences, drawn by step."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.tensors import save

_DOCUMENTS = 256  # tokenised at once
_MOST_HELD_OUT = 64
"""Held-out sequences that the loss is told on: about 32,000 tokens of the default length."""


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Sequences to train on, and others to tell the loss on.

    Attributes:
        sequences: of documents trained on.
        held_out: of documents that are not.
        sha256: of the documents, the tokenizer's vocabulary and how they were split.
    """

    sequences: Int[Tensor, "count length"]
    held_out: Int[Tensor, "held length"]
    sha256: str

    def batch(self, step: int, size: int, seed: int) -> Int[Tensor, "batch length"]:
        """The sequences of a step, which depend on nothing but it: every epoch is a new permutation."""
        count = len(self.sequences)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: _permutation(count, seed, epoch) for epoch in {place // count for place in places}}
        chosen = torch.tensor([int(orders[place // count][place % count]) for place in places])
        return self.sequences[chosen].long()


def training_text(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, held_out: float, path: Path
) -> TrainingText:
    """Tokenise documents, or take what was tokenised before from ``path``.

    Args:
        tokenizer: its end token is put between documents.
        texts: documents.
        length: tokens of each sequence.
        held_out: share of the documents that are kept aside.
        path: a safetensors file that the tokens are kept in.

    Raises:
        RestpointError: the tokenizer has no end token, or the text is too short.
    """
    if tokenizer.eos_token_id is None:
        raise RestpointError("tokenizer: it has no end token to put between documents; give another")
    documents = [text for text in texts if text.strip()]
    digest = hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), length, held_out]).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    sha256 = digest.hexdigest()
    kept = _read(path, sha256)
    if kept is None:
        aside = [_is_held_out(document, held_out) for document in documents]
        kept = {
            name: _sequences(tokenizer, [d for d, out in zip(documents, aside, strict=True) if out is chosen], length)
            for name, chosen in (("sequences", False), ("held_out", True))
        }
        save(path, kept, {"sha256": sha256})
    for name, found in kept.items():
        if not len(found):
            raise RestpointError(
                f"text: what is {'trained on' if name == 'sequences' else 'held out'} of its {len(documents)} documents"
                f" has fewer than {length} tokens; give more text, or a smaller sequence_length"
            )
    return TrainingText(kept["sequences"], kept["held_out"][:_MOST_HELD_OUT], sha256)


def _sequences(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int
) -> Int[Tensor, "count length"]:
    end = tokenizer.eos_token_id
    tokens: list[Tensor] = []
    for first in range(0, len(documents), _DOCUMENTS):
        some = list(documents[first : first + _DOCUMENTS])
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens.append(torch.tensor([end, *ids], dtype=torch.int32))
    whole = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32)
    return whole[: len(whole) // length * length].view(-1, length).clone()


def _read(path: Path, sha256: str) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("sha256") == sha256:
                return {name: file.get_tensor(name) for name in ("sequences", "held_out")}
    except SafetensorError:
        pass  # cut short: it is made again
    return None


def _is_held_out(document: str, share: float) -> bool:
    # Not the hash of the text alone: a corpus in the order of that would have its first documents held out.
    return int(hashlib.sha256(b"held out\n" + document.encode()).hexdigest()[:8], 16) < share * 16**8


def _permutation(count: int, seed: int, epoch: int) -> Int[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
