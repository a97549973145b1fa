"""Survey a model: read text, measure its trajectories as they pass, and keep the outcome as an atlas."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from restpoint.errors import RestpointError
from restpoint.model.fingerprint import fingerprint
from restpoint.model.watch import WatchedLayers
from restpoint.progress import Progress
from restpoint.trajectory.atlas import Atlas, Subject
from restpoint.trajectory.lens import FittedLens
from restpoint.trajectory.measures import Means, allowed, make
from restpoint.trajectory.options import MEASURES, SurveyOptions
from restpoint.trajectory.partial import Partial
from restpoint.trajectory.reading import Cut, Piece, Reader, Sample, batches
from restpoint.trajectory.scenes import Scene, scene
from restpoint.trajectory.sinks import LENGTH
from restpoint.trajectory.surveyed import Surveyed
from restpoint.trajectory.tasks import PAPERS, TEXTS, study_tasks

_EVERY = 64
_ATTENDED = 4
"""Of so many pieces, one is read with its attention."""


def survey(
    subject: Surveyed,
    samples: Iterable[Sample],
    options: SurveyOptions | None = None,
    *,
    lenses: Mapping[str, FittedLens] | None = None,
    folder: Path | str | None = None,
    progress: Progress | None = None,
) -> Atlas:
    """Measure the trajectories of a model on a corpus, in one pass and constant memory.

    Args:
        subject: the model.
        samples: texts, or inputs of any kind; read until ``options.max_tokens``.
        options: what to measure.
        lenses: of fitted predictors, by name, beside the logit lens (:meth:`Profile.lenses`).
        folder: keeps what is measured so far; the same call goes on from there after an interruption, until an atlas
            is saved to it.
        progress: called with ``read``, tokens so far, and tokens in all.

    Raises:
        RestpointError: there is no layer list, nothing to read, a state is not finite, a measure that was named cannot
            be made of this model, or the folder holds the survey of something else.
    """
    options = options or SurveyOptions()
    began = time.perf_counter()
    layers = subject.watched(options)
    reader = Reader(layers)
    measures, notes = allowed(subject, layers, options, lenses)
    which, count = options.shares()
    recipe = _recipe(subject, options, layers.path, lenses)
    partial = Partial(Path(folder), measures, recipe) if folder is not None else None
    done, known = partial.resume() if partial else (0, "")
    every = options.checkpoint_every or _EVERY
    cut = Cut(samples, subject.tokenizer, options.sequence_length, options.max_tokens)
    of_attention = [measure for measure in measures if measure.needs_attention]
    of_states = [measure for measure in measures if not measure.needs_attention]
    looked_at: dict[str, list[Piece]] = {}
    first: list[Piece] = []

    def seen() -> Iterator[Piece]:
        for piece in cut:
            if progress:
                progress("read", cut.tokens, options.max_tokens)
            if piece.ids and len(looked_at.setdefault(piece.domain, [])) < options.scenes:
                looked_at[piece.domain].append(piece)
            if piece.ids and len(first) < TEXTS:
                first.append(piece)
            yield piece

    number = -1
    for number, batch in enumerate(batches(seen(), options.batch)):
        if partial and number == done - 1 and cut.hash != known:
            raise partial.other_text()
        if number < done or number % count != which:
            continue
        for trajectory in reader.read(batch):
            for measure in of_states:
                measure.add(trajectory)
        for measure in of_attention:
            for piece in batch:
                if piece.index % _ATTENDED == 0 and len(piece.ids) >= LENGTH:
                    measure.add(reader.read_attention(piece, LENGTH))
        if partial and (number // count + 1) % every == 0:
            partial.save(number + 1, cut.hash)
    if partial and number < done - 1:
        raise partial.other_text()
    if not cut.texts:
        raise RestpointError("text: there is nothing in it to read; give a text of at least two tokens")
    if partial:
        partial.save(number + 1, cut.hash)
    if progress:
        progress("read", options.max_tokens, options.max_tokens)
    results = {measure.name: measure.results() for measure in measures if measure.sums}
    papers = {measure.name: measure.papers for measure in measures if measure.sums}
    layered = subject.layered()
    if layered is not None and "tasks" in (options.measures or MEASURES):
        if progress:
            progress("tasks", 0, 1)
        results["tasks"], papers["tasks"] = study_tasks(layered, reader, first, options.seed), PAPERS
        if progress:
            progress("tasks", 1, 1)
    return Atlas(
        subject=_describe(subject, layers),
        corpus={
            "texts": cut.texts,
            "tokens": cut.tokens,
            "skipped": cut.skipped,
            "domains": cut.domains,
            "hash": cut.hash,
            "shares": [which] if count > 1 else [],
        },
        conditions=_conditions(subject.model, options, time.perf_counter() - began, notes),
        results=results,
        papers=papers,
        scenes=_scenes(reader, subject, _in_turn(looked_at, options.scenes)),
        sums={measure.name: measure.sums for measure in measures if measure.sums} if count > 1 else {},
    )


def merge(atlases: Sequence[Atlas]) -> Atlas:
    """The atlas of a whole corpus from those of its shares.

    Raises:
        RestpointError: they are of different models, texts or options, or a share is missing or there twice.
    """
    if not atlases:
        raise RestpointError("atlases: there is none; give those of all shares")
    first = atlases[0]
    options = _options_of(first)
    for other in atlases[1:]:
        for what, one, two in (
            ("model", first.subject, other.subject),
            ("text", first.corpus["hash"], other.corpus["hash"]),
            ("options", replace(options, share=None), replace(_options_of(other), share=None)),
        ):
            if one != two:
                raise RestpointError(f"atlases: they differ in their {what}; merge shares of one survey only")
    shares = sorted(share for atlas in atlases for share in atlas.corpus["shares"])
    count = options.shares()[1]
    if shares != list(range(count)) or count == 1:
        told = ", ".join(f"{share + 1}/{count}" for share in shares) or "none"
        raise RestpointError(f"atlases: of {count} shares there are {told}; give each of them once")
    measures = []
    for name in dict.fromkeys(name for atlas in atlases for name in atlas.sums):
        means = Means(options, first.subject.layers, first.subject.loop, vocabulary=first.subject.vocabulary)
        parts = [make(name, means) for _ in atlases]
        for part, atlas in zip(parts, atlases, strict=True):
            part.restore(atlas.sums.get(name, {}))
        for part in parts[1:]:
            parts[0].merge(part)
        measures.append(parts[0])
    whole = {measure.name: measure.results() for measure in measures}
    seconds = sum(atlas.conditions["seconds"] for atlas in atlases)
    return replace(
        first,
        corpus=first.corpus | {"shares": []},
        papers={**first.papers, **{measure.name: measure.papers for measure in measures}},
        conditions=first.conditions | {"seconds": seconds, "options": asdict(replace(options, share=None))},
        results=whole | {name: own for name, own in first.results.items() if name not in whole},
        sums={},
    )


def _in_turn(pieces: Mapping[str, Sequence[Piece]], most: int) -> list[Piece]:
    """So many, the domains taking turns."""
    rounds = zip_longest(*pieces.values())
    return [piece for turn in rounds for piece in turn if piece is not None][:most]


def _scenes(reader: Reader, subject: Surveyed, pieces: Sequence[Piece]) -> list[Scene]:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return []
    head = None if subject.iterates and reader.layers.loop is None else subject.head()
    readout, loop = None if head is None else head.readout, reader.layers.loop
    return [scene(trajectory, readout, tokenizer, loop=loop) for piece in pieces for trajectory in reader.read([piece])]


# --- what goes into the artefact beside numbers ---


def _describe(subject: Surveyed, layers: WatchedLayers) -> Subject:
    model = subject.model
    unembedding = model.get_output_embeddings()
    return Subject(
        model=subject.name,
        fingerprint=fingerprint(model, subject.tokenizer),
        family=model.config.model_type,
        part=layers.path,
        layers=layers.length,
        hidden=subject.hidden_size,
        vocabulary=0 if unembedding is None else int(unembedding.weight.shape[0]),
        parameters=sum(own.numel() for own in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        untrained=subject.untrained,
        depths=layers.depths,
        loop=layers.loop,
    )


def _conditions(model: PreTrainedModel, options: SurveyOptions, seconds: float, notes: list[str]) -> dict[str, Any]:
    return {
        "restpoint": importlib.metadata.version("restpoint"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": str(model.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "options": asdict(options),
        "notes": notes,
    }


def _options_of(atlas: Atlas) -> SurveyOptions:
    known: dict[str, Any] = dict(atlas.conditions["options"])
    return SurveyOptions(**{**known, "measures": tuple(known["measures"])})


def _recipe(
    subject: Surveyed, options: SurveyOptions, path: str, lenses: Mapping[str, FittedLens] | None
) -> dict[str, Any]:
    """What a survey that is taken up again must have in common with what it was."""
    own = {name: value for name, value in asdict(options).items() if name != "checkpoint_every"}
    mark = fingerprint(subject.model, subject.tokenizer)
    return json.loads(
        json.dumps(
            {
                "options": own,
                "model": mark,
                "untrained": subject.untrained,
                "path": path,
                "lenses": {name: lens.hash for name, lens in (lenses or {}).items()},
            }
        )
    )
