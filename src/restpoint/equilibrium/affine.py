"""An affine map of rows, stored so that one row costs one fast matrix-vector product."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from restpoint.memory_order import for_one_row


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``x @ matrix + offset``."""

    matrix: Float[Tensor, "inputs outputs"]
    """Either memory order will do; `to` picks the fast one."""
    offset: Float[Tensor, " outputs"]

    def __call__(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Map every row."""
        return functional.linear(x, self.matrix.t(), self.offset)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "AffineMap":
        """A copy on that device and in that dtype, in the memory order that is fastest there."""
        return type(self)(for_one_row(self.matrix.to(device, dtype)), self.offset.to(device, dtype))

    @property
    def multiplications(self) -> int:
        """Multiply-adds per row."""
        return self.matrix.numel()
