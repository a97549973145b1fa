"""Tokens that come several at a time, given out one by one as ``generate`` does, and ended where it would."""

from collections import deque
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from restpoint.decode.loop import Round, Text
from restpoint.errors import RestpointError


class Run:
    """Rows that are decoded in one batch, read token by token, however many a pass brings."""

    def __init__(self, texts: dict[int, Text], rounds: Iterator[dict[int, Round]]):
        self.texts = texts
        self.rounds = rounds
        self.ready: dict[int, deque[int]] = {row: deque() for row in texts}

    def token(self, row: int) -> int:
        """The row's next token."""
        order = list(self.texts)
        while not self.ready[row]:
            for index, turn in next(self.rounds).items():
                self.ready[order[index]].extend(turn.tokens)
        return self.ready[row].popleft()

    def logits(self, row: int) -> Float[Tensor, " vocab"]:
        """The logits of the row's newest token, where they are kept."""
        kept = self.texts[row].logits
        assert kept is not None
        return kept.pop(0)


def emit(
    runs: list[Run],
    input_ids: Int[Tensor, "rows width"],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> GenerateDecoderOnlyOutput | Int[Tensor, "rows longer"]:
    """Go through the tokens step by step, as ``generate`` itself does, and end where it would."""
    home = {row: run for run in runs for row in run.texts}
    wants_scores, wants_logits = outputs(config)
    scores: tuple[Tensor, ...] | None = () if wants_scores else None
    logits: tuple[Tensor, ...] | None = () if wants_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ids = input_ids
    while bool(unfinished.any()):
        going = [row for row, on in enumerate(unfinished.tolist()) if on or not pads]
        tokens = {row: home[row].token(row) for row in going}
        newest = input_ids.new_tensor([tokens[row] if row in tokens else _padding(config) for row in home])
        if wants_scores or wants_logits:
            raw = {row: home[row].logits(row).to(input_ids.device, torch.float32) for row in going}
            blank = torch.zeros_like(raw[going[0]])
            step = torch.stack([raw.get(row, blank) for row in home])
            if logits is not None:
                logits += (step,)
            if scores is not None:
                processed = processors(ids, step.clone())  # pyright: ignore[reportArgumentType]
                scores += (processed * unfinished[:, None] if len(going) < len(home) else processed,)
        ids = torch.cat([ids, newest[:, None]], dim=1)
        unfinished = unfinished & ~criteria(ids, scores)  # pyright: ignore[reportArgumentType]
        if streamer is not None:
            streamer.put(newest.cpu())
        for row, on in enumerate(unfinished.tolist()):
            home[row].texts[row].stopped = pads and not on
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits)  # pyright: ignore[reportArgumentType]


def outputs(config: GenerationConfig) -> tuple[bool, bool]:
    """Whether scores and logits are to be returned."""
    if not config.return_dict_in_generate:
        return False, False
    return bool(config.output_scores), bool(config.output_logits)


def _padding(config: GenerationConfig) -> int:
    """What a finished row is filled up with; ``generate`` has put the end token where none was set."""
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None:
        raise RestpointError("pad_token_id: a row of the batch has ended and there is none to fill it up with; set it")
    return int(pad)
