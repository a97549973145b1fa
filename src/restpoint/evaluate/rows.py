"""What a benchmark reports: one row for each method and domain, and the conditions that they hold under."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from restpoint import files
from restpoint.evaluate.methods import Run
from restpoint.evaluate.statistics import paired_ratio

AVERAGE = "average"
"""The domain of rows over all domains."""


@dataclass(frozen=True)
class Divergence:
    """Where a text left the plain one.

    Attributes:
        prompt: id of the prompt.
        index: first new token that differs.
        margin: the model's largest logit there minus its second largest; around rounding where either is right.
    """

    prompt: str
    index: int
    margin: float


@dataclass(frozen=True)
class Row:
    """How one method does on one domain.

    Attributes:
        method: its name.
        domain: of the prompts, or ``average``.
        settings: what was chosen for it in the warm-up.
        status: ``ok``, or why there are no numbers.
        dtype: of the model.
        batch: texts decoded at once.
        prompts: number of prompts.
        runs: timed runs, over all prompts and repetitions.
        tokens_per_second: median over runs, prefill left out; of ``average``, the mean of the domains' medians.
        ratio_to_plain: geometric mean over prompts of paired ratios to restpoint's own plain decoding.
        ratio_low: lower end of its 95% interval; None with fewer than three prompts.
        ratio_high: upper end, likewise.
        slowest_quarter: the same ratio over the quarter of the prompts on which it is smallest.
        tokens_per_pass: tokens after the first pass over passes of the full model; 1 for plain decoding.
        layers_per_token: layers run after the first pass, drafts included, over these tokens.
        identical: share of runs that gave the plain tokens; None when sampling.
        divergences: where others left them, one for each prompt; none of methods that may differ by design.
        disagreement: of such methods, share of tokens after the first that are not the model's own after the same
            prefix; None of others, and when sampling.
        prefill_seconds: median time until the first pass is done; drafting before it is in it.
    """

    method: str
    domain: str
    settings: str
    status: str
    dtype: str
    batch: int = 1
    prompts: int = 0
    runs: int = 0
    tokens_per_second: float | None = None
    ratio_to_plain: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    slowest_quarter: float | None = None
    tokens_per_pass: float | None = None
    layers_per_token: float | None = None
    identical: float | None = None
    divergences: tuple[Divergence, ...] = ()
    disagreement: float | None = None
    prefill_seconds: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """A finished benchmark.

    Attributes:
        conditions: machine, versions and settings.
        rows: methods in the order that they ran, each with its domains and then ``average``.
    """

    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]

    def write(self, path: Path | str) -> None:
        """Write JSON with the keys ``conditions`` and ``rows``, complete or not at all.

        Raises:
            RestpointError: the file cannot be written.
        """
        content = {"conditions": dict(self.conditions), "rows": [asdict(row) for row in self.rows]}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        files.write(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"), "json")


@dataclass
class Record:
    """What was seen of one method so far.

    Attributes:
        method: its name.
        settings: chosen in the warm-up.
        status: ``ok``, or why it has no numbers.
        runs: timed runs of each prompt, by prompt id.
        counted: a run of each prompt with passes and layers counted.
        divergences: first divergence of each prompt.
        identical: how many runs gave the plain tokens.
        lossy: whether it may differ from them by design.
        disagreement: of each prompt, if it does so, share of tokens that are not the model's after the same prefix.
    """

    method: str
    settings: str = ""
    status: str = "ok"
    runs: dict[str, list[Run]] = field(default_factory=dict)
    counted: dict[str, Run] = field(default_factory=dict)
    divergences: dict[str, Divergence] = field(default_factory=dict)
    identical: dict[str, int] = field(default_factory=dict)
    lossy: bool = False
    disagreement: dict[str, float] = field(default_factory=dict)


def rows_of(
    record: Record, plain: Record, prompts: Mapping[str, Sequence[str]], dtype: str, greedy: bool, seed: int
) -> list[Row]:
    """The rows of one method.

    Args:
        record: what was seen of it.
        plain: the same of restpoint's plain decoding.
        prompts: ids of the prompts that were run, by domain.
        dtype: of the model.
        greedy: whether tokens can be compared.
        seed: of the bootstrap.
    """
    if record.status != "ok":
        domains = [*prompts, AVERAGE]
        return [Row(record.method, domain, record.settings, record.status, dtype) for domain in domains]
    rows = [_row(record, plain, domain, ids, dtype, greedy, seed) for domain, ids in prompts.items()]
    every = [prompt for ids in prompts.values() for prompt in ids]
    average = _row(record, plain, AVERAGE, every, dtype, greedy, seed)
    rate = statistics.fmean(row.tokens_per_second for row in rows if row.tokens_per_second is not None)
    return [*rows, Row(**{**vars(average), "tokens_per_second": rate})]


def _row(
    record: Record, plain: Record, domain: str, prompts: Sequence[str], dtype: str, greedy: bool, seed: int
) -> Row:
    rates = {prompt: [run.tokens_per_second for run in record.runs[prompt]] for prompt in prompts}
    baseline = {prompt: [run.tokens_per_second for run in plain.runs[prompt]] for prompt in prompts}
    ratio = paired_ratio(rates, baseline, seed)
    runs = [run for prompt in prompts for run in record.runs[prompt]]
    counted = [record.counted[prompt] for prompt in prompts]
    decoded = sum(run.decoded for run in counted)
    passes = sum(run.passes or 0 for run in counted)
    layers = sum(run.layers or 0 for run in counted)
    return Row(
        method=record.method,
        domain=domain,
        settings=record.settings,
        status="ok",
        dtype=dtype,
        prompts=len(prompts),
        runs=len(runs),
        tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        ratio_to_plain=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        slowest_quarter=_slowest_quarter(rates, baseline),
        tokens_per_pass=decoded / passes if passes else None,
        layers_per_token=layers / decoded if decoded and layers else None,
        identical=sum(record.identical[prompt] for prompt in prompts) / len(runs) if greedy else None,
        disagreement=statistics.fmean(record.disagreement[prompt] for prompt in prompts)
        if record.disagreement
        else None,
        divergences=tuple(record.divergences[prompt] for prompt in prompts if prompt in record.divergences),
        prefill_seconds=statistics.median(run.prefill_seconds for run in runs),
    )


def _slowest_quarter(rates: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    ratios = sorted(statistics.median(own) / statistics.median(baseline[prompt]) for prompt, own in rates.items())
    return statistics.geometric_mean(ratios[: math.ceil(len(ratios) / 4)])
