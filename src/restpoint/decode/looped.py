"""A model that iterates a block, decoded by its own loop: tokens leave it early, or begin it elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from restpoint.decode.target import NativeTarget, Scored
from restpoint.equilibrium.exits import ExitCriterion
from restpoint.model.recurrent.starts import Start
from restpoint.model.unrolled import UnrolledModel


class LoopedTarget(NativeTarget):
    """A recurrent-depth model on its own cache: each token runs as many steps as it needs. One text, no drafts.

    As the model's own forward with these arguments, over the prompt and then over each token.

    Args:
        layered: the model.
        exits: when a token leaves the loop; after the full count if None.
        start: where it begins; as trained if None.
        steps: the full count.
        keys: budget of the cache, see `RecurrentCache`. With a start it should be 1, so that earlier tokens are seen
            at their last step: a step's number says nothing where tokens begin at different distances from rest.
    """

    def __init__(
        self,
        layered: UnrolledModel,
        exits: ExitCriterion | None,
        start: Start | None,
        steps: int,
        keys: int | None = None,
    ):
        super().__init__(layered)
        self.unrolled, self.steps, self.keys = layered, steps, keys
        self.arguments: dict[str, Any] = {"exits": exits, "start": start, "num_steps": steps}

    def _fresh(self) -> dict[str, Any]:
        return {self.unrolled.stack.cache_argument: self.unrolled.stack.inner.new_cache(budget=self.keys)}

    def _step(self, tokens: Sequence[int]) -> Scored:
        ids = torch.tensor([list(tokens)], device=self.layered.device)
        with self._counting():
            output = self.layered.model(input_ids=ids, use_cache=True, logits_to_keep=1, **self.arguments, **self.past)
        return Scored(output.logits[0, -1:], None, self.unrolled.layers_of(int(output.steps[0, -1])))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count layers where they run: a criterion that reads logits runs the coda at every step."""
        inner, work = self.unrolled.stack.inner, self.layered.work

        def ran(_layer: nn.Module, arguments: tuple[Any, ...], _output: Any) -> None:
            work.layer_calls += 1
            work.token_layers += arguments[0].shape[0] * arguments[0].shape[1]

        hooks = [layer.register_forward_hook(ran) for layer in (*inner.prelude, *inner.core, *inner.coda)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
