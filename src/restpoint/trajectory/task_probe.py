"""Which rank is a layer at work on? A linear probe reads it from the state alone.

That states of different tasks differ in kind, and not only in layer or in token, is shown by a linear classifier that
is right about texts that it has not seen, on examples with as many of each task at every single layer.

Paper:
    Lioubashevski, Schlank, Stanovsky, Goldstein 2024, "Looking beyond the top-1: transformers determine top tokens in
    order".
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.optimize import minimize
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.task_examples import Examples, scattered


@dataclass(frozen=True, eq=False)
class Probe:
    """A multinomial logistic regression of the task on the standardised state.

    Attributes:
        mean, scale: of each coordinate of the examples' states.
        weights, bias: fitted on all examples; logits are ((h - mean) / scale) @ weights + bias.
        accuracy: on each held-out fold of texts.
        control: the same with the labels shuffled within every layer: what the method finds where there is nothing.
        chance: accuracy of guessing, 1 / tasks, since examples are balanced.
        confusion: of the held-out examples; rows are the true tasks.
    """

    mean: Float64[Tensor, " hidden"]
    scale: Float64[Tensor, " hidden"]
    weights: Float64[Tensor, "hidden tasks"]
    bias: Float64[Tensor, " tasks"]
    accuracy: Float64[Tensor, " folds"]
    control: Float64[Tensor, " folds"]
    chance: float
    confusion: Int[Tensor, "tasks tasks"]

    def tasks(self, states: Float[Tensor, "*batch hidden"]) -> Int[Tensor, "*batch"]:
        """The most probable task of each state, from 1 on."""
        logits = ((states.double() - self.mean) / self.scale) @ self.weights + self.bias
        return logits.argmax(-1) + 1


def fit_probe(examples: Examples, folds: int = 5, penalty: float = 1e-2, seed: int = 0) -> Probe:
    """Fit the probe, and cross-validate it over texts: a fold's texts are in no example that its probe is fitted on.

    Args:
        examples: balanced, as `TaskExamples.balanced` gives them.
        folds: of cross-validation.
        penalty: weight of ½ ‖W‖² against the mean log-loss; the bias is free.
        seed: of the shuffled labels.

    Raises:
        RestpointError: there are fewer texts than folds, or the penalty is negative.
    """
    texts = examples.texts.unique()
    if not 2 <= folds <= len(texts):
        raise RestpointError(f"folds is {folds} and the examples are of {len(texts)} texts; give 2 up to that many")
    dealt = torch.arange(len(texts))[scattered(texts).argsort().argsort()] % folds
    fold = dealt[torch.searchsorted(texts, examples.texts)]
    states, labels = examples.states.double(), examples.tasks - 1
    count = int(labels.max()) + 1
    confusion = _cross_validate(states, labels, fold, count, penalty)
    shuffled = _shuffled(labels, examples.layers, torch.Generator().manual_seed(seed))
    control = _cross_validate(states, shuffled, fold, count, penalty)
    mean, scale = _standard(states)
    weights, bias = multinomial_regression((states - mean) / scale, labels, count, penalty)
    accuracy, by_chance = (
        found.diagonal(dim1=1, dim2=2).sum(-1) / found.sum((1, 2)).double() for found in (confusion, control)
    )
    return Probe(mean, scale, weights, bias, accuracy, by_chance, 1 / count, confusion.sum(0))


def task_exits(probe: Probe, states: Float[Tensor, "depth tokens hidden"]) -> Int[Tensor, " tokens"]:
    """The task exit: the first layer at which the probe says task 2 or later, so that the top token is settled; else L.

    It needs neither norm nor unembedding: tasks times hidden multiplications for a layer.
    """
    later = probe.tasks(states) >= 2
    later[-1] = True
    return later.int().argmax(0)


def multinomial_regression(
    features: Float64[Tensor, "count hidden"], labels: Int[Tensor, " count"], classes: int, penalty: float
) -> tuple[Float64[Tensor, "hidden classes"], Float64[Tensor, " classes"]]:
    """Minimise the mean of -log softmax(x W + b)_y plus penalty / 2 ‖W‖² by L-BFGS; returns W and b.

    Convex, and strictly so in W for a positive penalty. b is centred: only its differences matter.

    Raises:
        RestpointError: the penalty is negative.
    """
    if penalty < 0:
        raise RestpointError(f"penalty is {penalty}; give 0 or a small positive number such as 0.01")
    hidden = features.shape[1]
    target = torch.nn.functional.one_hot(labels, classes).double()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).view(hidden + 1, classes)
        weights = parameters[:-1]
        logs = (features @ weights + parameters[-1]).log_softmax(-1)
        loss = -(logs * target).sum() / len(features) + penalty / 2 * weights.square().sum()
        residual = (logs.exp() - target) / len(features)
        gradient = torch.cat([features.mT @ residual + penalty * weights, residual.sum(0, keepdim=True)])
        return float(loss), gradient.flatten().numpy()

    options = {"maxiter": 1000, "gtol": 1e-7, "ftol": 1e-14}
    found = minimize(objective, np.zeros((hidden + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    parameters = torch.from_numpy(found.x).view(hidden + 1, classes)
    return parameters[:-1], parameters[-1] - parameters[-1].mean()


def _cross_validate(states: Tensor, labels: Tensor, fold: Tensor, classes: int, penalty: float) -> Tensor:
    """Confusion of each held-out fold: (folds, classes, classes), true classes first."""
    found = []
    for held_out in range(int(fold.max()) + 1):
        train, test = fold != held_out, fold == held_out
        mean, scale = _standard(states[train])
        weights, bias = multinomial_regression((states[train] - mean) / scale, labels[train], classes, penalty)
        predicted = (((states[test] - mean) / scale) @ weights + bias).argmax(-1)
        pairs = labels[test] * classes + predicted
        found.append(torch.bincount(pairs, minlength=classes**2).view(classes, classes))
    return torch.stack(found)


def _standard(states: Tensor) -> tuple[Tensor, Tensor]:
    scale = states.std(0, correction=0)
    return states.mean(0), torch.where(scale > 0, scale, 1)


def _shuffled(labels: Tensor, layers: Tensor, generator: torch.Generator) -> Tensor:
    """The labels of every layer, dealt out anew among its examples."""
    drawn = torch.randperm(len(labels), generator=generator)
    source = drawn[layers[drawn].argsort(stable=True)]
    result = torch.empty_like(labels)
    result[layers.argsort(stable=True)] = labels[source]
    return result
