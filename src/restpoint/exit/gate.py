"""A small learned gate: the probability that stopping here gives the token that the whole model would give."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn import functional

from restpoint.errors import RestpointError
from restpoint.exit.recorded import blocks_of
from restpoint.exit.signals import Signal, unknown
from restpoint.exit.view import Readout, View

_STEPS = 50
_FLAT = 1e-9  # a gradient below it is none
_PENALTY = 1e-6
"""Of the weights of what the law gives, standardised: it only keeps them finite where labels are separable."""
_FEW = 3
"""Inputs that the law gives."""


@dataclass(frozen=True, eq=False)
class Gate(Signal):
    """P(argmax p_l = argmax p_L) = sigmoid(w_l · [z_1, z_2, log Σ_v exp z_v, h_l] + b_l), for each fitted layer.

    z are the logits read at layer l, z_1 and z_2 the two largest: with the third input they span the lead of the
    logit, the logarithm of the largest probability, and how large logits are at all. It is a probability, so a
    threshold is the agreement that the least certain token which stops is expected to have. 0 at other layers.

    Paper:
        Schuster et al. 2022, "Confident Adaptive Language Modeling" (a classifier of early exits, theirs of the state).
    """

    kind: ClassVar[str] = "gate"
    papers: ClassVar[tuple[str, ...]] = ("Schuster et al. 2022, Confident Adaptive Language Modeling",)

    layers: tuple[int, ...]
    """Candidate layers, ascending."""
    weights: Float[Tensor, "layers inputs"]
    """w, in the order of `gate_inputs`; 0 for the state where it is left out. Standardisation is folded in."""
    bias: Float[Tensor, " layers"]

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        if view.layer not in self.layers:
            return unknown(view)
        place = self.layers.index(view.layer)
        weights, bias = (each[place].to(view.state.device) for each in (self.weights, self.bias))
        return torch.sigmoid(torch.addmv(bias, gate_inputs(view), weights))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Signal.state`."""
        return {"kind": self.kind, "layers": list(self.layers)}, {"weights": self.weights, "bias": self.bias}

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Gate":
        """From what `state` gave."""
        return cls(tuple(config["layers"]), tensors["weights"], tensors["bias"])


def gate_inputs(view: View) -> Float[Tensor, "rows inputs"]:
    """What the gate reads: z_1, z_2, log Σ_v exp z_v, and h_l."""
    return torch.cat([view.lead[0], view.logits.logsumexp(-1, keepdim=True), view.state.float()], -1)


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

    inputs: Float[Tensor, "tokens inputs"]
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
    """Fit a logistic regression for each layer: mean of -log P(label) + penalty / 2 ‖u‖², in float64, by Newton steps.

    The label of a token is whether the readout's top token at the layer is the full model's. Inputs are standardised,
    and the penalty is on the weights of standardised ones. Each layer takes the penalty with the smallest loss on
    held-out sequences, and is then fitted again on all.

    Args:
        sequences: of each text the states h_0 .. h_L of tokens such as will be met: the model's own text, prompts cut
            off. All are held in memory: (hidden + 3) numbers for each token and layer.
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
        target = readout.layered.logits(rest[None])[0].argmax(-1)
        for view in views:
            right = view.tokens == target
            held_out = torch.full_like(right, index % held_out_every == held_out_every - 1)
            found[view.layer].append(_Examples(*(each.cpu() for each in (gate_inputs(view), right, held_out))))
    fits = [_fit_layer(layer, _joined(layer, found[layer]), penalties) for layer in layers]
    weights, bias, losses, chosen = zip(*fits, strict=True)
    own = (torch.stack(each).float() for each in (weights, bias))
    tokens = sum(len(part.right) for part in found[layers[0]])
    return GateFit(Gate(layers, *own), penalties, chosen, torch.stack(losses), tokens)


def _joined(layer: int, parts: list[_Examples]) -> _Examples:
    names = ("inputs", "right", "held_out")
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


def _fit_layer(layer: int, examples: _Examples, penalties: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Weights, bias, losses and the chosen penalty of a layer."""
    inputs = functional.pad(examples.inputs.double(), (0, 1), value=1.0)  # the last one is the bias's
    mean, scale = inputs.mean(0), _scale(inputs)
    mean[-1] = 0
    inputs = inputs.sub_(mean).div_(scale)
    labels, held_out = examples.right.double(), examples.held_out

    def solve(penalty: float, rows: Tensor, own: Tensor, start: Tensor) -> Tensor:
        """Weights of all standardised inputs, the bias last."""
        penalties = torch.full_like(start, penalty)
        penalties[:_FEW], penalties[-1] = _PENALTY, 0
        if penalty < math.inf:
            return logistic_regression(rows, own, penalties, start)
        some = torch.tensor([*range(_FEW), len(start) - 1])
        found = torch.zeros_like(start)
        found[some] = logistic_regression(rows[:, some], own, penalties[some], start[some])
        return found

    rows, own, held, held_labels = inputs[~held_out], labels[~held_out], inputs[held_out], labels[held_out]
    weights = {math.nan: torch.zeros(inputs.shape[1], dtype=torch.float64)}
    for penalty in sorted(penalties, reverse=True):  # each starts where a stronger one ended
        weights[penalty] = solve(penalty, rows, own, list(weights.values())[-1])
    losses = [functional.binary_cross_entropy_with_logits(held @ weights[each], held_labels) for each in penalties]
    loss = torch.stack(losses)
    best = penalties[int(loss.argmin())]
    weight = solve(best, inputs, labels, weights[best]) / scale
    return weight[:-1], weight[-1] - (weight * mean).sum(), loss, best


def logistic_regression(
    inputs: Float64[Tensor, "count inputs"],
    labels: Float64[Tensor, " count"],
    penalties: Float64[Tensor, " inputs"],
    start: Float64[Tensor, " inputs"],
) -> Float64[Tensor, " inputs"]:
    """Minimise the mean of -log P(label), P(1) = sigmoid(x · w), plus ½ Σ penalty_i w_i², by Newton steps.

    Convex; each step is halved until the loss falls. Labels are 0 or 1; a column of ones with penalty 0 is a bias.
    """

    def loss_at(weights: Tensor) -> Tensor:
        loss = functional.binary_cross_entropy_with_logits(inputs @ weights, labels)
        return loss + (penalties * weights.square()).sum() / 2

    weights, loss = start, loss_at(start)
    for _ in range(_STEPS):
        found = torch.sigmoid(inputs @ weights)
        gradient = inputs.mT @ (found - labels) / len(labels) + penalties * weights
        if float(gradient.abs().max()) < _FLAT:
            break
        curvature = inputs.mT @ ((found * (1 - found) / len(labels))[:, None] * inputs)
        curvature.diagonal().add_(penalties + _FLAT)  # a column that never varies has no curvature of its own
        step = torch.linalg.solve(curvature, gradient)
        for halving in range(30):
            trial = weights - step / 2**halving
            if loss_at(trial) < loss:
                break
        else:
            break  # no step lowers the loss any more: rounding
        weights, loss = trial, loss_at(trial)
    return weights


def _scale(columns: Float64[Tensor, "tokens inputs"]) -> Float64[Tensor, " inputs"]:
    scale = columns.std(0, correction=0)
    return torch.where(scale > 0, scale, 1)
