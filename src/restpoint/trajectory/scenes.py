"""Scenes: a few sentences kept whole, to be looked at."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scene:
    """One sentence on its way through the layers.

    Attributes:
        text: the sentence.
        tokens: its tokens as they are read.
        plane: states in the three leading principal directions of all the states of the sentence, after each has been
            divided by its norm.
        norms: ‖h_l(t)‖.
        predicted: the most probable next token by the lens of every state.
        probability: its probability.
        entropy: of that law in nats.
        settled: the first layer from which the most probable token is the last layer's at every later one.
        domain: the kind of text.
    """

    text: str
    tokens: list[str]
    plane: Float[Tensor, "depth tokens 3"]
    norms: Float[Tensor, "depth tokens"]
    predicted: list[list[str]]
    probability: Float[Tensor, "depth tokens"]
    entropy: Float[Tensor, "depth tokens"]
    settled: Int[Tensor, " tokens"]
    domain: str = ""
