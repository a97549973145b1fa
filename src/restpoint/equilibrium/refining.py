"""The tuned lens proper: a closed-form map carried on by gradient descent on the divergence between the laws."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from restpoint.equilibrium.descent import (
    Head,
    RefineProgress,
    RefineResult,
    RefineSettings,
    Scales,
    descend,
    divergence,
    shuffled,
)
from restpoint.equilibrium.predictors import AffinePredictor
from restpoint.equilibrium.streaming import Pair, Stream, blocks, floating, lift, states_of
from restpoint.errors import RestpointError


def refine(
    predictor: AffinePredictor,
    stream: Stream,
    held_out: Stream,
    head: Head,
    settings: RefineSettings | None = None,
    *,
    progress: Callable[[RefineProgress], None] | None = None,
) -> RefineResult[AffinePredictor]:
    """Minimise mean KL(softmax head(rest) | softmax head(A x + c)) over A and c, from a closed-form fit on.

    Ridge regression minimises the squared error of the state; what is drafted from it is a law, and directions of the
    state matter to that by how the head reads them. Take `fit_affine` first and refine it where minutes of gradient
    steps are to be had. Deterministic: rows are taken in an order that the seed fixes.

    The step is AdamW's on D and e, where the map is x -> A x + c + s (D z + e), z the standardised x and s the rest
    state's deviations. Looks at the held-out divergence, the first before any step, decide when to stop and which map
    is returned, so on these rows it is never worse than the one given.

    Args:
        predictor: an affine predictor in the chunks' dtype, with random features or without; these stay.
        stream: starts a pass over the chunks to refine on; passes follow each other until the steps are done.
        held_out: starts a pass over other chunks.
        head: the model's own; its parameters get no gradient.
        settings: defaults of `RefineSettings` if None.
        progress: called after each look.

    Raises:
        RestpointError: a stream has no row, a layer is missing from a chunk, or the divergence is not finite.

    Paper:
        Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
    """
    settings = settings or RefineSettings()
    given = predictor.affine

    def pairs(of: Stream, rows: int) -> Iterator[Pair]:
        unlifted = ((states_of(chunk, predictor.state_layers), floating(chunk.rest)) for chunk in of())
        for x, y in blocks(((x.flatten(0, 1), y.flatten(0, 1)) for x, y in unlifted), rows):
            yield lift(x, predictor.features), y

    scales = Scales.of(next(pairs(stream, settings.buffer_rows), None))

    def changed(changes: Sequence[Tensor]) -> AffinePredictor:
        return replace(predictor, affine=scales.apply(given, *changes).to())

    return descend(
        predictor,
        [torch.zeros_like(given.matrix, dtype=scales.dtype), torch.zeros_like(given.offset, dtype=scales.dtype)],
        changed,
        _batches(lambda: pairs(stream, settings.buffer_rows), settings),
        lambda: pairs(held_out, settings.rows),
        lambda current, pair: divergence(head, current.affine(pair[0]), pair[1]),
        settings,
        progress,
    )


def _batches(passes: Callable[[], Iterator[Pair]], settings: RefineSettings) -> Iterator[Pair]:
    """Rows of pass after pass, shuffled within buffers."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        rows = 0
        for x, y in passes():
            rows += len(x)
            for part in shuffled(len(x), settings.rows, generator):
                chosen = part.to(x.device)
                yield x[chosen], y[chosen]
        if not rows:
            raise RestpointError("the stream gave no row in a later pass; every pass must yield the same chunks")
