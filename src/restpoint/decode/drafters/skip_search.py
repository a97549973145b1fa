"""The set of left-out layers that drafts best, searched on a text."""

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restpoint.decode.drafters.skip_choice import choose_layers, layers_at_end
from restpoint.decode.drafters.skip_judge import SkipJudge, SkipQuality
from restpoint.decode.drafters.skips import SkipSet
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

_SEED_POSITIONS = 8


@dataclass(frozen=True)
class SkipSearchOptions:
    """What is searched, and how it is judged.

    Attributes:
        trials: sets that are tried, those to begin with included.
        least: fewest layers to leave out.
        most: most layers to leave out; None for three quarters of them.
        longest: longest chain that is judged.
        greedy: judge by agreement of the most probable token, as greedy decoding does; else by 1 - TV.
        block_cost: what each further token adds to a verifying pass, as a share of a plain pass.
        seed: seed of the search.

    Raises:
        RestpointError: one of them is out of range.
    """

    trials: int = 80
    least: int = 1
    most: int | None = None
    longest: int = 8
    greedy: bool = True
    block_cost: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise RestpointError(f"trials={self.trials} tries nothing; give at least 1")
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise RestpointError(f"least={self.least}, most={self.most}: give 0 <= least <= most")

    def gain(self, quality: SkipQuality) -> float:
        """Expected tokens for the cost of a plain pass, at the best length."""
        drafted = quality.best_length(self.greedy, self.block_cost)
        return quality.gain(drafted, self.greedy, self.block_cost)

    def value(self, quality: SkipQuality) -> float:
        """What is maximised: the gain of the best draft that has a token, so that bad sets still differ."""
        lengths = range(1, len(quality.agreement) + 1)
        return max(quality.gain(drafted, self.greedy, self.block_cost) for drafted in lengths)


@dataclass(frozen=True)
class SkipSearch:
    """What a search found.

    Attributes:
        best: the best set's quality; ``best.skip`` is the set.
        gain: its expected tokens for the cost of a plain pass; 1 where plain decoding is not beaten.
        length: the number of drafted tokens that this takes; 0 where plain decoding is not beaten.
        trials: all sets that were judged, best first.
    """

    best: SkipQuality
    gain: float
    length: int
    trials: tuple[SkipQuality, ...]


def search_skip_set(
    layered: LayeredModel,
    texts: Sequence[Sequence[int]],
    options: SkipSearchOptions | None = None,
    progress: Callable[[int, int, SkipQuality], None] | None = None,
) -> SkipSearch:
    """Maximise expected tokens per cost, (1 + sum_{i<=d} prod_{j<=i} a_j) / (1 + d share), over sets and lengths d.

    The first sets tried are evenly spread ones and those that :func:`choose_layers` finds on a few tokens of the text;
    a tree-structured Parzen estimator then searches over the number of layers and an importance of each.

    When to use: once for a model and a kind of text, minutes on a small model. When not: the text changes in kind while
    decoding; then choose layers online (:class:`SkipChoice`).

    Args:
        layered: the model, of a family that can see trees (``check(layered).tree``).
        texts: token ids of some texts, together a few hundred tokens or more.
        options: what is searched.
        progress: called after every trial with its number from 1, the number of trials and its quality.

    Raises:
        RestpointError: the range of layers does not fit the model, the texts are too short, or the package ``optuna``
            is missing.

    Paper:
        Zhang et al. 2024, "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding".
        Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
    """
    options = options or SkipSearchOptions()
    depth = layered.depth
    most = max(options.least, 3 * depth // 4) if options.most is None else options.most
    if most >= depth:
        raise RestpointError(f"most={most} leaves none of the model's {depth} layers; give at most {depth - 1}")
    optuna = _optuna()
    judge = SkipJudge(layered, texts, options.longest)
    judged: dict[SkipSet, SkipQuality] = {}

    def objective(trial: Any) -> float:
        skipped = trial.suggest_int("skipped", options.least, most)
        worth = [trial.suggest_float(f"layer_{layer}", 0, 1) for layer in range(depth)]
        skip = SkipSet(tuple(sorted(range(depth), key=worth.__getitem__)[:skipped]))
        if skip not in judged:
            judged[skip] = judge.judge(skip)
        if progress is not None:
            progress(trial.number + 1, options.trials, judged[skip])
        return options.value(judged[skip])

    first = _first_sets(judge, range(options.least, most + 1))
    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=options.seed, n_startup_trials=len(first))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for skip in first:
            worth = {f"layer_{layer}": 0.25 if layer in skip.layers else 0.75 for layer in range(depth)}
            study.enqueue_trial({"skipped": len(skip.layers), **worth})
        study.optimize(objective, n_trials=options.trials)
    finally:
        optuna.logging.set_verbosity(shown)
    trials = tuple(sorted(judged.values(), key=options.value, reverse=True))
    best = trials[0]
    return SkipSearch(best, options.gain(best), best.best_length(options.greedy, options.block_cost), trials)


def _first_sets(judge: SkipJudge, counts: Sequence[int]) -> list[SkipSet]:
    """For every number of layers an evenly spread set, and the layers that single tokens would leave out most often."""
    layered = judge.layered
    votes: dict[int, Counter[int]] = {count: Counter() for count in counts}
    most = max(counts)
    for index in range(_SEED_POSITIONS if most > 0 else 0):
        text = judge.texts[index % len(judge.texts)]
        length = text.ids.shape[1]
        read = text.ids[:, : max(2, length - index * length // (2 * _SEED_POSITIONS))]
        cache = layered.cache(capacity=length + most + 1)
        kept = [(plan := layered.plan(read, cache)).hidden]
        layered.run(plan, keep=kept)
        cache.commit([read.shape[1]])
        states = torch.cat([state[0, -1:] for state in kept])
        for skip, _ in choose_layers(states, layers_at_end(layered, cache, most + 1), most):
            if len(skip.layers) in votes:
                votes[len(skip.layers)].update(skip.layers)
    voted = [
        SkipSet(tuple(layer for layer, _ in found.most_common(count)))
        for count, found in votes.items()
        if len(found) >= count
    ]
    return list(dict.fromkeys([*voted, *(SkipSet.spread(layered.depth, count) for count in counts)]))


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise RestpointError("searching a skip set needs the package optuna: pip install optuna") from error
