"""Text in, text out: a model with its profile, ready to decode."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypedDict, Unpack

import torch
from transformers import LogitsProcessorList

from restpoint.decode.compiled import CompiledTarget
from restpoint.decode.draft import Speculator
from restpoint.decode.loop import Stopping, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget, Target
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.registry import verifier as named_verifier
from restpoint.drafting.brought import Maker
from restpoint.drafting.speculators import drafting_for
from restpoint.errors import RestpointError
from restpoint.exit.chosen import chosen_policy, promised, refuse_drafters, require_exits
from restpoint.exit.policy import ExitPolicy
from restpoint.generation import Generation, Piece, Words
from restpoint.looping import Looping
from restpoint.model.check import Capabilities, check
from restpoint.model.compiled import CompiledModel
from restpoint.model.load import Loaded
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.unrolled import layered_model
from restpoint.profile import Profile
from restpoint.progress import Progress

DRAFTERS = ("lookup", "recycling", "predictor")
"""Who drafts by a profile, unless told otherwise."""

ITERATED_DRAFTERS = ("lookup", "recycling")
"""Who drafts for a model that iterates a block, which needs no profile, unless told otherwise."""

DEFAULT_VERIFIER = "traversal"
"""How drafts are verified when tokens are sampled, unless told otherwise; where trees cannot be, block."""


class TextOptions(TypedDict, total=False):
    """How a text is generated; all may be left out.

    Attributes:
        max_tokens: largest number of new tokens; 128 if left out.
        stop: strings that end the text; they are cut off, and text is held back while it could be one's start.
        processors: further logits processors, applied to draft, target and bonus token alike.
        ignore_end: go on after end tokens.
        draft_tokens: verify this many drafted tokens in every round; None or left out lets the controller choose.
    """

    max_tokens: int
    stop: Sequence[str]
    processors: LogitsProcessorList | None
    ignore_end: bool
    draft_tokens: int | None


class Decoder:
    """A loaded model, taken apart into layers, with those who draft for it.

    Output is the model's own: greedy text is identical to plain decoding, sampled text follows the same law. A
    family that cannot verify drafts is decoded plainly, and ``notes`` says why. Only with ``exits`` or ``looping`` may
    text differ.

    Args:
        loaded: model and tokenizer.
        profile: what was fitted for this model.
        drafters: who drafts, by name (see :class:`restpoint.drafting.speculators.Drafting`); if None, lookup, recycling
            and the predictor where there is a profile, and nobody, which is plain decoding, where there is none.
        brought: further drafters by name, each made for a text's target: a draft model, a datastore.
        verifier: how drafts drawn at random are verified; see :data:`restpoint.decode.verifiers.registry.VERIFIERS`.
        tree: limits of the draft tree.
        share: let drafters keep what they learn from one text to the next.
        compile: decode single texts in compiled passes. Compiling takes a while, and less the next time; give a
            :class:`CompiledModel` to share one that is compiled. Batches are decoded without it.
        progress: told of every step of a compilation.
        exits: exit early: as the profile was calibrated to (True), or by this policy. Tokens may then differ from the
            model's own, as rarely as the policy's certificate says; nobody drafts.
        looping: of a model that iterates a block, when tokens leave the loop and where they begin (see
            :func:`restpoint.looping.looping`). Tokens may then differ from the model's own; nobody drafts, and several
            prompts are decoded one by one.

    Raises:
        RestpointError: the profile belongs to another model, a name is unknown, the model has no layers that could
            be found, or no loop that tokens could leave, or it cannot be compiled.
    """

    def __init__(
        self,
        loaded: Loaded,
        profile: Profile | None = None,
        drafters: Sequence[str] | None = None,
        *,
        brought: Mapping[str, Maker] | None = None,
        verifier: str = DEFAULT_VERIFIER,
        tree: TreeSettings | None = None,
        share: bool = False,
        compile: "bool | CompiledModel" = False,
        progress: Progress | None = None,
        exits: "bool | ExitPolicy" = False,
        looping: Looping | None = None,
    ):
        if profile is not None:
            profile.require(loaded)
        if looping is not None:
            if exits is not False:
                raise RestpointError("looping: a token leaves either the layers or the loop early; leave exits out")
            drafters = _alone("looping", drafters, brought, compile)
        if exits is not False:
            drafters = _alone("exits", drafters, brought, compile)
        self.loaded = loaded
        shared = None if isinstance(compile, bool) else compile
        self.layered = layered_model(loaded.model) if shared is None else shared.layered
        self.looping = looping
        if looping is not None:
            looping.target(self.layered)  # refuses a model without a loop now
        self.capabilities: Capabilities = check(self.layered)
        self.compiled = self._compile(progress) if compile is True else shared
        self.profile = profile
        self.exits = chosen_policy(exits, None if profile is None else profile.exits)
        if self.exits is not None:
            require_exits(self.exits, self.layered, self.capabilities)
        self.verifier = named_verifier(verifier)
        names = DRAFTERS if drafters is None and profile is not None else tuple(drafters or ())
        self.drafting, self.notes = drafting_for(
            self.layered,
            self.capabilities,
            profile,
            names,
            brought,
            tree,
            self.verifier,
            share,
            self._single,
        )
        if self.exits is not None:
            self.notes = [*self.notes, promised(self.exits)]
        if looping is not None:
            self.notes = [*self.notes, looping.said]

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that its tokenizer adds.

        Raises:
            RestpointError: the prompt is empty.
        """
        if not prompt:
            raise RestpointError("prompt: it is empty; give at least one character of text")
        return list(self.loaded.tokenizer(prompt).input_ids)

    def stream(
        self, prompt: str | list[int], sampling: SamplingSettings | None = None, **options: Unpack[TextOptions]
    ) -> Iterator[Piece]:
        """Generate, yielding the text of each round as it comes.

        Args:
            prompt: text, or token ids.
            sampling: how tokens are chosen; greedy if None.
            **options: see :class:`TextOptions`.

        Raises:
            RestpointError: the prompt is empty, too long or has a token out of range; a setting makes no sense; the
                logits are NaN.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        words = Words(self.loaded.tokenizer, options.get("stop", ()))
        target = self._target()
        texts = self._texts(target, [ids], [sampling or SamplingSettings()], options)
        for rounds in decode_batch(target, texts, self.verifier):
            piece = words.add(rounds[0])
            yield piece
            if piece.round.finished:
                return

    def generate(
        self, prompt: str | list[int], sampling: SamplingSettings | None = None, **options: Unpack[TextOptions]
    ) -> Generation:
        """Generate to the end. Arguments and errors as :meth:`stream`."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return Generation.of(ids, list(self.stream(ids, sampling, **options)))

    def generate_batch(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingSettings | None = None,
        **options: Unpack[TextOptions],
    ) -> list[Generation]:
        """Generate from several prompts at once, of any lengths; every pass serves all unfinished texts.

        Each row accepts as many drafted tokens as it accepts, with drafters of its own. Row i draws with the seed
        ``sampling.seed + i``. The seconds in a row's statistics are those of the passes that it shared. Arguments and
        errors as :meth:`stream`. A family whose cache cannot hold rows of different lengths is decoded one by one.
        """
        if not prompts:
            raise RestpointError("prompts: there is none; give at least one")
        batch = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        sampling = sampling or SamplingSettings()
        seeded = [replace(sampling, seed=sampling.seed + row) for row in range(len(batch))]
        if self.looping is not None or not (self.capabilities.drafts and self.capabilities.ragged.supported):
            return [self.generate(ids, own, **options) for ids, own in zip(batch, seeded, strict=True)]
        target = self._target(len(batch))
        texts = self._texts(target, batch, seeded, options)
        words = [Words(self.loaded.tokenizer, options.get("stop", ())) for _ in batch]
        pieces: list[list[Piece]] = [[] for _ in batch]
        for rounds in decode_batch(target, texts, self.verifier):
            for row, turn in rounds.items():
                pieces[row].append(words[row].add(turn))
                texts[row].stopped = bool(pieces[row][-1].round.finished)
        return [Generation.of(ids, own) for ids, own in zip(batch, pieces, strict=True)]

    def _target(self, rows: int = 1) -> Target:
        """A cache of its own for each text: several streams may be read in turn."""
        if self.exits is not None:
            return self.exits.target(self.layered)
        if self.looping is not None:
            return self.looping.target(self.layered)
        if not self.capabilities.drafts:
            return NativeTarget(self.layered)
        return self._single() if rows == 1 else LayeredTarget(self.layered)

    def _single(self) -> LayeredTarget:
        return LayeredTarget(self.layered) if self.compiled is None else CompiledTarget(self.compiled)

    def unfamiliar(self, prompt: str | list[int]) -> str | None:
        """With exits: a warning where a prompt looks unlike what they were calibrated on; None where it does not."""
        if self.exits is None:
            return None
        return self.exits.unfamiliar(self.layered, self.encode(prompt) if isinstance(prompt, str) else prompt)

    def _compile(self, progress: Progress | None) -> CompiledModel:
        if not self.capabilities.drafts:
            reason = next(iter(self.capabilities.refused().values()))
            raise RestpointError(f"compile: this model can only be decoded by its own forward ({reason}); leave it out")
        compiled = CompiledModel(self.layered, progress=progress)
        compiled.warm_up()
        return compiled

    def _texts(
        self, target: Target, prompts: list[list[int]], sampling: Sequence[SamplingSettings], options: TextOptions
    ) -> list[Text]:
        """Texts of one batch with their settings and whoever drafts for them."""
        _refuse_unknown(options)
        draft_tokens = options.get("draft_tokens")
        if draft_tokens is not None and draft_tokens < 0:
            raise RestpointError(f"draft_tokens is {draft_tokens}; it must be 0 or more, or left out")
        if self.exits is not None and self.exits.certificate is not None and not all(own.greedy for own in sampling):
            raise RestpointError(
                "temperature: the exits are certified for greedy decoding; leave it at 0, or leave exits out"
            )
        samplers = [Sampler(own, options.get("processors"), self.layered.device) for own in sampling]
        end = frozenset[int]() if options.get("ignore_end") else self.end_tokens()
        stopping = Stopping(options.get("max_tokens", 128), end, self.loaded.context_length)
        speculators: Sequence[Speculator | None] = [None] * len(prompts)
        if self.drafting is not None and draft_tokens != 0 and isinstance(target, LayeredTarget):
            speculators = self.drafting.speculators(target, samplers, draft_tokens)
        return [
            Text(ids, sampler, stopping, speculator)
            for ids, sampler, speculator in zip(prompts, samplers, speculators, strict=True)
        ]

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, from the model's generation config and its tokenizer."""
        return self.loaded.end_tokens()


def default_drafters(loaded: Loaded, profile: Profile | None) -> tuple[str, ...]:
    """Who drafts where nobody is named: by the profile; without one nobody, but for models that iterate a block."""
    if profile is not None:
        return DRAFTERS
    return ITERATED_DRAFTERS if isinstance(loaded.model, RecurrentDepthForCausalLM) else ()


def _refuse_unknown(options: TextOptions) -> None:
    """Python itself would not notice a misspelt option, which would then do nothing."""
    known = TextOptions.__annotations__
    for name in options:
        if name in known:
            continue
        if name in {one.name for one in fields(SamplingSettings)}:
            raise RestpointError(f"{name}: it belongs to the sampling; give sampling=SamplingSettings({name}=..)")
        raise RestpointError(f"{name}: there is no such option; there are {', '.join(known)}")


def _alone(
    argument: str,
    drafters: Sequence[str] | None,
    brought: Mapping[str, Maker] | None,
    compile: "bool | CompiledModel",
) -> tuple[str, ...]:
    """Nobody drafts where tokens exit early."""
    refuse_drafters(drafters, brought, argument)
    if compile is not False:
        raise RestpointError(f"{argument}: compiled passes run all layers; leave compile or {argument} out")
    return ()


def inference_threads(count: int | None) -> None:
    """Use this many processor threads; None leaves torch's choice."""
    if count is not None:
        if count < 1:
            raise RestpointError(f"threads is {count}; it must be at least 1")
        torch.set_num_threads(count)
