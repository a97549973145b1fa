"""Text to judge loops on, and other text to fit starts on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.evaluate.looped.options import LoopOptions

_SPREAD = 4
"""Of so many texts' worth of a document, the first is judged on: texts of one document are that far apart."""
_WINDOW, _BATCH = 128, 16
_HELD_OUT = 8
"""Of so many batches to fit on, the ridge strength is chosen on one."""


@dataclass(frozen=True, eq=False)
class Material:
    """Token ids.

    Attributes:
        judge: texts to judge on, one token longer than is predicted.
        fit: batches of other text.
        held_out: more such batches, to choose on.
    """

    judge: Int[Tensor, "texts length"]
    fit: Sequence[Int[Tensor, "_ _"]]
    held_out: Sequence[Int[Tensor, "_ _"]]


def material(texts: Iterable[str] | None, tokenizer: PreTrainedTokenizerBase, options: LoopOptions) -> Material:
    """Deal out text: every second document is judged on until there is enough, the others are fitted on.

    Args:
        texts: documents; if None, the bundled prompts are judged on, which are held out from the bundled models'
            training but for some prose, and the bundled documents fitted on.
        tokenizer: of the model.
        options: how much of it.

    Raises:
        RestpointError: the text is too short; the message says how much there is.
    """
    length = options.text_tokens + 1
    judge: list[list[int]] = []
    if texts is None:
        for prompt in bundled.prompts():
            judge.extend(_windows(tokenizer(prompt.text).input_ids[:length], length, 1))
        documents: Iterable[str] = bundled.fit_texts()
    else:
        documents = texts
    wanted = 0 if options.no_starts else options.start_tokens
    rows: list[list[int]] = []
    for number, text in enumerate(documents):
        ids = list(tokenizer(text).input_ids)
        if texts is not None and number % 2 == 0 and len(judge) < options.texts:
            judge.extend(_windows(ids, length, _SPREAD))
        else:
            rows.extend(_windows(ids, _WINDOW, 1))
        if len(judge) >= options.texts and len(rows) * _WINDOW >= wanted:
            break
    if len(judge) < options.texts:
        raise RestpointError(
            f"text: it gives {len(judge)} texts of {length} tokens and texts is {options.texts}; give more text, "
            "or lower texts or text_tokens"
        )
    batches = [torch.tensor(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
    if wanted and len(batches) < 2:
        raise RestpointError(
            f"text: beside what is judged on it gives {len(rows) * _WINDOW} tokens to fit starts on, and "
            f"{2 * _BATCH * _WINDOW} are the fewest; give more text, or pass no_starts"
        )
    held = max(1, len(batches) // _HELD_OUT) if wanted else 0
    return Material(torch.tensor(judge[: options.texts]), batches[held:] if wanted else [], batches[:held])


def _windows(ids: list[int], length: int, spread: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, spread * length)]
