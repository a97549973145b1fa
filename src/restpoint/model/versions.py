"""What differs between versions of transformers: a cache is ``cache`` from 5.24 on, and had other names before."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What versions and models call a cache."""


def cache_name(function: Callable[..., Any]) -> str:
    """The name under which a function takes a cache and under which its output holds it; the newest if none shows."""
    accepted = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[0])


CACHE = cache_name(create_causal_mask)
"""The name in the functions and layers of the version that is installed."""


def causal_mask(
    config: PretrainedConfig,
    embedded: Float[Tensor, "batch seq hidden"],
    mask: Tensor | None,
    cache: Cache | None,
    positions: Int[Tensor, "rows seq"],
) -> Tensor | None:
    """``create_causal_mask`` of the version that is installed."""
    named: dict[str, Any] = {CACHE: cache}
    return create_causal_mask(
        config=config, inputs_embeds=embedded, attention_mask=mask, position_ids=positions, **named
    )
