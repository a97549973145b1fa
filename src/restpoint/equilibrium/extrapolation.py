"""Vector extrapolation along depth: the rest state as the limit of the states read so far, token by token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.equilibrium.fitting import FitResult
from restpoint.equilibrium.predictors import Predictor
from restpoint.equilibrium.solvers.anderson import mixing_weights
from restpoint.equilibrium.streaming import (
    FitProgress,
    FitSettings,
    Pair,
    Score,
    Stream,
    blocks,
    floating,
    mean_scores,
    negative_squared_error,
    states_of,
)
from restpoint.errors import RestpointError

Weighting = Literal["reduced-rank", "minimal-polynomial"]


@dataclass(frozen=True, eq=False)
class ExtrapolationPredictor(Predictor):
    """rest(t) ~ sum_j g_j (x_j + b u_j), sum_j g_j = 1, from the states read x_0 .. x_{k+1} and u_j = x_{j+1} - x_j.

    Nothing is fitted: the weights g_0 .. g_k are those of one token's own states, from a k x k system; b
    is ``mixing``.

    * reduced-rank (RRE): g = argmin |sum_j g_j u_j|² under sum_j g_j = 1.
    * minimal-polynomial (MPE): g = c / sum_j c_j with c_k = 1 and c_0 .. c_{k-1} = argmin |sum_j c_j u_j|².

    Both give the fixed point of x_{j+1} = A x_j + a exactly where the minimal polynomial of A with respect to u_0 has
    degree k or less (RRE needs no more than that 1 is no eigenvalue; for MPE sum_j c_j may also vanish by bad luck).

    **Anderson acceleration.** Take the sequence as iterates of an unknown map, x_{j+1} = f(x_j). Type II with window k
    at x_k has the residuals f(x_j) - x_j = u_j, so its weights are those of RRE, and with damping b in (0, 1] its next
    point is the formula above: RRE's point moved by b times RRE's residual, sum_j g_j u_j. With b = 1 and f affine it
    is f of RRE's point. What is *not* Anderson acceleration here is the sequence: the states are plain iterates, and
    the extrapolated point is never put back into it.

    The system is regularised like that of `Anderson`: with a strength that grows without bound, RRE tends to
    x_k + b u_k, which with b = 1 is the last state, the logit lens.

    Depth is rarely such a sequence: every layer is another map, and the rest state is L - E layers away, not at the
    limit. Use it as a baseline that needs no text and no fit, and on the iterates of a recurrent-depth model.

    Raises:
        RestpointError: fewer than three layers or unevenly spaced ones, or a hyperparameter is out of range.

    Paper:
        Sidi 2017, "Vector Extrapolation Methods with Applications"; Smith, Ford, Sidi 1987, "Extrapolation Methods for
        Vector Sequences" (MPE, RRE); Anderson 1965, "Iterative Procedures for Nonlinear Integral Equations"; Walker, Ni
        2011, "Anderson Acceleration for Fixed-Point Iterations" (the relation of the two).
    """

    kind: ClassVar[str] = "extrapolation"

    hidden: int
    """Entries of a state."""
    weighting: Weighting = "reduced-rank"
    """How the weights are chosen."""
    mixing: float = 0.0
    """b in [0, 1]: 0 for RRE and MPE, 1 for undamped Anderson acceleration."""
    regularisation: float = 1e-10
    """Tikhonov r >= 0, relative to the squared norms of the system's columns; rounding is its least value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.state_layers
        if len(layers) < 3 or len({later - earlier for earlier, later in pairwise(layers)}) > 1:
            raise RestpointError(
                f"state_layers is {layers}; extrapolation reads at least three layers, each as far from the last"
            )
        if self.weighting not in ("reduced-rank", "minimal-polynomial"):
            raise RestpointError(f"weighting is {self.weighting!r}; use reduced-rank or minimal-polynomial")
        if not 0 <= self.mixing <= 1:
            raise RestpointError(f"mixing is {self.mixing}; it must lie in [0, 1], such as 0.0 for RRE")
        if not 0 <= self.regularisation < float("inf"):
            raise RestpointError(f"regularisation is {self.regularisation}; it must be finite and not negative")

    @property
    def order(self) -> int:
        """k: weights that are solved for."""
        return len(self.state_layers) - 2

    def predict(
        self,
        states: Sequence[Float[Tensor, "*batch hidden"]],
        previous: Float[Tensor, "*batch rest"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "*batch hidden"]:
        """The extrapolated state, computed in float32 at least.

        A row that has no such state (MPE's weights cannot be made to sum to 1, or it is not finite) keeps its last one.
        """
        points = floating(torch.stack(tuple(states), -2))
        steps = points.diff(dim=-2)
        changes, last = steps.diff(dim=-2), steps[..., -1, :]
        if self.weighting == "reduced-rank":
            target = (changes @ last.unsqueeze(-1)).squeeze(-1)
            taken = mixing_weights(changes @ changes.mT, target, None, self.regularisation)
        else:
            earlier = steps[..., :-1, :]
            target = (earlier @ last.unsqueeze(-1)).squeeze(-1)
            coefficients = -mixing_weights(earlier @ earlier.mT, target, None, self.regularisation)
            total = 1 + coefficients.sum(-1, keepdim=True)
            vanishes = total.abs() <= torch.finfo(total.dtype).eps ** 0.5 * (
                1 + coefficients.abs().sum(-1, keepdim=True)
            )
            taken = coefficients.cumsum(-1) / torch.where(vanishes, torch.nan, total)
        moves = steps[..., :-1, :] + self.mixing * changes
        rest = points[..., -2, :] + self.mixing * last - (taken.unsqueeze(-2) @ moves).squeeze(-2)
        return torch.where(rest.isfinite().all(-1, keepdim=True), rest, points[..., -1, :]).to(states[-1].dtype)

    def parameters_read(self) -> int:
        """Multiply-adds of the inner products and of the sum; no parameter is read."""
        return self.order * (self.order + 2) * self.hidden

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ExtrapolationPredictor":
        """Itself: it has no tensor."""
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As for every predictor; the config also holds the hyperparameters, and there is no tensor."""
        config, tensors = super().state()
        return config | {
            "hidden": self.hidden,
            "weighting": self.weighting,
            "mixing": self.mixing,
            "regularisation": self.regularisation,
        }, tensors

    @classmethod
    def _build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ExtrapolationPredictor":
        chosen = (config[name] for name in ("hidden", "weighting", "mixing", "regularisation"))
        return cls(tuple(config["state_layers"]), *chosen, name=config["name"])


def fit_extrapolation(
    held_out: Stream,
    state_layers: tuple[int, ...],
    settings: FitSettings | None = None,
    *,
    weighting: Weighting = "reduced-rank",
    mixing: float = 0.0,
    score: Score = negative_squared_error,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult[ExtrapolationPredictor]:
    """Choose the regularisation of an extrapolation, the one number it has, by the score on held-out text.

    Args:
        held_out: starts a pass over the chunks to choose on; the rest state must be as wide as the others.
        state_layers: the layers to read, evenly spaced, k + 2 of them for order k.
        settings: ``strengths`` are the candidates, those of `FitSettings` if None.
        weighting: reduced-rank or minimal-polynomial.
        mixing: 0 for RRE and MPE, 1 for undamped Anderson acceleration.
        score: what to maximise, for example acceptance computed with the model's head.
        progress: called after each block of rows.

    Raises:
        RestpointError: as `ExtrapolationPredictor`; or the stream has no row, a layer is missing from a chunk, or a
            score is not finite.
    """
    settings = settings or FitSettings()
    predictors: list[ExtrapolationPredictor] = []

    def pairs() -> Iterator[Pair]:
        for chunk in held_out():
            yield states_of(chunk, state_layers).flatten(0, 1), floating(chunk.rest).flatten(0, 1)

    def ready(x: Tensor) -> list[Callable[[Tensor], Tensor]]:
        count = len(state_layers)
        first = ExtrapolationPredictor(state_layers, x.shape[1] // count, weighting, mixing)
        predictors.extend(replace(first, regularisation=strength) for strength in settings.strengths)
        return [lambda rows, own=own: own.predict(rows.chunk(count, -1)) for own in predictors]

    scores, rows = mean_scores(ready, blocks(pairs(), settings.chunk_rows), 0, score, progress)
    best = int(scores.argmax())
    chosen = (settings.strengths[best],)
    return FitResult(predictors[best], settings.strengths, chosen, scores.unsqueeze(0), (0,), (rows,))
