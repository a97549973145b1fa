"""Passes over texts that are given: what each token loses, which token it predicts, and how many steps it took."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from restpoint.equilibrium.exits import ExitCriterion
from restpoint.equilibrium.solvers.method import Method
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.starts import Start


@dataclass(frozen=True, eq=False)
class Passed:
    """What a pass over texts gave for every token that has a next one.

    Attributes:
        loss: -log of the probability of the token that follows, nats.
        best: the most probable token.
        steps: core steps.
    """

    loss: Float[Tensor, "texts tokens"]
    best: Int[Tensor, "texts tokens"]
    steps: Int[Tensor, "texts tokens"]

    def mean_loss(self) -> Float64[Tensor, " texts"]:
        """Of each text."""
        return self.loss.double().mean(-1)

    def mean_steps(self) -> Float64[Tensor, " texts"]:
        """Of each text."""
        return self.steps.double().mean(-1)

    def differs(self, full: "Passed") -> Float64[Tensor, " texts"]:
        """Share of tokens that are not the other's."""
        return (self.best != full.best).double().mean(-1)


@torch.no_grad()
def whole(
    model: RecurrentDepthForCausalLM,
    ids: Int[Tensor, "texts length"],
    num_steps: int,
    exits: ExitCriterion | None = None,
    batch: int = 20,
) -> Passed:
    """One pass over each text, whose tokens stop by themselves.

    Where the criterion reads logits, tokens see earlier ones at the states that these have by then; see
    `iterate_until_exit`.
    """
    found = []
    for part in ids.split(batch):
        output = model(part[:, :-1], num_steps=num_steps, exits=exits, use_cache=False)
        found.append(_passed(output.logits, output.steps, part[:, 1:]))
    return _joined(found, 0)


@torch.no_grad()
def token_by_token(
    model: RecurrentDepthForCausalLM,
    ids: Int[Tensor, "texts length"],
    num_steps: int,
    exits: ExitCriterion | None = None,
    start: Start | None = None,
    solver: Method | None = None,
    budget: int | None = None,
) -> Passed:
    """The texts side by side, one token of each a pass, with a cache: as they would be decoded."""
    cache = model.new_cache(budget=budget, capacity=ids.shape[1])
    found = []
    for place in range(ids.shape[1] - 1):
        output = model(
            ids[:, place : place + 1],
            cache=cache,
            num_steps=num_steps,
            exits=exits,
            start=start,
            solver=solver,
            use_cache=True,
        )
        found.append(_passed(output.logits, output.steps, ids[:, place + 1 : place + 2]))
    return _joined(found, 1)


def _passed(logits: Tensor, steps: Tensor, following: Tensor) -> Passed:
    loss = -logits.float().log_softmax(-1).gather(-1, following.unsqueeze(-1)).squeeze(-1)
    return Passed(loss, logits.argmax(-1), steps)


def _joined(parts: Sequence[Passed], axis: int) -> Passed:
    return Passed(*(torch.cat([getattr(part, name) for part in parts], axis) for name in ("loss", "best", "steps")))
