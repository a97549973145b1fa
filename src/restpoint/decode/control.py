"""How many tokens to draft: expected gain against measured cost, token by token, none allowed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from restpoint.decode.costs import Costs

_PRIOR_WEIGHT = 20.0
_GAIN_WEIGHT = 0.06
_FORGET = 0.97
_ROUNDS = 5.0
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
class Pace:
    """The rate reached so far, shared by all that draft for one text.

    Attributes:
        tokens: tokens of recent rounds; zero before the first estimate.
        seconds: what these rounds cost.
    """

    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def start(self, seconds: float) -> None:
        """Begin with the rate of plain rounds, unless a rate is known."""
        if self.seconds == 0:
            self.tokens, self.seconds = _ROUNDS, _ROUNDS * seconds

    def add(self, tokens: float, seconds: float) -> None:
        """Add a round; old ones fade."""
        self.tokens = _FORGET * self.tokens + tokens
        self.seconds = _FORGET * self.seconds + seconds


@dataclass
class Controller:
    """Chooses the draft length of every round for the highest expected rate.

    A round that verifies d drafted tokens emits 1 + sum_{i<=d} a_1..a_i tokens on average and costs
    c_draft(d) + c_verify(d + 1) seconds, a_i being the calibrated acceptance given the confidence of token i. With r
    the rate reached so far (tokens per second), the next token is drafted, and once its confidence is known verified,
    while some continuation adds more tokens than r times the seconds it adds. Acceptances are updated as outcomes are
    seen.

    What rounds with drafts really gained over plain ones, at the going rate, is averaged too; where that turns
    negative, rounds are plain, with a probe after a pause that doubles up to 64 rounds.

    Decisions rest on confidences, which are known before a token is drawn; so the law of what is proposed is fixed in
    time, and verification stays exact.

    Attributes:
        costs: seconds of passes and of drafted tokens on this machine.
        calibration: acceptance by confidence.
        longest: largest number of drafted tokens in a round.
        fixed: where given, that many tokens are drafted in every round, whatever is expected.
        pace: the rate, shared where several drafters take turns.
    """

    costs: Costs
    calibration: Calibration
    longest: int = 10
    fixed: int | None = None
    pace: Pace = field(default_factory=Pace)
    _by_bin: list[list[_Estimate]] = field(init=False)
    _by_step: list[_Estimate] = field(init=False)
    _gained: float = field(init=False)
    _pause: int = field(init=False, default=0)
    _next_pause: int = field(init=False, default=_FIRST_PAUSE)

    def __post_init__(self) -> None:
        """Start from the calibration."""
        self.longest = min(self.longest, self.costs.longest)
        self._by_bin = [
            [_Estimate(a * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for a in bins] for bins in self.calibration.acceptance
        ]
        self._by_step = [_Estimate(self.calibration.mean(step) * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for step in (0, 1)]
        self.pace.start(self.costs.verify[0])
        self._gained = self.gain(None, self.longest)

    def expected_tokens(self, drafted: int) -> float:
        """Tokens that a round with so many drafted ones emits on average."""
        first, later = (estimate.mean for estimate in self._by_step)
        return 1.0 + sum(first * later**index for index in range(drafted))

    def seconds(self, drafted: int) -> float:
        """What such a round costs."""
        return self.costs.drafting(drafted) + self.costs.verify[drafted]

    def acceptance(self, step: int, confidence: float) -> float:
        """Probability that a drafted token stands where all before it do."""
        return self._by_bin[min(step, 1)][self.calibration.bin(confidence)].mean

    def gain(self, confidences: Sequence[float] | None, room: int) -> float:
        """Tokens above the going rate that the best draft of a round brings; 0 where none pays.

        Args:
            confidences: of each token to come, where they are known beforehand; None for the average.
            room: largest length of the draft.
        """
        return max((gain for gain in self._gains(confidences, room)), default=0.0)

    def best_length(self, confidences: Sequence[float], room: int) -> int:
        """Length of the best draft, where all confidences are known beforehand."""
        room = min(room, self.longest, len(confidences))
        if self.fixed is not None:
            return min(self.fixed, room)
        gains = self._gains(confidences, room)
        return max(range(len(gains)), key=gains.__getitem__)

    def _gains(self, confidences: Sequence[float] | None, room: int) -> list[float]:
        """What drafts of length 0, 1, 2, .. bring."""
        known = room if confidences is None else min(room, len(confidences))
        gains, reach, tokens = [0.0], 1.0, 0.0
        for step in range(min(known, self.longest)):
            mean = self._by_step[min(step, 1)].mean
            reach *= mean if confidences is None else self.acceptance(step, confidences[step])
            tokens += reach
            gains.append(tokens - self.pace.rate * (self.seconds(step + 1) - self.seconds(0)))
        return gains

    def another(self, drafted: int, reach: float, room: int) -> bool:
        """Whether to compute one more draft after ``drafted`` ones that all stand with probability ``reach``."""
        room = min(room, self.longest)
        if self.fixed is not None:
            return drafted < min(self.fixed, room)
        if drafted >= room:
            return False
        if drafted > 0:
            return self._pays(drafted, drafted, reach, room)
        if self._gained > 0:
            return True
        if self._pause > 0:
            self._pause -= 1
            return False
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        return True

    def include(self, drafted: int, reach: float, confidence: float, room: int) -> float:
        """Probability that token ``drafted + 1`` stands with all before it, or 0 where it should not be verified.

        Args:
            drafted: tokens already in the draft.
            reach: probability that they all stand.
            confidence: what the drafter says of the token to come.
            room: largest length of the draft.
        """
        reach *= self.acceptance(drafted, confidence)
        if self.fixed is None and not self._pays(drafted, drafted + 1, reach, min(room, self.longest)):
            return 0.0
        return reach

    @property
    def usual_gain(self) -> float:
        """Tokens above the going rate that recent rounds with drafts brought."""
        return self._gained

    def observe(self, confidences: list[float], accepted: int, computed: int) -> None:
        """Learn from a round.

        Args:
            confidences: of the drafted tokens that were verified.
            accepted: how many of these stood.
            computed: drafted tokens that were computed, verified or not; 0 for a round without an attempt.
        """
        for step, confidence in enumerate(confidences[: accepted + 1]):
            kind, stood = min(step, 1), step < accepted
            self._by_bin[kind][self.calibration.bin(confidence)].add(stood)
            self._by_step[kind].add(stood)
        seconds = self.costs.drafting(computed) + self.costs.verify[len(confidences)]
        if computed:
            gained = accepted - self.pace.rate * (seconds - self.costs.verify[0])
            self._gained += _GAIN_WEIGHT * (gained - self._gained)
            if self._gained > 0:
                self._next_pause = _FIRST_PAUSE
        self.pace.add(accepted + 1.0, seconds)

    def _pays(self, drafted: int, computed: int, reach: float, room: int) -> bool:
        """Whether some draft longer than ``drafted`` is worth its time, with ``computed`` tokens drafted already.

        ``reach`` is the probability that all computed tokens stand.
        """
        rate, costs = self.pace.rate, self.costs
        spent, verified = costs.drafting(computed), costs.verify[drafted]
        gain = reach if computed > drafted else 0.0
        if gain > rate * (costs.verify[computed] - verified) and computed > drafted:
            return True
        for length in range(computed + 1, room + 1):
            reach *= self._by_step[min(length - 1, 1)].mean
            gain += reach
            if gain > rate * (costs.drafting(length) - spent + costs.verify[length] - verified):
                return True
        return False
