"""A compiled pass on a GPU, recorded once and replayed: one launch in the place of hundreds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_KEPT = 4


class Replayed:
    """Replays a CUDA graph of a pass for each cache that it is given.

    A recording holds addresses. So inputs are copied to tensors of its own, outputs are copied out of it, and a cache
    whose tensors lie elsewhere (another one, or one that has grown) gets a recording of its own; the oldest is dropped.

    Args:
        program: the compiled pass; it may not wait for the device.
    """

    def __init__(self, program: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]):
        self.program = program
        self.recordings: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor], Any]] = {}

    def __call__(self, inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        key = tuple(tensor.data_ptr() for tensor in storage)
        if key not in self.recordings:
            if len(self.recordings) == _KEPT:
                del self.recordings[next(iter(self.recordings))]
            self.recordings[key] = self._record(inputs, storage)
        graph, places, _, outputs = self.recordings[key]
        for place, given in zip(places, inputs, strict=True):
            place.copy_(given, non_blocking=True)
        graph.replay()
        logits, hidden = outputs
        return logits.clone(), hidden.clone()

    def _record(self, inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> Any:
        """Record a pass that writes what the pass itself will write again, so recording leaves no trace."""
        places = [given.clone() for given in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.program(places, storage)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.program(places, storage)
        return graph, places, list(storage), outputs  # the cache is held: its addresses may not be given to others
