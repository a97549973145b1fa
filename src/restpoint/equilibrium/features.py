"""Fixed random features: what makes a ridge regression a kernel machine."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from restpoint.errors import RestpointError
from restpoint.memory_order import for_one_row


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """relu(x @ weight + bias) = relu(R z + b): z standardised x, R ~ N(0, 1/inputs), b ~ N(0, 1/4).

    A linear map of [x, features(x)] approximates regression with the arc-cosine kernel, with one ridge solve
    and no gradient. The standardisation z = (x - mean) / deviation is folded into weight and bias, so
    evaluation is one matrix product and one relu. Inputs whose mean is a thousand deviations from zero lose
    three digits to that folding: keep these in float32.

    Paper:
        Rahimi, Recht 2007, "Random Features for Large-Scale Kernel Machines"; Cho, Saul 2009 (the arc-cosine
        kernel).
    """

    weight: Float[Tensor, "inputs features"]
    bias: Float[Tensor, " features"]

    @classmethod
    def draw(
        cls, mean: Float[Tensor, " inputs"], deviation: Float[Tensor, " inputs"], features: int, *, seed: int
    ) -> "RandomFeatures":
        """Draw R and b and fold in the standardisation.

        The draw runs in float64 on the CPU, so a seed means the same features on every device.

        Args:
            mean: of each input.
            deviation: standard deviation of each input, in the input's unit. An input that is constant (below
                1e-6 of the largest deviation) is left out of the features.
            features: how many.
            seed: of the draw.

        Raises:
            RestpointError: features is not positive.
        """
        if features < 1:
            raise RestpointError(
                f"features is {features}; give a positive number, or use no RandomFeatures for a linear map"
            )
        generator = torch.Generator().manual_seed(seed)
        inputs = mean.shape[0]
        projection = torch.randn(inputs, features, dtype=torch.float64, generator=generator) * inputs**-0.5
        shift = torch.randn(features, dtype=torch.float64, generator=generator) * 0.5
        mean, deviation = mean.double().cpu(), deviation.double().cpu()
        varies = deviation > 1e-6 * deviation.max()
        weight = projection * torch.where(varies, deviation.reciprocal(), torch.zeros_like(deviation)).unsqueeze(-1)
        return cls(weight, shift - mean @ weight)

    def __call__(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch features"]:
        """The features of every row."""
        return functional.linear(x, self.weight.t(), self.bias).relu_()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RandomFeatures":
        """A copy on that device and in that dtype, in the memory order that is fastest there."""
        return type(self)(for_one_row(self.weight.to(device, dtype)), self.bias.to(device, dtype))

    @property
    def multiplications(self) -> int:
        """Multiply-adds per row."""
        return self.weight.numel()
