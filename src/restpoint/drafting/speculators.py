"""Who drafts for each text of a model: drafters made by name, with what is known of them, and fused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from restpoint.decode.acceptance import Calibration
from restpoint.decode.control import Control
from restpoint.decode.draft import InstantDrafter, SteppedDrafter
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.fusion import Fusion
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.drafting.brought import Maker
from restpoint.drafting.costs import KnownCosts
from restpoint.drafting.names import NamedDrafters
from restpoint.errors import RestpointError
from restpoint.model.check import Capabilities
from restpoint.model.layered import LayeredModel
from restpoint.profile import Profile


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
        self.profile = profile
        self.settings = settings or TreeSettings()
        self.verifier = verifier
        self.notes: list[str] = []
        if not capabilities.tree.supported:
            self.settings = replace(self.settings, branching=False)
        self._costs = KnownCosts(layered, profile, make_target or (lambda: LayeredTarget(layered)))
        named = NamedDrafters(layered, capabilities, profile, self.settings, self._costs, share)
        self._makers: dict[str, Maker] = {name: named.maker(name) for name in names}
        self._makers |= brought or {}
        for name, predictor in named.exit_layers(names).items():
            if predictor > 0 and not capabilities.resume.supported:
                self.notes.append(f"{name} does not draft: from layer {predictor}: {capabilities.resume.reason}")
                del self._makers[name]

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
        self._costs.measure(stepped, rows, lambda fresh: self._crew(fresh, 1)[1])
        overhead = self._costs.overhead(samplers[0], self.settings, self.verifier)
        control = Control(lambda live: self._costs.of(live, rows), rows, overhead)
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
