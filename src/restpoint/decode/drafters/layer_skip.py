"""Drafts from the target itself with some of its layers left out."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import SteppedDrafter, TokenPath
from restpoint.decode.drafters.skip_choice import SkipChoice, choose_online
from restpoint.decode.drafters.skips import SkipSet
from restpoint.decode.drafters.walk import LayeredWalk
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel


class LayerSkipDrafter(SteppedDrafter):
    """q(x | text) is the target's law with the layers of a :class:`SkipSet` left out.

    The pending and the drafted tokens run through the kept layers in uncommitted slots of the target's own cache, so
    the text's keys and values are the full model's. Layers that are left out get no keys of drafted tokens, and nothing
    reads them: only kept layers attend, to what kept layers wrote. Verification overwrites all of it.

    A round of d drafted tokens costs about d times the kept share of a plain pass.

    When to use: on any model without fitting or further weights, most of all deep ones, where a half of the layers can
    be missed; with a set from :func:`search_skip_set`, or chosen from the text at hand (``choice``). When not: on small
    or shallow models, where every layer counts; a fitted predictor then drafts better for less.

    Args:
        layered: the target.
        cache: gives the target's cache.
        skip: the layers to leave out, at first.
        choice: choose them anew from the target's own states every few rounds; None to keep ``skip``.
        trees: whether the model can see a tree of drafted tokens (``check(layered).tree``).
        resumes: offer the states before the first layer left out, up to where the pass is the target's own, so that
            verification need not run those layers again. It pays where that layer lies deep: tokens that were drafted
            but not run need a pass of their own through the layers before it.

    Raises:
        RestpointError: ``skip`` names a layer that the model lacks; ``choice`` leaves out as many layers as it has, or
            is asked of a model that cannot see trees, which choosing needs.

    Paper:
        Zhang et al. 2024, "Draft & Verify"; Xia et al. 2025, "SWIFT"; Chen et al. 2025, "CLaSp".
    """

    name = "layer skip"

    def __init__(
        self,
        layered: LayeredModel,
        cache: Callable[[], SlotCache],
        skip: SkipSet,
        *,
        choice: SkipChoice | None = None,
        trees: bool = True,
        resumes: bool = False,
    ):
        skip.check(layered.depth)
        if choice is not None and choice.skipped >= layered.depth:
            raise RestpointError(
                f"choice: skipped={choice.skipped} leaves none of the model's {layered.depth} layers; give less"
            )
        if choice is not None and not trees:
            raise RestpointError(
                "choice: this model family cannot see trees, which choosing layers online needs; leave it out and give "
                "a set found offline"
            )
        self.layered = layered
        self.trees = trees
        self.skip = skip
        self._choice = choice
        self._resumes = resumes
        self._states: Tensor | None = None
        self._rounds: int | None = None
        self._walk = LayeredWalk(layered, cache, trees=trees)
        self._use(skip)

    @property
    def wants_states(self) -> bool:
        """Whether layers are to be chosen anew before the next draft, so that states after this round are of use."""
        return self._choice is not None and (self._rounds is None or self._rounds >= self._choice.every)

    def on_states(self, states: Float[Tensor, "levels hidden"]) -> None:
        """The target's states h_0 .. h_L of the last token in its cache, after a round; used where they are wanted."""
        self._states = states if self.wants_states else None

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Drafter.begin`; the set in use stays until states of the new text come."""
        self._states, self._rounds = None, None

    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """See :meth:`SteppedDrafter.start`; chooses the layers anew first, if states were given."""
        if self._choice is not None and self._states is not None:
            self._use(choose_online(self.layered, self._walk.cache, self._states, self._choice))
            self._states, self._rounds = None, 0
        if self._rounds is not None:
            self._rounds += 1
        return self.layered.logits(self._walk.start(path.pending))[0]

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """See :meth:`SteppedDrafter.extend`."""
        return self.layered.logits(self._walk.extend(parents, tokens))[0]

    def exits(self) -> tuple[int, Tensor] | None:
        """The first layer left out and the states before it: up to there, the pass is the target's own."""
        first = self._first
        return (first, self._walk.states(first)) if self._resumes and first > 0 else None

    @property
    def _first(self) -> int:
        return min(self.skip.layers, default=self.layered.depth)

    def _use(self, skip: SkipSet) -> None:
        self.skip = skip
        self._walk.skip = frozenset(skip.layers)
        self._walk.read([self._first] if self._resumes else [])
