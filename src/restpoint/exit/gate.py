"""A small learned gate: the probability that stopping here gives the token that the whole model would give."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.optimize import minimize
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.recorded import blocks_of
from restpoint.exit.signals import Signal, accelerations, relative_step, unknown
from restpoint.exit.view import Readout, View

QUANTITIES = ("max-p", "margin", "entropy", "relative-step", "acceleration", "agreement", "distance")
"""What the gate reads besides the state, in the order of :func:`quantities`."""

_LEAST = 1e-6  # below it, probabilities and relative steps in float32 are rounding
_PENALTY = 1e-4
"""Of the weights of standardised quantities: they are few, it only keeps them finite where labels are separable."""


@dataclass(frozen=True, eq=False)
class Gate(Signal):
    """P(argmax p_l = argmax p_L) = sigmoid(w_l · x + u_l · (h_l - m_l) + b_l), for each layer that was fitted.

    x are `QUANTITIES` of the view. It is a probability, so a threshold is the agreement that the least certain token
    which stops is expected to have. 0 at other layers. Candidates in use should be those of the fit: what agrees with
    the candidate before depends on which that is.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (a classifier of early exits, theirs of the state).
    """

    kind: ClassVar[str] = "gate"
    papers: ClassVar[tuple[str, ...]] = ("Schuster et al. 2022, Confident Adaptive Language Modeling",)

    layers: tuple[int, ...]
    """Candidate layers, ascending."""
    weights: Float[Tensor, "layers quantities"]
    """w; their standardisation is folded in, as in the others."""
    directions: Float[Tensor, "layers hidden"]
    """u; 0 where the state is left out."""
    bias: Float[Tensor, " layers"]
    centres: Float[Tensor, "layers hidden"]
    """m: mean states in the training text."""

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer not in self.layers:
            return unknown(view)
        place = self.layers.index(view.layer)
        weights, directions, bias, centre = (
            each[place].to(view.state.device) for each in (self.weights, self.directions, self.bias, self.centres)
        )
        away = view.state.float() - centre
        return torch.sigmoid(quantities(view, away) @ weights + away @ directions + bias)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Signal.state`."""
        tensors = {
            "weights": self.weights,
            "directions": self.directions,
            "bias": self.bias,
            "centres": self.centres,
        }
        return {"kind": self.kind, "layers": list(self.layers)}, tensors

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Gate":
        """From what `state` gave."""
        return cls(
            tuple(config["layers"]), tensors["weights"], tensors["directions"], tensors["bias"], tensors["centres"]
        )


def quantities(view: View, away: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows quantities"]:
    """What the gate reads, in the order of `QUANTITIES`.

    log(p / (1 - p)) of the largest probability p; the logarithm of its lead on the second; the entropy in nats; the
    logarithm of the relative step; the acceleration a_l; 1 where the candidate layer before has the same top token,
    else 0; log ‖h_l - m‖. What needs more layers than there are is 0.

    Args:
        view: of tokens at a candidate layer.
        away: h_l - m.
    """
    first, second = view.top_two.unbind(-1)
    nothing = unknown(view)
    columns = [
        first.logit(eps=_LEAST),
        (first - second).clamp_min(_LEAST).log(),
        view.entropy,
        relative_step(view).clamp_min(_LEAST).log() if view.layer > 0 else nothing,
        accelerations(view, 1)[0] if view.layer > 1 else nothing,
        (view.tokens == view.earlier.tokens).float() if view.earlier is not None else nothing,
        away.norm(dim=-1).clamp_min(_LEAST).log(),
    ]
    return torch.stack(columns, -1)


@dataclass(frozen=True, eq=False)
class GateFit:
    """A fitted gate, and how it was chosen."""

    gate: Gate
    penalties: tuple[float, ...]
    """The candidates."""
    chosen: tuple[float, ...]
    """That of each layer; inf where the state is left out."""
    log_loss: Float64[Tensor, "layers penalties"]
    """Mean on held-out sequences, in nats; the chosen one's is slightly optimistic, being chosen on it."""
    tokens: int
    """That the gate was fitted on, those of held-out sequences included."""


@dataclass(frozen=True, eq=False)
class _Examples:
    """Tokens at one layer."""

    states: Float[Tensor, "tokens hidden"]
    columns: Float[Tensor, "tokens quantities"]
    """The last one, a distance, still to come: the mean is not known before all are seen."""
    right: Bool[Tensor, " tokens"]
    held_out: Bool[Tensor, " tokens"]


@torch.no_grad()
def fit_gate(
    sequences: Iterable[Float[Tensor, "tokens levels hidden"]],
    layers: tuple[int, ...],
    readout: Readout,
    *,
    penalties: tuple[float, ...] = (math.inf, 0.1, 0.03, 0.01, 0.003),
    held_out_every: int = 5,
) -> GateFit:
    """Fit a logistic regression for each layer: mean of -log P(label) + penalty / 2 ‖u‖², in float64.

    The label of a token is whether the readout's top token at the layer is the full model's. Inputs are standardised,
    and the penalty is on the weights of standardised ones. Each layer takes the penalty with the smallest loss on
    held-out sequences, and is then fitted again on all.

    Args:
        sequences: of each text the states h_0 .. h_L of tokens such as will be met: the model's own text, prompts cut
            off. All are held in memory: (hidden + 7) numbers for each token and layer.
        layers: candidate layers, ascending.
        readout: which will be used.
        penalties: to choose from; inf leaves the state out.
        held_out_every: every so many-th sequence is held out.

    Raises:
        RestpointError: layers or states do not fit the model, there are too few sequences, a penalty is not positive,
            or at a layer all tokens are right, or all wrong.
    """
    if not penalties or not all(penalty > 0 for penalty in penalties):
        raise RestpointError(f"penalties is {penalties}; give positive ones, inf to leave the state out")
    if held_out_every < 2:
        raise RestpointError(f"held_out_every is {held_out_every}; give at least 2, so that some are fitted on")
    found: dict[int, list[_Examples]] = {layer: [] for layer in layers}
    for index, views, rest in blocks_of(sequences, layers, readout):
        target = readout.logits(rest).argmax(-1)
        for view in views:
            states = view.state.float()
            columns, right = quantities(view, torch.zeros_like(states)), view.tokens == target
            held_out = torch.full_like(right, index % held_out_every == held_out_every - 1)
            found[view.layer].append(_Examples(*(each.cpu() for each in (states, columns, right, held_out))))
    fits = [_fit_layer(layer, _joined(layer, found[layer]), penalties) for layer in layers]
    weights, directions, bias, centres, losses, chosen = zip(*fits, strict=True)
    own = (torch.stack(each).float() for each in (weights, directions, bias, centres))
    tokens = sum(len(part.right) for part in found[layers[0]])
    return GateFit(Gate(layers, *own), penalties, chosen, torch.stack(losses), tokens)


def _joined(layer: int, parts: list[_Examples]) -> _Examples:
    names = ("states", "columns", "right", "held_out")
    whole = _Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    if not bool(whole.held_out.any()) or bool(whole.held_out.all()):
        raise RestpointError("sequences: none is left to hold out, or to fit on; give more")
    for some in (whole.right, whole.right[~whole.held_out]):
        if bool(some.all()) or not bool(some.any()):
            which = "all" if bool(some.all()) else "none"
            raise RestpointError(
                f"layers: at layer {layer} {which} of the tokens agree with the full model; there is nothing to learn, "
                "leave the layer out or give more text"
            )
    return whole


def _fit_layer(layer: int, examples: _Examples, penalties: tuple[float, ...]) -> tuple[Any, ...]:
    """Weights, directions, bias, centre, losses and the chosen penalty of a layer."""
    states = examples.states.double()
    centre = states.mean(0)
    away = states.sub_(centre)
    columns = examples.columns.double()
    columns[:, -1] = away.norm(dim=-1).clamp_min(_LEAST).log()
    columns_mean, columns_scale = columns.mean(0), _scale(columns)
    state_scale = _scale(away)
    inputs = (columns - columns_mean) / columns_scale
    own, train = (away / state_scale), ~examples.held_out
    labels = examples.right.double()

    def solve(penalty: float, some: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of all standardised inputs, and the bias."""
        features = inputs[some] if penalty == math.inf else torch.cat([inputs[some], own[some]], -1)
        penalties = torch.full((features.shape[1],), penalty, dtype=torch.float64)
        penalties[: len(QUANTITIES)] = _PENALTY
        weight, bias = logistic_regression(features, labels[some], penalties)
        return torch.nn.functional.pad(weight, (0, len(QUANTITIES) + own.shape[1] - len(weight))), bias

    losses = []
    for penalty in penalties:
        weight, bias = solve(penalty, train)
        held = examples.held_out
        logit = inputs[held] @ weight[: len(QUANTITIES)] + own[held] @ weight[len(QUANTITIES) :] + bias
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logit, labels[held]))
    loss = torch.stack(losses)
    best = penalties[int(loss.argmin())]
    weight, bias = solve(best, torch.ones_like(train))
    folded = weight[: len(QUANTITIES)] / columns_scale
    return folded, weight[len(QUANTITIES) :] / state_scale, bias - folded @ columns_mean, centre, loss, best


def logistic_regression(
    features: Float64[Tensor, "tokens inputs"],
    labels: Float64[Tensor, " tokens"],
    penalties: Float64[Tensor, " inputs"],
) -> tuple[Float64[Tensor, " inputs"], Float64[Tensor, ""]]:
    """Minimise the mean log-loss of sigmoid(x · w + b) plus ½ Σ penalty w²; returns w and b.

    By a trust-region Newton method on the whole Hessian: a few hundred inputs of very unlike penalties take some ten
    steps, where L-BFGS takes thousands.
    """
    lifted = torch.nn.functional.pad(features, (0, 1), value=1.0)
    weighed = torch.nn.functional.pad(penalties, (0, 1))  # the bias is free

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat)
        logits = lifted @ parameters
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        gradient = lifted.mT @ (logits.sigmoid() - labels) / len(labels) + weighed * parameters
        return float(loss + 0.5 * (weighed * parameters.square()).sum()), gradient.numpy()

    def hessian(flat: np.ndarray) -> np.ndarray:
        chance = (lifted @ torch.from_numpy(flat)).sigmoid()
        return ((lifted * (chance * (1 - chance) / len(labels))[:, None]).mT @ lifted + weighed.diag()).numpy()

    start = np.zeros(lifted.shape[1])
    found = minimize(objective, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-8})
    parameters = torch.from_numpy(found.x)
    return parameters[:-1], parameters[-1]


def _scale(columns: Float64[Tensor, "tokens inputs"]) -> Float64[Tensor, " inputs"]:
    scale = columns.std(0, correction=0)
    return torch.where(scale > 0, scale, 1)
