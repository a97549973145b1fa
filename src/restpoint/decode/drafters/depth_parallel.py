"""Drafts from the target itself, its layers solved for all at once in a few sweeps."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, SteppedDrafter, TokenPath
from restpoint.equilibrium.depth import sweep_depth
from restpoint.equilibrium.slopes import Slopes
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.depth import layer_functions
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree

Start = Callable[[Tensor, Tensor], Tensor]
"""h_1 .. h_L of tokens, from their h_0 and from h_0 .. h_L of the tokens before them."""


class DepthParallelDrafter(SteppedDrafter):
    """q(x | text) is read off h_L after k sweeps over the depth (:func:`~restpoint.equilibrium.depth.sweep_depth`).

    When to use: to measure what a depth-parallel solve is worth, or where the layers of a sweep run in parallel on
    devices of their own. When not: on one device, where it can never pay: a level costs k sweeps, and a sweep reads the
    weights of a plain pass, which gives the token itself. Nothing chooses it by default.

    With k = L sweeps it is the target's own law.

    Args:
        layered: the target.
        cache: gives the target's cache; its uncommitted slots are written to.
        sweeps: k, at least 1.
        slopes: Jacobians of the layers; the identity if None.
        start: guesses h_1 .. h_L (`start_from_previous`, a `FittedStart`); None starts from h_0. Before the first
            states are given to :meth:`on_states`, the pending token starts from h_0 in any case.
        trees: whether the model can see a tree of drafted tokens (``check(layered).tree``).

    Raises:
        RestpointError: ``sweeps`` is not positive; from :meth:`extend`, a tree without ``trees``.

    Paper:
        Song et al. 2021, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving"; Danieli et al.
        2023, "DeepPCR".
    """

    name = "depth-parallel"

    def __init__(
        self,
        layered: LayeredModel,
        cache: Callable[[], SlotCache],
        sweeps: int = 2,
        *,
        slopes: Slopes | None = None,
        start: Start | None = None,
        trees: bool = True,
    ):
        if sweeps < 1:
            raise RestpointError(f"sweeps is {sweeps}; give at least 1")
        self.layered, self.sweeps, self.slopes, self.trees = layered, sweeps, slopes, trees
        self._cache = cache
        self._start = start
        self._before: Tensor | None = None
        self._levels: list[Tensor] = []
        self._parents: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Drafter.begin`."""
        self._before = None

    def on_states(self, states: Float[Tensor, "levels hidden"]) -> None:
        """h_0 .. h_L of the last token in the target's cache, after a round."""
        self._before = states

    def start(self, path: TokenPath) -> Float[Tensor, "1 vocab"]:
        """See :meth:`SteppedDrafter.start`."""
        self._levels, self._parents = [], []
        before = None if self._before is None else self._before[:, None, None]
        # States of a token that is not the last one any more say nothing: they are used once.
        self._before = None
        return self._solve([path.pending], None, before)

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, "added vocab"]:
        """See :meth:`SteppedDrafter.extend`."""
        self._parents.extend(parents)
        tree = None
        if any(parent != node - 1 for node, parent in enumerate(self._parents)):
            if not self.trees:
                raise RestpointError("drafter: this model family cannot see a tree of drafted tokens; draft chains")
            tree = Tree((-1, *(parent + 1 for parent in self._parents)))
        solved = torch.cat(self._levels, 2)
        return self._solve(tokens, tree, solved[:, :, [parent - ROOT for parent in parents]])

    @torch.no_grad()
    def _solve(self, tokens: Sequence[int], tree: Tree | None, before: Tensor | None) -> Tensor:
        """Logits after tokens that follow those already solved for; ``before`` are the levels of their parents."""
        offset = sum(levels.shape[2] for levels in self._levels)
        ids = torch.tensor([list(tokens)], device=self.layered.device)
        plan = self.layered.plan(ids, self._cache(), offset=offset, tree=tree)
        first = plan.hidden
        guess = None if self._start is None or before is None else self._start(first, before)
        swept = sweep_depth(layer_functions(self.layered, plan), first, guess, self.slopes)
        states = next(found.states for found in swept if found.exact >= min(self.sweeps, self.layered.depth))
        self._levels.append(torch.cat((first[None], states)))
        return self.layered.logits(states[-1])[0]
