"""Sweeps: for every threshold of a signal, how many layers are left out, and how many tokens become others.

All is told from traces at full depth, token by token on the full model's text. For rules whose later tokens miss
nothing (exact catch-up, and depths that only fall) a token of which all earlier ones agree stops exactly where the
sweep says. After a token that differs, decoding goes on with another text, and a sweep says what to expect of it. With
propagated keys later tokens see other states than these, so that no sweep can tell.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.exit.bootstrap import Estimate, estimates, resampled_shares
from restpoint.exit.costs import ExitCosts
from restpoint.exit.rules import PositionRule
from restpoint.exit.traces import Traces

NEVER = 2.0
"""A threshold that no confidence reaches."""
ORACLE, LASTING_ORACLE, STATIC = "oracle", "lasting oracle", "static depth"
_THRESHOLDS = 200
_AT_ONCE = 2**21
"""Points x sequences x tokens that are looked at together."""


@dataclass(frozen=True)
class Point:
    """One setting of a rule, means over sequences with their intervals.

    Attributes:
        setting: threshold of a signal, budget of an oracle, deepest layer of a rule by position.
        layers_seen: layers behind the law of a token. With exact catch-up and one text these are the layers' calls
            per token too, since tokens that wait are taken along in a call that is made anyway.
        layers_run: layers run per token, those of tokens that are taken along counted each.
        disagreement: share of tokens that are not the full model's.
        log_loss: by how many nats the full model's token is less probable than under the full law.
        speed: expected rate over plain decoding; None without costs.
    """

    setting: float
    layers_seen: Estimate
    layers_run: Estimate
    disagreement: Estimate
    log_loss: Estimate
    speed: Estimate | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """What one way of stopping gives, at each of its settings and for each sequence: means over its tokens.

    Attributes:
        name: of the signal, or of the rule that needs none.
        depth: layers of the model.
        layers: candidate layers.
        settings: see `Point`; thresholds ascend and end with `NEVER`.
        layers_seen: see `Point`.
        layers_run: see `Point`.
        disagreement: see `Point`.
        log_loss: see `Point`, in nats.
        seconds: expected, per token; None without costs.
        plain_seconds: of a token in plain decoding; None without costs.
    """

    name: str
    depth: int
    layers: tuple[int, ...]
    settings: tuple[float, ...]
    layers_seen: Float64[Tensor, "points sequences"]
    layers_run: Float64[Tensor, "points sequences"]
    disagreement: Float64[Tensor, "points sequences"]
    log_loss: Float64[Tensor, "points sequences"]
    seconds: Float64[Tensor, "points sequences"] | None = None
    plain_seconds: float | None = None

    @property
    def sequences(self) -> int:
        """How many texts it rests on."""
        return self.layers_seen.shape[1]

    def points(self, seed: int = 0) -> list[Point]:
        """Means over sequences, with 95% percentile bootstrap intervals over them."""
        shares = resampled_shares(self.sequences, seed)

        def estimated(values: Tensor, change: Callable[[Tensor], Tensor] = lambda means: means) -> list[Estimate]:
            return estimates(change(values.mean(-1)), change(values @ shares), self.sequences)

        columns = [estimated(own) for own in (self.layers_seen, self.layers_run, self.disagreement, self.log_loss)]
        found = [Point(*each) for each in zip(self.settings, *columns, strict=True)]
        if self.seconds is None or self.plain_seconds is None:
            return found
        plain = self.plain_seconds
        speeds = estimated(self.seconds, lambda means: plain / means)
        return [replace(point, speed=speed) for point, speed in zip(found, speeds, strict=True)]


def sweep(
    traces: Traces, signal: str, costs: ExitCosts | None = None, thresholds: int | Sequence[float] = _THRESHOLDS
) -> Curve:
    """Stop at the first candidate layer where the signal's confidence >= threshold, for many thresholds.

    Args:
        traces: of any candidate layers.
        signal: its name.
        costs: what to tell the expected speed by.
        thresholds: how many at most: quantiles of the confidences, besides 0 (always stop) and `NEVER`. Or these
            themselves, ascending.

    Raises:
        RestpointError: the signal was not recorded, or not measured.
    """
    confidence = traces.confidence(signal)
    settings = thresholds_of(confidence, thresholds) if isinstance(thresholds, int) else tuple(thresholds)
    return _curve(traces, signal, settings, lambda some: first_exits(confidence, some), costs, signal)


def sweeps(traces: Traces, costs: ExitCosts | None = None, thresholds: int = _THRESHOLDS) -> dict[str, Curve]:
    """A sweep of every signal that was recorded, by name."""
    return {signal: sweep(traces, signal, costs, thresholds) for signal in traces.confidences}


def oracle(
    traces: Traces, costs: ExitCosts | None = None, *, lasting: bool = False, budgets: Sequence[float] = (0.0,)
) -> Curve:
    """The ceiling: stop at the earliest candidate layer whose token is the full model's; it knows that token.

    With a budget b it may be wrong about a share b of the tokens: those that stopping at the first candidate layer
    saves most layers of. No rule on these layers sees fewer layers at a disagreement of at most b, unless ``lasting``.

    Args:
        traces: of any candidate layers.
        costs: what to tell the expected speed by; looking costs nothing here.
        lasting: stop only where every later candidate layer agrees too, which a rule has a better chance to notice.
        budgets: shares of tokens in [0, 1].

    Raises:
        RestpointError: a budget is outside [0, 1].
    """
    if not all(0 <= budget <= 1 for budget in budgets):
        raise RestpointError(f"budgets is {tuple(budgets)}; give shares of tokens between 0 and 1")
    agrees = traces.agrees.flip(-1).cummin(-1).values.flip(-1) if lasting else traces.agrees
    right = torch.cat([agrees, torch.ones_like(agrees[..., :1])], -1).int().argmax(-1)
    saved = _depths(traces)[right] - traces.layers[0]
    # Among tokens that save the same, any are as good; taken at random, no sequence pays for the others.
    shuffled = torch.randperm(saved.numel(), generator=torch.Generator().manual_seed(0))
    order = shuffled[saved.flatten()[shuffled].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))

    def exits(some: Float64[Tensor, " points"]) -> Int[Tensor, "points sequences tokens"]:
        allowed = (some * saved.numel() + 1e-9).floor().long()
        return torch.where(rank.view_as(saved) < allowed[:, None, None], 0, right)

    return _curve(traces, LASTING_ORACLE if lasting else ORACLE, tuple(budgets), exits, costs, None)


def fixed(
    traces: Traces, costs: ExitCosts | None = None, rules: Sequence[PositionRule] | None = None, name: str = STATIC
) -> Curve:
    """Depths that go by a token's place alone: the same for all tokens, or those of SkipDecode.

    Args:
        traces: of any candidate layers.
        costs: what to tell the expected speed by.
        rules: one for each point; every candidate layer and the whole depth, each for all tokens, if None.
        name: of the curve.

    Raises:
        RestpointError: a rule stops at a layer that was not recorded.
    """
    ways = [*traces.layers, traces.depth]
    if rules is None:
        rules = [PositionRule(layer, layer) for layer in ways if layer]
    places = range(1, traces.tokens.shape[1] + 1)
    asked = [[rule.layer_at(place) for place in places] for rule in rules]
    missing = {layer for depths in asked for layer in depths} - set(ways)
    if missing:
        raise RestpointError(
            f"rules: depth {min(missing)} was not recorded; record traces with it, or keep to "
            f"{', '.join(map(str, ways))}"
        )
    exits = torch.tensor([[ways.index(layer) for layer in depths] for depths in asked])[:, None]
    settings = tuple(float(rule.first) for rule in rules)
    numbers = torch.arange(len(rules), dtype=torch.float64)
    curve = _curve(
        traces,
        name,
        tuple(numbers.tolist()),
        lambda some: exits[some.long()].expand(-1, *traces.tokens.shape),
        costs,
        None,
    )
    return replace(curve, settings=settings)


def thresholds_of(confidence: Float[Tensor, "*shape"], count: int) -> tuple[float, ...]:
    """0, at most ``count`` thresholds at quantiles of confidences, and `NEVER`, ascending.

    A threshold lies half-way between two neighbouring confidences, so that rounding does not decide who stops.

    Raises:
        RestpointError: count is below 1.
    """
    if count < 1:
        raise RestpointError(f"thresholds is {count}; give at least 1")
    values = confidence.flatten().sort().values
    ranks = torch.linspace(0, len(values) - 1, min(count, len(values)), dtype=torch.float64).round().long()
    distinct = values.unique_consecutive()
    places = torch.searchsorted(distinct, values[ranks].unique_consecutive())
    places = places[places > 0]
    below, above = distinct[places - 1], distinct[places]
    middle = below + (above - below) / 2
    return (0.0, *torch.where(middle > below, middle, above).tolist(), NEVER)


def first_exits(
    confidence: Float[Tensor, "sequences tokens layers"], thresholds: Float64[Tensor, " points"]
) -> Int[Tensor, "points sequences tokens"]:
    """Number of the first layer where the confidence reaches each threshold; the number of layers where none does."""
    highest = confidence.cummax(-1).values
    asked = thresholds.to(confidence.dtype)[:, None, None]
    return torch.stack([highest[..., layer] < asked for layer in range(highest.shape[-1])]).sum(0)


def _depths(traces: Traces) -> Int[Tensor, " ways"]:
    return torch.tensor([*traces.layers, traces.depth])


def _curve(
    traces: Traces,
    name: str,
    settings: tuple[float, ...],
    exits: Callable[[Float64[Tensor, " points"]], Int[Tensor, "points sequences tokens"]],
    costs: ExitCosts | None,
    signal: str | None,
) -> Curve:
    """What a way of stopping gives at each setting, some settings at a time."""
    blocks = torch.tensor(settings, dtype=torch.float64).split(max(1, _AT_ONCE // traces.tokens.numel()))
    parts = [_outcome(traces, exits(some), costs, signal) for some in blocks]
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    plain = None if costs is None else costs.plain(traces.depth)
    return Curve(name, traces.depth, traces.layers, settings, **columns, plain_seconds=plain)


def _outcome(
    traces: Traces, exits: Int[Tensor, "points sequences tokens"], costs: ExitCosts | None, signal: str | None
) -> Mapping[str, Float64[Tensor, "points sequences"]]:
    """Means over each sequence's tokens, for tokens that stop at candidate layers of these numbers."""
    none = torch.zeros_like(traces.margin)[..., None]
    wrong = torch.cat([~traces.agrees, none.bool()], -1).double()
    lost = traces.full_log_probability[..., None].double() - traces.log_probability.double()
    lost = torch.cat([lost, none.double()], -1)

    def at_exits(values: Float64[Tensor, "sequences tokens ways"]) -> Float64[Tensor, "points sequences"]:
        return values.expand(len(exits), -1, -1, -1).gather(-1, exits[..., None])[..., 0].mean(-1)

    tokens = exits.shape[-1]
    blocks = torch.zeros(tokens + 1, dtype=torch.float64) if costs is None else costs.blocks(tokens)
    run = torch.full(exits.shape[:2], float(traces.layers[0]), dtype=torch.float64)
    seconds = run * blocks[1]
    before = torch.ones_like(exits)
    for width, taken in _passes(traces, exits):
        run += width * taken.double().mean(-1)
        if costs is not None:
            seconds += width * blocks[taken].mean(-1) + costs.joining * (taken > before).double().mean(-1)
        before = torch.where(taken > 0, taken, before)
    found = {
        "layers_seen": _depths(traces)[exits].double().mean(-1),
        "layers_run": run,
        "disagreement": at_exits(wrong),
        "log_loss": at_exits(lost),
    }
    if costs is not None:
        ways = len(traces.layers)
        looks = (exits + 1).clamp_max(ways).double().mean(-1)
        stopped = (exits < ways).double().mean(-1)
        found["seconds"] = (
            seconds
            + costs.overhead
            + looks * costs.check(signal)
            + stopped * costs.stop(signal)
            + (1 - stopped) * costs.head
        )
    return found


def _passes(
    traces: Traces, exits: Int[Tensor, "points sequences tokens"]
) -> Iterator[tuple[int, Int[Tensor, "points sequences tokens"]]]:
    """From each candidate layer to the next: how many layers, and how many tokens each pass takes through them.

    A token that goes on takes along all that have stopped there since the last one that went on: the distance to it.
    A token that stops takes none.
    """
    places = torch.arange(1, exits.shape[-1] + 1)
    ways = [*traces.layers, traces.depth]
    for number, (layer, following) in enumerate(itertools.pairwise(ways)):
        deep = exits > number
        last = (deep * places).cummax(-1).values
        previous = torch.nn.functional.pad(last[..., :-1], (1, 0))
        yield following - layer, torch.where(deep, places - previous, 0)
