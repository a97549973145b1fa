"""What a round costs beside the pass of the model: tables, trees, coupling."""

import statistics
import time
from collections.abc import Callable, Sequence

from restpoint.decode.draft import ROOT, Candidates, Draft, InstantDrafter, Speculator, TokenPath
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import LayeredTarget, Scored
from restpoint.decode.verifiers.base import Verifier
from restpoint.model.load import context_length

_SIZES = (2, 12)
_ROUNDS = 10


def measure_overhead(
    target: LayeredTarget,
    sampler: Sampler,
    verifier: Verifier | None,
    speculator: Callable[[InstantDrafter, int], Speculator],
) -> tuple[float, float]:
    """Seconds that a round with drafts takes beyond a plain one, passes not counted: of the round, and of each node.

    Medians over a few rounds of a text that nothing is known of; a fraction of a second on a small model. It stays
    within the model's context; where that holds no such round, nothing is counted.

    Args:
        target: the model; its cache is used up.
        sampler: how tokens are chosen, for this measurement only.
        verifier: couples draft and target.
        speculator: makes one that verifies so many nodes in every round, with this drafter among its own.
    """
    vocabulary = target.layered.vocabulary_size
    plain = [seconds for seconds, _ in _rounds(target, sampler, verifier, None)]
    few, many = (
        [
            seconds
            for seconds, nodes in _rounds(target, sampler, verifier, speculator(_Anything(vocabulary), size))
            if nodes
        ]
        for size in _SIZES
    )
    if not (plain and few and many):  # a context of a few tokens: too short for a round worth measuring
        return 0.0, 0.0
    low, high = statistics.median(few), statistics.median(many)
    node = max(0.0, (high - low) / (_SIZES[1] - _SIZES[0]))
    return max(0.0, low - statistics.median(plain) - _SIZES[0] * node), node


class _Anything(InstantDrafter):
    """Names tokens without a reason, as a tree: a stem, and some beside each of its tokens."""

    name = "anything"

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """See :meth:`InstantDrafter.candidates`."""
        count = min(_SIZES[1], self.vocabulary, 3 * room)
        tokens = [(path.pending + 1 + node) % self.vocabulary for node in range(count)]
        return Candidates(tokens, [node - node % 3 - 3 if node >= 3 else ROOT for node in range(count)], [0.5] * count)


def _rounds(
    target: LayeredTarget, sampler: Sampler, verifier: Verifier | None, speculator: Speculator | None
) -> list[tuple[float, float]]:
    """Of each round: seconds beside the pass, and nodes."""
    vocabulary = target.layered.vocabulary_size
    limit = context_length(target.layered.model)
    prompt = [(7 * place + 1) % vocabulary for place in range(16)] * 2
    prompt = prompt[: max(1, limit // 4)] if limit else prompt
    stopping = Stopping(_ROUNDS * (2 + _SIZES[1]), context_length=limit)
    passes = _Timed(target)
    rounds: list[Round] = []
    seconds: list[float] = []
    for turn in decode(passes, prompt, sampler, stopping, speculator, verifier):
        rounds.append(turn)
        seconds.append(turn.draft_seconds + turn.verify_seconds - passes.seconds)
        passes.seconds = 0.0
        if len(rounds) > _ROUNDS + 1:
            break
    return [(own, float(turn.drafted)) for own, turn in zip(seconds[2:], rounds[2:], strict=True)]


class _Timed(LayeredTarget):
    """A target that adds up the time of its passes."""

    def __init__(self, target: LayeredTarget):
        self.target = target
        self.seconds = 0.0
        self.widths = target.widths
        super().__init__(target.layered)
        self.prefill = target.prefill
        self.keep = target.keep

    def score(self, pending: Sequence[int], drafts: Sequence[Draft]) -> list[Scored]:
        """See :meth:`LayeredTarget.score`."""
        began = time.perf_counter()
        scored = self.target.score(pending, drafts)
        self.seconds += time.perf_counter() - began
        return scored
