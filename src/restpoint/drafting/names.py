"""Drafters by the names that callers give: tables, what a profile holds, and the model's own fewer steps."""

import difflib
from collections.abc import Sequence

from restpoint.decode.draft import Drafter
from restpoint.decode.drafters.dynamic_exit import DynamicExitDrafter
from restpoint.decode.drafters.exit import DraftHead, ExitDrafter
from restpoint.decode.drafters.few_steps import FewStepsDrafter, default_steps
from restpoint.decode.drafters.heads import HeadsDrafter
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.target import LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.drafting.brought import Maker
from restpoint.drafting.costs import KnownCosts
from restpoint.errors import RestpointError
from restpoint.model.check import Capabilities
from restpoint.model.layered import LayeredModel
from restpoint.model.unrolled import UnrolledModel
from restpoint.profile import Profile

PREDICTOR = "predictor"
"""Stands for the predictor that the profile has chosen."""

HEADS = "heads"
"""Stands for the profile's multi-token heads."""

STEPS = "steps"
"""Stands for a few steps of a model that iterates a block; ``steps@K`` for K of them."""

DYNAMIC_EXIT = "dynamic-exit"
"""Stands for all the profile's predictors, the one that drafts being chosen anew in every round."""


class NamedDrafters:
    """What makes the drafter of a name, for a model and its profile.

    Args:
        layered: the model.
        capabilities: what it can do.
        profile: what was fitted for it, if it was.
        settings: limits of the tree.
        costs: of the model's passes and drafts.
        share: let tables keep what they learn from one text to the next.
    """

    def __init__(
        self,
        layered: LayeredModel,
        capabilities: Capabilities,
        profile: Profile | None,
        settings: TreeSettings,
        costs: KnownCosts,
        share: bool,
    ):
        self._layered = layered
        self._resume = capabilities.resume
        self._trees = capabilities.tree.supported
        self._profile = profile
        self._settings = settings
        self._costs = costs
        self._share = share

    def maker(self, name: str) -> Maker:
        """What makes the drafter of this name, for one text.

        Raises:
            RestpointError: the name is unknown or needs a profile, or ``dynamic-exit`` or ``steps`` has nothing to
                choose from or a model that cannot resume.
        """
        if name in TABLES:
            table, vocabulary = TABLES[name], self._layered.vocabulary_size
            memory = table.memory(vocabulary) if self._share else None
            return lambda _target: table.make(vocabulary, memory)
        if isinstance(self._layered, UnrolledModel) and name.partition("@")[0] == STEPS:
            return self._few_steps(self._layered, name)
        own = [STEPS] if isinstance(self._layered, UnrolledModel) else []
        known = [PREDICTOR, DYNAMIC_EXIT, HEADS, *own, *TABLES, *(self._profile.predictors if self._profile else ())]
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise RestpointError(f"drafters: {name!r} is unknown; {hint}choose from {', '.join(known)}")
        if self._profile is None:
            raise RestpointError(f"drafters: {name} needs a profile; make one with `restpoint fit`, or leave it out")
        profile = self._profile
        if name == HEADS:
            if (heads := profile.heads) is None:
                raise RestpointError("drafters: the profile has no heads; fit them with `restpoint fit --heads 4`")
            return lambda _target: HeadsDrafter.of_model(heads, self._layered, vocabulary=profile.vocabulary)
        if name == DYNAMIC_EXIT:
            return self._dynamic_exit(profile)
        own = profile.predictors[profile.chosen if name == PREDICTOR else name]
        head = DraftHead(self._layered, profile.vocabulary)
        predictor = own.to(self._layered.device, head.dtype)
        return lambda target: ExitDrafter(target, predictor, trees=self._trees, head=head)

    def _few_steps(self, layered: UnrolledModel, name: str) -> Maker:
        _, _, given = name.partition("@")
        if given and not given.isdecimal():
            raise RestpointError(f"drafters: {name!r} has no number of steps after the @; write {STEPS}@3, or {STEPS}")
        if not self._resume.supported:
            raise RestpointError(
                f"drafters: {name} needs a model that can resume ({self._resume.reason}); leave it out"
            )
        if layered.steps == 1 and not given:
            raise RestpointError(f"drafters: {name} drafts by fewer steps than the model's one; leave it out")
        steps = int(given) if given else default_steps(layered)
        FewStepsDrafter(layered, layered.cache, steps)  # refuses a wrong number now
        return lambda target: FewStepsDrafter(layered, lambda: target.cache, steps, trees=self._trees, name=name)

    def _dynamic_exit(self, profile: Profile) -> Maker:
        predictors = tuple(profile.predictors.values())
        if len(predictors) < 2:
            raise RestpointError(
                f"drafters: {DYNAMIC_EXIT} chooses between predictors and the profile has {len(predictors)}; name "
                f"{PREDICTOR}, or fit several with `restpoint fit`"
            )
        if not self._resume.supported:
            raise RestpointError(
                f"drafters: {DYNAMIC_EXIT} drafts from layers of a model that cannot resume at them "
                f"({self._resume.reason}); name a predictor from layer 0"
            )

        def make(target: LayeredTarget) -> Drafter:
            drafter = DynamicExitDrafter(
                target,
                predictors,
                lambda: self._costs.of(1, 1),
                profile.vocabulary,
                trees=self._trees,
                name=DYNAMIC_EXIT,
                named=min(self._settings.width, self._layered.vocabulary_size) if self._settings.branching else 1,
                least=1,
            )
            target.watcher = drafter.on_kept
            return drafter

        return make

    def exit_layers(self, names: Sequence[str]) -> dict[str, int]:
        """Exit layers of the predictors among these names."""
        if self._profile is None:
            return {}
        chosen = {name: self._profile.chosen if name == PREDICTOR else name for name in names}
        return {
            name: self._profile.predictors[own].exit_layer
            for name, own in chosen.items()
            if own in self._profile.predictors
        }
