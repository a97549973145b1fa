"""What ``generate`` was asked for: what restpoint takes of it, in its own terms, and what it refuses."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from restpoint.decode.loop import Stopping
from restpoint.decode.sampling import BatchRow, Sampler
from restpoint.errors import RestpointError
from restpoint.model.versions import CACHE_NAMES

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window"),
}
"""Generation settings that restpoint has no counterpart of, with the values that ask for nothing."""

_OWN = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep")
"""Model inputs that ``generate`` makes by itself."""

_OUTSIDE = ("assistant_model", "synced_gpus", *CACHE_NAMES)
"""What cannot be told from the settings and model inputs that a callable gets."""


@dataclass(frozen=True)
class _Length(Stopping):
    """Goes on beyond the model's context, as ``generate`` does, but drafts only within it."""

    window: int | None = None

    def room(self, length: int, prompt: list[int]) -> int:
        room = super().room(length, prompt)
        return room if self.window is None else min(room, self.window - length)


def strip(input_ids: Int[Tensor, "rows width"], model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The prompts without what the attention mask hides."""
    mask = model_kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device) != 0
    prompts = [ids[own].tolist() for ids, own in zip(input_ids, seen, strict=True)]
    if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
        raise RestpointError(f"input_ids: row {empty[0]} has no token that attention_mask shows; give it at least one")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        own = (seen.cumsum(1) - 1)[seen]
        if positions.shape[-1] != input_ids.shape[1] or not bool((positions.expand_as(input_ids)[seen] == own).all()):
            raise RestpointError("position_ids: restpoint counts them from 0 in every row; leave them out")
    return prompts


def refuse(
    model: PreTrainedModel,
    config: GenerationConfig,
    given: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    processors: LogitsProcessorList,
) -> None:
    """Refuse, by name, what would else be left out in silence."""
    if model.config.is_encoder_decoder:
        raise RestpointError(f"model: {name_of(model)} is an encoder-decoder; restpoint needs a decoder-only model")
    refused = [name for name in _OUTSIDE if given.get(name) not in (None, False)]
    refused += [name for name, off in _HARMLESS.items() if getattr(config, name, None) not in off]
    refused += [name for name, value in model_kwargs.items() if name not in _OWN and value is not None]
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        refused.append("guidance_scale")
    if any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in processors):
        refused.append("watermarking_config")
    if refused:
        raise RestpointError(
            f"{refused[0]}: restpoint's generate does not do this; leave it out, or generate without custom_generate"
        )


def withheld(model: PreTrainedModel) -> dict[str, Any]:
    """What the calling ``generate`` was given and does not hand on to a callable: it must be neither lost nor ignored.

    transformers hands a callable no ``streamer``, ``synced_gpus`` or ``assistant_model``, and a user's cache like one
    of its own; so they are read where they are. Where they are handed on, this changes nothing.
    """
    code = inspect.unwrap(vars(GenerationMixin)["generate"]).__code__
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    if frame is None:
        return {}
    found = {**frame.f_locals["kwargs"], **frame.f_locals}
    return {name: found[name] for name in ("streamer", *_OUTSIDE) if found.get(name) is not None}


def stopping_of(criteria: StoppingCriteriaList, config: GenerationConfig, width: int, context: int | None) -> Stopping:
    """What the loop may know of the criteria ahead of time, to draft no further and to let ended rows go."""
    lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    longest = min(lengths, default=config.max_length)
    ends = [criterion.eos_token_id.tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
    tokens = sys.maxsize if longest is None else max(1, longest - width)
    return _Length(tokens, frozenset(token for own in ends for token in own), window=context)


def samplers_of(
    input_ids: Int[Tensor, "rows width"],
    prompts: list[list[int]],
    processors: LogitsProcessorList,
    config: GenerationConfig,
    generator: torch.Generator | None,
    device: torch.device,
) -> list[Sampler]:
    """One for each row, with random numbers of its own, seeded by the generator's."""
    rows, greedy = len(prompts), not config.do_sample
    seeds = [0] * rows
    if not greedy:
        at = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (rows,), generator=generator, device=at).tolist()
    samplers = []
    for row, (given, prompt) in enumerate(zip(input_ids.tolist(), prompts, strict=True)):
        place = BatchRow(given, len(prompt), row, rows, input_ids.device)
        own = [_of_row(processor, row, len(given)) for processor in processors]
        samplers.append(Sampler.prepared(own, greedy, torch.Generator(device).manual_seed(seeds[row]), place))
    return samplers


def _of_row(processor: LogitsProcessor, row: int, width: int) -> LogitsProcessor:
    """A processor as one row sees it."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        return PrefixConstrainedLogitsProcessor(_Constraint(processor._prefix_allowed_tokens_fn, row, width), 1)
    return processor


class _Constraint:
    """A row's ``prefix_allowed_tokens_fn``, asked only what ``generate`` asks: about texts that it allows itself.

    Tokens after a drafted one that it forbids can never stand, so anything may be said of them.
    """

    def __init__(self, allowed: Callable[[int, Tensor], list[int]], row: int, width: int):
        self.allowed, self.row, self.width = allowed, row, width
        self.known: dict[tuple[int, int], tuple[list[int], int]] = {}

    def __call__(self, _row: int, ids: Tensor) -> list[int]:
        answer, place = self._ask((-1, -1), ids[: self.width])
        for end, token in enumerate(ids[self.width :].tolist(), self.width + 1):
            if token not in answer:
                return [token]
            answer, place = self._ask((place, token), ids[:end])
        return answer

    def _ask(self, step: tuple[int, int], ids: Tensor) -> tuple[list[int], int]:
        """The answer about a text, known by the place of the text before it and its last token, and its own place."""
        if step not in self.known:
            self.known[step] = self.allowed(self.row, ids), len(self.known)
        return self.known[step]


def name_of(model: PreTrainedModel) -> str:
    """What messages call a model."""
    return model.name_or_path or type(model).__name__
