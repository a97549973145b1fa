"""Fit a profile: record states once, solve for predictors, see how their drafts stand, measure, choose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from restpoint.decode.draft import InstantDrafter
from restpoint.decode.drafters.heads import HeadsDrafter
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.descent import RefineProgress, RefineSettings
from restpoint.equilibrium.fitting import fit_affine, fit_monge, fit_recurrence
from restpoint.equilibrium.heads import MultiTokenHeads, fit_heads
from restpoint.equilibrium.predictors import AffinePredictor, IdentityPredictor, Predictor, RestPointRecurrence
from restpoint.equilibrium.refining import refine
from restpoint.equilibrium.refining_recurrence import refine_recurrence
from restpoint.equilibrium.streaming import Chunk, FitProgress, FitSettings
from restpoint.errors import RestpointError
from restpoint.fit.along_depth import extrapolations, layers_before
from restpoint.fit.measuring import CostMeter, measure, measure_instant
from restpoint.fit.options import FitOptions
from restpoint.fit.recording import Recording, record
from restpoint.fit.starting import require_loop, solve_start
from restpoint.model.check import check
from restpoint.model.fingerprint import fingerprint
from restpoint.model.load import Loaded
from restpoint.model.unrolled import layered_model
from restpoint.profile import Calibrations, Measured, Profile
from restpoint.progress import Progress

_ALIKE = 0.97
_LOOKED_AT = 48
"""Held-out sequences that say when a refinement has gone far enough."""


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


def fit_profile(
    loaded: Loaded,
    texts: Iterable[str],
    options: FitOptions | None = None,
    output: Path | str = "profile",
    progress: Progress | None = None,
) -> FitReport:
    """Fit a profile to a model and write it to ``output``.

    One pass of the model over the text records its states on disk. Predictors are closed-form algebra on them; gradient
    steps then refine the recurrence with random features.
    Part of the text is the model's own: half of those sequences greedy, half sampled. Memory does not depend on the
    amount of text. An interrupted fit resumes from its recording when the same call is repeated.

    Args:
        loaded: model and tokenizer.
        texts: documents; read until ``options.max_tokens`` are reached.
        options: what to fit.
        output: folder of the profile.
        progress: called as work proceeds.

    Raises:
        RestpointError: the text is too short, the model cannot verify drafts, an exit layer is not below its depth, a
            start is asked for where there is no loop,
            or ``output`` holds an unfinished fit of something else.
    """
    options = options or FitOptions()
    report = progress or (lambda _stage, _done, _total: None)
    layered = layered_model(loaded.model)
    capabilities = check(layered)
    if not capabilities.drafts:
        reason = "; ".join(f"{name}: {why}" for name, why in capabilities.refused().items())
        raise RestpointError(f"model: {loaded.name} cannot verify drafts, so there is nothing to fit ({reason})")
    if options.start:
        require_loop(loaded)
    exits = options.exit_layers or tuple(sorted({0, layered.depth // 4}))
    if not all(0 <= layer < layered.depth for layer in exits):
        raise RestpointError(f"exit_layers is {exits}; each must lie between 0 and {layered.depth - 1}")
    read = {*exits, *(layer for exit in exits for layer in layers_before(exit))} if options.extrapolate else exits
    recorded = record(loaded, layered, texts, options, tuple(sorted(read)), Path(output) / "states", report)
    vocabulary = recorded.frequent_tokens(options.vocabulary) if options.vocabulary else None
    allowed = vocabulary if layered.head.direct else None
    predictors = _solve(recorded, options, exits, allowed, report)
    heads = _solve_heads(recorded, options, report) if options.heads else None
    start = solve_start(loaded, recorded, report) if options.start else None
    meter = CostMeter(LayeredTarget(layered), trees=capabilities.tree.supported)
    calibrations: dict[str, Calibrations] = {}
    rows: list[Measured] = []
    for index, (name, predictor) in enumerate(predictors.items()):
        report("measure", index, len(predictors) + 1)
        calibrations[name], row = measure(recorded, predictor, allowed, meter)
        rows.append(row)
    report("measure", len(predictors), len(predictors) + 1)
    instant: list[InstantDrafter] = [table.make(layered.vocabulary_size, None) for table in TABLES.values()]
    if heads is not None:
        instant.append(HeadsDrafter.of_model(heads, layered, vocabulary=allowed))
    for drafter in instant:
        calibrations[drafter.name] = measure_instant(recorded, drafter)
    report("measure", len(predictors) + 1, len(predictors) + 1)
    rows = _ranked(rows)
    profile = Profile(
        fingerprint=fingerprint(loaded.model, loaded.tokenizer),
        model=loaded.name,
        chosen=rows[0].predictor,
        predictors=predictors,
        calibrations=calibrations,
        costs=meter.costs(),
        vocabulary=allowed,
        heads=heads,
        measured=tuple(rows),
        fitted_on={**asdict(options), "tokens": recorded.tokens, "text_sha256": recorded.text_hash},
        start=start,
    )
    profile.save(output)
    if not options.keep_states:
        recorded.store.remove()
    return FitReport(profile, tuple(rows), recorded.tokens)


def _solve(
    recorded: Recording, options: FitOptions, exits: tuple[int, ...], vocabulary: Tensor | None, report: Progress
) -> dict[str, Predictor]:
    """Every predictor at every exit layer, in closed form; then what refines one, for tokens that may be drafted."""
    jobs: list[tuple[str, Callable[[Callable[[FitProgress], None]], Predictor]]] = []
    linear = FitSettings(
        strengths=(1e-5, 1e-3, 1e-2), features=0, steps=options.steps, seed=options.seed, product_precision="float32"
    )
    lifted = replace(linear, features=options.features)

    held_out = recorded.scored

    def aside() -> Iterator[Chunk]:
        return recorded.set_aside(_LOOKED_AT)

    def stream() -> Iterator[Chunk]:
        return recorded.chunks(recorded.fitted)

    def add(name: str, solve: Callable[[Callable[[FitProgress], None]], Predictor]) -> None:
        jobs.append((name, solve))

    def refined(name: str) -> Predictor:
        start = solved[name]
        settings = RefineSettings(
            steps=options.refine,
            learning_rate=2e-3,
            rows=1024,
            every=max(1, min(100, options.refine // 5)),
            seed=options.seed,
        )

        def look(seen: RefineProgress) -> None:
            report(f"refine {name}", seen.step, seen.steps)

        if isinstance(start, RestPointRecurrence):
            return refine_recurrence(start, stream, aside, head, settings, progress=look).predictor
        assert isinstance(start, AffinePredictor)
        return refine(start, stream, aside, head, settings, progress=look).predictor

    head = recorded.head(vocabulary)

    solved: dict[str, Predictor] = {}
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
            if options.refine and options.tuned_lens:
                add(f"refined@{layer}", lambda _p, layer=layer: refined(f"ridge@{layer}"))
        if options.extrapolate:
            for name, job in extrapolations(
                stream, held_out, layer, recorded.layered.depth, linear, recorded.score
            ).items():
                add(name, job)
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
            if options.refine:
                name = f"recurrence+features@{layer}"
                add(f"refined-recurrence@{layer}", lambda _p, name=name: refined(name))
    for done, (name, solve) in enumerate(jobs):
        report(f"solve {name}", done, len(jobs))
        solved[name] = replace(solve(lambda _progress: None), name=name)
    report("solve", len(jobs), len(jobs))
    return solved


def _solve_heads(recorded: Recording, options: FitOptions, report: Progress) -> MultiTokenHeads:
    """Heads that read the embedding and the rest state before it, with random features."""
    report("solve heads", 0, 1)
    settings = FitSettings(
        strengths=(1e-5, 1e-4, 1e-3),
        features=options.features,
        steps=options.heads,
        seed=options.seed,
        product_precision="float32",
    )
    solved = fit_heads(
        lambda: recorded.chunks(recorded.fitted),
        recorded.scored,
        settings=settings,
        score=recorded.score,
    )
    report("solve heads", 1, 1)
    return solved.predictor


def _ranked(rows: Sequence[Measured]) -> list[Measured]:
    """Best first: of those whose expected speed is the highest within what times vary by, the most accepted."""
    fastest = max(row.expected_speed or 0.0 for row in rows)
    return sorted(rows, key=lambda row: ((row.expected_speed or 0.0) < _ALIKE * fastest, -row.acceptance))
