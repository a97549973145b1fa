"""What a model can do layer by layer, established by numbers and not by its name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree

_LENGTH = 12
_PROMPT = 7
_NOISES = 6
_TREE = Tree((-1, 0, 0, 1, 2, 1))
_CHANGED = 4


@dataclass(frozen=True)
class Capability:
    """The outcome of one check.

    Attributes:
        supported: whether restpoint may rely on it.
        difference: largest absolute logit (or state) difference from the model's own code; None where it raised.
        tolerance: largest difference that counts as rounding.
        reason: why it is refused; empty where it is supported.
    """

    supported: bool
    difference: float | None
    tolerance: float
    reason: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What :func:`check` found.

    Attributes:
        depth: all layers in one pass give the model's own logits.
        exit: states after any layer equal the model's own hidden states, so logits can be read early.
        skip: layers can be left out.
        cached: passes over a cache, one token or several at a time, give the model's own logits.
        resume: tokens that ran the first layers one by one can run the others together.
        rollback: tokens written to the cache and not committed leave no trace.
        tree: the nodes of a draft tree see their ancestors only, and an accepted path can be kept.
        ragged: rows of one batch may have different lengths.
    """

    depth: Capability
    exit: Capability
    skip: Capability
    cached: Capability
    resume: Capability
    rollback: Capability
    tree: Capability
    ragged: Capability

    @property
    def drafts(self) -> bool:
        """Whether drafted tokens can be verified, which is what lossless speed-ups need."""
        return self.depth.supported and self.cached.supported and self.rollback.supported

    def refused(self) -> dict[str, str]:
        """Reason for every capability that is refused."""
        return {name: found.reason for name, found in self.table() if not found.supported}

    def table(self) -> list[tuple[str, Capability]]:
        """Name and outcome of every check, in order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@torch.no_grad()
def check(layered: LayeredModel, seed: int = 0) -> Capabilities:
    """Compare everything that restpoint does with a model to the model's own code, on a few random tokens.

    Every check compares with ``model(ids)`` in the model's own dtype. The tolerance is 6 times the rounding noise,
    which is what the model's own cached and uncached passes differ by (at least 2 units in the last place and 1e-5 of
    the largest logit). A check is only believed where it could have failed: changing one of four earlier tokens must
    move the last logits by more than 4 tolerances, else the capability is refused as not established.

    Args:
        layered: the model.
        seed: seed of the calibration tokens.

    Returns:
        The capabilities with the differences behind them. A capability whose check raises is refused, with the
        error as its reason; the model is unchanged in any case.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, layered.vocabulary_size, (2, _LENGTH), generator=generator).to(layered.device)
    calibration = _Calibration(layered, ids)
    checks: dict[str, Callable[[_Calibration], float]] = {
        "depth": _depth,
        "exit": _exit,
        "skip": _skip,
        "cached": _cached,
        "resume": _resume,
        "rollback": _rollback,
        "tree": _tree,
        "ragged": _ragged,
    }
    outcomes: dict[str, Capability] = {}
    for name, run in checks.items():
        outcomes[name] = _judge(calibration, name, run)
    return Capabilities(**outcomes)


class _Calibration:
    """Tokens, the model's own answers for them, and the tolerance that follows from its rounding."""

    def __init__(self, layered: LayeredModel, ids: Tensor):
        self.layered = layered
        self.ids = ids[:1]
        self.other = ids[1:]
        self.states: list[Tensor] = []
        with self._watched_layers():
            self.logits = self.native(self.ids)
        changed = self.ids.repeat(_CHANGED, 1)
        for row in range(_CHANGED):
            changed[row, -3 - row] = self.other[0, -3 - row]
        self.sensitivity = _difference(self.native(changed)[:, -1], self.logits[:, -1].expand(_CHANGED, -1))
        largest = float(self.logits.float().abs().max())
        floor = max(2 * torch.finfo(self.logits.dtype).eps, 1e-5) * largest
        self.tolerance = max(_NOISES * self._native_noise(), floor)

    @contextmanager
    def _watched_layers(self) -> Iterator[None]:
        """Note what every layer returns while the model's own forward runs."""

        def note(_module: Any, _args: Any, output: Any) -> None:
            self.states.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(note) for layer in dict.fromkeys(self.layered.stack.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def native(self, ids: Tensor) -> Tensor:
        """The model's own logits of a sequence."""
        return self.layered.model(input_ids=ids, use_cache=False, **self.layered.forward_arguments).logits

    def _native_noise(self) -> float:
        """How far the model's own cached pass is from its uncached one."""
        name = self.layered.stack.cache_argument
        model = partial(self.layered.model, use_cache=True, **self.layered.forward_arguments)
        first = model(input_ids=self.ids[:, :_PROMPT])
        noise = 0.0
        cache = getattr(first, name)
        for index in range(_PROMPT, _LENGTH):
            step = model(input_ids=self.ids[:, index : index + 1], **{name: cache})
            cache = getattr(step, name)
            noise = max(noise, _difference(step.logits[:, 0], self.logits[:, index]))
        return noise


def _judge(calibration: _Calibration, name: str, run: Callable[[_Calibration], float]) -> Capability:
    tolerance = calibration.tolerance
    if calibration.layered.refusal:
        return Capability(False, None, tolerance, calibration.layered.refusal)
    if name in ("tree", "ragged") and (reason := _masks_itself(calibration.layered)):
        return Capability(False, None, tolerance, reason)
    try:
        difference = run(calibration)
    except Exception as error:  # a family's own code may raise anything; the reason is reported
        first_line = (str(error).splitlines() or [""])[0]
        return Capability(False, None, tolerance, f"{type(error).__name__}: {first_line}"[:160])
    if not difference <= tolerance:
        return Capability(False, difference, tolerance, "differs from the model's own result")
    if calibration.sensitivity < 4 * tolerance:
        reason = "not established: context moves the logits no more than rounding; load in float32"
        return Capability(False, difference, tolerance, reason)
    return Capability(True, difference, tolerance)


def _masks_itself(layered: LayeredModel) -> str:
    """Families whose layers hold a causal mask of their own, by slot, cannot be told another visibility."""
    for name, buffer in layered.stack.layers[0].named_buffers():
        square = buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
        if square and buffer.dtype in (torch.bool, torch.uint8):
            return f"its layers apply a mask of their own (buffer {name})"
    return ""


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _depth(calibration: _Calibration) -> float:
    layered = calibration.layered
    return _difference(layered.logits(layered.run(layered.plan(calibration.ids))), calibration.logits)


def _exit(calibration: _Calibration) -> float:
    """Every layer's state, as a share of its largest entry, scaled to the logits that the tolerance speaks of."""
    layered = calibration.layered
    kept: list[Tensor] = []
    layered.run(layered.plan(calibration.ids), keep=kept)
    largest = float(calibration.logits.float().abs().max())
    pairs = zip(kept, calibration.states, strict=True)
    return max(_difference(own, native) / float(native.float().abs().max() + 1e-30) for own, native in pairs) * largest


def _skip(calibration: _Calibration) -> float:
    layered = calibration.layered
    skip, expected = layered.without_some(calibration.ids)
    hidden = layered.run(layered.plan(calibration.ids), skip=skip)
    return _difference(layered.logits(hidden), expected)


def _cached(calibration: _Calibration) -> float:
    layered, ids = calibration.layered, calibration.ids
    cache = layered.cache(capacity=_LENGTH - 2)
    seen = []
    for start, stop in ((0, _PROMPT), (_PROMPT, _PROMPT + 1), (_PROMPT + 1, _LENGTH)):
        seen.append(layered.logits(layered.run(layered.plan(ids[:, start:stop], cache))))
        cache.commit([stop - start])
    return _difference(torch.cat(seen, 1), calibration.logits)


def _resume(calibration: _Calibration) -> float:
    layered, ids = calibration.layered, calibration.ids
    cache = layered.cache()
    layered.run(layered.plan(ids[:, :_PROMPT], cache))
    cache.commit([_PROMPT])
    early = layered.depth // 2
    exits = [
        layered.run(layered.plan(ids[:, index : index + 1], cache, offset=index - _PROMPT), stop=early)
        for index in range(_PROMPT, _LENGTH)
    ]
    block = layered.plan(ids[:, _PROMPT:], cache)
    hidden = layered.run(block, start=early, hidden=torch.cat(exits, 1))
    return _difference(layered.logits(hidden), calibration.logits[:, _PROMPT:])


def _rollback(calibration: _Calibration) -> float:
    layered, ids = calibration.layered, calibration.ids
    cache = layered.cache()
    layered.run(layered.plan(ids[:, :_PROMPT], cache))
    cache.commit([_PROMPT])
    layered.run(layered.plan(calibration.other[:, _PROMPT:], cache))
    cache.commit([0])
    seen = []
    for start, stop in ((_PROMPT, _PROMPT + 2), (_PROMPT + 2, _PROMPT + 3), (_PROMPT + 3, _LENGTH)):
        layered.run(layered.plan(calibration.other[:, start:], cache))
        seen.append(layered.logits(layered.run(layered.plan(ids[:, start:stop], cache))))
        cache.commit([stop - start])
    return _difference(torch.cat(seen, 1), calibration.logits[:, _PROMPT:])


def _tree(calibration: _Calibration) -> float:
    """Each path of a tree against the same tokens as a sequence, then a token after the kept path."""
    layered, prompt = calibration.layered, calibration.ids[:, :_PROMPT]
    nodes = calibration.other[:, : len(_TREE.parents)]
    cache = layered.cache()
    layered.run(layered.plan(prompt, cache))
    cache.commit([_PROMPT])
    logits = layered.logits(layered.run(layered.plan(nodes, cache, tree=_TREE)))
    ancestors = _TREE.ancestors()
    worst = 0.0
    path: list[int] = []
    for node in range(len(_TREE.parents)):
        path = [ancestor for ancestor in range(node + 1) if ancestors[node, ancestor]]
        sequence = torch.cat([prompt, nodes[:, path]], 1)
        worst = max(worst, _difference(logits[:, node], calibration.native(sequence)[:, -1]))
    path = [0, 2, 4]
    cache.keep(0, path)
    following = calibration.ids[:, -1:]
    sequence = torch.cat([prompt, nodes[:, path], following], 1)
    after = layered.logits(layered.run(layered.plan(following, cache)))
    return max(worst, _difference(after[:, 0], calibration.native(sequence)[:, -1]))


def _ragged(calibration: _Calibration) -> float:
    """Two rows of different lengths in one batch, against each row by itself."""
    layered = calibration.layered
    rows = torch.cat([calibration.ids, calibration.other])
    cache = layered.cache(batch=2)
    layered.run(layered.plan(rows[:, :_PROMPT], cache))
    lengths = [_PROMPT, _PROMPT - 3]
    cache.commit(lengths)
    width = 3
    block = torch.stack([row[length : length + width] for row, length in zip(rows, lengths, strict=True)])
    logits = layered.logits(layered.run(layered.plan(block, cache)))
    single = [calibration.native(row[None, : length + width]) for row, length in zip(rows, lengths, strict=True)]
    return max(_difference(logits[i : i + 1], one[:, -width:]) for i, one in enumerate(single))
