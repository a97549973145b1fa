"""Several texts at once: every row is what it would be alone, however long its neighbours are."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from decoding import INSTANT, Shrub, costs, fused, model_and_target, native, together, tokens_of
from families import VOCABULARY, build
from restpoint.decode.control import Control, best_count
from restpoint.decode.draft import TokenPath
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Stopping, Text, decode, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import _of_like_length
from restpoint.decode.tree import TreeSettings
from restpoint.equilibrium import RestPointRecurrence
from restpoint.errors import RestpointError
from restpoint.generate import Decoder
from restpoint.generation import Generation
from restpoint.model.load import Loaded

PROMPTS = [[5, 17, 33, 60, 8], [9], [7, 3, 7, 3, 7, 3, 7, 3, 11, 12, 40], [5, 17, 33, 60, 8, 21], [88, 4]]
LENGTHS = [30, 12, 1, 22, 30]


def greedy() -> Sampler:
    return Sampler(SamplingSettings())


def tiny(family: str = "llama") -> Loaded:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return Loaded("tiny", build(family), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2"))


@pytest.mark.parametrize(
    ("family", "drafters"),
    [
        pytest.param(family, drafters, id=f"{family}-{' '.join(drafters) or 'plain'}")
        for family in ("llama", "gpt2", "mistral", "falcon_alibi", "mpt")
        for drafters in ((), ("lookup",), INSTANT, ("recycling", "exit 0"))
        # GPT-2's embeddings depend on positions, and a predictor at layer 0 asks for them one row at a time.
        if family != "gpt2" or "exit 0" not in drafters
    ],
)
def test_every_row_is_what_it_is_alone(family: str, drafters: tuple[str, ...]) -> None:
    """Prompts and texts of different lengths, some with drafters and some without, against transformers."""
    trees = family != "mpt"
    model, target = model_and_target(family)
    for fixed in (None, 5) if drafters else (None,):
        texts = []
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
            sampler = greedy()
            settings = TreeSettings(fixed=fixed, levels=2, width=2, children=3, branching=trees)
            speculator = fused(target, sampler, drafters, settings, trees=trees) if drafters and row != 3 else None
            texts.append(Text(prompt, sampler, Stopping(length), speculator))
        found = together(target, texts)
        for prompt, length, rounds in zip(PROMPTS, LENGTHS, found, strict=True):
            assert tokens_of(rounds) == native(model, prompt, length)
            assert rounds[-1].finished == "length"
        assert all(len(turn.tokens) == 1 for turn in found[3])
        accepted = sum(turn.accepted for rounds in found for turn in rounds)
        assert accepted > 0 or not drafters
        assert len({len(rounds) for rounds in found}) > 2
        passes = max(len(rounds) for rounds in found)
        assert passes == max(LENGTHS) or drafters


def test_rows_are_read_with_rows_of_like_length() -> None:
    """One long prompt does not make padding of all others; states and texts are those of each row alone."""
    lengths = [3, 90, 40, 5, 88, 2, 41, 60]
    prompts = [[(7 * place + row) % VOCABULARY for place in range(length)] for row, length in enumerate(lengths)]
    groups = _of_like_length(prompts)
    assert [[lengths[row] for row in group] for group in groups] == [[90, 88, 60], [41, 40], [5, 3, 2]]
    for family in ("llama", "gpt2", "mistral"):
        model, target = model_and_target(family)
        alone = [target.prefill([prompt])[0] for prompt in prompts]
        target.layered.work.token_layers = 0
        scored = target.prefill(prompts)
        assert target.layered.work.token_layers == target.layered.depth * (3 * 90 + 2 * 41 + 3 * 5)
        assert target.cache.lengths == lengths
        for one, other in zip(alone, scored, strict=True):
            torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.rest, other.rest, rtol=1e-4, atol=1e-5)
        found = together(target, [Text(prompt, greedy(), Stopping(20)) for prompt in prompts])
        assert [tokens_of(rounds) for rounds in found] == [native(model, prompt, 20) for prompt in prompts]


def test_rows_of_a_batch_draft_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one control for all rows, a predictor is asked once for all of them, and greedy text stays the model's."""
    model, target = model_and_target("llama")
    asked: list[int] = []
    predict = RestPointRecurrence.predict

    def counted(self, states, *others):
        asked.append(states[0].shape[1])
        return predict(self, states, *others)

    monkeypatch.setattr(RestPointRecurrence, "predict", counted)
    control = Control(lambda rows: costs(0.02 * rows), len(PROMPTS))
    texts = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        sampler = greedy()
        settings = TreeSettings(levels=2, width=2)
        speculator = fused(target, sampler, ("lookup", "recycling", "exit 0"), settings, control=control)
        texts.append(Text(prompt, sampler, Stopping(length), speculator))
    found = together(target, texts)
    assert [tokens_of(rounds) for rounds in found] == [
        native(model, prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    assert max(asked) > 4  # more than the nodes of a level of one row
    assert len(asked) < sum(len(rounds) for rounds in found) * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_together_rows_draft_what_they_draft_alone(temperature: float) -> None:
    """Levels of all rows at once give the trees that each row's own levels give, up to the common width."""
    drafts: list[list[tuple[list[int], list[int]]]] = []
    for share in (False, True):
        _, target = model_and_target("llama")
        control = Control.alone(costs(0.0))
        paths, speculators = [], []
        for row, prompt in enumerate(PROMPTS):
            sampler = Sampler(SamplingSettings(temperature=temperature, seed=row))
            settings = TreeSettings(fixed=9, levels=3, width=2, children=3)
            own = control if share else Control.alone(costs(0.0))
            speculator = fused(target, sampler, ("recycling", "exit 0"), settings, control=own)
            speculator.begin(prompt)
            speculators.append(speculator)
            rest = torch.linspace(-1, 1 + row, target.layered.hidden_size)[None, None]
            paths.append(TokenPath([*prompt, 7 + row], rest))
        with torch.inference_mode():
            if share:
                made = Fusion.propose_together(speculators, paths, [20] * len(paths))
            else:
                made = [one.propose(path, 20) for one, path in zip(speculators, paths, strict=True)]
        drafts.append([(list(draft.tokens), list(draft.parents)) for draft in made])
    assert drafts[0] == drafts[1]
    assert all(len(tokens) >= 9 for tokens, _ in drafts[0])


def test_a_row_that_runs_ahead_does_not_widen_the_pass() -> None:
    """The width is worth it for the rows that take longest; for one row it is the rule of a single text."""
    long = [0.97**depth for depth in range(1, 25)]
    short = [0.3, 0.1, 0.05]
    control = Control(lambda rows: costs(0.05 * rows), 4)
    even = control.width([long, short, short, short])
    ahead = control.width([[0.2 * gain for gain in long], *[[1.2 * gain for gain in short]] * 3])
    assert 0 < ahead < even
    control.begin(1)
    assert control.width([long]) == best_count(long, [1 + 0.05 * count for count in range(25)], 1.0)
    control.begin(4)
    for _ in range(40):
        control.observe(10.0, 2)
    assert control.width([long, short, short, short]) < even


def test_random_trees_of_different_shapes_in_one_pass() -> None:
    for family in ("llama", "gpt2", "mistral", "falcon_alibi"):
        model, target = model_and_target(family)
        expected = [native(model, prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
        texts = [
            Text(prompt, greedy(), Stopping(length), Shrub(prompt + text, seed=row))
            for row, (prompt, length, text) in enumerate(zip(PROMPTS, LENGTHS, expected, strict=True))
        ]
        found = together(target, texts)
        assert [tokens_of(rounds) for rounds in found] == expected
        assert sum(turn.accepted for rounds in found for turn in rounds) > 20


@pytest.mark.parametrize("branching", [True, False], ids=["trees", "chains"])
def test_a_row_at_the_end_of_the_context_beside_one_with_room(branching: bool) -> None:
    """gpt2 has a table of 128 positions: what fills up a short draft must not reach beyond it either."""
    model, target = model_and_target("gpt2")
    long = [(7 * index) % VOCABULARY for index in range(120)]
    texts = []
    for prompt in (long, [5, 17, 33, 5, 17, 33, 5, 17, 33]):
        sampler = greedy()
        settings = TreeSettings(fixed=12, branching=branching)
        speculator = fused(target, sampler, ("lookup", "recycling"), settings, trees=branching)
        texts.append(Text(prompt, sampler, Stopping(40, context_length=128), speculator))
    found = together(target, texts)
    assert tokens_of(found[0]) == native(model, long, 8)
    assert found[0][-1].finished == "context"
    assert tokens_of(found[1]) == native(model, texts[1].prompt, 40)
    assert max(turn.drafted for turn in found[1][: len(found[0])]) > 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_sampled_rows_have_their_own_random_numbers(family: str) -> None:
    _, target = model_and_target(family)

    def settings(row: int) -> SamplingSettings:
        return SamplingSettings(temperature=1.1, top_k=20, seed=5 + row)

    texts = [
        Text(prompt, Sampler(settings(row)), Stopping(length))
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    found = [tokens_of(rounds) for rounds in together(target, texts)]
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        alone = tokens_of(decode(target, prompt, Sampler(settings(row)), Stopping(length)))
        assert found[row] == alone
    other = tokens_of(decode(target, PROMPTS[0], Sampler(settings(1)), Stopping(LENGTHS[0])))
    assert other != found[0]


def test_a_row_that_ends_leaves_the_batch() -> None:
    """By an end token, by its length, or because it was stopped between rounds; the others do not notice."""
    model, target = model_and_target("llama")
    expected = [native(model, prompt, 24) for prompt in PROMPTS]
    end = next(token for token in expected[0] if token not in expected[3] + expected[4])
    place = expected[0].index(end)
    texts = [
        Text(prompt, greedy(), Stopping(24, frozenset([end]) if row == 0 else frozenset()))
        for row, prompt in enumerate(PROMPTS)
    ]
    found: list[list[int]] = [[] for _ in texts]
    sizes = []
    for rounds in decode_batch(target, texts):
        sizes.append((len(rounds), target.cache.batch))
        for row, turn in rounds.items():
            found[row] += turn.tokens
        texts[3].stopped = len(found[3]) >= 6
    assert found[0] == expected[0][: place + 1]
    assert found[3] == expected[3][:6]
    assert [found[row] for row in (1, 2, 4)] == [expected[row] for row in (1, 2, 4)]
    assert all(rows == cached for rows, cached in sizes)
    assert sizes[0][0] == 5
    assert sizes[-1][0] == 3


def test_no_prompt_and_a_bad_one_are_refused() -> None:
    _, target = model_and_target("llama")
    with pytest.raises(RestpointError, match="prompts: there is none"):
        next(decode_batch(target, []))
    with pytest.raises(RestpointError, match="token id 96 is out of range"):
        next(decode_batch(target, [Text([3], greedy(), Stopping(4)), Text([VOCABULARY], greedy(), Stopping(4))]))


# --- text in, text out -----------------------------------------------------------------------------------------------

WORDS = ["w5 w17 w33 w60 w8", "w9", "w7 w3 w7 w3 w7 w3 w11", "w88 w4"]


def alone(decoder: Decoder, prompt: str | list[int], row: int, sampling: SamplingSettings, **options) -> Generation:
    seeded = SamplingSettings(**{**vars(sampling), "seed": sampling.seed + row})
    return decoder.generate(prompt, seeded, **options)


@pytest.mark.parametrize("drafters", [(), ("lookup", "recycling")], ids=["plain", "drafted"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_generated_batches_are_generated_texts(family: str, drafters: tuple[str, ...], monkeypatch) -> None:
    loaded = tiny(family)
    monkeypatch.setattr(
        "restpoint.drafting.costs.measure_passes", lambda *_a, **_k: tuple(1 + 0.01 * n for n in range(33))
    )
    decoder = Decoder(loaded, drafters=drafters)
    plain = Decoder(loaded)
    greedy = SamplingSettings()
    found = decoder.generate_batch(WORDS, max_tokens=24, ignore_end=True)
    for row, (words, one) in enumerate(zip(WORDS, found, strict=True)):
        expected = alone(plain, words, row, greedy, max_tokens=24, ignore_end=True)
        assert (one.tokens, one.text, one.finished) == (expected.tokens, expected.text, "length")
        assert one.prompt_tokens == len(words.split())
        assert one.statistics.new_tokens == 24
    assert (sum(one.statistics.accepted for one in found) > 0) == bool(drafters)
    if not drafters:
        sampling = SamplingSettings(temperature=1.2, seed=3)
        for row, one in enumerate(decoder.generate_batch(WORDS, sampling, max_tokens=16)):
            assert one.tokens == alone(plain, WORDS[row], row, sampling, max_tokens=16).tokens
    with pytest.raises(RestpointError, match="prompts: there is none"):
        decoder.generate_batch([])


def test_a_stop_string_ends_its_own_row_only() -> None:
    decoder = Decoder(tiny())
    whole = decoder.generate_batch(WORDS, max_tokens=20, ignore_end=True)
    stop = next(
        word for word in whole[0].text.split()[3:] if not any(f"{word} " in f"{one.text} " for one in whole[1:])
    )
    found = decoder.generate_batch(WORDS, max_tokens=20, stop=[f"{stop}"], ignore_end=True)
    assert found[0].finished == "stop"
    assert found[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert len(found[0].tokens) < 20
    assert [one.tokens for one in found[1:]] == [one.tokens for one in whole[1:]]


@pytest.mark.parametrize("family", ["mamba", "gpt_neo"])
def test_families_without_ragged_rows_are_decoded_one_by_one(family: str, monkeypatch) -> None:
    decoder = Decoder(tiny(family))
    assert not decoder.capabilities.ragged.supported
    alone_too: list[object] = []
    generate = decoder.generate
    monkeypatch.setattr(decoder, "generate", lambda *a, **k: alone_too.append(a) or generate(*a, **k))
    found = decoder.generate_batch(WORDS, max_tokens=10, ignore_end=True)
    assert len(alone_too) == len(WORDS)
    for words, one in zip(WORDS, found, strict=True):
        ids = [int(word.removeprefix("w")) for word in words.split()]
        expected = decoder.loaded.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=None,
        )
        assert one.tokens == expected[0, len(ids) :].tolist()
    with pytest.raises(RestpointError, match="prompts: there is none"):
        decoder.generate_batch([])


@pytest.mark.parametrize("drafters", [(), ("lookup", "recycling", "ngrams")], ids=["plain", "drafted"])
def test_a_batch_of_the_bundled_model(reference: Loaded, drafters: tuple[str, ...]) -> None:
    from restpoint import bundled

    decoder, plain = Decoder(reference, drafters=drafters), Decoder(reference)
    prompts = ["def read(path):\n", *(prompt.text for prompt in bundled.prompts()[:3])]
    found = decoder.generate_batch(prompts, max_tokens=24, ignore_end=True)
    for prompt, one in zip(prompts, found, strict=True):
        expected = plain.generate(prompt, max_tokens=24, ignore_end=True)
        assert (one.tokens, one.text) == (expected.tokens, expected.text)
    passes = max(one.statistics.passes for one in found)
    assert (passes < 23) == bool(drafters)
