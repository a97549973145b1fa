"""Drafts read from an early layer, or from no layer at all, through a predictor of the rest state."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import SteppedDrafter, TokenPath
from restpoint.decode.drafters.precision import draft_dtype
from restpoint.decode.drafters.walk import LayeredWalk
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel


class DraftHead:
    """The model's head as drafts use it: in the dtype of drafts, over the tokens that may be drafted.

    Args:
        layered: the model.
        vocabulary: tokens that may be drafted; None for all.

    Raises:
        RestpointError: a draft vocabulary is asked of a model whose head has no direct form.
    """

    def __init__(self, layered: LayeredModel, vocabulary: Tensor | None = None):
        if vocabulary is not None and not layered.head.direct:
            raise RestpointError("vocabulary: this model's head cannot be cut to some tokens; leave it out")
        self.layered = layered
        self.dtype = draft_dtype(layered)
        self.vocabulary = None if vocabulary is None else vocabulary.to(layered.device)
        cheaper = self.dtype != layered.dtype or vocabulary is not None
        self._rows = layered.head.rows(vocabulary, self.dtype) if layered.head.direct and cheaper else None

    def logits(self, rest: Float[Tensor, "1 states hidden"]) -> Float[Tensor, "states vocab"]:
        """Of the whole vocabulary; minus infinity outside the draft vocabulary."""
        layered = self.layered
        rest = rest.to(layered.dtype)
        if self._rows is None:
            return layered.logits(rest)[0]
        head = layered.head
        drafted = head.unembed(head.rest_state(rest), *self._rows)[0]
        if self.vocabulary is None:
            return drafted
        logits = drafted.new_full((drafted.shape[0], layered.vocabulary_size), float("-inf"))
        return logits.index_copy_(1, self.vocabulary, drafted)


class ExitDrafter(SteppedDrafter):
    """Runs the first E layers on each drafted token and predicts where it will come to rest.

    The state at the exit layer, with the rest state of the token before where the predictor wants it, gives a
    predicted rest state; the model's own head turns that into the law q of the next token. Keys, values and exit
    states are shared with the verification, which resumes at layer E. With E = 0 no layer runs.

    Args:
        target: the model that verifies; its cache is written to.
        predictor: from states of layers up to E to h_L.
        vocabulary: tokens that may be drafted (a frequent few make the head cheap); None for all. Verification stays
            exact: other tokens come from the residual and the bonus.
        trees: whether the target can verify trees.
        name: what tables call it; the predictor's name if empty.
        head: a head that drafters share, in place of one for ``vocabulary``.

    Attributes:
        walk: runs the layers.

    Raises:
        RestpointError: the predictor's exit layer is not below the model's depth, or a draft vocabulary is asked of a
            model whose head has no direct form.

    Paper:
        Elhoushi et al. 2024, "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", for drafts from
        the target's own first layers; the recurrence is restpoint's.
    """

    def __init__(
        self,
        target: LayeredTarget,
        predictor: Predictor,
        vocabulary: Tensor | None = None,
        *,
        trees: bool = True,
        name: str = "",
        head: DraftHead | None = None,
    ):
        layered = target.layered
        if predictor.exit_layer >= layered.depth:
            raise RestpointError(
                f"predictor: exit layer {predictor.exit_layer} is not below the model's {layered.depth} layers"
            )
        self.name = name or predictor.name
        self.target = target
        self.head = head or DraftHead(layered, vocabulary)
        self.dtype = self.head.dtype
        self.predictor = predictor.to(layered.device, self.dtype)
        self.trees = trees
        self.walk = LayeredWalk(
            layered, lambda: target.cache, stop=predictor.exit_layer, reads=predictor.state_layers, trees=trees
        )
        self._rests: list[Tensor] = []
        self._depths: list[int] = []

    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """See :meth:`SteppedDrafter.start`."""
        before = self._begin(path)
        return self._laws([self], [before], 0)[0]

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """See :meth:`SteppedDrafter.extend`."""
        before, depth = self._walk_on(parents, tokens)
        return self._laws([self], [before], depth)[0]

    @classmethod
    def start_together(
        cls, drafters: Sequence[SteppedDrafter], paths: Sequence[TokenPath]
    ) -> list[Float[Tensor, "1 vocab"]]:
        """See :meth:`SteppedDrafter.start_together`: the predictor and the head are read once for all rows."""
        own = [one for one in drafters if isinstance(one, ExitDrafter)]
        befores = [one._begin(path) for one, path in zip(own, paths, strict=True)]
        return cls._laws(own, befores, 0)

    @classmethod
    def extend_together(
        cls, drafters: Sequence[SteppedDrafter], parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "added vocab"]]:
        """See :meth:`SteppedDrafter.extend_together`."""
        own = [one for one in drafters if isinstance(one, ExitDrafter)]
        walked = [one._walk_on(*nodes) for one, *nodes in zip(own, parents, tokens, strict=True)]
        return cls._laws(own, [before for before, _ in walked], walked[0][1])

    def exits(self) -> tuple[int, Tensor] | None:
        """See :meth:`SteppedDrafter.exits`."""
        layer = self.predictor.exit_layer
        return (layer, self.walk.states(layer)) if layer else None

    def _begin(self, path: TokenPath) -> Tensor | None:
        """Run the pending token; the rest state before it."""
        self.walk.start(path.pending)
        self._rests, self._depths = [], []
        return None if path.rest is None else path.rest.to(self.dtype)

    def _walk_on(self, parents: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, int]:
        """Run further nodes; the rest states before them, and their depth."""
        self.walk.extend(parents, tokens)
        self._rests = [self._rests[0] if len(self._rests) == 1 else torch.cat(self._rests, 1)]
        return self._rests[0][:, [parent + 1 for parent in parents]], self._depths[parents[0] + 1] + 1

    @staticmethod
    def _laws(drafters: "Sequence[ExitDrafter]", befores: Sequence[Tensor | None], depth: int) -> list[Tensor]:
        """Logits after the nodes that each drafter ran last, by the predictor and head that all have in common."""
        first = drafters[0]
        states = [
            _joined([one.walk.newest(layer).to(one.dtype) for one in drafters])
            for layer in first.predictor.state_layers
        ]
        given = [before for before in befores if before is not None]
        rest = first.predictor.predict(states, _joined(given) if given else None, depth)
        sizes = [one.walk.newest(one.walk.stop).shape[1] for one in drafters]
        for one, own in zip(drafters, rest.split(sizes, 1), strict=True):
            one._rests.append(own)
            one._depths.extend([depth] * own.shape[1])
        return list(first.head.logits(rest).split(sizes))


def _joined(states: Sequence[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(list(states), 1)
