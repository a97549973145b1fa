"""Tokens per second of restpoint and of the baselines, on the same prompts, taking turns."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from restpoint import bundled
from restpoint.decode.drafters.tables import TABLES
from restpoint.drafting.brought import draft_at_exit
from restpoint.drafting.names import HEADS, PREDICTOR, STEPS
from restpoint.errors import RestpointError
from restpoint.evaluate.baselines import EarlyExit, HuggingFace, PromptLookup
from restpoint.evaluate.conditions import conditions
from restpoint.evaluate.methods import Method, Restpoint, Unsupported
from restpoint.evaluate.options import BenchOptions
from restpoint.evaluate.rows import BenchReport, Divergence, Record, rows_of
from restpoint.generate import Decoder, default_drafters
from restpoint.model.compiled import CompiledModel
from restpoint.model.load import Loaded
from restpoint.model.unrolled import layered_model
from restpoint.profile import Profile
from restpoint.progress import Progress

__all__ = ["COMPILED", "COMPILED_PLAIN", "PLAIN", "RESTPOINT", "BenchOptions", "BenchReport", "bench"]

PLAIN = "restpoint plain"
RESTPOINT = "restpoint"
COMPILED_PLAIN = "compiled plain"
COMPILED = "compiled"
EXITS = "early exits"
EXITS_VERIFIED = "early exits, verified"


@dataclass(frozen=True)
class _Prompt:
    id: str
    domain: str
    ids: list[int]


def bench(
    loaded: Loaded,
    profile: Profile | None = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure every method on the bundled prompts.

    A *lap* takes one prompt of each domain; on each, the methods run one after the other, a different one first every
    time, so that whatever slows the machine slows all of them. Laps go through the prompts, then repeat them; with a
    time budget, a lap that would end too late is left out. Warm-up and choice of settings come before and are not
    timed; baselines are counted by hooks in runs of their own.

    Every method gets the same token ids and makes the same number of tokens, ends of text ignored. Rates are of
    decoding alone, wall-clock; restpoint's include turning tokens into text, which the baselines need not do.

    Args:
        loaded: model and tokenizer.
        profile: what drafts; None leaves only plain decoding and the baselines.
        options: how much to measure.
        progress: called as work proceeds.

    Raises:
        RestpointError: the profile is not the model's, or the model's context is too short for the new tokens.
    """
    began = time.perf_counter()
    options = (options or BenchOptions()).resolved()
    report = progress or (lambda _stage, _done, _total: None)
    plain = Decoder(loaded)
    if options.exits:
        _check_exits(profile, options)
    prompts = _prompts(plain, options)
    methods: list[Method] = [
        HuggingFace(loaded, options.temperature),
        Restpoint(PLAIN, plain, options.temperature),
        EarlyExit(loaded, options.temperature),
        PromptLookup(loaded, options.temperature),
    ]
    notes = list(plain.notes)
    missing: list[Record] = []
    if profile is None and not default_drafters(loaded, None):
        reason = "not run: no profile given; make one with `restpoint fit` and give --profile"
        missing.append(Record(RESTPOINT, status=reason))
    for name, decoder, draft_tokens in _contestants(loaded, profile, options, report):
        methods.append(Restpoint(name, decoder, options.temperature, draft_tokens))
        notes.extend(note for note in decoder.notes if note not in notes)
    records = {method.name: Record(method.name, settings=method.settings, lossy=method.lossy) for method in methods}
    records |= {record.method: record for record in missing}
    _prepare(methods, records, prompts[0][0], options, report)
    laps = _run(methods, records, prompts, options, began, report)
    if options.temperature == 0:
        _compare(loaded, records, {prompt.id: prompt for lap in prompts for prompt in lap})
    ran = {domain: list[str]() for domain in options.domains}
    for prompt in (prompt for lap in prompts[:laps] for prompt in lap):
        ran[prompt.domain].append(prompt.id)
    dtype = str(plain.layered.dtype).removeprefix("torch.")
    greedy = options.temperature == 0
    rows = [
        row for record in records.values() for row in rows_of(record, records[PLAIN], ran, dtype, greedy, options.seed)
    ]
    return BenchReport(conditions(plain, options, laps, len(prompts), notes), tuple(rows))


def _check_exits(profile: Profile | None, options: BenchOptions) -> None:
    """Refuse exits that are not there, that cannot be compared, or that were calibrated on these prompts."""
    if profile is None or profile.exits is None:
        raise RestpointError("exits: the profile has none; calibrate some with: restpoint calibrate --profile FOLDER")
    if profile.exits.certificate is not None:
        prompts = [prompt.text for domain in options.domains for prompt in bundled.prompts(domain)]
        profile.exits.certificate.require_unseen(prompts, "domains")


def _contestants(
    loaded: Loaded, profile: Profile | None, options: BenchOptions, report: Progress
) -> Iterator[tuple[str, Decoder, int | None]]:
    """Our own ways to decode beside plain: name, decoder, and how many tokens it drafts if that is fixed."""
    compiled = None
    if options.compile:
        compiled = CompiledModel(layered_model(loaded.model), progress=report)
        compiled.warm_up()
        yield COMPILED_PLAIN, Decoder(loaded, compile=compiled), None
    if not (names := default_drafters(loaded, profile)):
        return
    drafting = Decoder(loaded, profile, names, verifier=options.verifier)
    yield RESTPOINT, drafting, None
    if compiled is not None:
        yield COMPILED, Decoder(loaded, profile, verifier=options.verifier, compile=compiled), None
    if drafting.drafting is None:
        return
    if options.exits and profile is not None and (exits := profile.exits) is not None:
        yield EXITS, Decoder(loaded, profile, exits=True), None
        if exits.predictors:
            first = exits.predictors[min(exits.predictors)]
            yield EXITS_VERIFIED, Decoder(loaded, profile, (), brought={first.name: draft_at_exit(first)}), None
    if options.alone:
        yield f"{RESTPOINT} warm", Decoder(loaded, profile, names, verifier=options.verifier, share=True), None
        heads = (HEADS,) if profile is not None and profile.heads is not None else ()
        for name in (*TABLES, *heads, STEPS if profile is None else PREDICTOR):
            yield f"{name} alone", Decoder(loaded, profile, (name,), verifier=options.verifier), None
            if name in TABLES and TABLES[name].memory(1) is not None:
                warm = Decoder(loaded, profile, (name,), verifier=options.verifier, share=True)
                yield f"{name} alone, warm", warm, None
    for nodes in options.fixed:
        yield f"{RESTPOINT}, always {nodes}", drafting, nodes


def _prompts(decoder: Decoder, options: BenchOptions) -> list[list[_Prompt]]:
    """One prompt of each domain for every lap, without repetitions."""
    new_tokens, count = options.new_tokens or 0, options.prompts or 0
    context = decoder.loaded.context_length
    longest = None if context is None else context - new_tokens
    if longest is not None and longest < 1:
        raise RestpointError(f"new_tokens is {new_tokens}, but the model's context is {context}; ask for fewer")
    by_domain: list[list[_Prompt]] = []
    for domain in options.domains:
        found = bundled.prompts(domain)
        if count > len(found):
            raise RestpointError(f"prompts is {count}, but there are only {len(found)} of each domain; ask for fewer")
        by_domain.append(
            [
                _Prompt(prompt.id, domain, decoder.encode(prompt.text)[-longest if longest else 0 :])
                for prompt in found[:count]
            ]
        )
    return [list(lap) for lap in zip(*by_domain, strict=True)]


def _prepare(
    methods: list[Method],
    records: Mapping[str, Record],
    prompt: _Prompt,
    options: BenchOptions,
    report: Progress,
) -> None:
    for done, method in enumerate(methods):
        report(f"warm up {method.name}", done, len(methods))
        with _noted(records[method.name]):
            method.prepare(prompt.ids, min(options.new_tokens or 0, 32))
        records[method.name].settings = method.settings
    report("warm up", len(methods), len(methods))


def _run(
    methods: list[Method],
    records: Mapping[str, Record],
    prompts: list[list[_Prompt]],
    options: BenchOptions,
    began: float,
    report: Progress,
) -> int:
    """Run the laps and return how many were completed."""
    total = len(prompts) * (options.repetitions or 0)
    steps = len(options.domains) * len(methods)
    longest = 0.0
    for lap in range(total):
        lap_began = time.perf_counter()
        if options.budget_seconds is not None and lap and lap_began - began + longest > options.budget_seconds:
            return lap
        for turn, prompt in enumerate(prompts[lap % len(prompts)]):
            first = (lap + turn) % len(methods)
            for place, method in enumerate(methods[first:] + methods[:first]):
                report("measure", lap * steps + turn * len(methods) + place, total * steps)
                _run_one(method, records[method.name], prompt, options, repetition=lap // len(prompts))
        longest = max(longest, time.perf_counter() - lap_began)
    report("measure", total * steps, total * steps)
    return total


def _run_one(method: Method, record: Record, prompt: _Prompt, options: BenchOptions, repetition: int) -> None:
    if record.status != "ok":
        return
    with _noted(record):
        seed = options.seed + repetition
        run = method.run(prompt.ids, options.new_tokens or 0, seed)
        record.runs.setdefault(prompt.id, []).append(run)
        if repetition == 0:
            record.counted[prompt.id] = run if method.counts else method.count(prompt.ids, len(run.tokens), seed)


@contextmanager
def _noted(record: Record) -> Iterator[None]:
    """Let a method that does not work with this model say so in its row."""
    try:
        yield
    except Unsupported as reason:
        record.status = f"not supported: {reason}"


def _compare(loaded: Loaded, records: Mapping[str, Record], prompts: Mapping[str, _Prompt]) -> None:
    """Hold every run's tokens against the first plain run on the same prompt."""
    for record in records.values():
        for prompt, runs in record.runs.items():
            expected = records[PLAIN].runs[prompt][0].tokens
            record.identical[prompt] = sum(run.tokens == expected for run in runs)
            other = next((run.tokens for run in runs if run.tokens != expected), None)
            if other is not None:
                index = next(
                    index for index, pair in enumerate(zip(expected, other, strict=True)) if len(set(pair)) > 1
                )
                text = prompts[prompt].ids + expected[:index]
                if not record.lossy:
                    record.divergences[prompt] = Divergence(prompt, index, _margin(loaded, text))
            if record.lossy:
                record.disagreement[prompt] = _disagreement(loaded, prompts[prompt].ids, runs[0].tokens)


@torch.inference_mode()
def _disagreement(loaded: Loaded, prompt: list[int], tokens: list[int]) -> float:
    """Share of the tokens after the first that are not the most probable ones of the model's own forward."""
    model: Any = loaded.model
    ids = torch.tensor([[*prompt, *tokens]], device=model.get_input_embeddings().weight.device)
    own = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) :].argmax(-1)
    return float((own != ids[0, len(prompt) + 1 :]).double().mean())


@torch.inference_mode()
def _margin(loaded: Loaded, ids: list[int]) -> float:
    """Largest minus second largest logit of the model's own forward after a text."""
    model: Any = loaded.model
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
    first, second = logits.float().topk(2).values.tolist()
    return first - second
