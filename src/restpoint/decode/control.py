"""How many tokens to draft: expected gain against measured cost, token by token, none allowed."""

from dataclasses import dataclass, field

from restpoint.decode.costs import Costs

_PRIOR_WEIGHT = 40.0
_FORGET = 0.98
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 64


@dataclass(frozen=True)
class Calibration:
    """Acceptance to expect from a drafter's confidence.

    Attributes:
        edges: inner edges of the confidence bins, ascending.
        acceptance: for the first drafted token and for later ones, the acceptance in each bin.
        share: how often each bin occurs, likewise.
    """

    edges: tuple[float, ...]
    acceptance: tuple[tuple[float, ...], tuple[float, ...]]
    share: tuple[tuple[float, ...], tuple[float, ...]]

    def bin(self, confidence: float) -> int:
        """Index of the bin that a confidence falls into."""
        return sum(confidence >= edge for edge in self.edges)

    def mean(self, step: int) -> float:
        """Acceptance to expect before the confidence is known."""
        kind = min(step, 1)
        return sum(a * s for a, s in zip(self.acceptance[kind], self.share[kind], strict=True))


@dataclass
class _Estimate:
    """A running acceptance: a prior worth some observations, then what was seen, old evidence fading."""

    accepted: float
    seen: float

    @property
    def mean(self) -> float:
        return self.accepted / self.seen

    def add(self, accepted: bool) -> None:
        self.accepted = _FORGET * self.accepted + accepted
        self.seen = _FORGET * self.seen + 1


@dataclass
class Controller:
    """Chooses the draft length of every round for the highest expected rate.

    A round that verifies d drafted tokens emits 1 + sum_{i<=d} a_1..a_i tokens on average and costs
    d c_draft + c_verify(d + 1) seconds, a_i being the calibrated acceptance given the confidence of token i. With r
    the rate reached so far (tokens per second), the next token is drafted, and once its confidence is known verified,
    while some continuation adds more tokens than r times the seconds it adds. Acceptances are updated as outcomes are
    seen. Where drafting does not pay, rounds are plain, with a probe after a pause that doubles up to 64 rounds.

    Decisions rest on confidences, which are known before a token is drawn; so the law of what is proposed is fixed in
    time, and verification stays exact.

    Attributes:
        costs: seconds of passes and of drafted tokens on this machine.
        calibration: acceptance by confidence.
        longest: largest number of drafted tokens in a round.
        fixed: where given, that many tokens are drafted in every round, whatever is expected.
    """

    costs: Costs
    calibration: Calibration
    longest: int = 7
    fixed: int | None = None
    _by_bin: list[list[_Estimate]] = field(init=False)
    _by_step: list[_Estimate] = field(init=False)
    _tokens: float = field(init=False)
    _seconds: float = field(init=False)
    _pause: int = field(init=False, default=0)
    _next_pause: int = field(init=False, default=_FIRST_PAUSE)

    def __post_init__(self) -> None:
        """Start from the calibration."""
        self.longest = min(self.longest, self.costs.longest)
        self._by_bin = [
            [_Estimate(a * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for a in bins] for bins in self.calibration.acceptance
        ]
        self._by_step = [_Estimate(self.calibration.mean(step) * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for step in (0, 1)]
        best = max(range(self.longest + 1), key=lambda drafted: self.expected_tokens(drafted) / self.seconds(drafted))
        self._tokens = 20 * self.expected_tokens(best)
        self._seconds = 20 * self.seconds(best)

    def expected_tokens(self, drafted: int) -> float:
        """Tokens that a round with so many drafted ones emits on average."""
        first, later = (estimate.mean for estimate in self._by_step)
        return 1.0 + sum(first * later**index for index in range(drafted))

    def seconds(self, drafted: int) -> float:
        """What such a round costs."""
        return drafted * self.costs.draft + self.costs.verify[drafted]

    def another(self, drafted: int, reach: float, room: int) -> bool:
        """Whether to compute one more draft after ``drafted`` ones that all stand with probability ``reach``."""
        room = min(room, self.longest)
        if self.fixed is not None:
            return drafted < min(self.fixed, room)
        if drafted == 0 and self._pause > 0:
            self._pause -= 1
            return False
        if drafted >= room:
            return False
        pays = self._pays(drafted, drafted, reach, room)
        if drafted == 0 and not pays:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
            return True
        return pays

    def include(self, drafted: int, reach: float, confidence: float, room: int) -> float:
        """Probability that token ``drafted + 1`` stands with all before it, or 0 where it should not be verified.

        Args:
            drafted: tokens already in the draft.
            reach: probability that they all stand.
            confidence: what the drafter says of the token to come.
            room: largest length of the draft.
        """
        kind = min(drafted, 1)
        reach *= self._by_bin[kind][self.calibration.bin(confidence)].mean
        if self.fixed is None and not self._pays(drafted, drafted + 1, reach, min(room, self.longest)):
            return 0.0
        return reach

    def observe(self, confidences: list[float], accepted: int) -> None:
        """Learn from a round: the confidences of what was verified, and how many of these tokens stood."""
        for step, confidence in enumerate(confidences[: accepted + 1]):
            kind, stood = min(step, 1), step < accepted
            self._by_bin[kind][self.calibration.bin(confidence)].add(stood)
            self._by_step[kind].add(stood)
        if accepted:
            self._next_pause = _FIRST_PAUSE
        self._tokens = _FORGET * self._tokens + accepted + 1
        self._seconds = _FORGET * self._seconds + self.seconds(len(confidences))

    def _pays(self, drafted: int, computed: int, reach: float, room: int) -> bool:
        """Whether some draft longer than ``drafted`` is worth its time, with ``computed`` tokens drafted already.

        ``reach`` is the probability that all computed tokens stand.
        """
        rate = self._tokens / self._seconds
        verify, later = self.costs.verify, self._by_step[1].mean
        gain = reach if computed > drafted else 0.0
        if computed > drafted and gain > rate * (verify[computed] - verify[drafted]):
            return True
        for length in range(computed + 1, room + 1):
            reach *= self._by_step[0].mean if length == 1 else later
            gain += reach
            cost = (length - computed) * self.costs.draft + verify[length] - verify[drafted]
            if gain > rate * cost:
                return True
        return False
