"""Two atlases held beside each other, layer by layer or, where depths differ, at equal shares of the depth."""

from dataclasses import dataclass

import numpy as np

from restpoint.errors import RestpointError
from restpoint.trajectory.atlas import Atlas

PROFILES = {
    "geometry": ("relative_step.mean", "angle.mean", "curvature.mean", "anisotropy", "effective_rank", "rank_collapse"),
    "lens": ("logit.entropy", "logit.kl", "logit.agreement"),
    "sinks": ("sink_rate", "value_drain"),
    "transport": ("unit.gaussian.to_final.relative", "unit.gaussian.between.relative"),
}
"""What is compared, by measure."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the depth, where values are read off."""


@dataclass(frozen=True, eq=False)
class Compared:
    """One profile of both atlases.

    Attributes:
        name: measure and quantity.
        first: values at :data:`SHARES` of the first atlas's depth, between layers linearly.
        second: likewise of the second.
        distance: mean absolute difference over 101 evenly spaced shares.
    """

    name: str
    first: list[float]
    second: list[float]
    distance: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """What both atlases have measured.

    Attributes:
        names: of the models.
        layers: of each.
        notes: on what must be kept in mind: unlike texts, depths, lengths.
        profiles: in the order of :data:`PROFILES`.
    """

    names: tuple[str, str]
    layers: tuple[int, int]
    notes: list[str]
    profiles: list[Compared]


def compare(first: Atlas, second: Atlas) -> Comparison:
    """Compare the profiles that both atlases hold. A profile runs over the whole depth, whatever its number of layers.

    Raises:
        RestpointError: they have measured nothing in common.
    """
    profiles = []
    for measure, names in PROFILES.items():
        for name in names:
            values = [atlas.results.get(measure, {}).get(name) for atlas in (first, second)]
            if values[0] is None or values[1] is None:
                continue
            one, other = (value.numpy() for value in values if value is not None)
            fine = np.linspace(0.0, 1.0, 101)
            distance = float(np.nanmean(np.abs(_at(one, fine) - _at(other, fine))))
            coarse = np.array(SHARES)
            profiles.append(
                Compared(f"{measure}.{name}", _at(one, coarse).tolist(), _at(other, coarse).tolist(), distance)
            )
    if not profiles:
        raise RestpointError("atlases: they have measured nothing in common; analyse both with the same measures")
    subjects = first.subject, second.subject
    notes = []
    if subjects[0].layers != subjects[1].layers:
        notes.append(
            f"depths differ ({subjects[0].layers} and {subjects[1].layers} layers): profiles are held beside each "
            "other at equal shares of the depth"
        )
    if first.corpus["hash"] != second.corpus["hash"]:
        notes.append("they have read different texts, or cut them differently")
    names = tuple(one.model + (" (random weights)" if one.untrained else "") for one in subjects)
    return Comparison((names[0], names[1]), (subjects[0].layers, subjects[1].layers), notes, profiles)


def _at(profile: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.interp(shares, np.linspace(0.0, 1.0, len(profile)), profile)
