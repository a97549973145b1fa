"""Streaming second moments of pairs (x, y): all that a linear fit needs to know of a corpus."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and population covariances (divided by the number of rows), float64."""

    count: int
    mean_x: Float64[Tensor, " inputs"]
    mean_y: Float64[Tensor, " outputs"]
    covariance_xx: Float64[Tensor, "inputs inputs"]
    covariance_xy: Float64[Tensor, "inputs outputs"]
    covariance_yy: Float64[Tensor, "outputs outputs"] | None
    """None where the accumulator was not asked for it."""


class GramAccumulator:
    """n, mean x, mean y, and the centred sums xx = sum (x - mean)(x - mean)^T, xy, yy, of a stream of rows.

    Each chunk is centred on **its own** mean before the products are taken, and folded in by the pairwise
    update of Chan et al. That is why products may run in float32: what they round is the size of the
    fluctuations, not of the means (a residual stream has coordinates whose mean is a thousand times their
    deviation), and the sum over chunks runs in float64. Memory is O(inputs^2 + inputs outputs), whatever the
    length of the stream. ``a + b`` is the accumulator of both streams, so a corpus can be cut over processes;
    ``state`` and ``from_state`` let a run stop and resume.

    Args:
        inputs: columns of x.
        outputs: columns of y.
        with_yy: whether to keep yy too. Only the Monge map needs it.
        product_dtype: dtype of the products within a chunk. float64 is exact to rounding; float32 is several
            times faster, worth it for systems of thousands of random features.
        device: where the sums live; chunks are moved there.

    Raises:
        RestpointError: a size is not positive, or product_dtype is neither float32 nor float64.

    Paper:
        Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        with_yy: bool = False,
        product_dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if inputs < 1 or outputs < 1:
            raise RestpointError(f"inputs={inputs} and outputs={outputs} must be positive numbers of columns")
        if product_dtype not in (torch.float32, torch.float64):
            raise RestpointError(f"product_dtype is {product_dtype}; use torch.float64, or torch.float32 for speed")
        self.inputs, self.outputs, self.product_dtype = inputs, outputs, product_dtype
        self.count = 0
        self.mean_x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.mean_y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros(outputs, outputs, dtype=torch.float64, device=device) if with_yy else None

    def update(self, x: Float[Tensor, "rows inputs"], y: Float[Tensor, "rows outputs"]) -> None:
        """Fold in a chunk of rows; an empty chunk changes nothing.

        Raises:
            RestpointError: the columns are not the ones announced, or a row is not finite (nothing is folded
                in then).
        """
        if x.shape[-1] != self.inputs or y.shape[-1] != self.outputs or x.shape[0] != y.shape[0]:
            raise RestpointError(
                f"x and y are {tuple(x.shape)} and {tuple(y.shape)}; this accumulator takes equally "
                f"many rows of {self.inputs} and {self.outputs} columns"
            )
        rows = x.shape[0]
        if rows == 0:
            return
        centred_x, mean_x = self._centre(x)
        centred_y, mean_y = self._centre(y)
        xx, xy = centred_x.T @ centred_x, centred_x.T @ centred_y
        yy = None if self.yy is None else centred_y.T @ centred_y
        if not all(bool(value.isfinite().all()) for value in (mean_x, mean_y, xx.diagonal(), xy)):
            self._refuse(x, y)
        self._fold(rows, mean_x, mean_y, xx, xy, yy)

    def __add__(self, other: "GramAccumulator") -> "GramAccumulator":
        """The accumulator of both streams; neither argument changes."""
        if (self.inputs, self.outputs, self.yy is None) != (other.inputs, other.outputs, other.yy is None):
            raise RestpointError(
                f"cannot add accumulators of {self.inputs} -> {self.outputs} columns (with_yy "
                f"{self.yy is not None}) and {other.inputs} -> {other.outputs} columns (with_yy "
                f"{other.yy is not None}); build both with the same arguments"
            )
        config, tensors = self.state()
        merged = type(self).from_state(config, {name: tensor.clone() for name, tensor in tensors.items()})
        if other.count:
            merged._fold(other.count, other.mean_x, other.mean_y, other.xx, other.xy, other.yy)
        return merged

    def moments(self) -> Moments:
        """Means and covariances of all rows so far.

        Raises:
            RestpointError: no row has been folded in.
        """
        if self.count == 0:
            raise RestpointError(
                "the accumulator holds no row; update it with at least one chunk before asking for moments"
            )
        count = self.count
        yy = None if self.yy is None else self.yy / count
        return Moments(count, self.mean_x, self.mean_y, self.xx / count, self.xy / count, yy)

    def state(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        """What `from_state` needs: a JSON-able config and tensors for safetensors (not copied)."""
        config = {"count": self.count, "product_dtype": str(self.product_dtype).removeprefix("torch.")}
        tensors = {"mean_x": self.mean_x, "mean_y": self.mean_y, "xx": self.xx, "xy": self.xy}
        return config, tensors if self.yy is None else tensors | {"yy": self.yy}

    @classmethod
    def from_state(cls, config: dict[str, int | str], tensors: dict[str, Tensor]) -> "GramAccumulator":
        """Resume from `state`, on the device the tensors are on; the accumulator then owns these tensors.

        Raises:
            RestpointError: an entry is missing.
        """
        missing = [name for name in ("count", "product_dtype") if name not in config]
        missing += [name for name in ("mean_x", "mean_y", "xx", "xy") if name not in tensors]
        if missing:
            raise RestpointError(
                f"the accumulator's state lacks {', '.join(missing)}; pass both halves of state() unchanged"
            )
        resumed = cls.__new__(cls)
        resumed.inputs, resumed.outputs = tensors["xy"].shape
        resumed.product_dtype = getattr(torch, str(config["product_dtype"]))
        resumed.count = int(config["count"])
        resumed.mean_x, resumed.mean_y = tensors["mean_x"], tensors["mean_y"]
        resumed.xx, resumed.xy, resumed.yy = tensors["xx"], tensors["xy"], tensors.get("yy")
        return resumed

    def _centre(
        self, rows: Float[Tensor, "rows columns"]
    ) -> tuple[Float[Tensor, "rows columns"], Float64[Tensor, " columns"]]:
        """The rows minus their mean in the product dtype, and that mean.

        The subtraction uses the mean as the rows' dtype can hold it. What is left of the true mean is below
        one unit of rounding; its square in the products is below the rounding of the products themselves.
        """
        rows = rows.to(self.xx.device, torch.promote_types(rows.dtype, self.product_dtype))
        mean = rows.mean(0, dtype=torch.float64)
        return (rows - mean.to(rows.dtype)).to(self.product_dtype), mean

    def _fold(self, rows: int, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor | None) -> None:
        """Chan's update: add another block's centred sums and the spread between the two means."""
        total = self.count + rows
        weight = self.count * rows / total
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        self.xx.add_(xx).addr_(step_x, step_x, alpha=weight)
        self.xy.add_(xy).addr_(step_x, step_y, alpha=weight)
        if self.yy is not None and yy is not None:
            self.yy.add_(yy).addr_(step_y, step_y, alpha=weight)
        self.mean_x = self.mean_x + step_x * (rows / total)
        self.mean_y = self.mean_y + step_y * (rows / total)
        self.count = total

    def _refuse(self, x: Tensor, y: Tensor) -> None:
        require_finite(x, y)
        raise RestpointError(
            f"products of the rows overflow {self.product_dtype}; "
            "build the accumulator with product_dtype=torch.float64"
        )


def require_finite(x: Float[Tensor, "rows inputs"], y: Float[Tensor, "rows outputs"]) -> None:
    """Raise a RestpointError that counts the rows with a value that is not finite, if there are any."""
    bad = int((~(x.isfinite().all(-1) & y.isfinite().all(-1).to(x.device))).sum())
    if bad:
        raise RestpointError(
            f"{bad} of {x.shape[0]} rows of x and y are not finite; check the model's dtype "
            "(float16 overflows: load it in bfloat16 or float32) and leave padded positions out"
        )
