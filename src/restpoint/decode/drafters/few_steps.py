"""Drafts from a recurrent-depth model itself, at a few steps of its core."""

from collections.abc import Callable

from restpoint.decode.drafters.layer_skip import LayerSkipDrafter
from restpoint.decode.drafters.skips import SkipSet
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.unrolled import UnrolledModel


class FewStepsDrafter(LayerSkipDrafter):
    """q(x | text) = head(norm(coda(norm(s_k)))), k < r: the trajectory's own law before it has come to rest.

    The pending and the drafted tokens run k steps over the keys that the text wrote at these steps, then the coda. Step
    k of a token depends on earlier tokens' steps up to k alone, so s_1 .. s_k are those of the full model on the same
    tokens, and their keys and values too: verification takes e and s_k of every drafted token as they are, and runs
    steps k + 1 .. r of all of them together. Only the last drafted token, which nothing was drafted after, has its
    first k steps to run. No step of a token that stands is run twice; the coda is.

    A round of d drafted tokens takes d passes of l_P + k l_R + l_C layers beside one of the whole depth. Where a pass
    takes as long for one token as for several, that is the price; where time goes by tokens, only rejected tokens and
    codas cost anything.

    When to use: the states are near their rest after a small part of the steps. When not: text that repeats itself,
    where copies draft as well for nothing (both may draft together).

    Args:
        layered: the target.
        cache: gives the target's cache.
        steps: k.
        trees: whether the model can see a tree of drafted tokens (``check(layered).tree``).
        name: what tables call it.

    Raises:
        RestpointError: k is not between 1 and r - 1, or the model does not iterate a block.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach" (section
        on self-speculation); Zhang et al. 2024, "Draft & Verify".
    """

    name = "steps"

    def __init__(
        self,
        layered: LayeredModel,
        cache: Callable[[], SlotCache],
        steps: int,
        *,
        trees: bool = True,
        name: str | None = None,
    ):
        if not isinstance(layered, UnrolledModel):
            raise RestpointError("drafters: steps drafts for models that iterate a block; leave it out for this one")
        if not 1 <= steps < layered.steps:
            raise RestpointError(
                f"drafters: steps@{steps} is asked of a model of {layered.steps} steps; "
                + (f"give 1 to {layered.steps - 1}" if layered.steps > 1 else "with one step it cannot draft by fewer")
            )
        self.steps = steps
        self.name = name or self.name
        super().__init__(layered, cache, SkipSet(layered.later_steps(steps)), trees=trees, resumes=True)


def default_steps(layered: UnrolledModel) -> int:
    """K where none is given: a quarter of r, and 1 at least."""
    return max(1, layered.steps // 4)
