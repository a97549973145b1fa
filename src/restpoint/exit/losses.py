"""What an early exit costs on one sequence, in [0, 1].

The sequence is the unit, since its tokens depend on one another: each loss is one number for one sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from restpoint.errors import RestpointError
from restpoint.exit.names import named


@dataclass(frozen=True, eq=False)
class Outcome:
    """One sequence with early exits, beside the full depth on the same tokens.

    Attributes:
        tokens: the tokens of the sequence: those that were decoded with exits, or a given text.
        full_tokens: the full depth's most probable token after the same prefix, for each of them.
        log_probability: of each token under the law at its exit, in nats.
        full_log_probability: of each token under the full depth's law after the same prefix, in nats.
        score: of the task, in [0, 1], with exits; None where there is no task.
        full_score: of the task at full depth.

    Raises:
        RestpointError: there is no token, the lengths differ, or a log-probability is not finite or above 0.
    """

    tokens: Int[np.ndarray, " tokens"]
    full_tokens: Int[np.ndarray, " tokens"]
    log_probability: Float[np.ndarray, " tokens"]
    full_log_probability: Float[np.ndarray, " tokens"]
    score: float | None = None
    full_score: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no loss can be taken of."""
        if len(self.tokens) == 0:
            raise RestpointError("tokens: the sequence is empty; a loss needs one token at least")
        for name in ("full_tokens", "log_probability", "full_log_probability"):
            if (length := len(getattr(self, name))) != len(self.tokens):
                raise RestpointError(f"{name}: {length} values for {len(self.tokens)} tokens; give one for each token")
        for name in ("log_probability", "full_log_probability"):
            values = getattr(self, name)
            if not (np.isfinite(values) & (values < _ROUNDING)).all():
                raise RestpointError(
                    f"{name}: a value is above 0 or not finite; give natural logarithms of probabilities, taken before "
                    "any top-k or top-p cut"
                )


_ROUNDING = 1e-4
"""What float32 may put above zero where a probability is 1."""


@runtime_checkable
class Loss(Protocol):
    """What one sequence loses: any function of an `Outcome` whose values lie in [0, 1]. Call it through `checked`."""

    def __call__(self, outcome: Outcome, /) -> float:
        """The loss of one sequence."""
        ...


@runtime_checkable
class Score(Protocol):
    """How well a text solves its task, in [0, 1]: any function of the prompt's ids and the new ones."""

    def __call__(self, prompt: list[int], tokens: list[int], /) -> float:
        """The score of one text; an end token is the last of the new ones."""
        ...


@dataclass(frozen=True)
class Disagreement:
    """Share of the tokens that are not the full depth's most probable token after the same prefix."""

    def __call__(self, outcome: Outcome) -> float:
        return float(np.mean(outcome.tokens != outcome.full_tokens))


@dataclass(frozen=True)
class PerplexityIncrease:
    """clip(mean over tokens of (log p_full - log p_exit) / cap, 0, 1): how much less the exit expects these tokens.

    At the cap of 1 nat a sequence loses everything when its perplexity is e times that of the full depth, and a risk of
    0.02 is a perplexity about 2% higher. Sequences that the exit expects better than the full depth lose nothing; they
    make up for no others.

    Attributes:
        cap: the increase in nats for each token that counts as a loss of 1.

    Raises:
        RestpointError: the cap is not positive.
    """

    cap: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a cap that bounds nothing."""
        if not 0 < self.cap < np.inf:
            raise RestpointError(f"cap is {self.cap}; give a positive number of nats, such as 1")

    def __call__(self, outcome: Outcome) -> float:
        full = outcome.full_log_probability.astype(np.float64)
        increase = np.mean(full - outcome.log_probability)
        return float(np.clip(increase / self.cap, 0, 1))


@dataclass(frozen=True)
class ScoreDrop:
    """max(0, full_score - score) of a task whose scores lie in [0, 1].

    Raises:
        RestpointError: a sequence has no scores.
    """

    def __call__(self, outcome: Outcome) -> float:
        if outcome.score is None or outcome.full_score is None:
            raise RestpointError("score: the score drop needs the score and full_score of every sequence; give both")
        for name, value in (("score", outcome.score), ("full_score", outcome.full_score)):
            if not 0 <= value <= 1:
                raise RestpointError(f"{name} is {value}; the score drop needs scores in [0, 1]: divide by the largest")
        return float(max(0.0, outcome.full_score - outcome.score))


LOSSES: Mapping[str, Loss] = {
    "disagreement": Disagreement(),
    "perplexity-increase": PerplexityIncrease(),
    "score-drop": ScoreDrop(),
}
"""Every loss, by the name that settings and the command line use."""


def loss(name: str) -> Loss:
    """The loss with this name.

    Raises:
        RestpointError: there is none.
    """
    return named("loss", name, LOSSES)


def checked(loss: Loss, outcome: Outcome) -> float:
    """The loss of one sequence, as risk control needs it.

    Raises:
        RestpointError: it is outside [0, 1] or NaN; the message names the loss.
    """
    value = float(loss(outcome))
    if not 0 <= value <= 1:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise RestpointError(
            f"loss: {name} gave {value}; the risk is bounded for losses in [0, 1] only: divide it by the largest that "
            "it can be, or clip it"
        )
    return value
