"""Text dealt out: passages to fit on, to choose on and to certify on, no document in two of them."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from restpoint.calibrate.options import CalibrateOptions
from restpoint.errors import RestpointError
from restpoint.exit.policy import document_hash

_SPREAD = 4
"""Of so many prompts' worth of text, the first is a prompt: prompts of one document are that far apart."""
TUNED = 400
"""Prompts to fit the signal and to choose layers and thresholds on."""
_DEALT = ("fit", "fit", "certify", "tune", "fit", "certify", "fit", "certify", "fit", "tune")


@dataclass
class Passages:
    """Text, dealt out by document.

    Attributes:
        fit: documents to fit predictors on.
        tune: prompts.
        certify: prompts.
        documents: short hashes of all documents that were read.
        sources: documents that the prompts to certify on come from.
        text: SHA-256 of all documents.
    """

    fit: list[str] = field(default_factory=list)
    tune: list[list[int]] = field(default_factory=list)
    certify: list[list[int]] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    sources: int = 0
    text: str = ""


def deal(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, options: CalibrateOptions) -> Passages:
    """Read documents until there is enough of everything, each used for one thing only.

    Raises:
        RestpointError: the text is too short; the message says how much there is.
    """
    dealt = Passages()
    digest = hashlib.sha256()
    fit_tokens = 0
    for number, text in enumerate(texts):
        ids = list(tokenizer(text).input_ids)
        role = _DEALT[number % len(_DEALT)]
        digest.update(text.encode())
        dealt.documents.append(document_hash(text))
        if role == "fit":
            fit_tokens += len(ids)
            dealt.fit.append(text)
        else:
            prompts = list(_prompts(ids, options.prompt_tokens))
            (dealt.certify if role == "certify" else dealt.tune).extend(prompts)
            dealt.sources += role == "certify" and bool(prompts) and len(dealt.certify) <= options.sequences
        if fit_tokens >= options.fit_tokens and len(dealt.tune) >= TUNED and len(dealt.certify) >= options.sequences:
            break
    if len(dealt.certify) < options.sequences or len(dealt.tune) < TUNED // 4:
        raise RestpointError(
            f"text: it gives {len(dealt.certify)} texts to certify on and {len(dealt.tune)} to choose on, where "
            f"{options.sequences} and {TUNED // 4} are needed; give more text (about "
            f"{options.sequences * options.prompt_tokens * _SPREAD * 10 // 3:,} tokens), or lower --sequences"
        )
    dealt.text = digest.hexdigest()
    dealt.tune, dealt.certify = dealt.tune[:TUNED], dealt.certify[: options.sequences]
    return dealt


def _prompts(ids: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - length + 1, _SPREAD * length):
        yield ids[start : start + length]
