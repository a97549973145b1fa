"""What drafters hand to the verification, and the state that they draft from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass
class TokenPath:
    """The text so far, as the loop keeps it.

    Attributes:
        tokens: prompt and everything decoded; the last one is *pending*: it is not in the cache yet.
        rest: h_L of the last position in the cache, whose logits gave the pending token; None where the target
            cannot tell.
    """

    tokens: list[int]
    rest: Float[Tensor, "1 1 hidden"] | None

    @property
    def pending(self) -> int:
        """The newest token, not yet in the cache."""
        return self.tokens[-1]


@dataclass(frozen=True)
class Draft:
    """A chain of drafted tokens that follow the pending one.

    Attributes:
        tokens: the drafted tokens; none is plain decoding.
        law: for each, the distribution it was drawn from; None where it was chosen without chance.
        confidences: what the drafter said of each, known before the token was drawn.
        exit_layer: layers below this one have already run on the pending and all drafted tokens.
        exits: their states before ``exit_layer``; None where no layer has run.
    """

    tokens: list[int] = field(default_factory=list)
    law: Float[Tensor, "drafted vocab"] | None = None
    confidences: list[float] = field(default_factory=list)
    exit_layer: int = 0
    exits: Float[Tensor, "1 block hidden"] | None = None


class Drafter(ABC):
    """Proposes tokens that may follow a path."""

    @abstractmethod
    def propose(self, path: TokenPath, room: int) -> Draft:
        """Draft at most ``room`` tokens after the path's pending token; none is always allowed.

        The law of each token, and whether it is proposed at all, must be fixed before anything of the target at
        that position is seen, and must not depend on the value drawn: exactness rests on it.
        """

    @abstractmethod
    def observe(self, draft: Draft, accepted: int) -> None:
        """Learn how many tokens of a draft were accepted."""
