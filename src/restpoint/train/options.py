"""What to train and how, as options of the library and of the command line; torch is not needed for it."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from restpoint.errors import RestpointError
from restpoint.flags import Flag, Number

Kind = Literal["recurrent", "deq"]
Precision = Literal["bfloat16", "float32"]

_BFLOAT16 = 2**-8  # its resolution: no residual below it is meant
_OF_DEQ = ("solver_tolerance", "solver_steps")
_OF_RECURRENT = ("fixed_recurrence", "gradient_steps", "ramp")
_FREE = ("max_tokens", "evaluate_every", "save_every")


@dataclass(frozen=True)
class TrainOptions:
    """The model, the text it sees and the steps it takes."""

    kind: Kind = "recurrent"
    """recurrent: a core that is iterated a random number of times; deq: solved to its fixed point, differentiated
    implicitly."""
    max_tokens: int = 6_000_000
    """Tokens to train on, repeated text counted again. May be changed when an unfinished training is resumed: the rate
    then falls to zero at the new end."""
    hidden_size: int = 256
    """Width of the states."""
    intermediate_size: Number = None
    """Width inside the gated MLPs; 8/3 of hidden_size, rounded up to a multiple of 64, if left out."""
    heads: int = 4
    """Attention heads of queries."""
    key_value_heads: int = 2
    """Attention heads of keys and values."""
    prelude_layers: int = 1
    """Layers before the core, run once."""
    core_layers: int = 2
    """Layers of the core, which is iterated."""
    coda_layers: int = 1
    """Layers behind the core, run once."""
    mean_recurrence: int = 12
    """Mean number of iterations in training, and the number at inference."""
    fixed_recurrence: Flag = False
    """Always iterate mean_recurrence times, instead of a number drawn for each step; 1 is an ordinary model."""
    gradient_steps: int = 4
    """Last iterations that gradients flow through."""
    ramp: float = 0.5
    """Share of the training in which the mean number of iterations rises from 1 to mean_recurrence; it saves time."""
    solver_tolerance: float = 1e-2
    """deq: relative residual that the fixed point is solved to, forwards and backwards."""
    solver_steps: int = 16
    """deq: evaluations of the core at most, forwards and backwards."""
    start_embeddings: Flag = False
    """Begin with the embeddings of the model that the tokenizer is of, which must have the same width."""
    sequence_length: int = 512
    """Tokens of each training text."""
    batch: int = 8
    """Texts of each step."""
    learning_rate: float = 4e-3
    """Peak rate of both optimisers: Muon for the matrices of the layers, AdamW for everything else."""
    warm_up: float = 0.03
    """Share of the training in which the rate rises to its peak."""
    decay: float = 0.3
    """Share of the training, its last, in which the rate falls to zero, linearly."""
    weight_decay: float = 0.1
    """Of the matrices, decoupled."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "bfloat16"
    """Of the products in training; weights stay in float32. The finished checkpoint is stored in bfloat16."""
    held_out: float = 0.02
    """Share of the documents that are not trained on, chosen by their hashes."""
    evaluate_every: int = 100
    """Steps between two looks at the held-out loss."""
    save_every: int = 50
    """Steps between two states that a stopped training resumes from."""
    seed: int = 0
    """Of the weights, the order of the text, the numbers of iterations and the first states."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", -(-self.hidden_size * 8 // (3 * 64)) * 64)
        for name in ("hidden_size", "heads", "sequence_length"):
            _require(name, getattr(self, name), getattr(self, name) >= 2, "at least 2")
        for name in ("batch", "evaluate_every", "save_every", "core_layers", "mean_recurrence", "gradient_steps"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "clip", "solver_tolerance"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("ramp", "warm_up", "decay", "held_out"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share in [0, 1)")
        _require("held_out", self.held_out, self.held_out > 0, "above 0: the loss is told on text not trained on")
        _require("warm_up", self.warm_up, self.warm_up + self.decay <= 1, "at most 1 together with decay")
        _require("hidden_size", self.hidden_size, self.hidden_size % (2 * self.heads) == 0, "a multiple of 2 x heads")
        if self.kind == "deq" and self.precision == "bfloat16":
            finest = self.solver_tolerance >= _BFLOAT16
            _require(
                "solver_tolerance",
                self.solver_tolerance,
                finest,
                f"at least {_BFLOAT16} in bfloat16, or precision float32",
            )
        least = self.batch * self.sequence_length
        _require("max_tokens", self.max_tokens, self.max_tokens >= least, f"at least {least}: one step")

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.max_tokens // (self.batch * self.sequence_length)

    @property
    def binding(self) -> dict[str, Any]:
        """What an unfinished training must agree in to be resumed."""
        other = _OF_RECURRENT if self.kind == "deq" else _OF_DEQ
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in (*_FREE, *other)}


def _require(name: str, value: object, holds: bool, needed: str) -> None:
    if not holds:
        raise RestpointError(f"{name} is {value}; it must be {needed}")
