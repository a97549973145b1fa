"""Drafts from a model with another vocabulary: written by it as text, read by the target's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from restpoint.decode.draft import Candidates, InstantDrafter, TokenPath
from restpoint.decode.drafters.reading import Reader
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LOOKBEHIND = range(8, 12)  # a character has at most 4 bytes, so one of these tails begins with a whole one


@dataclass(frozen=True)
class Reencoding:
    """How far a draft model writes, and how much of the text it reads.

    Attributes:
        longest: the most tokens, of its own, that it drafts.
        least_confidence: it stops before a token that it holds less probable than this.
        window: the most tokens of the target that are turned into text for it.

    Raises:
        RestpointError: one of them is out of range.
    """

    longest: int = 6
    least_confidence: float = 0.4
    window: int = 512

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise RestpointError(f"longest={self.longest} drafts nothing; give at least 1")
        if not 0 <= self.least_confidence < 1:
            raise RestpointError(f"least_confidence={self.least_confidence} is no probability; give one in [0, 1)")
        if self.window < 2 * _LOOKBEHIND[-1]:
            raise RestpointError(f"window={self.window} is too short to align; give at least {2 * _LOOKBEHIND[-1]}")


class ReencodingDrafter(InstantDrafter):
    """Target tokens that spell what a draft model with another tokenizer writes next, greedily.

    The text's end is decoded by the target's tokenizer and encoded by the draft model's; what the model then writes is
    encoded by the target's tokenizer together with the last tokens of the text, and split where these end. Only
    tokens that spell exactly what was written are proposed, and none where the two do not align: inside a character,
    at an unknown token, at a change that an encoding makes to the text. There is no law over target tokens, so drafts
    are deterministic, which keeps every verifier exact and accepts less than :class:`ModelDrafter` under sampling.

    Cost: it is instant in kind only. Each round costs one pass of the draft model to catch up and one for every drafted
    token (counted in ``layered.work``), one decoding and one encoding of at most ``window`` tokens, and about 20 short
    decodings. Whoever times drafters must time this one as a whole.

    When to use: no small model with the target's tokenizer exists, and text is decoded greedily or nearly so. When not:
    a draft model with the same vocabulary exists, or the target is less than ten times larger.

    Args:
        layered: the draft model.
        own: its tokenizer.
        target: the target's tokenizer.
        settings: how far it writes and reads.
        context_length: the most positions that the draft model takes; None for no limit.

    Paper:
        Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
        Vocabularies"; universal assisted generation in ``transformers``.
    """

    name = "draft model (re-encoded)"

    def __init__(
        self,
        layered: LayeredModel,
        own: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        settings: Reencoding | None = None,
        *,
        context_length: int | None = None,
    ):
        self.layered = layered
        self.settings = settings or Reencoding()
        self._own = own
        self._target = target
        self._reader = Reader(layered, context_length, trees=False)
        self._ends = set(own.all_special_ids)
        begin = own("").input_ids
        self._begin = begin if begin == [own.bos_token_id] else []

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """A chain of target tokens; none where the draft model is unsure or the tokenizers do not align."""
        if room < 1:
            return Candidates()
        tokens = self._window(path.tokens)
        text = _text(self._target, tokens)
        if not text or text.endswith(_BROKEN):
            return Candidates()
        ids = [*self._begin, *_encode(self._own, text)]
        if not ids:
            return Candidates()
        drafted, confidences = self._write(ids)
        written, ends = self._spell(ids, drafted)
        found, stops = align(self._target, tokens, written)
        starts = [0, *stops][: len(stops)]
        sure = [_least(confidences, ends, start, stop) for start, stop in zip(starts, stops, strict=True)]
        return Candidates.chain(found[:room], sure[:room])

    def _window(self, tokens: Sequence[int]) -> list[int]:
        """The text's end, beginning at a multiple of half the window, so that it begins anew rarely."""
        step = self.settings.window // 2
        excess = len(tokens) - self.settings.window
        return list(tokens[max(0, -(-excess // step)) * step :])

    def _write(self, ids: list[int]) -> tuple[list[int], list[float]]:
        """The draft model's greedy continuation and the probability of each token."""
        drafted: list[int] = []
        confidences: list[float] = []
        states = self._reader.start(ids)
        while True:
            law = torch.softmax(self.layered.logits(states)[0, -1].float(), -1)
            confidence, token = (float(value) for value in law.max(-1))
            if int(token) in self._ends or confidence < self.settings.least_confidence:
                return drafted, confidences
            drafted.append(int(token))
            confidences.append(confidence)
            if len(drafted) == self.settings.longest:
                return drafted, confidences
            states = self._reader.extend([len(drafted) - 2], drafted[-1:])

    def _spell(self, ids: list[int], drafted: list[int]) -> tuple[str, list[int]]:
        """What drafted tokens add to the text, and where each of them ends in that."""
        if not drafted:
            return "", []
        tail = ids[-_LOOKBEHIND[0] :]
        before = _text(self._own, tail)
        after = [_text(self._own, tail + drafted[: count + 1]) for count in range(len(drafted))]
        if not after[-1].startswith(before):
            return "", []
        written = after[-1][len(before) :].split(_BROKEN)[0]
        return written, [_length(one) - len(before) for one in after]


def align(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], written: str) -> tuple[list[int], list[int]]:
    """Tokens that continue ``tokens`` and spell as long a beginning of ``written`` as can be.

    The last tokens and what was written are encoded together, as the tokenizer would have encoded the whole text, if a
    token boundary lies between them; else what was written by itself.

    Args:
        tokenizer: whose tokens these are.
        tokens: a text.
        written: what comes after it.

    Returns:
        The tokens and where each of them ends in ``written``; none where the text ends inside a character, or where
        nothing that the tokenizer encodes comes back as it was written.
    """
    tails = (list(tokens[-count:]) for count in _LOOKBEHIND)
    tail, before = next(((tail, text) for tail in tails if _BROKEN not in (text := _text(tokenizer, tail))), ([], ""))
    if not (before and written):
        return [], []
    joint = _encode(tokenizer, before + written)
    texts = [_text(tokenizer, joint[:count]) for count in range(len(joint) + 1)]
    if before in texts:
        start = len(texts) - 1 - texts[::-1].index(before)
        found, texts = joint[start:], texts[start + 1 :]
    else:
        found = _encode(tokenizer, written)
        texts = [_text(tokenizer, tail + found[: count + 1]) for count in range(len(found))]
    special = set(tokenizer.all_special_ids)
    known = next((index for index, token in enumerate(found) if token in special), len(found))
    whole = before + written
    spelled = [len(text) if whole.startswith(text) else 0 for text in texts[:known]]
    count = spelled.index(max(spelled)) + 1 if any(spelled) else 0
    return found[:count], [_length(text) - len(before) for text in texts[:count]]


def _least(confidences: Sequence[float], ends: Sequence[int], start: int, stop: int) -> float:
    """The least confidence of the drafted tokens that cover characters ``start .. stop-1``."""
    begins = [0, *ends[:-1]]
    stop = max(stop, start + 1)  # a part of a character ends where it begins
    covering = zip(confidences, begins, ends, strict=False)
    return min((sure for sure, begin, end in covering if begin < stop and end > start), default=0.0)


def _length(text: str) -> int:
    """Characters that are whole."""
    return len(text.rstrip(_BROKEN))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return decoded


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
