"""Lossless means lossless: the emitted law against exact enumeration, plain decoding and transformers."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor, LogitsProcessorList

from families import VOCABULARY, build
from restpoint.decode.calibrate import AcceptanceCounter
from restpoint.decode.control import Calibration, Controller
from restpoint.decode.costs import Costs
from restpoint.decode.draft import Draft, Drafter, TokenPath
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget, NativeTarget, Scored
from restpoint.decode.verify import verify
from restpoint.equilibrium import AffineMap, AffinePredictor, IdentityPredictor, RestPointRecurrence
from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

FLAT = Calibration((), ((0.7,), (0.7,)), ((1.0,), (1.0,)))
CHEAP = Costs("here", "float32", (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35), (0.01, 0.01))


def tokens_of(rounds: Iterator[Round]) -> list[int]:
    return [token for turn in rounds for token in turn.tokens]


def predictors(layered: LayeredModel) -> dict[str, Predictor]:
    """Predictors with random maps: bad drafts, which must not change a single token."""
    torch.manual_seed(3)
    width = layered.hidden_size
    square = AffineMap(torch.eye(width) + 0.3 * torch.randn(width, width), torch.zeros(width))
    recurrent = AffineMap(torch.randn(2 * width, width) / width**0.5, torch.zeros(width))
    return {
        "lens": IdentityPredictor((2,)),
        "affine": AffinePredictor((1,), square),
        "recurrence-without-layers": RestPointRecurrence((0,), (recurrent, recurrent)),
    }


def drafter_for(target: LayeredTarget, predictor: Predictor, sampler: Sampler, fixed: int | None) -> ExitDrafter:
    controller = Controller(CHEAP, FLAT, fixed=fixed)
    return ExitDrafter(target, predictor, sampler, controller, vocabulary=torch.arange(0, VOCABULARY, 2))


@pytest.mark.parametrize("fixed", [None, 1, 4, 7])
@pytest.mark.parametrize("name", ["lens", "affine", "recurrence-without-layers"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi", "mistral", "mpt"])
def test_greedy_is_token_identical(family: str, name: str, fixed: int | None) -> None:
    model = build(family)
    layered = LayeredModel(model)
    prompt = [5, 17, 33, 60, 8]
    expected = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=40, eos_token_id=None
    )[0, 5:].tolist()
    stopping = Stopping(max_tokens=40)
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())
    assert tokens_of(decode(target, prompt, sampler, stopping)) == expected
    drafter = drafter_for(target, predictors(layered)[name], sampler, fixed)
    rounds = list(decode(target, prompt, sampler, stopping, drafter))
    assert tokens_of(iter(rounds)) == expected
    if fixed is not None:
        assert sum(turn.drafted for turn in rounds) > 0
    assert sum(turn.accepted for turn in rounds) >= 40 - len(rounds)


def test_a_perfect_drafter_is_always_accepted() -> None:
    """Drafts that are the model's own greedy tokens all stand, and the text comes in the fewest possible passes."""

    class Oracle(Drafter):
        def __init__(self, text: list[int]):
            self.text = text
            self.accepted: list[int] = []

        def propose(self, path: TokenPath, room: int) -> Draft:
            return Draft(self.text[len(path.tokens) : len(path.tokens) + min(5, room)])

        def observe(self, draft: Draft, accepted: int) -> None:
            self.accepted.append(accepted - len(draft.tokens))

    layered = LayeredModel(build("llama"))
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())
    prompt = [5, 17, 33]
    text = prompt + tokens_of(decode(target, prompt, sampler, Stopping(max_tokens=25)))
    oracle = Oracle(text)
    rounds = list(decode(target, prompt, sampler, Stopping(max_tokens=25), oracle))
    assert prompt + tokens_of(iter(rounds)) == text
    assert set(oracle.accepted) == {0}
    assert len(rounds) == 1 + 4  # the prompt's token, then 24 more in blocks of at most 6


# --- the law of one verified block, extracted from the verification itself -----------------------------------------


class Scripted(Sampler):
    """A sampler whose uniform numbers are given."""

    def __init__(self, settings: SamplingSettings):
        super().__init__(settings)
        self.script: list[float] = []

    def uniforms(self, count: int) -> torch.Tensor:
        taken, self.script = self.script[:count], self.script[count:]
        return torch.tensor(taken, dtype=torch.float64).float()


def bisect(holds: "callable[[float], bool]") -> float:  # type: ignore[valid-type]
    """Supremum of the u in [0, 1) for which a statement that holds up to some point holds."""
    low, high = 0.0, 1.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def block_law(
    p_logits: torch.Tensor, q: torch.Tensor, tokens: list[int], sampler: Scripted
) -> dict[tuple[int, int], float]:
    """Probability of every outcome (accepted, next token), read off the thresholds of the uniform numbers."""
    count = len(tokens)
    draft = Draft(tokens, q)

    def outcome(accept: list[float], last: float) -> tuple[int, int]:
        sampler.script = [*accept, last]
        result = verify(p_logits, draft, list(range(count + 1)), sampler)
        return result.accepted, result.next_token

    keep = [bisect(lambda u, i=i: outcome([0.0] * i + [u] + [0.0] * (count - i - 1), 0.5)[0] > i) for i in range(count)]
    law: dict[tuple[int, int], float] = {}
    for accepted in range(count + 1):
        weight = math.prod(keep[:accepted]) * (1 - keep[accepted] if accepted < count else 1.0)
        if weight < 1e-12:
            continue
        script = [0.0] * accepted + [1 - 1e-7] * (count - accepted)
        bounds = [bisect(lambda u, t=t, s=script: outcome(s, u)[1] <= t) for t in range(p_logits.shape[1])]
        for token, (low, high) in enumerate(itertools.pairwise([0.0, *bounds])):
            law[accepted, token] = law.get((accepted, token), 0.0) + weight * (high - low)
    return law


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.7, top_p=0.9),
        SamplingSettings(temperature=1.3, top_k=4),
        SamplingSettings(temperature=1.0, min_p=0.2),
    ],
    ids=["temperature-1", "top-p", "top-k", "min-p"],
)
def test_law_of_a_block_by_enumeration(settings: SamplingSettings) -> None:
    """All 7 x 7 drafts of two tokens: the emitted block, completed by the target, has the target's joint law."""
    size = 7
    generator = torch.Generator().manual_seed(11)
    sampler = Scripted(settings)

    def logits(rows: int) -> torch.Tensor:
        return 2 * torch.randn(rows, size, generator=generator)

    p = {(): logits(1), **{(a,): logits(1) for a in range(size)}}
    p |= {(a, b): logits(1) for a in range(size) for b in range(size)}
    law = {prefix: sampler.law(rows, [0])[0].double() for prefix, rows in p.items()}
    q = {(): sampler.law(logits(1), [0])[0], **{(a,): sampler.law(logits(1), [0])[0] for a in range(size)}}
    emitted = torch.zeros(size, size, size, dtype=torch.float64)
    for a, b in itertools.product(range(size), repeat=2):
        drawn = float(q[()][a] * q[a,][b])
        if drawn == 0:
            continue
        rows = torch.cat([p[()], p[a,], p[a, b]])
        for (accepted, token), share in block_law(rows, torch.stack([q[()], q[a,]]), [a, b], sampler).items():
            block = (*(a, b)[:accepted], token)
            if len(block) == 1:
                emitted[block[0]] += (
                    drawn * share * law[block][:, None] * torch.stack([law[(*block, c)] for c in range(size)])
                )
            elif len(block) == 2:
                emitted[block] += drawn * share * law[block]
            else:
                emitted[block] += drawn * share
    target = torch.stack(
        [law[()][a] * law[a,][:, None] * torch.stack([law[a, b] for b in range(size)]) for a in range(size)]
    )
    assert float((emitted - target).abs().sum()) / 2 < 2e-6


def test_enumeration_would_notice_a_wrong_coupling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing rejected tokens by draws from p instead of the residual moves the law by far more than the bound."""
    from restpoint.decode import verify as module

    monkeypatch.setattr(module, "residual", lambda p, q: p)
    with pytest.raises(AssertionError):
        test_law_of_a_block_by_enumeration(SamplingSettings(temperature=1.0))


def g_test(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the G-test, cells expected below 5 pooled."""
    total = sum(counts.values())
    statistic, cells, rare_seen, rare_expected = 0.0, 0, 0, 0.0
    assert set(counts) <= {block for block, share in law.items() if share > 0}
    for block, share in law.items():
        if total * share < 5:
            rare_seen, rare_expected = rare_seen + counts[block], rare_expected + total * share
            continue
        cells += 1
        if counts[block]:
            statistic += 2 * counts[block] * math.log(counts[block] / (total * share))
    if rare_expected > 0:
        cells += 1
        statistic += 2 * rare_seen * math.log(rare_seen / rare_expected) if rare_seen else 0.0
    return float(chi2.sf(statistic, cells - 1))


@pytest.mark.parametrize("name", [pytest.param("affine", marks=pytest.mark.slow), "recurrence-without-layers"])
def test_sampled_blocks_follow_the_models_law(name: str) -> None:
    """G-test of three-token blocks through the whole loop; n = 1500 notices a total variation of about 0.07."""
    model = build("llama")
    layered = LayeredModel(model)
    settings = SamplingSettings(temperature=1.2, top_k=3)
    prompt = [5, 17, 33]
    law = exact_law(model, prompt, Sampler(settings), 3)
    target, sampler = LayeredTarget(layered), Sampler(settings)
    predictor = predictors(layered)[name]
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = 0
    for _ in range(1500):
        drafter = ExitDrafter(target, predictor, sampler, Controller(CHEAP, FLAT, fixed=2))
        rounds = list(decode(target, prompt, sampler, Stopping(max_tokens=3), drafter))
        counts[tuple(tokens_of(iter(rounds)))] += 1
        drafted += sum(turn.drafted for turn in rounds)
    assert drafted >= 1500
    assert g_test(counts, law) > 0.01


@torch.no_grad()
def exact_law(model, prompt: list[int], sampler: Sampler, length: int) -> dict[tuple[int, ...], float]:
    """Joint law of the next tokens from the model's own uncached logits."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for block, share in law.items():
            logits = model(torch.tensor([[*prompt, *block]]), use_cache=False).logits[0, -1:]
            probabilities = sampler.law(logits, [*prompt, *block])[0]
            for token in probabilities.nonzero()[:, 0].tolist():
                longer[(*block, token)] = share * float(probabilities[token])
        law = longer
    return law


class Rewound(LayeredTarget):
    """Reads its prompt once: a later text with the same prompt begins from the cache as it was then."""

    def prefill(self, prompt: list[int]) -> Scored:
        if self.cache.lengths[0] == 0:
            self.scored = super().prefill(prompt)
        self.cache.lengths = [len(prompt)]
        return self.scored


@pytest.mark.slow
def test_sampled_blocks_of_the_bundled_model(reference) -> None:
    """G-test of three-token blocks, n = 20,000, with the bundled profile."""
    from restpoint import bundled
    from restpoint.generate import Decoder
    from restpoint.profile import Profile

    decoder = Decoder(reference, Profile.load(bundled.PROFILE_PATH))
    settings = SamplingSettings(temperature=1.0, top_k=4)
    prompt = decoder.encode("def main(")
    law = exact_law(reference.model, prompt, Sampler(settings), 3)
    sampler = Sampler(settings)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    target = Rewound(decoder.layered)
    assert decoder.profile is not None
    for _ in range(20_000):
        drafter = decoder.drafter(decoder.profile, target, sampler, 2)
        rounds = list(decode(target, prompt, sampler, Stopping(max_tokens=3), drafter))
        counts[tuple(tokens_of(iter(rounds)))] += 1
        accepted += sum(turn.accepted for turn in rounds)
    assert accepted > 2000
    assert g_test(counts, law) > 0.01


# --- processors, stopping, controller ------------------------------------------------------------------------------


class NeverTwice(LogitsProcessor):
    """Forbids the last token of each path: right only if it is given every path's own prefix."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))  # type: ignore[return-value]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_processors_see_their_own_prefix(penalty: float) -> None:
    model = build("llama")
    layered = LayeredModel(model)
    processors = LogitsProcessorList([NeverTwice()])
    prompt = [5, 17, 33, 60, 8]
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 5),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=None,
        repetition_penalty=penalty,
        logits_processor=processors,
    )[0, 5:].tolist()
    target = LayeredTarget(layered)
    sampler = Sampler(SamplingSettings(repetition_penalty=penalty), processors)
    for name in ("lens", "recurrence-without-layers"):
        drafter = drafter_for(target, predictors(layered)[name], sampler, 4)
        assert tokens_of(decode(target, prompt, sampler, Stopping(max_tokens=30), drafter)) == expected


class OnlyOdd(LogitsProcessor):
    """Allows odd tokens only, none of which is in the draft vocabulary of these tests."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()  # type: ignore[assignment]
        scores[:, ::2] = float("-inf")
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drafted_where_processors_leave_nothing_to_draft(temperature: float) -> None:
    layered = LayeredModel(build("llama"))
    target = LayeredTarget(layered)
    sampler = Sampler(SamplingSettings(temperature=temperature), LogitsProcessorList([OnlyOdd()]))
    drafter = drafter_for(target, predictors(layered)["lens"], sampler, 3)
    rounds = list(decode(target, [5, 17, 33], sampler, Stopping(max_tokens=20), drafter))
    assert all(token % 2 == 1 for token in tokens_of(iter(rounds)))
    assert sum(turn.drafted for turn in rounds) == 0


@pytest.mark.parametrize("name", ["affine", "recurrence-without-layers"])
def test_low_precision_decodes(name: str) -> None:
    """bfloat16: the same code runs, and output is the target's own up to ties within rounding."""
    layered = LayeredModel(build("llama", "sdpa", torch.bfloat16))
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())
    drafter = drafter_for(target, predictors(layered)[name], sampler, 3)
    prompt = [5, 17, 33]
    tokens = prompt + tokens_of(decode(target, prompt, sampler, Stopping(max_tokens=30), drafter))
    with torch.no_grad():
        logits = layered.model(torch.tensor([tokens]), use_cache=False).logits[0, 2:-1].float()
    chosen = logits.gather(1, torch.tensor(tokens[3:])[:, None])[:, 0]
    rounding = 8 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    assert float((logits.amax(1) - chosen).max()) <= rounding


def test_stopping_rules_never_add_a_token() -> None:
    layered = LayeredModel(build("llama"))
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())
    prompt = [5, 17, 33]
    text = tokens_of(decode(target, prompt, sampler, Stopping(max_tokens=30)))
    drafter = drafter_for(target, predictors(layered)["lens"], sampler, 5)
    end = text[11]
    rounds = list(decode(target, prompt, sampler, Stopping(30, frozenset([end])), drafter))
    assert tokens_of(iter(rounds)) == text[: text.index(end) + 1]
    assert rounds[-1].finished == "end"
    for limit in (1, 2, 7):
        rounds = list(decode(target, prompt, sampler, Stopping(limit), drafter))
        assert tokens_of(iter(rounds)) == text[:limit]
        assert rounds[-1].finished == "length"
    rounds = list(decode(target, prompt, sampler, Stopping(50, context_length=12), drafter))
    assert tokens_of(iter(rounds)) == text[:9]
    assert rounds[-1].finished == "context"


def test_families_without_rollback_decode_plainly() -> None:
    model = build("mamba")
    target, sampler = NativeTarget(LayeredModel(model)), Sampler(SamplingSettings())
    prompt = [5, 17, 33]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)[0, 3:]
    for _ in range(2):  # a second text starts afresh
        assert tokens_of(decode(target, prompt, sampler, Stopping(20))) == expected.tolist()
    with pytest.raises(RestpointError, match="cannot verify drafts"):
        target.score(5, Draft([1, 2]))


def test_rejected_prompts_and_settings() -> None:
    layered = LayeredModel(build("llama"))
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())

    def start(prompt: list[int], stopping: Stopping) -> None:
        next(decode(target, prompt, sampler, stopping))

    with pytest.raises(RestpointError, match="prompt: it is empty"):
        start([], Stopping())
    with pytest.raises(RestpointError, match="token id 96 is out of range; ids go from 0 to 95"):
        start([3, VOCABULARY], Stopping())
    with pytest.raises(RestpointError, match=r"fill the context of 4"):
        start([1, 2, 3, 4], Stopping(context_length=4))
    with pytest.raises(RestpointError, match="max_tokens is 0"):
        Stopping(0)
    for wrong, said in (
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "min_p": -1.0}, "min_p is -1.0"),
        ({"top_p": 0.9}, "no effect on greedy"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ):
        with pytest.raises(RestpointError, match=said):
            SamplingSettings(**wrong)
    with pytest.raises(RestpointError, match="exit layer 9 is not below"):
        ExitDrafter(target, IdentityPredictor((9,)), sampler, Controller(CHEAP, FLAT))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(temperature: float) -> None:
    model = build("llama")
    layered = LayeredModel(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    sampler = Sampler(SamplingSettings(temperature=temperature))
    with pytest.raises(RestpointError, match="NaN"):
        list(decode(LayeredTarget(layered), [3, 4], sampler, Stopping(4)))


def test_controller_drafts_where_it_pays_and_not_where_it_does_not() -> None:
    rising = Costs("here", "float32", tuple(1 + 0.2 * n for n in range(8)), (0.2, 0.2))
    good = Controller(rising, Calibration((), ((0.9,), (0.9,)), ((1.0,), (1.0,))))
    assert good.another(0, 1.0, 7)
    assert good.include(0, 1.0, 0.5, 7) > 0
    assert good.another(1, 0.9, 7)
    steep = Costs("here", "float32", tuple(1.0 + n for n in range(8)), (0.5, 0.5))
    bad = Controller(steep, Calibration((), ((0.3,), (0.3,)), ((1.0,), (1.0,))))
    assert bad.include(0, 1.0, 0.5, 7) == 0.0
    probes = 0
    for _ in range(200):
        attempt = bad.another(0, 1.0, 7)
        bad.observe([], 0, int(attempt))
        probes += attempt
    assert 1 <= probes <= 8  # a probe after pauses of 8, 16, 32 and then 64 rounds
    for _ in range(60):
        good.observe([0.5], 0, 1)
    assert not all(good.another(0, 1.0, 7) for _ in range(5))  # it learns that its drafts fail


def test_controller_length_is_the_best_one() -> None:
    """With a flat acceptance the chosen length maximises tokens per second, found by trying all."""
    for accept in (0.3, 0.5, 0.7, 0.9):
        costs = Costs("here", "float32", (1.0, 1.25, 1.3, 1.35, 1.4, 1.6, 1.8, 2.0), (0.05, 0.03))
        controller = Controller(costs, Calibration((), ((accept,), (accept,)), ((1.0,), (1.0,))))
        rates = [controller.expected_tokens(n) / controller.seconds(n) for n in range(8)]
        best = max(range(8), key=rates.__getitem__)
        for _ in range(100):  # the going rate settles at the best one
            controller.pace.add(controller.expected_tokens(best), controller.seconds(best))
        chosen, reach = 0, 1.0
        while controller.another(chosen, reach, 7):
            reach = controller.include(chosen, reach, 0.5, 7)
            if reach == 0:
                break
            chosen += 1
        assert rates[chosen] >= 0.97 * max(rates), (accept, chosen, rates)


def test_calibration_rises_with_confidence() -> None:
    generator = torch.Generator().manual_seed(5)
    confidence = torch.rand(20_000, generator=generator)
    accepted = (torch.rand(20_000, generator=generator) < confidence**2).float()
    counter = AcceptanceCounter()
    counter.add(0, confidence, accepted)
    calibration = counter.calibration()
    assert list(calibration.acceptance[0]) == sorted(calibration.acceptance[0])
    assert calibration.mean(0) == pytest.approx(float(accepted.mean()), abs=0.01)
    assert calibration.acceptance[0][calibration.bin(0.85)] == pytest.approx(0.85**2, abs=0.03)
