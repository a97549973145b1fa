"""Text dealt out: documents to fit on, prompts to choose on and prompts to judge on, no document for two of these."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from restpoint.calibrate.options import ReadOptions
from restpoint.errors import RestpointError
from restpoint.exit.policy import document_hash

_SPREAD = 4
"""Of so many prompts' worth of text, the first is a prompt: prompts of one document are that far apart."""
_DEALT = ("fit", "fit", "judge", "tune", "fit", "judge", "fit", "judge", "fit", "tune")


@dataclass
class Passages:
    """Text, dealt out by document.

    Attributes:
        fit: documents to fit predictors on.
        tune: prompts to fit signals and to choose layers and thresholds on.
        judge: prompts for what is reported or certified.
        documents: short hashes of all documents that were read.
        sources: documents that the prompts to judge on come from.
        text: SHA-256 of all documents.
    """

    fit: list[str] = field(default_factory=list)
    tune: list[list[int]] = field(default_factory=list)
    judge: list[list[int]] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    sources: int = 0
    text: str = ""


def deal(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, options: ReadOptions, tune: int, judge: int
) -> Passages:
    """Read documents until there is enough of everything, each used for one thing only.

    Args:
        texts: documents.
        tokenizer: of the model.
        options: how long prompts are, and how much text is fitted on; where there is none to fit or to tune on, all
            documents are to judge on.
        tune: prompts to tune on, at most; a quarter of them will do.
        judge: prompts to judge on, exactly.

    Raises:
        RestpointError: the text is too short; the message says how much there is.
    """
    dealt = Passages()
    digest = hashlib.sha256()
    fit_tokens = 0
    for number, text in enumerate(texts):
        ids = list(tokenizer(text).input_ids)
        role = _DEALT[number % len(_DEALT)] if tune or options.fit_tokens else "judge"
        digest.update(text.encode())
        dealt.documents.append(document_hash(text))
        if role == "fit":
            fit_tokens += len(ids)
            dealt.fit.append(text)
        elif role == "tune":
            dealt.tune.extend(_prompts(ids, options.prompt_tokens))
        elif len(dealt.judge) < judge:
            before = len(dealt.judge)
            dealt.judge.extend(_prompts(ids, options.prompt_tokens))
            dealt.sources += len(dealt.judge) > before
        if fit_tokens >= options.fit_tokens and len(dealt.tune) >= tune and len(dealt.judge) >= judge:
            break
    if len(dealt.judge) < judge or len(dealt.tune) < tune // 4:
        raise RestpointError(
            f"text: it gives {len(dealt.judge)} and {len(dealt.tune)} prompts of {options.prompt_tokens} tokens, where "
            f"{judge} are needed to judge on and {tune // 4} to choose on; give more text (about "
            f"{judge * options.prompt_tokens * _SPREAD * 10 // 3:,} tokens), or lower --sequences"
        )
    dealt.text = digest.hexdigest()
    dealt.tune, dealt.judge = dealt.tune[:tune], dealt.judge[:judge]
    return dealt


def _prompts(ids: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - length + 1, _SPREAD * length):
        yield ids[start : start + length]
