"""Which drafted tokens are worth verifying: expected gain against measured cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from restpoint.decode.costs import Costs

_FORGET = 0.97
_ROUNDS = 5.0
_TRIAL = 8
_REST = 16
_LONGEST = 192
_KEPT = 6.0
_KEEP = 0.9


@dataclass
class Pace:
    """The rate that a text has reached so far.

    A round that verifies n drafted nodes emits 1 + (sum of the probabilities that each stands) tokens on average. With
    r the rate reached so far, a node, or a level of a drafter, is worth its time while it adds more tokens than r
    times the time it adds: the rule that maximises the long-run rate once r is that rate.

    Attributes:
        tokens: tokens of recent rounds.
        time: what these rounds took, in plain passes of as many rows.
    """

    tokens: float = _ROUNDS
    time: float = _ROUNDS

    @property
    def rate(self) -> float:
        """Tokens by time; 1 for plain decoding."""
        return self.tokens / self.time

    @property
    def worth(self) -> float:
        """Tokens that a unit of time is worth: what is saved goes into plain decoding at least."""
        return max(1.0, self.rate)

    def add(self, tokens: float, time: float) -> None:
        """Add a round; old ones fade."""
        self.tokens = _FORGET * self.tokens + tokens
        self.time = _FORGET * self.time + time


@dataclass
class Rest:
    """Rounds in which nobody is asked to draft, where drafting has cost more than it brought.

    After a trial of eight rounds whose rate is below that of plain decoding, nobody is asked for 16 rounds;
    after each further trial, half as long, for twice as many as before: where nothing can be drafted, less and less is
    spent on trying.

    Attributes:
        left: rounds left of the rest.
    """

    left: int = 0
    _length: int = _REST
    _trial: int = _TRIAL
    _tried: int = 0

    def after(self, rate: float) -> bool:
        """A round is over, and the rate so far is this: whether a rest has just ended, and a new trial begins."""
        if self.left:
            self.left -= 1
            return self.left == 0
        self._tried += 1
        if self._tried >= self._trial and rate < 1.0:
            self.left, self._length = self._length, min(2 * self._length, _LONGEST)
            self._tried, self._trial = 0, _TRIAL // 2
        elif self._tried >= 2 * _TRIAL:
            self._length, self._trial = _REST, _TRIAL
        return False


class Control:
    """What the rounds of a batch cost, and how wide they are; the fusions of its rows share it.

    All rows wait for the same pass, which is as wide as the widest tree: up to that width nodes cost nothing. So a
    width is chosen for all of them. With r_i the rate of row i so far and t_i the time that it still needs, another
    node is worth its time while sum_i t_i (tokens that it adds in row i) / r_i > (sum_i t_i) x (time that it adds). For
    one text that is the rule of :class:`Pace`; in a batch it speeds up those that the others will wait for, and lets no
    row that runs ahead widen the pass for all. The rows that ask for the widest pass are also those whose chances are
    overestimated most, so in a batch gains count by the share of expected tokens that lately stood. Time is counted in
    plain passes, so that rates hold while rows end.

    Args:
        costs: measured seconds, by the number of rows.
        rows: rows to begin with.
        overhead: seconds of a row's round with drafts beside passes and drafts, and of each node in it.

    Attributes:
        rows: rows of the round.
        costs: measured seconds for so many rows.
        time: what the round costs, as far as it is planned.
    """

    time: float = 1.0

    def __init__(self, costs: Callable[[int], Costs], rows: int = 1, overhead: tuple[float, float] = (0.0, 0.0)):
        self._costs_of = costs
        self._overhead = overhead
        self._expected = self._stood = _KEPT
        self._price(rows)

    @classmethod
    def alone(cls, costs: Costs) -> "Control":
        """For one text."""
        return cls(lambda _rows: costs)

    def begin(self, rows: int) -> None:
        """A round of so many rows begins."""
        self.time = 1.0
        if rows != self.rows:
            self._price(rows)

    def _price(self, rows: int) -> None:
        """Passes of so many rows, in plain ones."""
        self.rows, self.costs = rows, self._costs_of(rows)
        plain = self.costs.verify[0]
        node = rows * self._overhead[1]
        self._passes = [(seconds + count * node) / plain for count, seconds in enumerate(self.costs.verify)]

    @property
    def node_time(self) -> float:
        """What another node in every row adds to the pass, on average."""
        count = min(16, self.costs.largest)
        return (self._passes[count] - 1.0) / count

    def time_of_more(self, gains: Sequence[float], nodes: int) -> float:
        """What so many further nodes add to the pass that is best for a row without them."""
        width = best_count(gains, self._passes, 1.0)
        return self._passes[min(width + nodes, self.costs.largest)] - self._passes[width]

    def level_time(self, drafter: str, levels: int) -> float:
        """What another level of a drafter takes after so many."""
        seconds = self.costs.drafting(drafter, levels + 1) - self.costs.drafting(drafter, levels)
        return seconds / self.costs.verify[0]

    def width(self, gains: Sequence[Sequence[float]], least: int = 0) -> int:
        """How many nodes to verify in each row, as far as it has so many.

        Args:
            gains: for each row, in the order in which its nodes are taken, the time that each is expected to save,
                weighted by rows with weights of mean 1.
            least: the first so many are taken in any case.
        """
        trust = self._stood / self._expected if self.rows > 1 else 1.0
        together = [trust * sum(column) for column in zip_longest(*gains, fillvalue=0.0)]
        return best_count(together, self._passes, float(self.rows), least)

    def observe(self, expected: float, stood: int) -> None:
        """Nodes of one row stood, where so many were expected to."""
        share = 1.0 / self.rows
        self._expected = _KEEP**share * self._expected + share * expected
        self._stood = _KEEP**share * self._stood + share * stood

    def spend(self, nodes: int, drafter: str = "", levels: int = 0) -> None:
        """The round verifies so many nodes in its widest row, after so many levels of a drafter."""
        seconds = self.costs.drafting(drafter, levels) + self.rows * self._overhead[0]
        self.time = self._passes[nodes] + seconds / self.costs.verify[0]


def best_count(reaches: Sequence[float], verify: Sequence[float], rate: float, least: int = 0) -> int:
    """How many nodes to verify: the n that maximises the sum of the first n reaches - rate * verify[n].

    Args:
        reaches: probability that each node stands, in the order in which nodes are taken.
        verify: time of a pass over 1, 2, 3, .. tokens; a draft of n nodes is a pass over n + 1.
        rate: tokens that a unit of time is worth.
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
