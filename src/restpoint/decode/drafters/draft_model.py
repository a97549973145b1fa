"""Drafts from a smaller model that shares the target's vocabulary."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from restpoint.decode.draft import SteppedDrafter, TokenPath
from restpoint.decode.drafters.reading import Reader
from restpoint.decode.drafters.reencoding import Reencoding, ReencodingDrafter
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.model.check import check
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.model.unrolled import layered_model


class ModelDrafter(SteppedDrafter):
    """q(x | text) is another causal LM's law over the same tokens; it reads along on a cache of its own.

    A round of d drafted tokens costs d passes of the draft model and stands for (1 - a^(d+1)) / (1 - a) tokens where
    each is accepted with probability a = 1 - TV(p, q).

    When to use: a model of the same family exists whose pass costs a tenth of the target's or less. When not: the
    smallest such model is more than a third of the target, or memory for a second model and its cache is missing;
    then draft with the target's own layers.

    Args:
        layered: the draft model. Its unembedding may be padded otherwise than the target's: rows that only it has
            are cut, tokens that it lacks have probability 0.
        target: the model that verifies; it is only asked for its vocabulary's size and its device.
        context_length: the most positions that the draft model takes; None for no limit.
        trees: whether it can see a tree of drafted tokens (``check(layered).tree``).

    Raises:
        RestpointError: the context is too short to draft in; from :meth:`extend`, a tree without ``trees``.

    Paper:
        Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
        "Accelerating Large Language Model Decoding with Speculative Sampling".
    """

    name = "draft model"

    def __init__(
        self, layered: LayeredModel, target: LayeredModel, *, context_length: int | None = None, trees: bool = True
    ):
        self.layered = layered
        self.trees = trees
        self._size = target.vocabulary_size
        self._device = target.device
        self._reader = Reader(layered, context_length, trees)

    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """Read what the text has gained, and the pending token; nodes that stood are not run again."""
        return self._logits(self._reader.start(path.tokens))

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """See :meth:`SteppedDrafter.extend`."""
        return self._logits(self._reader.extend(parents, tokens))

    def _logits(self, states: Tensor) -> Tensor:
        return fit_vocabulary(self.layered.logits(states)[0], self._size).to(self._device)


def draft_by_model(
    draft: Loaded, target: Loaded, *, reencode: bool = False
) -> Callable[[LayeredTarget], ModelDrafter | ReencodingDrafter]:
    """Makes drafters from a draft model: by law where it shares the target's tokens, else by text if that is allowed.

    The draft model is taken apart once; each text gets a drafter with a cache of its own.

    Args:
        draft: the draft model and its tokenizer.
        target: the target and its tokenizer.
        reencode: allow a draft model with another vocabulary; its text is then re-encoded
            (:class:`ReencodingDrafter`), greedily and at more cost.

    Raises:
        RestpointError: the vocabularies differ and ``reencode`` is False, or the draft model cannot take back drafted
            tokens.
    """
    same = same_vocabulary(draft.tokenizer, target.tokenizer)
    if not (same or reencode):
        raise RestpointError(
            f"draft model {draft.name!r} has another vocabulary than {target.name!r} ({_difference(draft, target)}): "
            "give a draft model with the target's tokenizer, or reencode=True, which translates its drafts as text"
        )
    layered = layered_model(draft.model)
    found = check(layered)
    if not found.drafts:
        reason = "; ".join(found.refused().values())
        raise RestpointError(
            f"draft model {draft.name!r} cannot take back drafted tokens ({reason}): give one with a plain "
            "key-value cache"
        )
    context, trees = draft.context_length, found.tree.supported
    if same:
        return lambda decoded: ModelDrafter(layered, decoded.layered, context_length=context, trees=trees)
    return lambda _: ReencodingDrafter(layered, draft.tokenizer, target.tokenizer, Reencoding(), context_length=context)


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both know the same tokens under the same numbers."""
    return one.get_vocab() == other.get_vocab()


def fit_vocabulary(logits: Float[Tensor, "rows draft_vocab"], size: int) -> Float[Tensor, "rows vocab"]:
    """Logits over ``size`` tokens: further ones are cut, missing ones have probability 0."""
    missing = size - logits.shape[1]
    if missing <= 0:
        return logits[:, :size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))


def _difference(draft: Loaded, target: Loaded) -> str:
    ours, theirs = draft.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    shared = len(ours.items() & theirs.items())
    return f"{len(ours)} and {len(theirs)} tokens, {shared} of them the same"
