"""The whole depth of a model as one compiled function, for a few widths of block."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model import kernels
from restpoint.model.agreement import is_row_invariant, require_agreement
from restpoint.model.cache import SlotCache
from restpoint.model.graph import Program, compile_pass, explained
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree
from restpoint.model.narrow import NarrowProducts
from restpoint.model.passes import Pass, block_shape, storage
from restpoint.model.tables import Tables
from restpoint.model.unrolled import UnrolledModel
from restpoint.progress import Progress

WIDTHS = (2, 4, 8, 16)
"""One token runs as two, at no cost that could be measured: for one row alone, compilers choose other sums."""

_LARGEST_START = 1024
_TIMED_PASSES = 12
_LIMIT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx")


class BucketCache(SlotCache):
    """A :class:`SlotCache` whose capacity is one of few, so that few shapes are compiled."""

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots: the capacity is doubled as often as that takes."""
        if slots <= self.capacity:
            return
        while self.capacity < slots:
            self.capacity *= 2
        for layer in self.slot_layers:
            layer.grow(self.capacity)


class CompiledModel:
    """The full depth of a :class:`LayeredModel`, from token ids to logits and h_L, in compiled passes of few widths.

    A block of n tokens, a chain or a tree, is padded to the next width. Padding is written to slots after the block,
    where nothing sees it. The cache is an ordinary :class:`SlotCache` (from :meth:`cache`), so the LayeredModel can
    work on it between passes.

    On a CPU, products and attention run in :mod:`restpoint.model.kernels`. What they give a token does not depend on
    the other tokens of its pass, so a speculative decoder's text is that of plain decoding to the last bit, in low
    precision too. ``row_invariant`` says whether :meth:`warm_up` saw that hold between all widths, trees included.
    Where it does not (a GPU), ``one_shape`` restores it for chains, at the price of the widest pass for every token.

    Args:
        layered: the model. On a CPU its weights are copied in the order that the kernels read them.
        widths: numbers of tokens to compile for.
        capacity: slots of a cache at first; None for the model's context length, but at most 1024. It doubles when
            needed, and then every width is compiled again on its first use.
        one_shape: use the largest width for every pass.
        compiled: False to run the same passes without torch.compile.
        progress: told of every step of a compilation.

    Raises:
        RestpointError: the model cannot be compiled; the message says why.
    """

    def __init__(
        self,
        layered: LayeredModel,
        widths: Sequence[int] = WIDTHS,
        capacity: int | None = None,
        *,
        one_shape: bool = False,
        compiled: bool = True,
        progress: Progress | None = None,
    ):
        if not widths or min(widths) < 1:
            raise RestpointError(f"widths={tuple(widths)}: give at least one number of tokens, each 1 or more")
        if capacity is not None and capacity < max(widths):
            raise RestpointError(f"capacity={capacity} is less than the widest pass: give {max(widths)} or more")
        _check_compilable(layered)
        self.layered = layered
        self.widths = (max(widths),) if one_shape else tuple(sorted(set(widths)))
        self.limit = next((int(n) for name in _LIMIT_NAMES if (n := getattr(layered.config, name, None))), None)
        self.capacity = capacity or min(self.limit or _LARGEST_START, _LARGEST_START) + self.widths[-1]
        self.compiled = compiled
        self.progress: Progress = progress or (lambda _stage, _done, _total: None)
        self.row_invariant = False
        self.compile_seconds = 0.0
        self._tables: dict[int, Tables] = {}
        self._programs: dict[tuple[int, int, int], Program] = {}
        self._products = None
        with explained(layered):
            self._pass(self.widths[0], self.capacity)
            if layered.device.type == "cpu":
                self.progress("preparing kernels", 0, len(self.widths))
                self._products = self._packed_products()

    def cache(self, batch: int = 1) -> BucketCache:
        """An empty cache for ``batch`` rows."""
        return BucketCache(self.layered.depth, batch, self.capacity)

    def width(self, tokens: int) -> int:
        """The width that a block of so many tokens is padded to."""
        for width in self.widths:
            if tokens <= width:
                return width
        raise RestpointError(
            f"a tree of {tokens} tokens is wider than the widest compiled pass: add {tokens} to widths"
        )

    @torch.no_grad()
    def score(
        self, ids: Int[Tensor, "batch token"], cache: SlotCache, tree: Tree | Sequence[Tree] | None = None
    ) -> tuple[Float[Tensor, "batch token vocab"], Float[Tensor, "batch token hidden"]]:
        """Run all layers over new tokens and write them to the cache, uncommitted.

        Args:
            ids: the tokens, appended to each row; rows may have different lengths.
            cache: from :meth:`cache`.
            tree: the tokens are the nodes of this tree, or of one tree for each row.

        Returns:
            Logits and h_L of every token. A chain longer than the widest pass runs in several; for a long prompt the
            LayeredModel is a little faster.
        """
        batch, count = ids.shape
        if tree is None and count > self.widths[-1]:
            return self._in_chunks(ids, cache)
        width = self.width(count)
        if self.limit and max(cache.lengths) + count > self.limit:
            raise RestpointError(f"the text is longer than the model's context of {self.limit} tokens: shorten it")
        cache.reserve(max(cache.lengths) + width)
        self._initialise(cache)
        program = self._program(batch, width, cache.capacity)
        padded = torch.nn.functional.pad(ids, (0, width - count)) if count < width else ids
        inputs = self._inputs(padded, cache.lengths, *block_shape(tree, batch, count, width))
        logits, hidden = program(inputs, storage(cache))
        self.layered.work.layer_calls += self.layered.depth
        self.layered.work.token_layers += self.layered.depth * batch * count
        return logits[:, :count], hidden[:, :count]

    def warm_up(self, batch: int = 1) -> None:
        """Compile every width for the first capacity, before anyone waits for a token.

        Every width is compared with the LayeredModel once it is compiled. Then it is seen whether results depend on the
        width, and whether the kernels gain from torch's number of threads.

        Raises:
            RestpointError: compilation fails, or its results differ from the LayeredModel's.
        """
        for index, width in enumerate(self.widths):
            self.progress(f"compiling a pass of {width}", index, len(self.widths))
            self._program(batch, width, self.capacity)
        self.progress("comparing the widths", len(self.widths), len(self.widths))
        if batch == 1:
            with self._uncounted():
                self._choose_threads()
                self.row_invariant = is_row_invariant(self)

    def _choose_threads(self) -> None:
        """Short parallel regions cost more than they bring on some machines: measure."""
        if self._products is None or torch.get_num_threads() == 1:
            return
        cache, ids = self.cache(), torch.zeros(1, self.widths[-1], dtype=torch.long)
        counts = (1, torch.get_num_threads())
        seconds = dict.fromkeys(counts, float("inf"))
        for _ in range(_TIMED_PASSES):
            for count in counts:
                kernels.set_threads(count)
                begun = time.perf_counter()
                self.score(ids, cache)
                seconds[count] = min(seconds[count], time.perf_counter() - begun)
        kernels.set_threads(min(counts, key=lambda count: seconds[count]))

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """What is run here is no work done for a text."""
        work = self.layered.work
        before = (work.layer_calls, work.token_layers)
        try:
            yield
        finally:
            work.layer_calls, work.token_layers = before

    def _in_chunks(self, ids: Tensor, cache: SlotCache) -> tuple[Tensor, Tensor]:
        lengths, parts = cache.lengths, []
        for chunk in ids.split(self.widths[-1], dim=1):
            parts.append(self.score(chunk, cache))
            cache.commit([chunk.shape[1]] * len(lengths))
        cache.lengths = lengths
        logits, hidden = zip(*parts, strict=True)
        return torch.cat(logits, 1), torch.cat(hidden, 1)

    def _inputs(self, ids: Tensor, lengths: list[int], depths: Tensor, sees: Tensor) -> list[Tensor]:
        base = torch.tensor(lengths)
        first = ids
        if self.layered.embedding_scale is None:  # h_0 depends on the position too, in the model's own way
            positions = base[:, None] + depths
            positions = positions if self.limit is None else positions.clamp(max=self.limit - 1)
            with self._using():
                first = self.layered.stack.prelude(ids, positions.to(ids.device), None, None).hidden
        return [part.to(self.layered.device, non_blocking=True) for part in (first, base, depths, sees)]

    def _initialise(self, cache: SlotCache) -> None:
        """Allocate an empty cache: its sizes are known after one eager token."""
        if not cache.slot_layers[0].is_initialized:
            if cache.lengths != [0] * cache.batch:
                raise RestpointError("cache: it says that tokens are in it, but none were written")
            ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=self.layered.device)
            with self._uncounted():
                self.layered.run(self.layered.plan(ids, cache))

    def _example(self, batch: int, width: int, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        cache = BucketCache(self.layered.depth, batch, capacity)
        self._initialise(cache)
        ids = torch.zeros(batch, width, dtype=torch.long, device=self.layered.device)
        return self._inputs(ids, cache.lengths, *block_shape(None, batch, width, width)), storage(cache)

    def _pass(self, width: int, capacity: int) -> Pass:
        if capacity not in self._tables:
            self._tables[capacity] = Tables.read(self.layered, min(capacity, self.limit or capacity))
        return Pass(self.layered, self._tables[capacity], width, capacity)

    @torch.no_grad()
    def _packed_products(self) -> NarrowProducts:
        """Run one pass as the model has it, and pack the weights that it multiplies with."""
        products = NarrowProducts(self.layered.model)
        inputs, kept = self._example(1, self.widths[0], self.capacity)
        program = compile_pass(self._pass(self.widths[0], self.capacity), inputs, kept, nullcontext, compiled=False)
        with products.recorded():
            self._inputs(
                torch.zeros(1, self.widths[0], dtype=torch.long), [0], *block_shape(None, 1, 1, self.widths[0])
            )
            program(inputs, kept)
        return products

    def _using(self) -> AbstractContextManager[None]:
        return nullcontext() if self._products is None else self._products.used()

    def _program(self, batch: int, width: int, capacity: int) -> Program:
        key = (batch, width, capacity)
        if key not in self._programs:
            begun = time.perf_counter()
            inputs, kept = self._example(batch, width, capacity)
            self._programs[key] = compile_pass(self._pass(width, capacity), inputs, kept, self._using, self.compiled)
            self.compile_seconds += time.perf_counter() - begun
            if batch == 1 and capacity == self.capacity:
                with self._uncounted():
                    require_agreement(self, width)
        return self._programs[key]


def _check_compilable(layered: LayeredModel) -> None:
    name = layered.config.model_type
    if layered.device.type == "cpu" and layered.dtype not in kernels.DTYPES:
        raise RestpointError(f"compile: on a CPU in {layered.dtype}: load with dtype='float32' or 'bfloat16'")
    if layered.device.type not in ("cpu", "cuda"):
        raise RestpointError(f"compile: not on device {layered.device.type!r}: use cpu or cuda, or leave compile out")
    if isinstance(layered, UnrolledModel):
        raise RestpointError(f"compile: {name} cannot be compiled, because it iterates its layers: leave compile out")
    if not layered.head.direct:
        raise RestpointError(
            f"compile: {name} cannot be compiled, because its head was not recognised: leave compile out"
        )
