"""Draft models: they read along with any text, and speak the target's tokens or have their text re-encoded."""

import random

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from families import FAMILIES, VOCABULARY, build
from restpoint.decode.draft import TokenPath
from restpoint.decode.drafters.draft_model import ModelDrafter, draft_by_model, fit_vocabulary, same_vocabulary
from restpoint.decode.drafters.reading import Reader, recent
from restpoint.decode.drafters.reencoding import Reencoding, ReencodingDrafter, align
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. Naïve café — 漢字 and 🙂 too.",
    "def add(first, second):\n    return first + second  # the sum\n\n\nprint(add(1, 2))\n" * 2,
    "When the other brother thought about the weather, they gathered together rather than bother.",
]


def path(tokens: list[int]) -> TokenPath:
    return TokenPath(list(tokens), None)


def native(layered: LayeredModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return layered.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def byte_tokenizer(texts: list[str], size: int) -> hf.PreTrainedTokenizerBase:
    """Byte-level BPE with as many merges as fit into ``size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def word_tokenizer(words: list[str]) -> hf.PreTrainedTokenizerBase:
    """Lower-case words joined by spaces; others are unknown."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: i + 1 for i, word in enumerate(words)}}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def llama(vocabulary: int, seed: int = 0) -> LayeredModel:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**{**FAMILIES["llama"].to_diff_dict(), "vocab_size": vocabulary, "num_hidden_layers": 2})
    return LayeredModel(hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_reading_along_equals_reading_anew(family: str) -> None:
    layered = LayeredModel(build(family))
    drafter = ModelDrafter(layered, layered)
    draws = random.Random(0)
    tokens = [draws.randrange(VOCABULARY) for _ in range(9)]
    for round_ in range(6):
        torch.testing.assert_close(drafter.start(path(tokens))[0], native(layered, tokens), rtol=1e-4, atol=1e-4)
        texts = [tokens]
        for parents in ([-1, -1], [0, 1, 1], [3]):
            added = [draws.randrange(VOCABULARY) for _ in parents]
            logits = drafter.extend(parents, added)
            texts += [[*texts[parent + 1], token] for parent, token in zip(parents, added, strict=True)]
            for row, text in zip(logits, texts[-len(parents) :], strict=True):
                torch.testing.assert_close(row, native(layered, text), rtol=1e-4, atol=1e-4)
        tokens = [*draws.choice(texts), draws.randrange(VOCABULARY), draws.randrange(VOCABULARY)][:120]
        if round_ == 3:  # the text is cut and goes on otherwise
            tokens = [*tokens[: draws.randrange(1, len(tokens))], draws.randrange(VOCABULARY)]
    drafter.begin([1, 2])
    torch.testing.assert_close(drafter.start(path([1, 2]))[0], native(layered, [1, 2]), rtol=1e-4, atol=1e-4)


def test_nodes_that_stood_are_not_run_again() -> None:
    layered = LayeredModel(build("llama"))
    drafter = ModelDrafter(layered, layered)
    drafter.start(path([5, 6, 7]))
    for parents, tokens in (([-1, -1], [8, 9]), ([0, 1], [10, 11])):
        drafter.extend(parents, tokens)
    before = layered.work.token_layers
    drafter.start(path([5, 6, 7, 9, 11, 12]))
    assert layered.work.token_layers - before == layered.depth
    drafter.start(path([5, 6, 7, 9, 11, 12]))
    assert layered.work.token_layers - before == 2 * layered.depth


def test_the_target_as_its_own_draft_model_drafts_its_greedy_tokens() -> None:
    layered = LayeredModel(build("llama"))
    tokens = [5, 17, 40]
    drafter = ModelDrafter(layered, layered)
    for _ in range(3):
        expected = list(tokens)
        for _ in range(5):
            expected.append(int(native(layered, expected).argmax()))
        logits, drafted = drafter.start(path(tokens)), []
        while len(drafted) < 5:
            drafted.append(int(logits[-1].argmax()))
            logits = drafter.extend([len(drafted) - 2], drafted[-1:])
        assert drafted == expected[len(tokens) :]
        tokens = [*tokens, *drafted[:3], 50]


def test_a_text_beyond_the_context_is_read_from_its_end() -> None:
    layered = LayeredModel(build("gpt2"))
    reader = Reader(layered, context_length=128)
    draws = random.Random(1)
    tokens = [draws.randrange(VOCABULARY) for _ in range(80)]
    begins = set()
    for _ in range(20):
        tokens += [draws.randrange(VOCABULARY) for _ in range(8)]
        begins.add(len(tokens) - len(recent(tokens, 128)))
        logits = layered.logits(reader.start(tokens))[0, 0]
        torch.testing.assert_close(logits, native(layered, recent(tokens, 128)), rtol=1e-4, atol=1e-4)
        for node in range(4):
            reader.extend([node - 1], [node])
    assert begins == {0, 64, 128, 192}
    with pytest.raises(RestpointError, match="context_length=4"):
        Reader(layered, context_length=4)


def test_padding_is_cut_or_filled() -> None:
    logits = torch.randn(2, 5)
    assert torch.equal(fit_vocabulary(logits, 3), logits[:, :3])
    filled = fit_vocabulary(logits, 7)
    assert torch.equal(filled[:, :5], logits)
    assert torch.softmax(filled, -1)[:, 5:].sum() == 0
    drafter = ModelDrafter(llama(80), LayeredModel(build("llama")))
    assert drafter.start(path([3, 4])).shape == (1, VOCABULARY)


def test_vocabularies_decide_how_is_drafted() -> None:
    first, second = byte_tokenizer(TEXTS[:2], 300), byte_tokenizer(TEXTS[2:], 290)
    assert same_vocabulary(first, byte_tokenizer(TEXTS[:2], 300))
    assert not same_vocabulary(first, second)
    models_ = {size: llama(size) for size in (300, 320, 290)}
    target = Loaded("big", models_[320].model, first)
    decoded = LayeredTarget(models_[320])
    small = Loaded("small", models_[300].model, first)
    assert isinstance(draft_by_model(small, target)(decoded), ModelDrafter)
    other = Loaded("other", models_[290].model, second)
    with pytest.raises(RestpointError, match=r"'other' has another vocabulary .* give .* or reencode=True"):
        draft_by_model(other, target)
    assert isinstance(draft_by_model(other, target, reencode=True)(decoded), ReencodingDrafter)


def test_a_model_that_cannot_roll_back_is_refused() -> None:
    tokenizer = byte_tokenizer(TEXTS, 280)
    layered = llama(280)
    with pytest.raises(RestpointError, match="cannot take back"):
        draft_by_model(Loaded("state", build("mamba"), tokenizer), Loaded("big", layered.model, tokenizer))


def test_aligned_tokens_spell_what_was_written() -> None:
    tokenizer = byte_tokenizer(TEXTS, 400)
    split = 0
    for text in TEXTS:
        for cut in range(1, len(text)):
            tokens = tokenizer.encode(text[:cut])
            found, ends = align(tokenizer, tokens, text[cut : cut + 30])
            assert tokenizer.decode(tokens + found) == text[: cut + 30]
            assert ends[-1] == len(text[cut : cut + 30])
            split += tokenizer.encode(text[: cut + 30]) != tokens + found
    assert split > 0  # cuts inside a word were among them


def test_nothing_is_proposed_inside_a_character() -> None:
    tokenizer = byte_tokenizer(["ascii only"], 260)
    tokens = tokenizer.encode("so 漢")
    assert align(tokenizer, tokens, " x")[0] != []
    for count in (1, 2):
        assert align(tokenizer, tokens[:-count], " x") == ([], [])
    assert align(tokenizer, [], "x") == ([], [])
    assert align(tokenizer, tokens, "") == ([], [])


def test_proposals_end_where_an_encoding_changes_the_text() -> None:
    tokenizer = word_tokenizer(["the", "dog", "sleeps", "on", "and", "fox"])
    tokens = tokenizer.encode("the dog and the fox and the dog and the")
    assert tokenizer.decode(align(tokenizer, tokens, " fox and cats sleeps")[0]) == "fox and"
    assert tokenizer.decode(align(tokenizer, tokens, " fox AND dog")[0]) == "fox"
    assert align(tokenizer, tokens, "CAT") == ([], [])


def test_reencoded_drafts_spell_the_draft_models_text() -> None:
    own, target = byte_tokenizer(TEXTS[2:], 290), byte_tokenizer(TEXTS[:2], 330)
    layered = llama(290)
    drafter = ReencodingDrafter(layered, own, target, Reencoding(longest=5, least_confidence=0.0))
    proposed = 0
    tokens = target.encode(TEXTS[0][:40])
    for cut in range(40, 60):
        found = drafter.candidates(path(tokens), 8)
        assert list(found.parents) == list(range(-1, len(found.tokens) - 1))
        assert all(0 < confidence <= 1 for confidence in found.confidences)
        text = target.decode(tokens)
        written = own.decode(_greedy(layered, own.encode(text), 5, own.all_special_ids))
        spelled = target.decode([*tokens, *found.tokens])
        assert (text + written).startswith(spelled)
        proposed += len(found.tokens)
        tokens = target.encode(TEXTS[0][: cut + 1])
    assert proposed > 10
    assert len(drafter.candidates(path(tokens), 2).tokens) <= 2
    assert drafter.candidates(path(tokens), 0).tokens == ()
    unsure = ReencodingDrafter(layered, own, target, Reencoding(least_confidence=0.999))
    assert list(unsure.candidates(path(tokens), 8).tokens) == []


def test_what_is_written_comes_through_another_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    own, target = byte_tokenizer(TEXTS[2:], 320), byte_tokenizer(TEXTS[:2], 330)
    drafter = ReencodingDrafter(llama(320), own, target)
    sentence = TEXTS[2]
    for cut in range(12, 60, 5):
        rest = own.encode(sentence[cut:])[:6]
        monkeypatch.setattr(drafter, "_write", lambda _, rest=rest: (rest, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))
        tokens = target.encode(sentence[:cut])
        found = drafter.candidates(path(tokens), 50)
        assert target.decode([*tokens, *found.tokens]) == sentence[:cut] + own.decode(rest)
        assert found.confidences[0] == 0.9
        assert found.confidences[-1] == 0.4
        assert list(found.confidences) == sorted(found.confidences, reverse=True)


def _greedy(layered: LayeredModel, ids: list[int], count: int, ends: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < count and (token := int(native(layered, ids + found).argmax())) not in ends:
        found.append(token)
    return found


@pytest.mark.parametrize("wrong", [{"longest": 0}, {"least_confidence": 1.0}, {"window": 4}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(RestpointError, match=next(iter(wrong))):
        Reencoding(**wrong)
