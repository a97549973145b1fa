"""What is measured along depth: the states of one text, and what adds up over texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError

Readout = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens vocabulary"]]
"""Logits of states by the model's final norm and unembedding."""


@dataclass(frozen=True, eq=False)
class Attention:
    """What attention did in every layer of one text, summed over queries: nothing here is tokens x tokens.

    Attributes:
        received: alpha_k = mean over the queries that see position k of the weight that they give it.
        entropy: of each query's weights in nats, averaged over queries.
        value_norms: ‖v_k‖ of the values of each head's group.
    """

    received: Float[Tensor, "layers heads tokens"]
    entropy: Float[Tensor, "layers heads"]
    value_norms: Float[Tensor, "layers heads tokens"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One text on its way through the layers.

    Attributes:
        states: h_0 .. h_L; h_0 enters the first layer, h_L leaves the last, before the final norm.
        index: number of the text in the corpus. What is measured on a sample of the texts is sampled by it, so that
            parts of a corpus add up to the whole.
        ids: token ids; None where what was read are no tokens.
        domain: the kind of text, where kinds are told apart.
        attention: None where no measure asks for it.
        finish: what the head would be given, were each of the states the last; None where that is the states.
    """

    states: Float[Tensor, "depth tokens hidden"]
    index: int
    ids: Int[Tensor, " tokens"] | None = None
    domain: str = ""
    attention: Attention | None = None
    finish: Callable[[Float[Tensor, "depth tokens hidden"]], Float[Tensor, "depth tokens hidden"]] | None = None

    @cached_property
    def read(self) -> Float[Tensor, "depth tokens hidden"]:
        """The states as the head would read them: an iterate passes through the model's coda first."""
        return self.states if self.finish is None else self.finish(self.states)


class Measure(ABC):
    """Adds up over texts, in memory that does not grow with them.

    All that it knows of what it has seen are ``sums``: float64 or int64 tensors, on the CPU, that start at zero and
    only have things added to them. So two measures of two halves of a corpus merge by adding, up to rounding.

    Attributes:
        name: of the measure, in files and results.
        needs_attention: whether trajectories must come with their attention.
        papers: that it follows.
        sums: by name.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @abstractmethod
    def add(self, trajectory: Trajectory) -> None:
        """Measure one text."""

    @abstractmethod
    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """What it comes to, by name: profiles over depth, histograms, matrices."""

    def merge(self, other: "Measure") -> None:
        """Add what another one has seen.

        Raises:
            RestpointError: it measured a model of another shape.
        """
        for name, value in other.sums.items():
            if name in self.sums and self.sums[name].shape != value.shape:
                raise RestpointError(
                    f"{self.name}: {name} is {tuple(self.sums[name].shape)} here and {tuple(value.shape)} there; "
                    "merge only measurements of one model with the same settings"
                )
            self._add(name, value)

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums that were saved."""
        self.sums = {name: value.clone() for name, value in sums.items()}

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a sum, which begins at zero."""
        if name not in self.sums:
            exact = torch.int64 if value.dtype == torch.int64 else torch.float64
            self.sums[name] = torch.zeros(value.shape, dtype=exact)
        self.sums[name] += value.cpu()
