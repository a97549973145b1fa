"""Recorded texts as views of their tokens, for what is fitted to them."""

from collections.abc import Iterable, Iterator

from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.view import Readout, View, views

_TOKENS = 512  # whose logits over the vocabulary are held at once, for each layer


def blocks_of(
    sequences: Iterable[Float[Tensor, "tokens levels hidden"]], layers: tuple[int, ...], readout: Readout
) -> Iterator[tuple[int, list[View], Float[Tensor, "rows hidden"]]]:
    """The number of the text, views at the layers of some of its tokens, and their h_L; text after text.

    Raises:
        RestpointError: there is no text, a text does not have the states h_0 .. h_L, or the layers do not ascend or
            are not the model's.
    """
    depth = readout.layered.depth
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise RestpointError(f"layers is {layers}; name at least one from 0 to {depth - 1}, ascending, each once")
    index = -1
    for index, sequence in enumerate(sequences):
        if sequence.shape[1] != depth + 1:
            raise RestpointError(
                f"sequences: text {index} has {sequence.shape[1]} states for each token; record h_0 .. h_{depth}, "
                f"{depth + 1} of them"
            )
        for block in sequence.split(_TOKENS):
            yield index, views(block, layers, readout), block[:, -1]
    if index < 0:
        raise RestpointError("sequences: there is none; record at least one text")
