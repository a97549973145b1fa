"""From logits to the law of the next token: the same processors for draft, target and bonus token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from restpoint.decode.settings import SamplingSettings

Prefixes = Callable[[], Sequence[Sequence[int]]]
"""The text before each row of logits, made when asked for."""

_BLIND: frozenset[type[LogitsProcessor]] = frozenset(
    [
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        MinPLogitsWarper,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    ]
)
"""Processors that do not look at the text: they serve all rows at once."""


@dataclass(frozen=True)
class BatchRow:
    """Where a text stands in a padded batch, for processors that were prepared for the whole batch.

    Attributes:
        prompt: the row as it stands in the batch, padding included.
        tokens: how many of them are the text's own; the text's prompt is so long.
        index: its row.
        rows: rows of the batch.
        device: where the processors keep their tensors.
    """

    prompt: Sequence[int]
    tokens: int
    index: int
    rows: int
    device: torch.device


class Sampler:
    """Applies settings and extra processors to logits, each row with the text of its own path through the draft.

    Args:
        settings: temperature and filters.
        processors: further ``LogitsProcessor``s, given each path's own prefix; run after the repetition penalty and
            before temperature and filters, as ``generate`` does.
        device: where logits live.

    Raises:
        RestpointError: from :meth:`law` and :meth:`choose`, where a row has NaN or no admissible token.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        processors: LogitsProcessorList | None = None,
        device: torch.device | str = "cpu",
    ):
        self.settings = settings
        self.greedy = settings.greedy
        self.generator = torch.Generator(device=device).manual_seed(settings.seed)
        self.row: BatchRow | None = None
        self.by_prefix = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self.by_prefix.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        self.by_prefix.extend(processors or [])
        self.filters = LogitsProcessorList()
        if not self.greedy:
            if settings.temperature != 1.0:
                self.filters.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k is not None:
                self.filters.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p is not None and settings.top_p < 1:
                self.filters.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p is not None:
                self.filters.append(MinPLogitsWarper(settings.min_p))

    @classmethod
    def prepared(
        cls, processors: Sequence[LogitsProcessor], greedy: bool, generator: torch.Generator, row: BatchRow
    ) -> "Sampler":
        """A sampler of processors that ``generate`` has prepared, warpers included; they run in their order.

        Args:
            processors: each a function of the ids and scores that it is given; one with a memory of its calls would
                see drafts that never stood.
            greedy: whether the most probable token is always taken.
            generator: where random numbers come from.
            row: the text's place in the batch that they were prepared for: they are shown its padding, too.
        """
        sampler = cls(SamplingSettings(temperature=0.0 if greedy else 1.0), device=generator.device)
        sampler.generator, sampler.row = generator, row
        reading = [index for index, processor in enumerate(processors) if type(processor) not in _BLIND]
        split = reading[-1] + 1 if reading else 0
        sampler.by_prefix = LogitsProcessorList(processors[:split])
        sampler.filters = LogitsProcessorList(processors[split:])
        return sampler

    def scores(self, logits: Float[Tensor, "rows vocab"], prefixes: Prefixes) -> Float[Tensor, "rows vocab"]:
        """Processed logits.

        Args:
            logits: raw ones, one row for each position of a draft.
            prefixes: gives the whole text before the token that each row is about; only asked for where a processor
                reads it.
        """
        home = logits.device
        logits = logits.to(home if self.row is None else self.row.device)
        if self.by_prefix:
            rows = logits.clone().split(1)
            logits = torch.cat([self._process(prefix, row) for prefix, row in zip(prefixes(), rows, strict=True)])
        if self.filters:
            no_prefix = torch.empty(logits.shape[0], 0, dtype=torch.long, device=logits.device)
            logits = self.filters(no_prefix, logits)  # pyright: ignore[reportArgumentType]
        return logits.to(home)

    def law(self, logits: Float[Tensor, "rows vocab"], prefixes: Prefixes) -> Float[Tensor, "rows vocab"]:
        """Probabilities, in float32, that the next token of each position is drawn from."""
        return torch.softmax(self.scores(logits.float(), prefixes), -1)

    def best(self, logits: Float[Tensor, "rows vocab"], prefixes: Prefixes) -> Int[Tensor, " rows"]:
        """The token that greedy decoding takes at each position."""
        if self.by_prefix or self.filters:
            logits = self.scores(logits.float(), prefixes)
        return logits.argmax(-1)

    def uniforms(self, count: int) -> Float[Tensor, " count"]:
        """Fresh random numbers in [0, 1)."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)

    def _process(self, prefix: Sequence[int], logits: Float[Tensor, "1 vocab"]) -> Float[Tensor, "1 vocab"]:
        """Run the processors that look at the text; where they expect a batch, each of its rows holds this one text."""
        row = self.row
        if row is None:
            return self.by_prefix(torch.tensor([prefix], device=logits.device), logits)  # pyright: ignore[reportArgumentType]
        ids = torch.tensor([[*row.prompt, *prefix[row.tokens :]]], device=logits.device).repeat(row.rows, 1)
        scores = self.by_prefix(ids, logits.repeat(row.rows, 1))  # pyright: ignore[reportArgumentType]
        return scores[row.index : row.index + 1]
