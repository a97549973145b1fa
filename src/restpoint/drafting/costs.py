"""What passes and drafts cost here: as the profile says where that still holds, else measured, once."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from restpoint.decode.control import Control
from restpoint.decode.costs import Costs, between, device_name, measure_drafts, measure_passes, name_of, still_hold
from restpoint.decode.draft import InstantDrafter, SteppedDrafter
from restpoint.decode.drafters.dynamic_exit import DynamicExitDrafter
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.fusion import Fusion
from restpoint.decode.overhead import measure_overhead
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.model.layered import LayeredModel
from restpoint.profile import Profile


class KnownCosts:
    """Costs of a model's passes and of its drafters, by the number of rows.

    Args:
        layered: the model.
        profile: what was measured when it was fitted, if it was.
        make_target: makes the targets of single texts.
    """

    def __init__(self, layered: LayeredModel, profile: Profile | None, make_target: Callable[[], LayeredTarget]):
        self._layered = layered
        self._profile = profile
        self._make_target = make_target
        self._verify: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = {}  # by rows and widths of passes
        self._draft: dict[tuple[str, int], tuple[float, float]] = {}  # by drafter and rows
        self._beside: dict[bool, tuple[float, float]] = {}  # of greedy decoding and of sampling

    def measure(
        self, stepped: SteppedDrafter | None, rows: int, make: Callable[[LayeredTarget], SteppedDrafter | None]
    ) -> None:
        """Know all costs of a batch: the profile's where they still hold here, else measured, once.

        Args:
            stepped: who drafts step by step, if anybody.
            rows: of the batch.
            make: makes another such drafter.
        """
        for count in {1, rows}:
            self._measure_passes(count, rows)
            if stepped is not None and any((one.name, count) not in self._draft for one in _ways(stepped)):
                target = self._make_target()
                crew = [make(target) for _ in range(count)]
                for ways in zip(*(_ways(own) for own in crew if own is not None), strict=True):
                    if (ways[0].name, count) not in self._draft:
                        self._draft[ways[0].name, count] = measure_drafts(target, ways)

    def overhead(self, sampler: Sampler, settings: TreeSettings, verifier: Verifier | None) -> tuple[float, float]:
        """What a round costs beside passes and drafts, measured once with fresh tables."""
        if sampler.greedy not in self._beside:
            sampling = SamplingSettings(temperature=0.0 if sampler.greedy else 1.0)
            self._measure_passes(1, 1)
            vocabulary, target = self._layered.vocabulary_size, self._make_target()
            fresh, costs = Sampler(sampling, device=self._layered.device), self.of(1, 1)

            def fixed(other: InstantDrafter, nodes: int) -> Fusion:
                tables = [TABLES[name].make(vocabulary, None) for name in ("lookup", "recycling")]
                limits = replace(settings, fixed=nodes)
                return Fusion([*tables, other], None, fresh, Control.alone(costs), None, limits, verifier)

            self._beside[sampler.greedy] = measure_overhead(target, fresh, verifier, fixed)
        return self._beside[sampler.greedy]

    def _measure_passes(self, count: int, rows: int) -> None:
        target = self._make_target() if rows == 1 else LayeredTarget(self._layered)
        key = count, target.widths
        if key in self._verify:
            return
        known = self._profile.costs if self._profile and count == 1 and not target.widths else None
        here = device_name(self._layered.device), name_of(self._layered.dtype)
        if known is not None and (known.device, known.dtype) == here and still_hold(target, known):
            self._verify[key] = known.verify
            self._draft = {(name, 1): seconds for name, seconds in known.draft.items()} | self._draft
        else:
            self._verify[key] = measure_passes(target, rows=count)

    def of(self, live: int, rows: int) -> Costs:
        """Costs of so many rows of a batch that began with ``rows``: between those of one and those of all."""
        widths = self._make_target().widths if rows == 1 else ()
        here = device_name(self._layered.device), name_of(self._layered.dtype)
        one, every = (
            Costs(
                *here,
                self._verify[count, widths],
                {name: own for (name, at), own in self._draft.items() if at == count},
            )
            for count in (1, rows)
        )
        return one if rows == 1 else between(one, every, (live - 1) / (rows - 1))


def _ways(drafter: SteppedDrafter) -> Sequence[SteppedDrafter]:
    """The drafters that each have a cost of their own: what it chooses from, or itself."""
    return drafter.ways if isinstance(drafter, DynamicExitDrafter) else (drafter,)
