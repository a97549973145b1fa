"""A signal that reads from the state alone whether its top token is settled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.exit.signals import Signal
from restpoint.exit.view import View
from restpoint.trajectory.task_probe import Probe


@dataclass(frozen=True, eq=False)
class TaskSaturation(Signal):
    """1 - P(task 1 | h_l): the probability that the layer is at work on a lower rank, so that the first is settled.

    P is a multinomial logistic regression on the state: hidden times tasks multiplications, no norm and no unembedding.
    One probe serves every layer. `task_exits` stops where another task than 1 is the most probable one; a threshold of
    1/2 here asks for more than that where there are three tasks or more.

    Paper:
        Lioubashevski, Schlank, Stanovsky, Goldstein 2024, "Looking beyond the top-1: transformers determine top tokens
        in order".
    """

    kind: ClassVar[str] = "task-saturation"
    reads_law: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = ("Lioubashevski, Schlank, Stanovsky, Goldstein 2024, Looking beyond the top-1",)

    mean: Float[Tensor, " hidden"]
    """Taken off the state first."""
    weights: Float[Tensor, "hidden tasks"]
    """Of the state so centred; the probe's scale is folded in."""
    bias: Float[Tensor, " tasks"]

    @classmethod
    def of(cls, probe: Probe) -> "TaskSaturation":
        """The signal of a fitted probe."""
        return cls(probe.mean.float(), (probe.weights / probe.scale[:, None]).float(), probe.bias.float())

    def confidence(self, view: View) -> Float[Tensor, " rows"]:
        """See the class."""
        mean, weights, bias = (each.to(view.state.device) for each in (self.mean, self.weights, self.bias))
        logits = torch.addmm(bias, view.state.float() - mean, weights)
        return 1 - logits.softmax(-1)[:, 0]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`Signal.state`."""
        tensors = {"mean": self.mean, "weights": self.weights, "bias": self.bias}
        return {"kind": self.kind}, {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def build(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "TaskSaturation":
        """From what `state` gave."""
        return cls(tensors["mean"], tensors["weights"], tensors["bias"])
