"""Layers of a model that are left out."""

from dataclasses import dataclass

from restpoint.errors import RestpointError


@dataclass(frozen=True)
class SkipSet:
    """Layers that are left out of a pass; the state goes by them unchanged. Any order, kept sorted.

    Attributes:
        layers: their indices, from 0.

    Raises:
        RestpointError: a layer is negative or named twice.
    """

    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers = tuple(sorted(self.layers))
        if len(set(layers)) < len(layers) or (layers and layers[0] < 0):
            raise RestpointError(f"layers={self.layers} has a negative or repeated entry; name each from 0, once")
        object.__setattr__(self, "layers", layers)

    @classmethod
    def spread(cls, depth: int, skipped: int) -> "SkipSet":
        """Layers evenly spread, neither the first nor the last where that can be: a set to begin with."""
        inner = depth - 2 if skipped <= depth - 2 else depth
        first = (depth - inner) // 2
        return cls(tuple(first + int((index + 0.5) * inner / skipped) for index in range(skipped)))

    def check(self, depth: int) -> None:
        """Refuse layers that a model of this depth lacks, and sets that leave it none.

        Raises:
            RestpointError: the set does not fit the model.
        """
        if self.layers and self.layers[-1] >= depth:
            raise RestpointError(
                f"skip: layer {self.layers[-1]} is left out, but the model has layers 0 to {depth - 1}; name these only"
            )
        if len(self.layers) >= depth:
            raise RestpointError(f"skip: all {depth} layers are left out; keep at least one")

    def kept_share(self, depth: int) -> float:
        """Share of the layers that still run."""
        return 1 - len(self.layers) / depth
