"""Keys and values of layers that run several times per token, for tokens that ran them different numbers of times."""

import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class Chosen:
    """The tokens of a pass that a step computes: a rectangle of rows and columns.

    Attributes:
        rows: of the batch.
        columns: of the pass, 0 for its first token.
        live: those in the rectangle that have not stopped; the others are computed for nothing and not stored.
    """

    rows: Int[Tensor, " rows"]
    columns: Int[Tensor, " columns"]
    live: Bool[Tensor, "rows columns"]

    def of(self, whole: Tensor) -> Tensor:
        """The rectangle in a tensor (batch, seq, ..)."""
        return whole.index_select(0, self.rows).index_select(1, self.columns)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the rectangle into a tensor (batch, seq, ..)."""
        whole[self.rows[:, None], self.columns] = part


class _Layer(CacheLayerMixin):
    """One layer's keys and values, (steps, batch, heads, slots, size); a layer that runs once has one step."""

    is_sliding = False
    is_croppable = True

    def __init__(self, owner: "RecurrentCache", iterated: bool):
        super().__init__()
        self.owner, self.iterated = owner, iterated

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on first use, when head count, head sizes, dtype and device are known."""
        steps = self.owner.stored_steps if self.iterated else 1
        self.keys, self.values = (
            new.new_zeros(steps, new.shape[0], new.shape[1], self.owner.capacity, new.shape[3])
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write at the owner's present step and tokens; return what these tokens may be shown."""
        if key_states.requires_grad:
            raise RestpointError("use_cache: gradients do not flow through this cache; pass False, or use no_grad()")
        owner = self.owner
        if not self.is_initialized:
            if owner.chosen is not None and owner.chosen.rows.shape[0] != owner.batch:
                wide = key_states.new_empty(owner.batch, key_states.shape[1], 0, key_states.shape[3])
                self.lazy_initialization(wide, wide.new_empty(*wide.shape[:3], value_states.shape[3]))
            else:
                self.lazy_initialization(key_states, value_states)
        step = owner.step if self.iterated else 0
        found = []
        for stored, new in zip(self.stored, (key_states, value_states), strict=True):
            self._write(stored[owner.slot(step)], new)
            found.append(self._read(stored, step))
        return found[0], found[1]

    def _write(
        self, target: Float[Tensor, "batch heads slots size"], new: Float[Tensor, "rows heads seq size"]
    ) -> None:
        owner, chosen = self.owner, self.owner.chosen
        if chosen is None:
            target.narrow(2, owner.length, new.shape[2]).copy_(new)
            return
        rows, slots = chosen.rows[:, None], owner.length + chosen.columns
        new = new.transpose(1, 2)
        if self.iterated and owner.budget is not None:
            # A stopped token's latest step may be in this slot.
            new = torch.where(chosen.live[..., None, None], new, target[rows, :, slots])
        target[rows, :, slots] = new

    def _read(self, stored: Float[Tensor, "steps batch heads slots size"], step: int) -> Tensor:
        owner, chosen = self.owner, self.owner.chosen
        length = owner.length + owner.count
        if not (self.iterated and owner.uneven):
            shown = stored[owner.slot(step)].narrow(2, 0, length)
            return shown if chosen is None else shown.index_select(0, chosen.rows)
        rows = torch.arange(owner.batch, device=stored.device) if chosen is None else chosen.rows
        available = owner.available[rows, :length].to(stored.device)
        steps = owner.slot((available - 1).clamp(0, step))
        slots = torch.arange(length, device=stored.device)
        return stored[steps, rows[:, None], :, slots].transpose(1, 2)

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values over all that is allocated."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def grow(self, steps: int, slots: int) -> None:
        """Enlarge, keeping what is written."""
        if self.is_initialized:
            self.keys, self.values = (
                pad(
                    kept,
                    (0, 0, 0, slots - kept.shape[3]) + (0,) * 5 + ((steps if self.iterated else 1) - kept.shape[0],),
                )
                for kept in self.stored
            )

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with these rows of the batch, in this order."""
        if self.is_initialized:
            self.keys, self.values = (kept.index_select(1, rows.to(kept.device)) for kept in self.stored)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that a pass of ``query_length`` tokens is shown, and where they begin."""
        return self.owner.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored before the present pass."""
        return self.owner.length

    def get_max_length(self) -> int:
        """No maximum: capacity grows by doubling."""
        return -1


class RecurrentCache(Cache):
    """Keys and values for every step of every core layer, and how many steps each token ran.

    Step k of a token sees, of every earlier token, the keys and values of its step k; of one that stopped before,
    those of its **latest available step**. With a budget B, step k is stored in place k mod B, over step k - B: memory
    stays bounded, and a step sees the last one of its place that the earlier token ran. That is an approximation: a
    pass over many tokens, which run step by step together, does not equal one over each of them in turn.

    Args:
        layers: of the whole model.
        core: those that are iterated.
        budget: steps stored; all if None.
        capacity: slots allocated at first; doubles when exceeded.

    Attributes:
        available: steps that each token ran, (batch, capacity).
        last_state: of every row, the core's state of its last token; None where nothing is known of it.

    Raises:
        RestpointError: the budget is below 1.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach".
    """

    def __init__(self, layers: int, core: range, *, budget: int | None = None, capacity: int = 256):
        if budget is not None and budget < 1:
            raise RestpointError(f"budget is {budget}; it must be at least 1, or None to store every step")
        self.step_layers = [_Layer(self, layer in core) for layer in range(layers)]
        super().__init__(layers=list(self.step_layers))
        self.budget, self.capacity = budget, capacity
        self.batch = self.length = self.count = self.step = 0
        self.stored_steps = 0
        self.chosen: Chosen | None = None
        self.uneven = False
        self.available = torch.zeros(0, 0, dtype=torch.int64)
        self.last_state: Float[Tensor, "batch hidden"] | None = None
        self._fewest = sys.maxsize

    def open(
        self,
        batch: int,
        count: int,
        num_steps: int,
        device: torch.device,
        padding: Bool[Tensor, "batch count"] | None = None,
    ) -> None:
        """Make room for a pass over ``count`` new tokens of every row, of ``num_steps`` steps at most.

        Args:
            padding: tokens that nothing ever looks at.

        Raises:
            RestpointError: the cache holds another number of rows.
        """
        if self.batch and self.batch != batch:
            raise RestpointError(f"cache: it holds {self.batch} rows and the pass has {batch}; use another")
        if not self.batch:
            self.batch, self.available = batch, torch.zeros(batch, self.capacity, dtype=torch.int64, device=device)
        self.count = count
        self.leave()
        slots = self.length + count
        steps = num_steps if self.budget is None else min(num_steps, self.budget)
        if slots > self.capacity or steps > self.stored_steps:
            if slots > self.capacity:
                self.capacity = max(slots, 2 * self.capacity)
            self.stored_steps = max(steps, self.stored_steps)
            self.available = pad(self.available, (0, self.capacity - self.available.shape[1]))
            for layer in self.step_layers:
                layer.grow(self.stored_steps, self.capacity)
        self.available[:, self.length : slots] = 0
        if padding is not None:
            self.available[:, self.length : slots][padding] = sys.maxsize

    def enter(self, step: int, chosen: Chosen | None = None, *, frozen: bool = False) -> None:
        """The core's step ``step``, from 0 on, begins, for these tokens; ``frozen`` if any of the pass has stopped."""
        self.step, self.chosen = step, chosen
        self.uneven = frozen or step >= self._fewest
        present = self.available[:, self.length : self.length + self.count]
        if chosen is None:
            present.fill_(step + 1)
        else:
            chosen.put(present, torch.where(chosen.live, step + 1, chosen.of(present)))

    def leave(self) -> None:
        """The core is done: layers after it see all tokens of the pass."""
        self.chosen, self.uneven = None, False

    def close(self, fewest: int) -> None:
        """The pass is over, and its tokens ran ``fewest`` steps or more: they count as stored."""
        self.length += self.count
        self.count = 0
        self._fewest = min(self._fewest, fewest)

    def remember(
        self, state: Float[Tensor, "batch count hidden"], padding: Bool[Tensor, "batch count"] | None = None
    ) -> None:
        """Keep the state of each row's last token that is no padding; a row of padding alone keeps the one it had."""
        if padding is None:
            self.last_state = state[:, -1].clone()
            return
        places = torch.arange(state.shape[1], device=state.device)
        last = torch.where(padding, -1, places).amax(-1)
        found = state[torch.arange(state.shape[0], device=state.device), last.clamp_min(0)]
        if self.last_state is None:
            self.last_state = None if bool((last < 0).any()) else found
        else:
            self.last_state = torch.where((last < 0).unsqueeze(-1), self.last_state, found)

    def slot(self, step: Any) -> Any:
        """Where a step is stored."""
        return step if self.budget is None else step % self.budget

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row, as many as the negative number given; 0 forgets none.

        Raises:
            RestpointError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise RestpointError(f"tokens_to_remove is {tokens_to_remove}; give it as a negative number")
        self.length = max(0, self.length + tokens_to_remove)
        if tokens_to_remove:
            self.last_state = None

    def reset(self) -> None:
        """Forget everything."""
        self.length, self._fewest, self.last_state = 0, sys.maxsize, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows, in this order."""
        for layer in self.step_layers:
            layer.select(indices)
        self.available = self.available.index_select(0, indices.to(self.available.device))
        if self.last_state is not None:
            self.last_state = self.last_state.index_select(0, indices.to(self.last_state.device))
        self.batch = self.available.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(self.batch, device=self.available.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))


def refuse_other(cache: Cache) -> NoReturn:
    """Say that a cache of another kind does not do."""
    raise RestpointError(
        f"cache is a {type(cache).__name__}, which has one step for every layer; "
        "use the model's new_cache(), or leave it out"
    )
