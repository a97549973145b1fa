"""Hugging Face ``generate`` and its two ways to draft without a second model, each at its best settings."""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from restpoint.evaluate.methods import Method, Run, Unsupported, synchronize
from restpoint.model.load import Loaded
from restpoint.model.unrolled import stack_of

_LOOKUP_TOKENS = (3, 5, 10)
_EXIT_DRAFTS = (5, 20)
_TUNING_TOKENS = 16

# `generate` warns of arguments that it passes itself when it calls itself to draft.
_OWN_WARNINGS = ("Passing `generation_config` together with", "A custom logits processor of type")


class HuggingFace(Method):
    """``model.generate``: key-value cache, no end token, nothing else switched on.

    The first tokens are there when ``generate`` hands them to its streamer, which tells prefill from decoding in
    one and the same run. Passes and layers are counted by hooks, in a run of their own that is not timed.
    """

    name = "huggingface"

    def __init__(self, loaded: Loaded, temperature: float = 0.0):
        self.model: Any = loaded.model
        self.temperature = temperature
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        self.options: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}

    def run(self, prompt_ids: list[int], new_tokens: int, seed: int = 0) -> Run:
        """See :meth:`Method.run`."""
        clock = _Clock(self.device)
        return self._generate(prompt_ids, new_tokens, seed, clock)

    def count(self, prompt_ids: list[int], new_tokens: int, seed: int = 0) -> Run:
        """See :meth:`Method.count`."""
        layers = list(dict.fromkeys(stack_of(self.model).layers))
        clock = _Clock(self.device)
        hooks = [layer.register_forward_hook(lambda *_: clock.add_layer()) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(lambda *_: clock.add_pass()))
        try:
            return self._generate(prompt_ids, new_tokens, seed, clock)
        finally:
            for hook in hooks:
                hook.remove()

    def _generate(self, prompt_ids: list[int], new_tokens: int, seed: int, clock: "_Clock") -> Run:
        ids = torch.tensor([prompt_ids], device=self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0, use_cache=True, **sampling, **self.options)
        torch.manual_seed(seed)
        try:
            with _unchanged(self.model, self.defaults), _without_own_warnings():
                clock.start()
                output = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock
                )
                clock.stop()
        except Exception as error:  # a family's own code may raise anything; the reason stands in this method's row
            line = (str(error).splitlines() or [""])[0]
            raise Unsupported(f"{type(error).__name__}: {line}"[:160]) from error
        tokens = output[0, len(prompt_ids) :].tolist()
        if len(tokens) != new_tokens:
            raise Unsupported(f"it gave {len(tokens)} tokens instead of {new_tokens}")
        return clock.run(tokens)


class _Tuned(HuggingFace):
    """Tries some settings on the warm-up prompt and keeps the fastest."""

    def prepare(self, prompt_ids: list[int], new_tokens: int) -> None:
        """See :meth:`Method.prepare`; each setting runs twice and the second run counts."""
        rates: list[tuple[float, str, dict[str, Any], dict[str, Any]]] = []
        reason = "no setting to try"
        for settings, options, defaults in self._candidates():
            self.options, self.defaults = options, defaults
            try:
                self.run(prompt_ids, 4)
                rate = self.run(prompt_ids, min(new_tokens, _TUNING_TOKENS)).tokens_per_second
            except Unsupported as error:
                reason = str(error)
                continue
            rates.append((rate, settings, options, defaults))
        if not rates:
            raise Unsupported(reason)
        _, self.settings, self.options, self.defaults = max(rates, key=lambda entry: entry[0])

    @abstractmethod
    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """What to try: how rows call it, options of the generation, and defaults of the drafting."""


class PromptLookup(_Tuned):
    """``prompt_lookup_num_tokens``: drafts are copied from where the last tokens stood before.

    Saxena, "Prompt Lookup Decoding", 2023.
    """

    name = "huggingface lookup"

    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        for count in _LOOKUP_TOKENS:
            yield f"{count} tokens", {"prompt_lookup_num_tokens": count}, {}


class EarlyExit(_Tuned):
    """``assistant_early_exit``: the model's first layers with its own head draft, in a cache of their own.

    Elhoushi et al., "LayerSkip", 2024 (arXiv 2404.16710); meant for models trained for it.
    """

    name = "huggingface early exit"

    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        depth = len(stack_of(self.model).layers)
        for layer in sorted({max(1, depth // 4), max(1, depth // 2)}):
            for drafts in _EXIT_DRAFTS:
                yield (
                    f"layer {layer}, {drafts} tokens",
                    {"assistant_early_exit": layer},
                    {"num_assistant_tokens": drafts},
                )


class _Clock(BaseStreamer):
    """Notes when the first new tokens came, and what had been counted by then."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self.first = self.ended = 0.0
        self.prefilled = 0
        self.passes = self.layers = 0
        self.counted_first = (0, 0)
        self._calls = 0

    def add_layer(self) -> None:
        self.layers += 1

    def add_pass(self) -> None:
        self.passes += 1

    def start(self) -> None:
        synchronize(self.device)
        self.began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate``, with the prompt at first."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()
            self.prefilled = value.numel()
            self.counted_first = self.passes, self.layers

    def end(self) -> None:
        """Called by ``generate`` when all is done."""

    def stop(self) -> None:
        synchronize(self.device)
        self.ended = time.perf_counter()

    def run(self, tokens: list[int]) -> Run:
        """The outcome; without hooks nothing was counted."""
        counted = self.layers > 0
        return Run(
            tokens,
            self.prefilled,
            self.first - self.began,
            self.ended - self.first,
            self.passes - self.counted_first[0] if counted else None,
            self.layers - self.counted_first[1] if counted else None,
        )


@contextmanager
def _unchanged(model: Any, defaults: dict[str, Any]) -> Iterator[None]:
    """Let ``generate`` fill gaps from these defaults, not the checkpoint's (no end token), and undo what it leaves."""
    own = model.generation_config
    config = model.config.get_text_config(decoder=True)
    depth = config.num_hidden_layers
    model.generation_config = GenerationConfig(pad_token_id=0, **defaults)
    try:
        yield
    finally:
        model.generation_config = own
        if config.num_hidden_layers != depth:  # early exit sets it while it drafts, and leaves it so if that crashes
            config.num_hidden_layers = depth


@contextmanager
def _without_own_warnings() -> Iterator[None]:
    logger = logging.getLogger("transformers.generation.utils")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_OWN_WARNINGS)

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
