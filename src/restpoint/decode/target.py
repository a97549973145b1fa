"""The model whose law is kept: prefill, score a draft, commit what stands."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel


@dataclass(frozen=True)
class Scored:
    """The target's view of a block.

    Attributes:
        logits: one row for each token of the block.
        rest: h_L of each token of the block; None where the target cannot tell.
    """

    logits: Float[Tensor, "block vocab"]
    rest: Float[Tensor, "1 block hidden"] | None


class Target(ABC):
    """A causal LM that is being decoded, with its cache. One text at a time."""

    def __init__(self, layered: LayeredModel):
        self.layered = layered

    @abstractmethod
    def prefill(self, prompt: list[int]) -> Scored:
        """Start a new text: run the prompt, forget what was before. Only the last token is scored."""

    @abstractmethod
    def score(self, pending: int, draft: Draft) -> Scored:
        """Run the pending and the drafted tokens in one pass."""

    @abstractmethod
    def commit(self, count: int) -> None:
        """Keep the first ``count`` tokens of the block that was scored last."""

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.layered.device)


class LayeredTarget(Target):
    """A model on its slot cache: drafts are verified in one pass, rejected ones cost nothing to forget."""

    def __init__(self, layered: LayeredModel):
        super().__init__(layered)
        self.cache: SlotCache = layered.cache()

    def prefill(self, prompt: list[int]) -> Scored:
        """See :meth:`Target.prefill`."""
        layered = self.layered
        self.cache = layered.cache(capacity=max(256, 2 * len(prompt)))
        rest = layered.run(layered.plan(self._ids(prompt), self.cache))[:, -1:]
        self.cache.commit([len(prompt)])
        return Scored(layered.logits(rest)[0], rest)

    def score(self, pending: int, draft: Draft) -> Scored:
        """See :meth:`Target.score`. Resumes at the draft's exit layer, where it has one."""
        layered = self.layered
        plan = layered.plan(self._ids([pending, *draft.tokens]), self.cache)
        start = 0 if draft.exits is None else draft.exit_layer
        rest = layered.run(plan, start, hidden=draft.exits)
        return Scored(layered.logits(rest)[0], rest)

    def commit(self, count: int) -> None:
        """See :meth:`Target.commit`."""
        self.cache.commit([count])


class NativeTarget(Target):
    """A model on its own cache, by its own forward: for families whose cache cannot roll back. It takes no drafts."""

    def __init__(self, layered: LayeredModel):
        super().__init__(layered)
        self.past: dict[str, Any] = {}

    def prefill(self, prompt: list[int]) -> Scored:
        """See :meth:`Target.prefill`."""
        self.past = {}
        return self._step(prompt)

    def score(self, pending: int, draft: Draft) -> Scored:
        """See :meth:`Target.score`; the draft must be empty."""
        if draft.tokens:
            raise RestpointError("drafter: this model family cannot verify drafts; decode it plainly (drafter=None)")
        return self._step([pending])

    def commit(self, count: int) -> None:
        """Nothing to do: its cache keeps every token it has seen."""

    def _step(self, tokens: list[int]) -> Scored:
        stack = self.layered.stack
        output = stack.model(input_ids=self._ids(tokens), use_cache=True, **self.past)
        self.past = {stack.cache_argument: getattr(output, stack.cache_argument)}
        self.layered.work.layer_calls += self.layered.depth
        self.layered.work.token_layers += self.layered.depth * len(tokens)
        return Scored(output.logits[0, -1:], None)
