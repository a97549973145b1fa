"""Fit where tokens begin the loop of a model that iterates a block."""

from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.fit.recording import Recording
from restpoint.model.load import Loaded
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM
from restpoint.model.recurrent.starts import PredictedStart, fit_start
from restpoint.progress import Progress

_BATCH = 16


def require_loop(loaded: Loaded) -> None:
    """Refuse a model whose tokens begin no loop.

    Raises:
        RestpointError: it iterates no block, or solves it.
    """
    if not isinstance(loaded.model, RecurrentDepthForCausalLM) or isinstance(loaded.model, DeepEquilibriumForCausalLM):
        raise RestpointError(f"start: {loaded.name} iterates no block a number of times; leave it out")


def solve_start(loaded: Loaded, recorded: Recording, report: Progress) -> PredictedStart:
    """The linear start, on the text that all else is fitted on; one more pass over it."""
    total = len(recorded.fitted)

    def batches(indices: list[int]) -> list[Tensor]:
        return [ids.to(loaded.model.device) for ids, _states in recorded.store.read(indices, batch=_BATCH)]

    fitted = batches(recorded.fitted)
    length = fitted[0].shape[1]
    found = fit_start(
        loaded.model,
        fitted,
        batches(recorded.held_out),
        progress=lambda at: report("solve start", min(at.rows // length, total), total) if at.stage == "fit" else None,
    )
    report("solve start", total, total)
    return PredictedStart(found.predictor)
