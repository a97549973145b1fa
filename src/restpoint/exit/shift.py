"""Whether a prompt looks like the text that the exits were calibrated on."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from restpoint.errors import RestpointError

_MOST_NUMBERS = 1000
_DIGITS = 6
_LEVEL = 0.02


@dataclass(frozen=True)
class ShiftMonitor:
    """One number of every calibration sequence, to hold those of new prompts against.

    The number is the mean confidence of the exit signal over a prompt at the first candidate layer; any other will do,
    if it is taken alike of both. The bound on the risk speaks of sequences drawn as those of the calibration; this
    tells where a prompt hardly can be one. It sees only what the number sees: no warning is no proof.

    Make one with `ShiftMonitor.of`.

    Attributes:
        calibration: the numbers in ascending order.

    Raises:
        RestpointError: there is no number, one is not finite, or they are not in order.

    Paper:
        Vovk, Gammerman, Shafer 2005, "Algorithmic learning in a random world"; Bates, Candes, Lei, Romano, Sesia 2023,
        "Testing for outliers with conformal p-values".
    """

    calibration: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        if not self.calibration:
            raise RestpointError("calibration: there is no number in it; give one for each calibration sequence")
        if not all(isfinite(number) for number in self.calibration):
            raise RestpointError("calibration: a number is NaN or infinite; leave that sequence out")
        if any(a > b for a, b in zip(self.calibration, self.calibration[1:], strict=False)):
            raise RestpointError("calibration: the numbers are not in ascending order; use ShiftMonitor.of")

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "ShiftMonitor":
        """Keep a thousand quantiles at most, of six digits each.

        Neither costs validity. The new number is rounded too, and rounding keeps the order and what is exchangeable;
        ties count on both sides. Of more than a thousand numbers every k-th smallest is kept, after leaving out the
        last few so that n + 1 is a multiple of k: the p-values are then those of all n numbers, rounded up to the next
        step of 1 / (kept + 1).

        Args:
            numbers: one for each calibration sequence, in an order that does not depend on them.

        Raises:
            RestpointError: there is no number, or one is not finite.
        """
        numbers = [float(number) for number in numbers]
        step = -(-(len(numbers) + 1) // (_MOST_NUMBERS + 1))
        if step > 1:
            numbers = numbers[: (len(numbers) + 1) // step * step - 1]
        if not all(isfinite(number) for number in numbers):
            raise RestpointError("calibration: a number is NaN or infinite; leave that sequence out")
        return cls(tuple(_rounded(number) for number in sorted(numbers)[step - 1 :: step]))

    def p_value(self, number: float) -> float:
        """2 min((1 + #{c <= x}) / (n+1), (1 + #{c >= x}) / (n+1)), at most 1, of the number x of a new prompt.

        For a prompt drawn as the calibration was, it is at most a with probability a at most. It is never below
        2 / (n+1). A NaN is nowhere: its p-value is the least.
        """
        count = len(self.calibration)
        if number != number:
            return min(1.0, 2 / (count + 1))
        number = _rounded(number)
        below = bisect_right(self.calibration, number)
        above = count - bisect_left(self.calibration, number)
        return min(1.0, 2 * (1 + min(below, above)) / (count + 1))

    def check(self, number: float, level: float = _LEVEL) -> str | None:
        """A warning where the p-value is at most this level, None otherwise.

        Of prompts like those of the calibration it warns of a share of level at most.

        Args:
            number: of the new prompt.
            level: share of false alarms, in (0, 1).

        Raises:
            RestpointError: the level is outside (0, 1), or too small for so few calibration numbers ever to reach.
        """
        count = len(self.calibration)
        if not 0 < level < 1:
            raise RestpointError(f"level is {level}; give a share above 0 and below 1, such as {_LEVEL}")
        if 2 / (count + 1) > level:
            raise RestpointError(
                f"level: no number can be unusual at {level} against {count} of calibration; calibrate on more "
                f"sequences, or give a level of {2 / (count + 1):.3g} at least"
            )
        p_value = self.p_value(number)
        if p_value > level:
            return None
        middle = self.calibration[count // 2]
        side = "above" if number > middle else "below"
        return (
            f"this prompt is unlike the text that the exits were calibrated on: its mean confidence {number:.4g} lies "
            f"far {side} the usual {middle:.4g} (p = {p_value:.3g}). The bound on the risk may not hold for it; decode "
            f"it at full depth, or calibrate on text like it. Of prompts like the calibration's, a share of {level:g} "
            "at most is warned of by chance."
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types."""
        return {"calibration": list(self.calibration)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "ShiftMonitor":
        """What `to_json` saved.

        Raises:
            RestpointError: it holds no list of numbers, or those cannot be searched.
        """
        numbers = saved.get("calibration")
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            raise RestpointError("calibration: what was saved is no list of numbers; calibrate anew")
        return cls(tuple(float(number) for number in numbers))


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
