"""Fit a profile: record states once, solve for predictors, see how their drafts stand, measure, choose."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from restpoint.decode.calibrate import AcceptanceCounter
from restpoint.decode.control import Calibration, Controller
from restpoint.decode.costs import Costs, measure_costs
from restpoint.decode.draft import Path as TextPath
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.sampling import Sampler, SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.fitting import (
    Chunk,
    FitProgress,
    FitSettings,
    fit_affine,
    fit_monge,
    fit_recurrence,
)
from restpoint.equilibrium.predictors import IdentityPredictor, Predictor
from restpoint.errors import RestpointError
from restpoint.model.check import check
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.profile import Drafting, Measured, Profile, fingerprint
from restpoint.trajectory.record import continue_texts, pack, states_of
from restpoint.trajectory.store import StateStore, StoreLayout
from restpoint.transport.variation import acceptance

_SCORED = 16
"""Held-out sequences that ridge strengths are compared on."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done and how much there is."""


@dataclass(frozen=True)
class FitOptions:
    """What to fit, on how much text."""

    max_tokens: int = 200_000
    """Tokens of text to fit on, the model's own included."""
    own_share: float = 0.35
    """Share of these that the model writes itself, as continuations of the text: decoding sees its own words."""
    exit_layers: tuple[int, ...] = ()
    """Layers to draft from; empty for 0, a quarter and half of the depth. At 0 no layer runs."""
    features: int = 1536
    """Random features of the rest-point recurrence; more draft better and slower. 0 for linear maps only."""
    feature_layers: tuple[int, ...] = (0,)
    """Exit layers whose recurrence is fitted with random features too, which takes most of the time."""
    steps: int = 2
    """Maps of the recurrence, one per drafted position; later positions use the last."""
    vocabulary: int = 2048
    """Tokens that may be drafted, the most frequent of the text; 0 for all. Verification is exact in any case."""
    sequence_length: int = 256
    """Tokens of each recorded sequence."""
    batch: int = 16
    """Sequences read at once."""
    held_out: float = 0.06
    """Share of the sequences kept aside for ridge strengths, acceptance and calibration."""
    seed: int = 0
    """Seed of the random features and of the model's own text."""
    keep_states: bool = False
    """Keep the recorded states on disk afterwards."""

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.max_tokens < 40 * self.sequence_length:
            raise RestpointError(
                f"max_tokens is {self.max_tokens}; at least {40 * self.sequence_length} are needed "
                f"(40 sequences of {self.sequence_length})"
            )
        if not 0 <= self.own_share < 1:
            raise RestpointError(f"own_share is {self.own_share}; it must lie in [0, 1)")
        if not 0 < self.held_out < 0.5:
            raise RestpointError(f"held_out is {self.held_out}; it must lie between 0 and 0.5")
        for name in ("features", "vocabulary"):
            if getattr(self, name) < 0:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be 0 or positive")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.sequence_length < 32:
            raise RestpointError(f"sequence_length is {self.sequence_length}; it must be at least 32")


@dataclass(frozen=True)
class FitReport:
    """A finished fit.

    Attributes:
        profile: what was written.
        rows: how well each predictor does, best expected speed first.
        tokens: tokens fitted on, held-out ones included.
    """

    profile: Profile
    rows: tuple[Measured, ...]
    tokens: int


def fit(
    loaded: Loaded,
    texts: Iterable[str],
    options: FitOptions | None = None,
    output: Path | str = "profile",
    progress: Progress | None = None,
) -> FitReport:
    """Fit a profile to a model and write it to ``output``.

    One pass of the model over the text records its states on disk; everything else is closed-form algebra on them.
    Part of the text is the model's own: half of those sequences greedy, half sampled. Memory does not depend on the
    amount of text. An interrupted fit resumes from its recording when the same call is repeated.

    Args:
        loaded: model and tokenizer.
        texts: documents; read until ``options.max_tokens`` are reached.
        options: what to fit.
        output: folder of the profile.
        progress: called as work proceeds.

    Raises:
        RestpointError: the text is too short, the model cannot verify drafts, an exit layer is not below its depth,
            or ``output`` holds an unfinished fit of something else.
    """
    options = options or FitOptions()
    report = progress or (lambda _stage, _done, _total: None)
    layered = LayeredModel(loaded.model)
    capabilities = check(layered)
    if not capabilities.drafts:
        reason = "; ".join(f"{name}: {why}" for name, why in capabilities.refused().items())
        raise RestpointError(f"model: {loaded.name} cannot verify drafts, so there is nothing to fit ({reason})")
    exits = options.exit_layers or tuple(sorted({0, layered.depth // 4, layered.depth // 2}))
    if not all(0 <= layer < layered.depth for layer in exits):
        raise RestpointError(f"exit_layers is {exits}; each must lie between 0 and {layered.depth - 1}")
    recorded = _record(loaded, layered, texts, options, exits, Path(output) / "states", report)
    predictors = _solve(recorded, options, exits, report)
    vocabulary = recorded.frequent_tokens(options.vocabulary) if options.vocabulary else None
    drafting: dict[str, Drafting] = {}
    rows: list[Measured] = []
    for index, (name, predictor) in enumerate(predictors.items()):
        report("measure", index, len(predictors))
        allowed = vocabulary if layered.head.direct else None
        drafting[name], row = _measure(recorded, predictor, allowed)
        rows.append(row)
    report("measure", len(predictors), len(predictors))
    rows.sort(key=lambda row: -(row.expected_speed or 0))
    profile = Profile(
        fingerprint=fingerprint(loaded),
        model=loaded.name,
        chosen=rows[0].predictor,
        predictors=predictors,
        drafting=drafting,
        vocabulary=vocabulary if layered.head.direct else None,
        measured=tuple(rows),
        fitted_on={**asdict(options), "tokens": recorded.tokens, "text_sha256": recorded.text_hash},
    )
    profile.save(output)
    if not options.keep_states:
        recorded.store.remove()
    return FitReport(profile, tuple(rows), recorded.tokens)


def measure_drafting(target: LayeredTarget, predictor: Predictor, vocabulary: Tensor | None) -> Costs:
    """Seconds of passes and of one drafted token with this predictor, on this machine."""
    flat = Calibration((), ((1.0,), (1.0,)), ((1.0,), (1.0,)))
    unlimited = Controller(Costs("", "", (1.0,) * 9, 0.0), flat, fixed=1)
    drafter = ExitDrafter(target, predictor, Sampler(SamplingSettings()), unlimited, vocabulary)
    layered = target.layered
    rest = torch.zeros(1, 1, layered.hidden_size, dtype=layered.dtype, device=layered.device)
    path = TextPath([1 % layered.vocabulary_size] * 129, rest)
    return measure_costs(target, lambda: drafter.propose(path, 1), predictor.exit_layer)


class _Recorded:
    """A recording, split into what is fitted on and what is held out."""

    def __init__(self, layered: LayeredModel, store: StateStore, natural: int, options: FitOptions, text_hash: str):
        self.layered = layered
        self.store = store
        self.natural = natural
        self.text_hash = text_hash
        self.tokens = store.count * store.layout.length
        every = max(2, round(1 / options.held_out))
        self.held_out = [index for index in range(store.count) if index % every == every - 1]
        aside = set(self.held_out)
        self.fitted = [index for index in range(store.count) if index not in aside]

    def own(self, index: int) -> bool:
        """Whether a sequence is the model's own text."""
        return index >= self.natural

    def chunks(self, indices: list[int]) -> Iterator[Chunk]:
        """States in float32; the first position, often an attention sink, is left out."""
        layers = self.store.layout.layers
        for _ids, states in self.store.read(indices):
            wide = states[:, 1:].to(self.layered.device, torch.float32)
            yield Chunk(wide[:, :, :-1], wide[:, :, -1], layers)

    def frequent_tokens(self, count: int) -> Tensor:
        """The most frequent tokens of the text fitted on."""
        counts: Counter[int] = Counter()
        for ids, _states in self.store.read(self.fitted, batch=64):
            counts.update(ids.flatten().tolist())
        return torch.tensor([token for token, _ in counts.most_common(count)])

    def laws(self, rest: Tensor) -> Tensor:
        """Next-token distributions of rest states."""
        logits = self.layered.logits(rest[None].to(self.layered.dtype))
        return torch.softmax(logits[0].float(), -1)

    def score(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Acceptance 1 - TV of each row, the vocabulary in blocks of rows."""
        rows = max(1, 4_000_000 // self.layered.vocabulary_size)
        blocks = zip(predicted.split(rows), true.split(rows), strict=True)
        return torch.cat([acceptance(self.laws(p), self.laws(t)) for p, t in blocks])


def _record(
    loaded: Loaded,
    layered: LayeredModel,
    texts: Iterable[str],
    options: FitOptions,
    exits: tuple[int, ...],
    folder: Path,
    report: Progress,
) -> _Recorded:
    """Read text and let the model continue some of it, or pick up where an interrupted recording stopped."""
    length = options.sequence_length
    if loaded.context_length is not None and length > loaded.context_length:
        raise RestpointError(f"sequence_length is {length}, above the model's context of {loaded.context_length}")
    wanted = options.max_tokens // length
    own_wanted = int(wanted * options.own_share) // (2 * options.batch) * (2 * options.batch)
    digest = hashlib.sha256()
    sequences: list[list[int]] = []
    for sequence in pack(_documents(loaded, texts, digest), length):
        sequences.append(sequence)
        if len(sequences) >= wanted - own_wanted:
            break
    if len(sequences) < 40:
        raise RestpointError(
            f"text: it has only {len(sequences)} sequences of {length} tokens; at least 40 are needed, give more text"
        )
    own_wanted = min(own_wanted, int(len(sequences) * options.own_share / (1 - options.own_share)))
    layers = tuple(sorted({0, *exits}))
    layout = StoreLayout(
        fingerprint(loaded),
        hashlib.sha256(json.dumps([digest.hexdigest(), asdict(options)]).encode()).hexdigest(),
        length,
        layers,
        layered.hidden_size,
        "float32" if layered.dtype == torch.float32 else "bfloat16",
    )
    store = StateStore(folder, layout)
    total = len(sequences) + own_wanted
    report("record", store.count, total)
    while store.count < len(sequences):
        ids = torch.tensor(sequences[store.count : store.count + options.batch], device=layered.device)
        store.append(ids, states_of(layered, ids, layers))
        report("record", store.count, total)
    prompt_length = length // 4
    while store.count < total:
        done = store.count - len(sequences)
        count = min(4 * options.batch, total - store.count)
        prompts = [sequences[(done + row) * 7 % len(sequences)][:prompt_length] for row in range(count)]
        ids, states = continue_texts(
            layered,
            torch.tensor(prompts, device=layered.device),
            length,
            layers,
            greedy=lambda row: row % 2 == 0,
            seed=options.seed + done,
        )
        store.append(ids, states)
        report("record", store.count, total)
    return _Recorded(layered, store, len(sequences), options, digest.hexdigest())


def _documents(loaded: Loaded, texts: Iterable[str], digest: "hashlib._Hash") -> Iterator[list[int]]:
    """Token ids of each document, with a separator where the tokenizer adds none."""
    tokenizer = loaded.tokenizer
    separator = tokenizer.eos_token_id
    for text in texts:
        digest.update(text.encode())
        ids = list(tokenizer(text).input_ids)
        if ids and separator is not None and ids[0] != tokenizer.bos_token_id:
            ids = [*ids, separator]
        yield ids


def _solve(recorded: _Recorded, options: FitOptions, exits: tuple[int, ...], report: Progress) -> dict[str, Predictor]:
    """Every predictor at every exit layer, in closed form."""
    jobs: list[tuple[str, Callable[[Callable[[FitProgress], None]], Predictor]]] = []
    linear = FitSettings(strengths=(1e-5, 1e-4, 1e-3, 1e-2), features=0, steps=options.steps, seed=options.seed)
    lifted = replace(linear, features=options.features)

    def stream() -> Iterator[Chunk]:
        return recorded.chunks(recorded.fitted)

    def held_out() -> Iterator[Chunk]:
        return recorded.chunks(recorded.held_out[:: max(1, len(recorded.held_out) // _SCORED)])

    def add(name: str, solve: Callable[[Callable[[FitProgress], None]], Predictor]) -> None:
        jobs.append((name, solve))

    shared = {"score": recorded.score}
    for layer in exits:
        if layer > 0:
            add(f"lens@{layer}", lambda _p, layer=layer: IdentityPredictor((layer,)))
            add(
                f"ridge@{layer}",
                lambda p, layer=layer: fit_affine(stream, held_out, (layer,), linear, progress=p, **shared).predictor,
            )
            add(
                f"monge@{layer}",
                lambda p, layer=layer: fit_monge(stream, held_out, layer, linear, progress=p, **shared).predictor,
            )
        reads = tuple(sorted({0, layer}))
        add(
            f"recurrence@{layer}",
            lambda p, reads=reads: fit_recurrence(stream, held_out, reads, linear, progress=p, **shared).predictor,
        )
        if options.features and layer in options.feature_layers:
            add(
                f"recurrence+features@{layer}",
                lambda p, reads=reads: fit_recurrence(stream, held_out, reads, lifted, progress=p, **shared).predictor,
            )
    solved: dict[str, Predictor] = {}
    for done, (name, solve) in enumerate(jobs):
        report(f"solve {name}", done, len(jobs))
        solved[name] = replace(solve(lambda _progress: None), name=name)
    report("solve", len(jobs), len(jobs))
    return solved


@torch.no_grad()
def _measure(recorded: _Recorded, predictor: Predictor, vocabulary: Tensor | None) -> tuple[Drafting, Measured]:
    """Acceptance on held-out text, calibration, and costs of one predictor."""
    layered = recorded.layered
    counters = {"greedy": AcceptanceCounter(), "sampling": AcceptanceCounter()}
    totals = torch.zeros(2, 3, dtype=torch.float64)
    only_own = any(recorded.own(index) for index in recorded.held_out)
    mapped = predictor.to(layered.device)
    for index in recorded.held_out:
        chunk = next(recorded.chunks([index]))
        assert chunk.layers is not None
        states = [chunk.states[0, :, chunk.layers.index(layer)] for layer in predictor.state_layers]
        rest = chunk.rest[0]
        true = recorded.laws(rest)
        best = true.argmax(-1)
        own = recorded.own(index)
        previous, stands = rest, torch.ones(len(rest), dtype=torch.bool, device=rest.device)
        for step in range(3):
            first = step + 1
            predicted = mapped.predict([state[first:] for state in states], previous[:-1], step)
            law = recorded.laws(predicted)
            if vocabulary is not None:
                allowed = torch.zeros(law.shape[-1], device=law.device)
                allowed[vocabulary.to(law.device)] = 1
                law = law * allowed
                law = law / law.sum(-1, keepdim=True)
            confidence, guess = law.max(-1)
            agrees = guess == best[first:]
            accepted = acceptance(law, true[first:])
            if step == 0:
                totals[int(own)] += (
                    torch.stack([accepted.sum(), agrees.sum(), torch.tensor(len(agrees))]).double().cpu()
                )
            if own or not only_own:
                stands = stands[-len(agrees) :]
                counters["greedy"].add(step, confidence[stands], agrees[stands].float())
                counters["sampling"].add(step, confidence, accepted)
                stands = (stands & agrees)[1:] if len(agrees) > 1 else stands
            previous = predicted
    drafting = Drafting(
        counters["greedy"].calibration(),
        counters["sampling"].calibration(),
        measure_drafting(LayeredTarget(layered), predictor, vocabulary),
    )
    controller = Controller(drafting.costs, drafting.greedy)
    rates = [
        controller.expected_tokens(drafted) / controller.seconds(drafted) for drafted in range(controller.longest + 1)
    ]
    natural, own_totals = (row / row[2].clamp_min(1) for row in totals)
    return drafting, Measured(
        predictor=predictor.name,
        exit_layer=predictor.exit_layer,
        acceptance=float(natural[0]),
        top1=float(natural[1]),
        own_acceptance=float(own_totals[0]),
        own_top1=float(own_totals[1]),
        multiplications=predictor.parameters_read(),
        expected_speed=max(rates) / rates[0],
    )
