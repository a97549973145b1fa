"""The ``custom_generate`` of ``model.generate``, and the models that it has taken apart."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from restpoint.decode.draft import Speculator
from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import LayeredTarget, NativeTarget
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.decode.verifiers.registry import verifier as named_verifier
from restpoint.drafting.brought import Maker
from restpoint.drafting.speculators import Drafting, drafting_for
from restpoint.errors import RestpointError
from restpoint.exit.chosen import chosen_policy, promised, refuse_drafters, require_exits
from restpoint.exit.policy import ExitPolicy
from restpoint.generate import DEFAULT_VERIFIER, DRAFTERS
from restpoint.huggingface.arguments import name_of, refuse, samplers_of, stopping_of, strip, withheld
from restpoint.huggingface.emitting import Run, emit, outputs
from restpoint.model.check import Capabilities, check
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded, context_length
from restpoint.model.unrolled import layered_model
from restpoint.profile import Profile


def generate_fn(
    profile: Profile | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    drafters: Sequence[str] | None = None,
    brought: Mapping[str, Maker] | None = None,
    verifier: str = DEFAULT_VERIFIER,
    tree: TreeSettings | None = None,
    share: bool = False,
    draft_tokens: int | None = None,
    exits: bool | ExitPolicy = False,
) -> "CustomGenerate":
    """Make a ``custom_generate`` for ``model.generate`` and for text-generation pipelines.

    Output is what ``generate`` by itself gives: the same tokens where it is greedy, the same law where it samples. It
    is stopped by the same criteria at the same token, however many tokens a pass brings; padding on either side,
    logits processors, streamers, scores and logits behave as they do there, with these limits:

    - A row is continued from its last token that the attention mask does not hide.
    - Random numbers come from ``torch.manual_seed``, or from ``generate(.., generator=..)``. The same seed gives the
      same text again, but not the text that ``generate`` by itself draws with it.
    - Logits processors and stopping criteria see each row's own path; they must be functions of what they are given.
    - Where a batch returns scores or logits, those of steps after a row's end are zero. No cache is returned.
    - ``stop_strings`` must be given to ``generate`` itself, not in a generation config.

    What cannot be done (beams, an assistant, a cache or embeddings from outside, attentions and hidden states, ..) is
    refused by name. A family that cannot verify drafts is decoded plainly, which is logged. A model is taken apart
    and checked when it is first seen, and again when it has moved to another device, dtype or mode.

    With ``exits`` tokens leave the model early, and text may differ from ``generate``'s as rarely as the certificate
    says, which is logged. It speaks of greedy decoding, so ``do_sample`` is refused; of logits processors that change
    what is emitted it says nothing. Scores and logits are those of the law that was emitted: minus infinity for tokens
    that an exit cannot emit.

    Args:
        profile: what was fitted for the model; another model is refused.
        tokenizer: the model's, which a profile is bound to and stop strings are read with; if None, the one that lies
            beside the model's checkpoint, on this machine.
        drafters: who drafts, by name; if None, lookup, recycling and the predictor, or the first two without a profile.
        brought: further drafters by name, each made for a text's target.
        verifier: how drafts drawn at random are verified; see :data:`restpoint.decode.verifiers.registry.VERIFIERS`.
        tree: limits of the draft tree.
        share: let drafters keep what they learn from one text to the next.
        draft_tokens: draft this many in every round; None lets costs and chances decide.
        exits: exit early, as the profile was calibrated to (True), or by this policy; nobody drafts.

    Raises:
        RestpointError: the verifier is unknown, ``draft_tokens`` is negative, or exits are asked for that the profile
            does not hold, or together with settings of drafting; when called, what is refused.
    """
    if draft_tokens is not None and draft_tokens < 0:
        raise RestpointError(f"draft_tokens is {draft_tokens}; it must be 0 or more, or left out")
    policy = chosen_policy(exits, None if profile is None else profile.exits)
    if policy is not None:
        refuse_drafters(drafters, brought)
        _refuse_drafting(verifier=verifier != DEFAULT_VERIFIER, tree=tree, share=share, draft_tokens=draft_tokens)
        drafters = ()
    if drafters is None:
        drafters = DRAFTERS if profile is not None else ("lookup", "recycling")
    makers = brought or {}
    return CustomGenerate(
        profile, tokenizer, tuple(drafters), makers, named_verifier(verifier), tree, share, draft_tokens, policy
    )


def _refuse_drafting(**given: Any) -> None:
    """Refuse, by name, settings of drafting that exits would leave without an effect."""
    for name, value in given.items():
        if value:
            raise RestpointError(
                f"{name}: early exits draft nothing, so it would have no effect; leave it or exits out"
            )


@dataclass(frozen=True)
class _Prepared:
    """A model taken apart, with who drafts for it, and where that holds."""

    layered: LayeredModel
    capabilities: Capabilities
    drafting: Drafting | None
    notes: list[str]
    context_length: int | None
    state: tuple[Any, ...]


class _Memory:
    """What callables have prepared for one model. It hangs on the model, to live as long, and is not copied with it."""

    def __init__(self):
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.said: set[str] = set()
        self.prepared: WeakKeyDictionary[CustomGenerate, _Prepared] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["_Memory"], tuple[()]]:
        return _Memory, ()


def _memory(model: PreTrainedModel) -> _Memory:
    return vars(model).setdefault("_restpoint", _Memory())


def _say(model: PreTrainedModel, note: str) -> None:
    """Log what could not be used, once for each model."""
    said = _memory(model).said
    if note not in said:
        said.add(note)
        logging.getLogger(__name__).warning("%s: %s", name_of(model), note)


@dataclass(frozen=True, eq=False)
class CustomGenerate:
    """What :func:`generate_fn` makes; ``generate`` calls it with everything prepared."""

    profile: Profile | None
    tokenizer: PreTrainedTokenizerBase | None
    drafters: tuple[str, ...]
    brought: Mapping[str, Maker]
    verifier: Verifier
    tree: TreeSettings | None
    share: bool
    draft_tokens: int | None
    exits: ExitPolicy | None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "rows width"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        assistant_model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_strings: str | list[str] | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Int[Tensor, "rows longer"]:
        """Decode. The arguments are those of ``generate``'s own decoding methods.

        Args:
            model: the model that generates.
            input_ids: prompts, padded.
            logits_processor: processors and warpers, run as they are.
            stopping_criteria: asked after every token.
            generation_config: all settings.
            synced_gpus: refused.
            streamer: gets every token, after the prompt that ``generate`` has given it.
            assistant_model: refused.
            tokenizer: reads stop strings, where it was not given before.
            stop_strings: texts that end a row; taken here because ``generate`` would want the tokenizer that it drops.
            generator: source of random numbers; torch's global one if None.
            **model_kwargs: inputs of the model.

        Raises:
            RestpointError: something is asked for that restpoint does not do, or the profile is another model's.
        """
        given = {"streamer": streamer, "synced_gpus": synced_gpus, "assistant_model": assistant_model}
        given |= withheld(model)
        refuse(model, generation_config, given, model_kwargs, logits_processor)
        if self.exits is not None and generation_config.do_sample:
            raise RestpointError(
                "do_sample: early exits are certified for greedy decoding; give do_sample=False, or leave exits out"
            )
        prompts = strip(input_ids, model_kwargs)
        prepared = self._prepare(model)
        criteria = StoppingCriteriaList(stopping_criteria)
        if stop_strings:
            criteria.append(StopStringCriteria(self._tokenizer(model, tokenizer), stop_strings))
        stopping = stopping_of(criteria, generation_config, input_ids.shape[1], prepared.context_length)
        samplers = samplers_of(input_ids, prompts, logits_processor, generation_config, generator, model.device)
        runs = self._runs(prepared, prompts, samplers, stopping, keep=any(outputs(generation_config)))
        for note in prepared.notes:
            _say(model, note)
        return emit(runs, input_ids, logits_processor, criteria, generation_config, given["streamer"])

    def _prepare(self, model: PreTrainedModel) -> _Prepared:
        """The model taken apart: made once, and again where it has become another."""
        memory = _memory(model)
        state = (model.device, model.dtype, model.training, getattr(model.config, "_attn_implementation", None))
        known = memory.prepared.get(self)
        if known is not None and known.state == state:
            return known
        if self.profile is not None:
            self.profile.require(Loaded(name_of(model), model, self._tokenizer(model)))
        layered = layered_model(model)
        capabilities = check(layered)
        if self.exits is not None:
            require_exits(self.exits, layered, capabilities)
        drafting, notes = drafting_for(
            layered, capabilities, self.profile, self.drafters, self.brought, self.tree, self.verifier, self.share
        )
        if self.exits is not None:
            notes = [*notes, promised(self.exits)]
        prepared = _Prepared(layered, capabilities, drafting, notes, context_length(model), state)
        memory.prepared[self] = prepared
        return prepared

    def _tokenizer(
        self, model: PreTrainedModel, given: PreTrainedTokenizerBase | None = None
    ) -> PreTrainedTokenizerBase:
        """The model's tokenizer: given, or beside its checkpoint; nothing is downloaded."""
        memory = _memory(model)
        for own in (self.tokenizer, given, memory.tokenizer):
            if own is not None:
                return own
        try:
            beside = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever is missing or wrong there, the remedy is the same
            raise RestpointError(
                f"tokenizer: profiles and stop strings need the model's, and none was found beside {name_of(model)}; "
                "give it: generate_fn(profile, tokenizer)"
            ) from error
        memory.tokenizer = beside
        return beside

    def _runs(
        self,
        prepared: _Prepared,
        prompts: list[list[int]],
        samplers: list[Sampler],
        stopping: Stopping,
        keep: bool,
    ) -> "list[Run]":
        """All rows in one batch where the family's cache can hold it, else each by itself."""
        layered, drafts = prepared.layered, prepared.capabilities.drafts
        rows = list(range(len(prompts)))
        together = [rows] if drafts and prepared.capabilities.ragged.supported else [[row] for row in rows]
        runs: list[Run] = []
        for group in together:
            target = LayeredTarget(layered) if drafts else NativeTarget(layered)
            if self.exits is not None:
                target = self.exits.target(layered)
            speculators: Sequence[Speculator | None] = [None] * len(group)
            if prepared.drafting is not None and self.draft_tokens != 0 and isinstance(target, LayeredTarget):
                own = [samplers[row] for row in group]
                speculators = prepared.drafting.speculators(target, own, self.draft_tokens)
            texts = {
                row: Text(prompts[row], samplers[row], stopping, speculator, logits=[] if keep else None)
                for row, speculator in zip(group, speculators, strict=True)
            }
            runs.append(Run(texts, decode_batch(target, list(texts.values()), self.verifier)))
        return runs
