"""Drafters that no profile names: a caller brings them along, made for every text."""

from collections.abc import Callable

from restpoint.decode.draft import Drafter
from restpoint.decode.drafters.datastore import Datastore
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.layer_skip import LayerSkipDrafter
from restpoint.decode.drafters.retrieval import RetrievalDrafter
from restpoint.decode.drafters.skip_choice import SkipChoice
from restpoint.decode.drafters.skips import SkipSet
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.equilibrium.predictors import Predictor

Maker = Callable[[LayeredTarget], Drafter]
"""Makes a drafter for one text on its target."""


def retrieve_from(datastore: Datastore) -> Maker:
    """Drafts retrieved from a datastore, opened and checked by the caller (:meth:`Datastore.require`)."""
    return lambda _target: RetrievalDrafter(datastore)


def draft_at_exit(predictor: Predictor) -> Maker:
    """Drafts by the target's own first layers and a predictor that the profile does not name."""
    return lambda target: ExitDrafter(target, predictor)


def skip_layers(skip: SkipSet, choice: SkipChoice | None = None, *, trees: bool = True) -> Maker:
    """Drafts by the target itself without some of its layers, chosen anew as the text goes on with a ``choice``."""

    def make(target: LayeredTarget) -> Drafter:
        drafter = LayerSkipDrafter(target.layered, lambda: target.cache, skip, choice=choice, trees=trees)

        def watch(kept: Kept) -> None:
            if (last := kept.last) is not None:
                drafter.on_states(last)

        if choice is not None:
            target.watcher = watch
        return drafter

    return make
