"""Who drafts for a model: drafters by name, with what its profile knows of them and what they cost here."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from restpoint.decode.acceptance import Calibration
from restpoint.decode.control import Control
from restpoint.decode.costs import Costs, between, device_name, measure_drafts, measure_passes, name_of, still_hold
from restpoint.decode.draft import Drafter, InstantDrafter, SteppedDrafter
from restpoint.decode.drafters.datastore import Datastore
from restpoint.decode.drafters.dynamic_exit import DynamicExitDrafter
from restpoint.decode.drafters.exit import DraftHead, ExitDrafter
from restpoint.decode.drafters.few_steps import FewStepsDrafter, default_steps
from restpoint.decode.drafters.heads import HeadsDrafter
from restpoint.decode.drafters.layer_skip import LayerSkipDrafter
from restpoint.decode.drafters.retrieval import RetrievalDrafter
from restpoint.decode.drafters.skip_choice import SkipChoice
from restpoint.decode.drafters.skips import SkipSet
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.fusion import Fusion
from restpoint.decode.overhead import measure_overhead
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.equilibrium.predictors import Predictor
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

Maker = Callable[[LayeredTarget], Drafter]
"""Makes a drafter for one text on its target."""


class Drafting:
    """Makes a speculator for every text: its own drafters, fused.

    Args:
        layered: the model.
        capabilities: what it can do.
        profile: what was fitted for it; None where only drafters are named that need none.
        names: who drafts: ``predictor`` or one of the profile's predictors, ``dynamic-exit`` for the one of them that
            suits each round, ``heads``, ``steps`` or ``steps@K`` where the model iterates a block, and names of tables
            (``lookup``, ``recycling``, ..). At most one of them may run step by step.
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
        self._verify: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = {}  # by rows and widths of passes
        self._draft: dict[tuple[str, int], tuple[float, float]] = {}  # by drafter and rows
        self._beside: dict[bool, tuple[float, float]] = {}  # of greedy decoding and of sampling

    @property
    def names(self) -> tuple[str, ...]:
        """Who drafts."""
        return tuple(self._makers)

    def speculators(
        self, target: LayeredTarget, samplers: Sequence[Sampler], draft_tokens: int | None = None
    ) -> Sequence[Fusion | None]:
        """Who drafts for each text of a target's batch; they learn as their texts go on. None where nobody does.

        Args:
            target: where drafts are verified.
            samplers: how each text's tokens are chosen.
            draft_tokens: verify exactly so many drafted tokens in every round; None lets costs and chances decide.
        """
        rows = len(samplers)
        crews = [self._crew(target, rows) for _ in samplers]
        instant, stepped = crews[0]
        if not (instant or stepped):
            return [None] * rows
        settings = self.settings if draft_tokens is None else replace(self.settings, fixed=draft_tokens)
        self._measure(stepped, rows)
        control = Control(lambda live: self._costs(live, rows), rows, self._overhead(samplers[0]))
        return [
            Fusion(instant, stepped, sampler, control, self._known(sampler), settings, self.verifier)
            for sampler, (instant, stepped) in zip(samplers, crews, strict=True)
        ]

    def _crew(self, target: LayeredTarget, rows: int) -> tuple[list[InstantDrafter], SteppedDrafter | None]:
        """The drafters of one text."""
        drafters = [make(target) for make in self._makers.values()]
        instant = [one for one in drafters if isinstance(one, InstantDrafter)]
        stepped = [one for one in drafters if isinstance(one, SteppedDrafter)]
        if len(stepped) > 1:
            both = " and ".join(one.name for one in stepped)
            raise RestpointError(f"drafters: {both} both draft step by step; name one of them")
        if stepped and (rows == 1 or self._serves_batches(stepped[0])):
            return instant, stepped[0]
        return instant, None

    def _maker(self, name: str) -> Maker:
        if name in TABLES:
            table, vocabulary = TABLES[name], self.layered.vocabulary_size
            memory = table.memory(vocabulary) if self._share else None
            return lambda _target: table.make(vocabulary, memory)
        if isinstance(self.layered, UnrolledModel) and name.partition("@")[0] == STEPS:
            return self._few_steps(self.layered, name)
        own = [STEPS] if isinstance(self.layered, UnrolledModel) else []
        known = [PREDICTOR, DYNAMIC_EXIT, HEADS, *own, *TABLES, *(self.profile.predictors if self.profile else ())]
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
        own = profile.predictors[profile.chosen if name == PREDICTOR else name]
        head = DraftHead(self.layered, profile.vocabulary)
        predictor = own.to(self.layered.device, head.dtype)
        return lambda target: ExitDrafter(target, predictor, trees=self.trees, head=head)

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
        return lambda target: FewStepsDrafter(layered, lambda: target.cache, steps, trees=self.trees, name=name)

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
                lambda: self._costs(1, 1),
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

    def _measure(self, stepped: SteppedDrafter | None, rows: int) -> None:
        """Know all costs of a batch: the profile's where they still hold here, else measured, once."""
        for count in {1, rows}:
            self._measure_passes(count, rows)
            if stepped is not None and any((one.name, count) not in self._draft for one in _ways(stepped)):
                target = self._make_target()
                crews = [self._crew(target, 1)[1] for _ in range(count)]
                for ways in zip(*(_ways(own) for own in crews if own is not None), strict=True):
                    if (ways[0].name, count) not in self._draft:
                        self._draft[ways[0].name, count] = measure_drafts(target, ways)

    def _overhead(self, sampler: Sampler) -> tuple[float, float]:
        """What a round costs beside passes and drafts, measured once with fresh tables."""
        if sampler.greedy not in self._beside:
            settings = SamplingSettings(temperature=0.0 if sampler.greedy else 1.0)
            self._measure_passes(1, 1)
            vocabulary, target = self.layered.vocabulary_size, self._make_target()
            fresh, costs = Sampler(settings, device=self.layered.device), self._costs(1, 1)

            def fixed(other: InstantDrafter, nodes: int) -> Fusion:
                tables = [TABLES[name].make(vocabulary, None) for name in ("lookup", "recycling")]
                limits = replace(self.settings, fixed=nodes)
                return Fusion([*tables, other], None, fresh, Control.alone(costs), None, limits, self.verifier)

            self._beside[sampler.greedy] = measure_overhead(target, fresh, self.verifier, fixed)
        return self._beside[sampler.greedy]

    def _measure_passes(self, count: int, rows: int) -> None:
        target = self._make_target() if rows == 1 else LayeredTarget(self.layered)
        key = count, target.widths
        if key in self._verify:
            return
        known = self.profile.costs if self.profile and count == 1 and not target.widths else None
        here = device_name(self.layered.device), name_of(self.layered.dtype)
        if known is not None and (known.device, known.dtype) == here and still_hold(target, known):
            self._verify[key] = known.verify
            self._draft = {(name, 1): seconds for name, seconds in known.draft.items()} | self._draft
        else:
            self._verify[key] = measure_passes(target, rows=count)

    def _costs(self, live: int, rows: int) -> Costs:
        """Costs of so many rows of a batch that began with ``rows``: between those of one and those of all."""
        widths = self._make_target().widths if rows == 1 else ()
        here = device_name(self.layered.device), name_of(self.layered.dtype)
        one, every = (
            Costs(
                *here,
                self._verify[count, widths],
                {name: own for (name, at), own in self._draft.items() if at == count},
            )
            for count in (1, rows)
        )
        return one if rows == 1 else between(one, every, (live - 1) / (rows - 1))


def drafting_for(
    layered: LayeredModel,
    capabilities: Capabilities,
    profile: Profile | None,
    names: Sequence[str],
    brought: Mapping[str, Maker] | None = None,
    settings: TreeSettings | None = None,
    verifier: Verifier | None = None,
    share: bool = False,
    make_target: Callable[[], LayeredTarget] | None = None,
) -> tuple[Drafting | None, list[str]]:
    """Who drafts for a model, None where nobody does or can, and notes on what could not be used.

    Arguments and errors as :class:`Drafting`.
    """
    if not capabilities.drafts:
        refused = capabilities.refused()
        reason = next(refused[name] for name in ("depth", "cached", "rollback") if name in refused)
        return None, [f"decoding plainly, by the model's own forward: {reason}"]
    if not (names or brought):
        return None, []
    drafting = Drafting(layered, capabilities, profile, names, brought, settings, verifier, share, make_target)
    return drafting, drafting.notes


def _ways(drafter: SteppedDrafter) -> Sequence[SteppedDrafter]:
    """The drafters that each have a cost of their own: what it chooses from, or itself."""
    return drafter.ways if isinstance(drafter, DynamicExitDrafter) else (drafter,)


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
