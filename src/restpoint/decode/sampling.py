"""From logits to the law of the next token: the same processors for draft, target and bonus token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from restpoint.decode.settings import SamplingSettings


class Sampler:
    """Applies settings and extra processors to logits, row by row of a drafted path.

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

    def scores(self, logits: Float[Tensor, "path vocab"], prefix: list[int]) -> Float[Tensor, "path vocab"]:
        """Processed logits of the positions along one path.

        Args:
            logits: row i follows ``prefix[: len(prefix) - path + 1 + i]``.
            prefix: all tokens of the path, the last row's included.
        """
        if self.by_prefix:
            rows = logits.shape[0]
            ids = torch.tensor([prefix], device=logits.device)
            shorter = len(prefix) - rows
            logits = torch.cat(
                [self.by_prefix(ids[:, : shorter + 1 + i], logits[i : i + 1].clone()) for i in range(rows)]  # pyright: ignore[reportArgumentType]
            )
        if self.filters:
            no_prefix = torch.empty(logits.shape[0], 0, dtype=torch.long, device=logits.device)
            logits = self.filters(no_prefix, logits)  # pyright: ignore[reportArgumentType]
        return logits

    def law(self, logits: Float[Tensor, "path vocab"], prefix: list[int]) -> Float[Tensor, "path vocab"]:
        """Probabilities, in float32, that the next token of each position is drawn from."""
        return torch.softmax(self.scores(logits.float(), prefix), -1)

    def best(self, logits: Float[Tensor, "path vocab"], prefix: list[int]) -> Int[Tensor, " path"]:
        """The token that greedy decoding takes at each position."""
        if self.by_prefix:
            logits = self.scores(logits.float(), prefix)
        return logits.argmax(-1)

    def uniforms(self, count: int) -> Float[Tensor, " count"]:
        """Fresh random numbers in [0, 1)."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)
