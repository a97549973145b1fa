import io
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.stats
import torch
from rich.console import Console
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from restpoint.decode.acceptance import Calibration
from restpoint.decode.costs import Costs, device_name
from restpoint.equilibrium.predictors import IdentityPredictor
from restpoint.errors import RestpointError
from restpoint.evaluate import chart
from restpoint.evaluate.baselines import EarlyExit, HuggingFace, PromptLookup
from restpoint.evaluate.methods import Restpoint, Run, Unsupported
from restpoint.evaluate.rows import AVERAGE, BenchReport, Record, Row, rows_of
from restpoint.evaluate.speed import PLAIN, RESTPOINT, BenchOptions, _compare, _Prompt, bench
from restpoint.evaluate.statistics import bootstrap_mean, paired_ratio
from restpoint.evaluate.table import table
from restpoint.generate import Decoder
from restpoint.model.fingerprint import fingerprint
from restpoint.profile import Calibrations, Profile

METHODS = [
    *("huggingface", PLAIN, "huggingface early exit", "huggingface lookup"),
    *(RESTPOINT, f"{RESTPOINT} warm", "lookup alone", "recycling alone", "recycling alone, warm", "ngrams alone"),
    *("ngrams alone, warm", "lookahead alone", "predictor alone", f"{RESTPOINT}, always 4"),
]
SMALL = BenchOptions(new_tokens=8, prompts=1, repetitions=2, domains=("maths", "plays"), alone=True, fixed=(4,))


@pytest.fixture(scope="module")
def profile(reference):
    """Drafts by the state of layer 12 as it is; costs that make it draft."""
    flat = Calibration.guess((), (0.9,))
    costs = Costs(device_name(torch.device("cpu")), "float32", (1.0,) * 8, {"lens@12": (0.01, 0.01)})
    predictor = replace(IdentityPredictor((12,)), name="lens@12")
    calibrations = {"lens@12": Calibrations(flat, flat)}
    return Profile(
        fingerprint(reference.model, reference.tokenizer),
        "reference",
        "lens@12",
        {"lens@12": predictor},
        calibrations,
        costs,
        None,
    )


@pytest.fixture(scope="module")
def decoder(reference):
    return Decoder(reference)


@pytest.fixture(scope="module")
def report(reference, profile):
    return bench(reference, profile, SMALL)


def ids_of(decoder, text="Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer:"):
    return decoder.encode(text)


# --- statistics ---


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(5).normal(0.3, 0.4, 12)
    low, high = bootstrap_mean(values.tolist(), seed=3)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.04 * width)
    assert high == pytest.approx(theirs.high, abs=0.04 * width)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_mean(random.normal(1.0, 0.5, 30).tolist(), seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.985


def test_drift_that_hits_both_methods_cancels():
    drift = [1.0, 0.4, 2.3]
    plain = {f"p{p}": [100.0 * (p + 1) * d for d in drift] for p in range(4)}
    fast = {prompt: [1.7 * rate for rate in rates] for prompt, rates in plain.items()}
    ratio = paired_ratio(fast, plain)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.7, 1.7, 1.7))


def test_ratio_is_the_geometric_mean_over_prompts_whatever_their_repetitions():
    ratio = paired_ratio({"a": [2.0, 2.0, 2.0], "b": [8.0]}, {"a": [1.0, 1.0, 1.0], "b": [1.0]})
    assert ratio.value == pytest.approx(4.0)
    assert ratio.low is None
    assert ratio.high is None


def test_interval_is_reproducible_and_contains_the_ratio():
    rates = {str(p): [10.0 + p, 12.0 + p] for p in range(5)}
    plain = {str(p): [8.0 + 2 * p, 9.0] for p in range(5)}
    one, two = paired_ratio(rates, plain, seed=1), paired_ratio(rates, plain, seed=1)
    assert one == two
    assert one.low is not None
    assert one.high is not None
    assert one.low < one.value < one.high


def test_runs_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        paired_ratio({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio({"a": [1.0, 2.0]}, {"a": [1.0]})


# --- options ---


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"new_tokens": 1}, "new_tokens is 1; it must be at least 2"),
        ({"prompts": 0}, "prompts is 0"),
        ({"repetitions": -1}, "repetitions is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"budget_seconds": 0.0}, "budget_seconds is 0.0"),
        ({"domains": ("code", "poems")}, "'poems' is not bundled; choose from code, maths, prose, plays"),
        ({"domains": ()}, "domains: is empty"),
        ({"domains": ("code", "code")}, "names one twice"),
    ],
)
def test_senseless_options_are_refused(wrong, says):
    with pytest.raises(RestpointError, match=says.replace("(", r"\(")):
        BenchOptions(**wrong)


def test_quick_only_changes_what_was_left_open():
    assert BenchOptions().resolved() == BenchOptions(new_tokens=128, prompts=5, repetitions=3)
    quick = BenchOptions(quick=True, new_tokens=16).resolved()
    assert quick.new_tokens == 16
    assert quick.prompts == 2
    assert quick.budget_seconds is not None


def test_more_prompts_or_tokens_than_there_are_are_refused(reference):
    with pytest.raises(RestpointError, match="prompts is 51, but there are only 50"):
        bench(reference, None, replace(SMALL, prompts=51))
    with pytest.raises(RestpointError, match="new_tokens is 1024, but the model's context is 1024"):
        bench(reference, None, replace(SMALL, new_tokens=1024))


# --- contestants ---


def test_all_methods_make_exactly_the_models_own_tokens(reference, decoder, profile):
    ids = ids_of(decoder)
    expected = reference.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False, pad_token_id=0
    )[0, len(ids) :].tolist()
    assert len(expected) == 24
    methods = [HuggingFace(reference), Restpoint(PLAIN, decoder), EarlyExit(reference), PromptLookup(reference)]
    for method in [*methods, Restpoint(RESTPOINT, Decoder(reference, profile))]:
        method.prepare(ids, 8)
        run = method.run(ids, 24)
        assert run.tokens == expected, method.name
        assert run.prefill_seconds > 0
        assert run.decode_seconds > 0
        assert run.decoded == 24 - run.prefilled


def test_plain_methods_run_every_layer_once_for_every_token_after_the_first(reference, decoder):
    ids = ids_of(decoder)
    for method in (HuggingFace(reference), Restpoint(PLAIN, decoder)):
        run = method.count(ids, 9)
        assert (run.prefilled, run.passes, run.layers) == (1, 8, 8 * 16), method.name


def test_early_exit_counts_layers_of_drafts_and_of_verification(reference, decoder):
    method = EarlyExit(reference)
    method.options, method.defaults = {"assistant_early_exit": 4}, {"num_assistant_tokens": 3}
    run = method.count(ids_of(decoder), 20)
    assert run.passes is not None
    assert run.layers is not None
    drafts, rest = divmod(run.layers - 16 * run.passes, 4)
    assert rest == 0
    assert run.passes <= drafts <= 3 * run.passes
    assert run.decoded <= run.passes + drafts


def test_lookup_saves_passes_on_text_that_repeats(reference, decoder):
    method = PromptLookup(reference)
    method.options = {"prompt_lookup_num_tokens": 5}
    run = method.count(decoder.encode("one two three four five six\n" * 8), 32)
    assert run.passes is not None
    assert run.layers == 16 * run.passes
    assert run.passes < run.decoded / 1.5


def test_timed_runs_carry_no_hooks(reference, decoder):
    """Hooks that transformers itself leaves behind, once it was asked for hidden states, are not ours."""
    layers = reference.model.model.layers
    before = [list(layer._forward_hooks) for layer in layers]
    method = HuggingFace(reference)
    assert method.count(ids_of(decoder), 4).layers
    assert [list(layer._forward_hooks) for layer in layers] == before
    run = method.run(ids_of(decoder), 4)
    assert (run.passes, run.layers) == (None, None)


def test_end_tokens_are_ignored_by_all(reference, decoder, monkeypatch):
    ids = ids_of(decoder)
    first = HuggingFace(reference).run(ids, 6).tokens[1]
    monkeypatch.setattr(reference.model.generation_config, "eos_token_id", first)
    own = reference.model.generation_config
    for method in (HuggingFace(reference), Restpoint(PLAIN, decoder), EarlyExit(reference), PromptLookup(reference)):
        method.prepare(ids, 4)
        assert len(method.run(ids, 6).tokens) == 6, method.name
    assert reference.model.generation_config is own


def test_sampled_methods_follow_their_seed(reference, decoder):
    ids = ids_of(decoder)
    for method in (HuggingFace(reference, 1.0), Restpoint(PLAIN, decoder, 1.0)):
        one, two, other = (method.run(ids, 16, seed).tokens for seed in (1, 1, 2))
        assert one == two
        assert one != other


def test_generate_says_nothing_about_its_own_calls(reference, decoder, caplog):
    method = EarlyExit(reference)
    with caplog.at_level("WARNING"):
        method.prepare(ids_of(decoder), 4)
    assert not caplog.records


def test_a_method_that_crashes_says_why_and_leaves_the_model_as_it_was(reference, monkeypatch):
    def crash(*_args, **_kwargs):
        raise RuntimeError("no such\ncache")

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", crash)
    own = reference.model.generation_config
    with pytest.raises(Unsupported, match=r"RuntimeError: no such$"):
        EarlyExit(reference).prepare([1, 2, 3], 4)
    assert reference.model.config.num_hidden_layers == 16
    assert reference.model.generation_config is own
    report = bench(reference, None, BenchOptions(new_tokens=4, prompts=1, repetitions=1, domains=("maths",)))
    rows = {row.method: row for row in report.rows if row.domain == AVERAGE}
    assert rows["huggingface early exit"].status == "not supported: RuntimeError: no such"
    assert rows["huggingface early exit"].tokens_per_second is None
    assert rows["huggingface lookup"].status == "ok"
    assert rows[RESTPOINT].status.startswith("not run: no profile given")


# --- the benchmark ---


def test_report_has_a_row_for_every_method_and_domain(report):
    assert [(row.method, row.domain) for row in report.rows] == [
        (method, domain) for method in METHODS for domain in ("maths", "plays", AVERAGE)
    ]
    for row in report.rows:
        assert row.status == "ok"
        assert (row.dtype, row.batch) == ("float32", 1)
        assert (row.prompts, row.runs) == ((2, 4) if row.domain == AVERAGE else (1, 2))
        assert row.tokens_per_second > 0
        assert row.ratio_to_plain > 0
        assert row.prefill_seconds > 0
        assert row.identical == 1
        assert row.divergences == ()


def test_plain_rows_are_the_denominator(report):
    for row in report.rows:
        if row.method in (PLAIN, "huggingface"):
            assert row.tokens_per_pass == 1
            assert row.layers_per_token == 16
        if row.method == PLAIN:
            assert row.ratio_to_plain == 1


def test_drafting_rows_count_drafts(report):
    rows = {row.method: row for row in report.rows if row.domain == AVERAGE}
    assert rows[RESTPOINT].settings == "lookup, recycling, predictor"
    assert rows[RESTPOINT].tokens_per_pass > 1
    assert rows["huggingface early exit"].settings.startswith("layer ")
    assert rows["huggingface lookup"].settings.endswith(" tokens")


def test_average_is_over_domains(report):
    rows = {(row.method, row.domain): row for row in report.rows}
    for method in METHODS:
        parts = [rows[method, domain] for domain in ("maths", "plays")]
        average = rows[method, AVERAGE]
        assert average.tokens_per_second == pytest.approx(sum(part.tokens_per_second for part in parts) / 2)
        assert average.ratio_to_plain == pytest.approx(math.prod(part.ratio_to_plain for part in parts) ** 0.5)


def test_written_json_has_all_that_the_report_has(report, tmp_path):
    path = tmp_path / "new" / "bench.json"
    report.write(path)
    report.write(path)
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content.keys() == {"conditions", "rows"}
    names = {field.name for field in fields(Row)}
    assert all(row.keys() == names for row in content["rows"])
    assert len(content["rows"]) == len(report.rows)
    conditions = content["conditions"]
    assert conditions["versions"].keys() == {"restpoint", "torch", "transformers"}
    assert {"device", "threads", "dtype", "attention", "date", "new_tokens", "model"} <= conditions.keys()
    assert (conditions["new_tokens"], conditions["prompts_per_domain"], conditions["repetitions"]) == (8, 1, 2)
    assert conditions["notes"] == []


def test_unwritable_json_is_an_error_in_one_line(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RestpointError, match=r"^json: .* cannot be written"):
        report.write(tmp_path / "file" / "bench.json")


def test_budget_leaves_out_what_would_not_fit_but_no_method(reference):
    options = replace(SMALL, new_tokens=4, prompts=2, domains=("maths",), budget_seconds=0.01)
    seen = []
    report = bench(reference, None, options, lambda *step: seen.append(step))
    assert {row.runs for row in report.rows if row.status == "ok"} == {1}
    assert report.conditions["notes"] == ["the time budget of 0.01 s allowed 1 of 4 laps"]
    assert seen[0][0].startswith("warm up")
    assert seen[-1][0] == "measure"


def test_sampled_runs_claim_no_identity(reference):
    options = BenchOptions(new_tokens=4, prompts=1, repetitions=1, domains=("maths",), temperature=0.8)
    report = bench(reference, None, options)
    assert {row.identical for row in report.rows} == {None}
    assert report.conditions["temperature"] == 0.8


def test_a_divergence_is_recorded_with_its_index_and_margin(reference, decoder):
    ids = ids_of(decoder)
    good = Restpoint(PLAIN, decoder).run(ids, 6)
    bad = replace(good, tokens=[*good.tokens[:3], good.tokens[3] + 1, *good.tokens[4:]])
    records = {PLAIN: Record(PLAIN, runs={"p": [good, good]}), "other": Record("other", runs={"p": [good, bad]})}
    for record in records.values():
        record.counted["p"] = good
    _compare(reference, records, {"p": _Prompt("p", "maths", ids)})
    row = rows_of(records["other"], records[PLAIN], {"maths": ["p"]}, "float32", True, 0)[0]
    assert row.identical == 0.5
    (divergence,) = row.divergences
    assert (divergence.prompt, divergence.index) == ("p", 3)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([ids + good.tokens[:3]])).logits[0, -1].sort(descending=True).values
    assert divergence.margin == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
    assert rows_of(records[PLAIN], records[PLAIN], {"maths": ["p"]}, "float32", True, 0)[0].divergences == ()


# --- what is shown ---


def test_chart_shows_bars(report, tmp_path):
    path = tmp_path / "new" / "chart.png"
    chart.draw(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    assert [file.name for file in path.parent.iterdir()] == ["chart.png"]


def test_chart_of_methods_without_numbers_names_them(report, tmp_path):
    rows = [
        row
        if row.method in (PLAIN, "huggingface")
        else Row(row.method, row.domain, "", "not supported: it crashed", "float32")
        for row in report.rows
    ]
    chart.draw(BenchReport(report.conditions, tuple(rows)), tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_chart_refuses_unknown_formats():
    with pytest.raises(RestpointError, match=r"^plot: .*bench.bmp is none of .png, .svg, .pdf"):
        chart.check_path(chart.Path("bench.bmp"))


def test_table_has_every_method_and_the_conditions(report):
    console = Console(width=160, record=True, file=io.StringIO())
    gone = replace(report.rows[-1], method="gone", status="not supported: it crashed")
    console.print(table(replace(report, rows=(*report.rows, gone))))
    text = console.export_text()
    for words in [
        *METHODS,
        "maths",
        "average",
        "lookup, recycling, predictor",
        "8 new tokens",
        "gone: not supported: it crashed",
    ]:
        assert words in text


def test_a_run_rates_only_what_came_after_the_first_pass():
    run = Run(tokens=list(range(11)), prefilled=1, prefill_seconds=5.0, decode_seconds=2.0)
    assert run.tokens_per_second == 5.0
