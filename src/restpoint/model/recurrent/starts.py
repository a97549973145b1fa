"""Where a token's iteration begins, when it need not begin at noise."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from restpoint.equilibrium.fitting import FitResult, fit_recurrence
from restpoint.equilibrium.predictors import RestPointRecurrence
from restpoint.equilibrium.streaming import Chunk, FitProgress, FitSettings, Stream


@dataclass(frozen=True)
class Start(ABC):
    """s_0 of the tokens of a pass. Frozen: what is known of earlier tokens is in the cache.

    A pass knows the last state of the token before it, not those of its own tokens: so starts that read it serve the
    **first token of each pass**, which in decoding is every token, and the others begin as the model was trained to.
    """

    @abstractmethod
    def first(
        self,
        trained: Float[Tensor, "batch seq hidden"],
        injected: Float[Tensor, "batch seq hidden"],
        previous: Float[Tensor, "batch hidden"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """s_0.

        Args:
            trained: where the model begins by itself, noise or zero.
            injected: e.
            previous: the last state of the token before the pass; None where there is none.
        """


@dataclass(frozen=True)
class ZeroStart(Start):
    """s_0 = 0."""

    def first(
        self,
        trained: Float[Tensor, "batch seq hidden"],
        injected: Float[Tensor, "batch seq hidden"],
        previous: Float[Tensor, "batch hidden"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        return torch.zeros_like(trained)


@dataclass(frozen=True)
class PreviousStart(Start):
    """s_0(t) = s(t-1), the state that the token before came to: a guess that neighbours rest near each other.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach"
        (its continuous chain of thought).
    """

    def first(
        self,
        trained: Float[Tensor, "batch seq hidden"],
        injected: Float[Tensor, "batch seq hidden"],
        previous: Float[Tensor, "batch hidden"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        return trained if previous is None else _begin(trained, previous)


@dataclass(frozen=True, eq=False)
class PredictedStart(Start):
    """s_0(t) = A e(t) + B s(t-1) + c, or the same with random features: the rest-point recurrence.

    Fit it with `fit_start`; it holds for the checkpoint and the number of steps that it was fitted on.
    """

    predictor: RestPointRecurrence

    def first(
        self,
        trained: Float[Tensor, "batch seq hidden"],
        injected: Float[Tensor, "batch seq hidden"],
        previous: Float[Tensor, "batch hidden"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        if previous is None:
            return trained
        affine = self.predictor.maps[0].matrix
        predicted = self.predictor.predict((injected[:, 0].to(affine.dtype),), previous.to(affine.dtype))
        return _begin(trained, predicted)


def fit_start(
    model: nn.Module,
    texts: Sequence[Int[Tensor, "_ _"]],
    held_out: Sequence[Int[Tensor, "_ _"]],
    num_steps: int | None = None,
    settings: FitSettings | None = None,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[RestPointRecurrence]:
    """Fit s_r(t) from (e(t), s_r(t-1)) by ridge regression, in one pass over the text.

    The states are those that tokens come to from the start that the model was trained with, in ``num_steps`` steps.

    Args:
        model: a `RecurrentDepthForCausalLM`.
        texts: batches of token ids to fit on, none of them padding.
        held_out: other batches, on which the ridge strength is chosen.
        num_steps: r; the config's mean if None.
        settings: linear by default: ``FitSettings(features=0, steps=1)``. One map is fitted, whatever they say.
        progress: called after each block of rows.

    Raises:
        RestpointError: there is no text, or a state is not finite.
    """
    settings = settings or FitSettings(features=0, steps=1)
    inner = cast(nn.Module, model.model)

    def stream(batches: Sequence[Tensor]) -> Stream:
        def chunks() -> Iterator[Chunk]:
            for ids in batches:
                with torch.no_grad():
                    output = inner(ids, num_steps=num_steps, use_cache=False, output_states=True)
                yield Chunk(output.injected.unsqueeze(2), output.states[-1])

        return chunks

    return fit_recurrence(stream(texts), stream(held_out), (0,), replace(settings, steps=1), progress=progress)


def _begin(trained: Float[Tensor, "batch seq hidden"], first: Float[Tensor, "batch hidden"]) -> Tensor:
    """``first`` for the first token of the pass."""
    return torch.cat((first.to(trained).unsqueeze(1), trained[:, 1:]), 1)
