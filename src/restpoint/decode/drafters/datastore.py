"""A corpus of token ids on disk, memory-mapped and sorted, in which every earlier occurrence of a context is found."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt, UInt32, UInt64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from restpoint import files
from restpoint.errors import RestpointError
from restpoint.tensors import content_hash, save

CONTEXT = 16
"""Contexts are compared up to so many tokens."""

_FORMAT = 2
_JSON = "datastore.json"
_TENSORS = ("tokens", "ends", "starts")
_NEAR = 8
_WIDEST = 2**32 - 1  # tokens, and places of tokens, are kept in 32 bits


@runtime_checkable
class HasVocabulary(Protocol):
    """A tokenizer, as far as it matters here."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token strings to ids."""
        ...


def tokenizer_hash(tokenizer: HasVocabulary) -> str:
    """SHA-256 of a tokenizer's vocabulary: where it is the same, the same ids mean the same tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@dataclass(frozen=True)
class Described:
    """What a datastore holds.

    Attributes:
        format: version of the files.
        tokenizer: :func:`tokenizer_hash` of the tokenizer that made the ids.
        documents: number of documents.
        tokens: number of tokens in them.
        file: name of the file of tensors.
        sha256: of its content.
    """

    format: int
    tokenizer: str
    documents: int
    tokens: int
    file: str
    sha256: str


class Datastore:
    """The tokens of a corpus, and all their places sorted by the context that ends there, read backwards.

    That is a suffix array of the corpus reversed. Contexts that end alike lie side by side in it, so one binary search
    finds the longest match of a text's end and all its occurrences: O(log n) comparisons of at most 16 tokens. The
    places that end in each token are known, which saves half of these.

    Attributes:
        described: what it holds.
    """

    def __init__(self, described: Described, tensors: Mapping[str, Tensor]):
        self.described = described
        arrays = {name: tensors[name].numpy() for name in _TENSORS}
        self._separator = int(np.iinfo(arrays["tokens"].dtype).max)
        # Entries of a memoryview are Python's own integers, an order of magnitude faster to get than NumPy's.
        self._tokens, self._ends, self._starts = (arrays[name].data for name in _TENSORS)

    @classmethod
    def build(cls, token_documents: Iterable[Sequence[int]], folder: Path | str, tokenizer: str) -> "Datastore":
        """Sort a corpus and write it to a folder, complete or not at all.

        Places are sorted by prefix doubling (Manber and Myers 1993), stopped at 16 tokens: as many tokens as fit into
        64 bits at first, twice as many in every further pass. O(n log n) time in 3 or 4 sorts, and about 30 bytes of
        memory and 8 of disk for each token.

        Args:
            token_documents: token ids of each document; no match runs over the end of one.
            folder: made if missing; a datastore that is there already is replaced.
            tokenizer: :func:`tokenizer_hash` of the tokenizer that made the ids.

        Raises:
            RestpointError: there is no token, a token is no id, or there are 2^32 tokens or more.
        """
        corpus, documents = _joined(token_documents)
        ends, starts = _sorted(corpus)
        tensors = {name: torch.from_numpy(array) for name, array in zip(_TENSORS, (corpus, ends, starts), strict=True)}
        content = content_hash(tensors)
        described = Described(
            _FORMAT, tokenizer, documents, len(ends), f"datastore-{content[:16]}.safetensors", content
        )
        folder = Path(folder)
        text = json.dumps(asdict(described), indent=1) + "\n"
        before = _file_in(folder)
        try:
            save(folder / described.file, tensors)
            files.write(folder / _JSON, lambda path: path.write_text(text))  # from here on it holds the new one
        except BaseException:
            if described.file != before:
                (folder / described.file).unlink(missing_ok=True)
            raise
        if before not in (None, described.file):
            (folder / before).unlink(missing_ok=True)
        return cls.open(folder, check=False)

    @classmethod
    def open(cls, folder: Path | str, *, check: bool = True) -> "Datastore":
        """Map a datastore into memory.

        Args:
            folder: that :meth:`build` wrote to.
            check: whether to read all of it once and compare its hash, about a second for each gigabyte.

        Raises:
            RestpointError: the folder has none, a file is damaged or cut short, or another version wrote it.
        """
        folder = Path(folder)
        rebuild = "build it again with Datastore.build"
        if not (folder / _JSON).is_file():
            raise RestpointError(f"datastore: {folder} has no {_JSON}; make one with Datastore.build")
        try:
            entries = json.loads((folder / _JSON).read_text())
            if entries["format"] != _FORMAT:
                raise RestpointError(
                    f"datastore: {folder} has format {entries['format']}, this version reads {_FORMAT}; {rebuild}"
                )
            described = Described(**entries)
            with safe_open(folder / described.file, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (KeyError, TypeError) as error:
            raise RestpointError(f"datastore: {folder / _JSON} is not of this form ({error}); {rebuild}") from error
        except (ValueError, SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RestpointError(f"datastore: {folder} is damaged or cut short ({reason}); {rebuild}") from error
        if check and content_hash(tensors) != described.sha256:
            raise RestpointError(f"datastore: {folder / described.file} is damaged; {rebuild}")
        return cls(described, tensors)

    def require(self, tokenizer: str) -> None:
        """Refuse a tokenizer that this datastore was not built with.

        Args:
            tokenizer: :func:`tokenizer_hash` of the model's tokenizer.

        Raises:
            RestpointError: it is another one.
        """
        if tokenizer != self.described.tokenizer:
            raise RestpointError(
                "datastore: it was built with another tokenizer than the model's; "
                "build one with Datastore.build from the same text and this model's tokenizer"
            )

    def find(self, tokens: Sequence[int]) -> tuple[int, range]:
        """The longest suffix of a text that occurs in the corpus, up to 16 tokens.

        Returns:
            Its length, and its occurrences, to be given to :meth:`after`; later ones of the same context come first.
        """
        wanted = list(tokens[: -CONTEXT - 1 : -1])
        if self._separator in wanted:
            del wanted[wanted.index(self._separator) :]
        if not wanted or not 0 <= wanted[0] < len(self._starts) - 1:
            return 0, range(0)
        same_token = range(self._starts[wanted[0]], self._starts[wanted[0] + 1])
        if not same_token:
            return 0, same_token

        def context(place: int) -> list[int]:  # as much of it as is wanted
            end = self._ends[place]
            return self._tokens[end : end - len(wanted) : -1].tolist()

        near = bisect_left(same_token, wanted, key=context)
        length = max(_common(wanted, context(place)) for place in same_token[max(near - 1, 0) : near + 1])
        del wanted[length:]
        low, high = max(near - _NEAR, 0), min(near + _NEAR, len(same_token))
        if low and context(same_token[low - 1]) >= wanted:
            low = 0
        if high < len(same_token) and context(same_token[high]) == wanted:
            high = len(same_token)
        first = bisect_left(same_token, wanted, low, near, key=context)
        stop = bisect_right(same_token, wanted, near, high, key=context)
        return length, same_token[first:stop]

    def after(self, place: int, count: int) -> list[int]:
        """Up to ``count`` tokens that followed an occurrence in its document."""
        end = self._ends[place] + 1
        following = self._tokens[end : end + count].tolist()
        return following[: following.index(self._separator)] if self._separator in following else following


def _joined(token_documents: Iterable[Sequence[int]]) -> tuple[UInt[np.ndarray, " tokens"], int]:
    """All documents one after the other, a separator after each and a context of them first; and their number."""
    documents: list[UInt32[np.ndarray, " tokens"]] = []
    for number, tokens in enumerate(token_documents):
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or (len(ids) and not 0 <= ids.min() <= ids.max() < _WIDEST):
            raise RestpointError(f"token_documents: document {number} is no sequence of token ids; tokenize it first")
        if len(ids):
            documents.append(ids.astype(np.uint32))
    if not documents:
        raise RestpointError("token_documents: there is no token in them; give at least one document with text")
    total = CONTEXT + sum(len(ids) + 1 for ids in documents)
    if total > _WIDEST:
        raise RestpointError(f"token_documents: {total} tokens are too many for one datastore; give fewer than 2^32")
    largest = max(int(ids.max()) for ids in documents)
    dtype = np.uint16 if largest < 2**16 - 1 else np.uint32
    joined = np.full(total, np.iinfo(dtype).max, dtype=dtype)
    start = CONTEXT
    for ids in documents:
        joined[start : start + len(ids)] = ids
        start += len(ids) + 1
    return joined, len(documents)


def _sorted(corpus: UInt[np.ndarray, " tokens"]) -> tuple[UInt32[np.ndarray, " places"], Int64[np.ndarray, " bounds"]]:
    """Places of all tokens, sorted by the tokens up to there read backwards; and where those of each token start."""
    is_token = corpus != np.iinfo(corpus.dtype).max
    vocabulary = int(corpus.max(where=is_token, initial=0)) + 1
    count, bits = len(corpus), vocabulary.bit_length()
    ranks = corpus[::-1].astype(np.uint32)
    ranks[~is_token[::-1]] = vocabulary  # the separator, above all tokens in as few bits as can be
    span = 64 // bits
    keys = _joint_keys(ranks, span, 1, bits, vocabulary)
    while span < CONTEXT:
        order = np.argsort(keys)
        keys = keys[order]
        ranks[order[0]] = 0
        ranks[order[1:]] = np.cumsum(keys[1:] != keys[:-1], dtype=np.uint32)
        del order
        keys = _joint_keys(ranks, 2, span, 32, _WIDEST)
        span *= 2
    del ranks
    order = np.argsort(keys, kind="stable")[: int(is_token.sum())]  # separators come last
    ends = (count - 1 - order).astype(np.uint32)
    starts = np.concatenate(([0], np.cumsum(np.bincount(corpus[is_token], minlength=vocabulary))))
    return ends, starts.astype(np.int64)


def _joint_keys(
    ranks: UInt32[np.ndarray, " tokens"], together: int, distance: int, bits: int, beyond: int
) -> UInt64[np.ndarray, " tokens"]:
    """So many ranks, at such distances, in one number each, the first in its highest bits; ``beyond`` after the end."""
    keys = ranks.astype(np.uint64)
    for index in range(1, together):
        offset = min(index * distance, len(ranks))
        keys <<= np.uint64(bits)
        keys[: len(ranks) - offset] |= ranks[offset:]
        keys[len(ranks) - offset :] |= np.uint64(beyond)
    return keys


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first entries are the same."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _file_in(folder: Path) -> str | None:
    """Name of the tensors of the datastore in a folder, None if there is no whole one."""
    try:
        name = json.loads((folder / _JSON).read_text())["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).name == name else None
