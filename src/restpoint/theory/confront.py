"""What the particle system says of a model's layers, beside what the layers do."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.attention import SelfAttention
from restpoint.theory.weights import attention_of, read_heads
from restpoint.trajectory.observables import (
    cluster_count,
    cosines,
    directions,
    distance_to_first,
    effective_rank,
    log_energy,
)


@dataclass(frozen=True)
class Level:
    """The cloud of tokens before a layer (level 0 is the embedding output, the last one the model's own output).

    Averages over texts; of pairs and tokens after the first one, which many models use as a sink, but for
    ``to_first``.

    Attributes:
        level: number of layers that have run.
        norm: mean length of a state.
        log_energy: log E_b of the directions. With V = QᵀK = I attention never lets it decrease.
        mean_cosine: mean of <x_i, x_j> over pairs; 1 where all directions agree.
        clusters: connected components of tokens with <x_i, x_j> > 1 - tau.
        effective_rank: exp of the entropy of the covariance's eigenvalues.
        to_first: mean angle to the first token, in radians. With V = I causal attention sends it to 0.
    """

    level: int
    norm: float
    log_energy: float
    mean_cosine: float
    clusters: float
    effective_rank: float
    to_first: float


@dataclass(frozen=True)
class Step:
    """One layer: what it does to directions, what its attention alone does, and what its heads as particles would.

    The layer adds an attention output a and then an MLP's to h. *Attention alone* is h + a, with the a that the
    model computed; *particles* is h + F(h/|h|), F the force of the causal particle system with the layer's own
    Q, K and V, without positions, biases and windows. Contraction is the change of the mean cosine of pairs:
    positive where directions come together.

    Attributes:
        layer: its index.
        layer_contraction: by the whole layer.
        attention_contraction: by its attention alone.
        particle_contraction: by its heads as particles; None where they cannot be read.
        alignment: mean cosine of F and a over tokens: how much of the attention its content part is.
        to_first: change of the mean angle to the first token by the whole layer, in radians.
        particle_to_first: by its heads as particles.
        added_by_attention: mean of |a| / |h|.
        added_by_rest: mean of |h' - h - a| / |h|: the MLP's, mostly.
    """

    layer: int
    layer_contraction: float
    attention_contraction: float
    particle_contraction: float | None
    alignment: float | None
    to_first: float
    particle_to_first: float | None
    added_by_attention: float
    added_by_rest: float


@dataclass(frozen=True)
class Confrontation:
    """Theory and model, layer by layer.

    Attributes:
        levels: the cloud before every layer and after the last one.
        steps: the layers.
        tokens: tokens read.
        texts: texts read.
        left_out: what the model's attention has beside the particles', or why its heads could not be read.
    """

    levels: tuple[Level, ...]
    steps: tuple[Step, ...]
    tokens: int
    texts: int
    left_out: tuple[str, ...]

    @property
    def violations(self) -> tuple[int, ...]:
        """Layers after which the energy is lower, which full attention with V = QᵀK = I would not allow."""
        return tuple(
            step.layer
            for step, before, after in zip(self.steps, self.levels[:-1], self.levels[1:], strict=True)
            if after.log_energy < before.log_energy
        )

    @property
    def agreeing(self) -> tuple[int, int]:
        """In how many layers particles and attention contract or spread alike, and in how many both are known."""
        known = [step for step in self.steps if step.particle_contraction is not None]
        alike = [step for step in known if (step.particle_contraction or 0) * step.attention_contraction > 0]
        return len(alike), len(known)


@torch.no_grad()
def confront(
    layered: LayeredModel,
    texts: Iterable[Tensor],
    *,
    beta: float = 1.0,
    tau: float = 0.1,
    progress: Callable[[int], None] | None = None,
) -> Confrontation:
    """Read texts and hold every layer against the particle system with the layer's own heads.

    Args:
        layered: the model.
        texts: token ids, (1, seq) each, of at least 3 tokens.
        beta: inverse temperature of the energy.
        tau: tokens with a cosine above 1 - tau are in one cluster.
        progress: told the number of tokens read so far.

    Raises:
        RestpointError: there is no text, or one has fewer than 3 tokens; beta is not positive.

    Paper:
        Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, "A mathematical perspective on transformers"; Karagodin,
        Polyanskiy, Rigollet 2024, "Clustering in causal attention masking".
    """
    systems, left_out = _systems(layered)
    levels = _Sums(layered.depth + 1)
    steps = _Sums(layered.depth)
    tokens = count = 0
    for ids in texts:
        if ids.shape[0] != 1 or ids.shape[1] < 3:
            raise RestpointError(f"texts: one has shape {tuple(ids.shape)}; give (1, seq) with at least 3 tokens")
        count, tokens = count + 1, tokens + ids.shape[1]
        states, outputs = _trace(layered, ids)
        for level, cloud in enumerate(states):
            levels.add(level, _level(cloud, beta, tau))
        for layer, (before, after, added) in enumerate(zip(states, states[1:], outputs, strict=False)):
            steps.add(layer, _step(before, after, added, systems[layer]))
        if progress is not None:
            progress(tokens)
    if count == 0:
        raise RestpointError("texts: there is none; give at least one")
    return Confrontation(
        tuple(Level(level, **levels.means(level)) for level in range(layered.depth + 1)),
        tuple(Step(layer, **_complete(steps.means(layer))) for layer in range(layered.depth)),
        tokens,
        count,
        left_out,
    )


class _Sums:
    """Means of named numbers over texts, for each layer."""

    def __init__(self, places: int):
        self._sums: list[dict[str, float]] = [{} for _ in range(places)]
        self._counts = [0] * places

    def add(self, place: int, values: dict[str, float]) -> None:
        self._counts[place] += 1
        for name, value in values.items():
            self._sums[place][name] = self._sums[place].get(name, 0.0) + value

    def means(self, place: int) -> dict[str, float]:
        return {name: value / self._counts[place] for name, value in self._sums[place].items()}


def _complete(means: dict[str, float]) -> dict[str, Any]:
    """None for what could not be read."""
    return {field.name: means.get(field.name) for field in fields(Step) if field.name != "layer"}


def _systems(layered: LayeredModel) -> tuple[list[SelfAttention | None], tuple[str, ...]]:
    """Every layer's heads as particles, None where they cannot be read."""
    systems: list[SelfAttention | None] = []
    left_out: dict[str, None] = {}
    for layer in range(layered.depth):
        try:
            read = read_heads(layered, layer)
        except RestpointError as refusal:
            systems.append(None)
            left_out[str(refusal)] = None
        else:
            systems.append(SelfAttention(1.0, read.maps, causal=True))
            left_out |= dict.fromkeys(read.left_out)
    return systems, tuple(left_out)


def _trace(layered: LayeredModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States at every level and the attention output of every layer, of one text, in float64."""
    plan = layered.plan(ids)
    states = [plan.hidden]
    with _attention_outputs(layered) as outputs:
        layered.run(plan, keep=states)
    return [state[0].double().cpu() for state in states], [output[0].double().cpu() for output in outputs]


@contextmanager
def _attention_outputs(layered: LayeredModel) -> Iterator[list[Tensor]]:
    """A list that gains what the attention of every layer adds to the residual stream."""
    found: list[Tensor] = []

    def see(_module: Any, _arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [attention_of(layered, layer).register_forward_hook(see) for layer in range(layered.depth)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _level(cloud: Float[Tensor, "tokens dim"], beta: float, tau: float) -> dict[str, float]:
    rest = cloud[1:]
    return {
        "norm": float(rest.norm(dim=-1).mean()),
        "log_energy": float(log_energy(rest, beta)),
        "mean_cosine": _mean_cosine(rest),
        "clusters": float(cluster_count(rest, tau)),
        "effective_rank": float(effective_rank(rest)),
        "to_first": float(distance_to_first(cloud)[1:].mean()),
    }


def _step(before: Tensor, after: Tensor, added: Tensor, system: SelfAttention | None) -> dict[str, float]:
    norms = before.norm(dim=-1, keepdim=True)
    cosine, angle = _mean_cosine(before[1:]), float(distance_to_first(before)[1:].mean())
    found = {
        "layer_contraction": _mean_cosine(after[1:]) - cosine,
        "attention_contraction": _mean_cosine((before + added)[1:]) - cosine,
        "to_first": float(distance_to_first(after)[1:].mean()) - angle,
        "added_by_attention": float((added.norm(dim=-1, keepdim=True) / norms)[1:].mean()),
        "added_by_rest": float(((after - before - added).norm(dim=-1, keepdim=True) / norms)[1:].mean()),
    }
    if system is None:
        return found
    force = system.force(directions(before), 0.0)
    alignment = torch.nn.functional.cosine_similarity(force, added, dim=-1)[1:]
    return found | {
        "particle_contraction": _mean_cosine((before + force)[1:]) - cosine,
        "particle_to_first": float(distance_to_first(before + force)[1:].mean()) - angle,
        "alignment": float(alignment.mean()),
    }


def _mean_cosine(cloud: Float[Tensor, "tokens dim"]) -> float:
    """Over pairs of different tokens."""
    every = cosines(cloud)
    count = every.shape[0]
    return float((every.sum() - every.diagonal().sum()) / (count * (count - 1)))
