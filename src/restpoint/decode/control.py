"""Which drafted tokens are worth verifying: expected gain against measured cost."""

from collections.abc import Sequence
from dataclasses import dataclass

_FORGET = 0.97
_ROUNDS = 5.0


@dataclass
class Pace:
    """The rate reached so far on one text.

    A round that verifies n drafted nodes emits 1 + (sum of the probabilities that each stands) tokens on average. With
    r the rate reached so far, a node, or a level of a drafter, is worth its time while it adds more tokens than r
    times the seconds it adds: the rule that maximises the long-run rate once r is that rate.

    Attributes:
        tokens: tokens of recent rounds.
        seconds: what these rounds cost.
    """

    tokens: float
    seconds: float

    @classmethod
    def plain(cls, seconds: float) -> "Pace":
        """Begin with the rate of plain rounds."""
        return cls(_ROUNDS, _ROUNDS * seconds)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def add(self, tokens: float, seconds: float) -> None:
        """Add a round; old ones fade."""
        self.tokens = _FORGET * self.tokens + tokens
        self.seconds = _FORGET * self.seconds + seconds


def best_count(reaches: Sequence[float], verify: Sequence[float], rate: float, least: int = 0) -> int:
    """How many nodes to verify: the n that maximises the sum of the first n reaches - rate * verify[n].

    Args:
        reaches: probability that each node stands, in the order in which nodes are taken.
        verify: seconds of a pass over 1, 2, 3, .. tokens; a draft of n nodes is a pass over n + 1.
        rate: tokens per second that the time is worth.
        least: the first so many are taken in any case.
    """
    best, best_gain, tokens = least, float("-inf"), 0.0
    for count in range(min(len(reaches), len(verify) - 1) + 1):
        if count:
            tokens += reaches[count - 1]
        gain = tokens - rate * verify[count]
        if count >= least and gain > best_gain:
            best, best_gain = count, gain
    return best
