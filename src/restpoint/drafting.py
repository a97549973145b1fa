"""Who drafts for a model: drafters by name, with what its profile knows of them and what they cost here."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from restpoint.decode.acceptance import Calibration
from restpoint.decode.costs import Costs, device_name, measure_drafts, measure_passes, name_of, still_hold
from restpoint.decode.draft import Drafter, InstantDrafter, SteppedDrafter
from restpoint.decode.drafters.datastore import Datastore
from restpoint.decode.drafters.dynamic_exit import DynamicExitDrafter
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.heads import HeadsDrafter
from restpoint.decode.drafters.layer_skip import LayerSkipDrafter
from restpoint.decode.drafters.retrieval import RetrievalDrafter
from restpoint.decode.drafters.skip_choice import SkipChoice
from restpoint.decode.drafters.skips import SkipSet
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.fusion import Fusion, TreeSettings
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.decode.verifiers.base import Verifier
from restpoint.errors import RestpointError
from restpoint.model.check import Capabilities
from restpoint.model.layered import LayeredModel
from restpoint.profile import Profile

PREDICTOR = "predictor"
"""Stands for the predictor that the profile has chosen."""

HEADS = "heads"
"""Stands for the profile's multi-token heads."""

DYNAMIC_EXIT = "dynamic-exit"
"""Stands for all the profile's predictors, the one that drafts being chosen anew in every round."""

Maker = Callable[[LayeredTarget], Drafter]
"""Makes a drafter for one text on its target."""


class Drafting:
    """Makes a speculator for every text: its own drafters, fused.

    Args:
        layered: the model.
        capabilities: what it can do.
        profile: what was fitted for it; None where only drafters are named that need none.
        names: who drafts: ``predictor`` or one of the profile's predictors, ``dynamic-exit`` for the one of them that
            suits each round, ``heads``, and names of tables (``lookup``, ``recycling``, ..). At most one of them may
            run step by step.
        brought: further drafters by name, made for every text; they draft too.
        settings: limits of the tree.
        verifier: how drawn tokens are verified; token-wise if None.
        share: let tables keep what they learn from one text to the next; else each text starts afresh.
        make_target: makes the targets of single texts, for measuring; a plain :class:`LayeredTarget` if None.

    Attributes:
        notes: what could not be used, and why.

    Raises:
        RestpointError: a name is unknown or needs a profile, two drafters run step by step, or ``dynamic-exit`` is
            named where the profile has one predictor or the model cannot resume.
    """

    def __init__(
        self,
        layered: LayeredModel,
        capabilities: Capabilities,
        profile: Profile | None,
        names: Sequence[str],
        brought: Mapping[str, Maker] | None = None,
        settings: TreeSettings | None = None,
        verifier: Verifier | None = None,
        share: bool = False,
        make_target: Callable[[], LayeredTarget] | None = None,
    ):
        self.layered = layered
        self._make_target = make_target or (lambda: LayeredTarget(layered))
        self.profile = profile
        self.settings = settings or TreeSettings()
        self.verifier = verifier
        self.notes: list[str] = []
        self.trees = capabilities.tree.supported
        if not self.trees:
            self.settings = replace(self.settings, branching=False)
        self._share = share
        self._resume = capabilities.resume
        self._makers: dict[str, Maker] = {name: self._maker(name) for name in names}
        self._makers |= brought or {}
        for name, predictor in self._predictors(names).items():
            if predictor > 0 and not capabilities.resume.supported:
                self.notes.append(f"{name} does not draft: from layer {predictor}: {capabilities.resume.reason}")
                del self._makers[name]
        self._verify: dict[int, tuple[float, ...]] = {}
        self._draft: dict[str, tuple[float, float]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Who drafts."""
        return tuple(self._makers)

    def speculator(
        self, target: LayeredTarget, sampler: Sampler, draft_tokens: int | None = None, rows: int = 1
    ) -> Fusion | None:
        """Who drafts one text on one target; it learns as the text goes on. None where nobody does.

        Args:
            target: where drafts are verified.
            sampler: how the text's tokens are chosen.
            draft_tokens: verify exactly so many drafted tokens in every round; None lets costs and chances decide.
            rows: texts in the target's batch.
        """
        drafters = [make(target) for make in self._makers.values()]
        instant = [one for one in drafters if isinstance(one, InstantDrafter)]
        stepped = [one for one in drafters if isinstance(one, SteppedDrafter)]
        if len(stepped) > 1:
            both = " and ".join(one.name for one in stepped)
            raise RestpointError(f"drafters: {both} both draft step by step; name one of them")
        if rows > 1 and stepped and not self._serves_batches(stepped[0]):
            stepped = []
        if not (instant or stepped):
            return None
        settings = self.settings if draft_tokens is None else replace(self.settings, fixed=draft_tokens)
        chosen = stepped[0] if stepped else None
        costs = self._costs_of(chosen, rows)
        return Fusion(instant, chosen, sampler, costs, self._known(sampler), settings, self.verifier)

    def _maker(self, name: str) -> Maker:
        if name in TABLES:
            table, vocabulary = TABLES[name], self.layered.vocabulary_size
            memory = table.memory(vocabulary) if self._share else None
            return lambda _target: table.make(vocabulary, memory)
        known = [PREDICTOR, DYNAMIC_EXIT, HEADS, *TABLES, *(self.profile.predictors if self.profile else ())]
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise RestpointError(f"drafters: {name!r} is unknown; {hint}choose from {', '.join(known)}")
        if self.profile is None:
            raise RestpointError(f"drafters: {name} needs a profile; make one with `restpoint fit`, or leave it out")
        profile = self.profile
        if name == HEADS:
            if (heads := profile.heads) is None:
                raise RestpointError("drafters: the profile has no heads; fit them with `restpoint fit --heads 4`")
            return lambda _target: HeadsDrafter.of_model(heads, self.layered, vocabulary=profile.vocabulary)
        if name == DYNAMIC_EXIT:
            return self._dynamic_exit(profile)
        predictor = profile.predictors[profile.chosen if name == PREDICTOR else name]
        return lambda target: ExitDrafter(target, predictor, profile.vocabulary, trees=self.trees)

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
                lambda: self._costs(1),
                profile.vocabulary,
                trees=self.trees,
                name=DYNAMIC_EXIT,
                named=min(self.settings.width, self.layered.vocabulary_size) if self.settings.branching else 1,
                least=1,
            )
            target.watcher = drafter.on_kept
            return drafter

        return make

    def _predictors(self, names: Sequence[str]) -> dict[str, int]:
        """Exit layers of the predictors among these names."""
        if self.profile is None:
            return {}
        chosen = {name: self.profile.chosen if name == PREDICTOR else name for name in names}
        return {
            name: self.profile.predictors[own].exit_layer
            for name, own in chosen.items()
            if own in self.profile.predictors
        }

    def _serves_batches(self, drafter: SteppedDrafter) -> bool:
        """Whether a stepped drafter can draft for one row of several; it says why not."""
        if isinstance(drafter, ExitDrafter) and drafter.predictor.exit_layer == 0:
            if self.layered.embedding_scale is not None:
                return True
            reason = "this model's embeddings depend on positions"
        else:
            reason = "it runs layers"
        note = f"{drafter.name} does not draft for a batch: {reason}"
        if note not in self.notes:
            self.notes.append(note)
        return False

    def _known(self, sampler: Sampler) -> dict[str, Calibration]:
        """Calibrations of the profile, by drafter."""
        if self.profile is None:
            return {}
        found = self.profile.calibrations
        return {name: own.greedy if sampler.greedy else own.sampling for name, own in found.items()}

    def _costs_of(self, stepped: SteppedDrafter | None, rows: int) -> Costs:
        """The profile's costs where they are of this device and dtype, and cover who drafts; else measured, once."""
        here = device_name(self.layered.device), name_of(self.layered.dtype)
        if rows not in self._verify:
            known = self.profile.costs if self.profile else None
            target = self._make_target() if rows == 1 else LayeredTarget(self.layered)
            same = known is not None and rows == 1 and not target.widths and (known.device, known.dtype) == here
            if known is not None and same and still_hold(target, known):
                self._verify[rows] = known.verify
                self._draft = {**known.draft, **self._draft}
            else:
                self._verify[rows] = measure_passes(target, rows=rows)
        if stepped is not None and any(one.name not in self._draft for one in _ways(stepped)):
            target = self._make_target()
            drafters = (make(target) for make in self._makers.values())
            own = next(one for one in drafters if isinstance(one, SteppedDrafter))
            for one in _ways(own):
                if one.name not in self._draft:
                    self._draft[one.name] = measure_drafts(target, one)
        return self._costs(rows)

    def _costs(self, rows: int) -> Costs:
        """What was measured. Rows draft one after the other, and all wait for each."""
        draft = {name: (first * rows, later * rows) for name, (first, later) in self._draft.items()}
        return Costs(device_name(self.layered.device), name_of(self.layered.dtype), self._verify[rows], draft)


def _ways(drafter: SteppedDrafter) -> Sequence[SteppedDrafter]:
    """The drafters that each have a cost of their own: what it chooses from, or itself."""
    return drafter.ways if isinstance(drafter, DynamicExitDrafter) else (drafter,)


def retrieve_from(datastore: Datastore) -> Maker:
    """Drafts retrieved from a datastore, opened and checked by the caller (:meth:`Datastore.require`)."""
    return lambda _target: RetrievalDrafter(datastore)


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
