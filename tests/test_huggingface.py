"""``model.generate(custom_generate=generate_fn(..))`` gives what ``model.generate(..)`` gives."""

import copy
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import restpoint
from decoding import costs
from families import VOCABULARY, build
from restpoint import bundled
from restpoint.decode.loop import Round, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.tree import TreeSettings
from restpoint.errors import RestpointError
from restpoint.exit.policy import ExitPolicy
from restpoint.exit.rules import LayerSkipRule, PositionRule
from restpoint.generate import Decoder
from restpoint.huggingface import custom
from restpoint.huggingface.custom import CustomGenerate, generate_fn
from restpoint.model.load import Loaded
from restpoint.model.versions import CACHE
from restpoint.profile import Profile
from test_law import SETTINGS, TEXT, NeverTwice, exact_law, g_test

SAMPLES = 400
PROMPTS = ["def read(path):\n", "The", "Question: Tom has 3 apples and"]
TABLES = ("lookup", "recycling")
ROWS = torch.tensor([[5, 17, 33, 5, 17, 33, 5, 17], [0, 0, 0, 8, 40, 8, 40, 8], [0, 0, 0, 0, 0, 0, 0, 61]])


@pytest.fixture(scope="module", autouse=True)
def _costs() -> Iterator[None]:
    """Nothing is measured: it takes long, and tokens do not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("restpoint.drafting.costs.measure_passes", lambda target, rows=1: costs().verify)
        patch.setattr("restpoint.drafting.costs.measure_drafts", lambda target, drafters: (0.1, 0.1))
        yield


@pytest.fixture(scope="module")
def fast(reference: Loaded) -> CustomGenerate:
    return generate_fn(Profile.load(bundled.PROFILE_PATH))


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Every round that is decoded."""
    found: list[Round] = []

    def watched(*args: Any) -> Any:
        for turns in decode_batch(*args):
            found.extend(turns.values())
            yield turns

    monkeypatch.setattr(custom, "decode_batch", watched)
    return found


def encoded(loaded: Loaded, prompts: list[str], side: str = "left") -> BatchEncoding:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.padding_side = side
    return tokenizer(prompts, return_tensors="pt", padding=True)


def tables(**options: Any) -> CustomGenerate:
    return generate_fn(drafters=TABLES, draft_tokens=3, **options)


class AddsUp(StoppingCriteria):
    """Ends a row once the ids after its prompt add up to so much; keeps everything it is given."""

    def __init__(self, width: int, total: int):
        self.width, self.total = width, total
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return input_ids[:, self.width :].sum(1) >= self.total


class Kept(BaseStreamer):
    def __init__(self):
        self.values: list[list[Any]] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append(["end"])


SAME: dict[str, dict[str, Any]] = {
    "length": {"max_new_tokens": 25},
    "max_length": {"max_length": 20},
    "min_new_tokens": {"max_new_tokens": 20, "min_new_tokens": 15, "eos_token_id": [0, 13, 90]},
    "repetition_penalty": {"max_new_tokens": 16, "repetition_penalty": 1.3},
    "no_repeat_ngram": {"max_new_tokens": 16, "no_repeat_ngram_size": 2},
    "bad_words": {"max_new_tokens": 16, "bad_words_ids": [[13], [14, 15]], "suppress_tokens": [90]},
    "forced_end": {"max_new_tokens": 12, "forced_eos_token_id": 7},
    "growing_end": {"max_new_tokens": 16, "exponential_decay_length_penalty": (4, 1.5)},
    "top_k 1": {"max_new_tokens": 16, "do_sample": True, "top_k": 1},
}


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_tokens_are_generates_own(reference: Loaded, fast: CustomGenerate, settings: dict[str, Any]) -> None:
    inputs = encoded(reference, PROMPTS[:1])
    settings = {"do_sample": False, **settings}
    expected = reference.model.generate(**inputs, **settings)
    assert expected.shape[1] > inputs.input_ids.shape[1] + 3
    assert torch.equal(reference.model.generate(**inputs, **settings, custom_generate=fast), expected)


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_tokens_of_a_padded_batch_are_generates_own(tiny: PreTrainedModel, settings: dict[str, Any]) -> None:
    settings = {"attention_mask": (ROWS != 0).long(), "do_sample": False, **settings}
    expected = tiny.generate(ROWS, **settings)
    assert expected.shape[1] > ROWS.shape[1] + 3
    assert torch.equal(tiny.generate(ROWS, **settings, custom_generate=tables()), expected)


def test_drafts_are_accepted(reference: Loaded, fast: CustomGenerate, rounds: list[Round]) -> None:
    reference.model.generate(
        **encoded(reference, PROMPTS[:1]), do_sample=False, max_new_tokens=40, custom_generate=fast
    )
    assert sum(turn.accepted for turn in rounds) > 0
    assert len(rounds) < 30


def test_end_tokens_pad_the_rows_that_have_ended(reference: Loaded, fast: CustomGenerate) -> None:
    inputs = encoded(reference, PROMPTS)
    width = inputs.input_ids.shape[1]
    plain = reference.model.generate(**inputs, do_sample=False, max_new_tokens=30)
    ends = [int(plain[0, width + 5]), int(plain[2, width + 17])]
    settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": ends, "pad_token_id": 3}
    expected = reference.model.generate(**inputs, **settings)
    assert (expected == 3).any()
    assert torch.equal(reference.model.generate(**inputs, **settings, custom_generate=fast), expected)


@pytest.mark.parametrize("ends", [None, 0], ids=["no end token", "end token"])
def test_stopping_criteria_see_and_end_what_generate_shows_them(tiny: PreTrainedModel, ends: int | None) -> None:
    """Without an end token, rows that were stopped are written on until the last one is."""
    width = ROWS.shape[1]
    asked = [AddsUp(width, 500), AddsUp(width, 500)]
    first, second = (
        tiny.generate(
            ROWS,
            attention_mask=(ROWS != 0).long(),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=ends,
            stopping_criteria=StoppingCriteriaList([criterion]),
            custom_generate=using,
        )
        for criterion, using in zip(asked, (None, tables()), strict=True)
    )
    assert first.shape[1] < width + 40
    assert bool((first[:, -1] == 0).any()) is (ends is not None)
    assert torch.equal(first, second)
    assert len(asked[0].seen) == len(asked[1].seen)
    assert all(torch.equal(one, other) for one, other in zip(asked[0].seen, asked[1].seen, strict=True))


def test_stop_strings_end_inside_a_block(reference: Loaded, fast: CustomGenerate, rounds: list[Round]) -> None:
    inputs = encoded(reference, PROMPTS[:1])
    width = inputs.input_ids.shape[1]
    whole = reference.model.generate(**inputs, do_sample=False, max_new_tokens=40, custom_generate=fast)
    start = width
    inside = 0
    for turn in list(rounds):  # a string that ends at the first token of a block of several
        if len(turn.tokens) > 1 and start > width:
            stop = reference.tokenizer.decode(whole[0, start - 1 : start + 1])
            settings = {"do_sample": False, "max_new_tokens": 40, "stop_strings": [stop]}
            expected = reference.model.generate(**inputs, **settings, tokenizer=reference.tokenizer)
            ours = reference.model.generate(**inputs, **settings, tokenizer=reference.tokenizer, custom_generate=fast)
            assert torch.equal(ours, expected)
            inside += expected.shape[1] == start + 1
            if inside:
                break
        start += len(turn.tokens)
    assert inside


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
def test_scores_and_logits(reference: Loaded, fast: CustomGenerate, prompts: list[str]) -> None:
    inputs = encoded(reference, prompts)
    settings = {
        "do_sample": False,
        "max_new_tokens": 20,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = reference.model.generate(**inputs, **settings)
    found = reference.model.generate(**inputs, **settings, custom_generate=fast)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for own, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert len(own) == len(theirs) == 20
        assert max(float((a - b).abs().max()) for a, b in zip(own, theirs, strict=True)) < 1e-4
        assert all(a.dtype == torch.float32 and not a.is_inference() for a in own)
    only = reference.model.generate(
        **inputs, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, custom_generate=fast
    )
    assert only.scores is None
    assert only.logits is None


def test_scores_after_a_rows_end_are_zero() -> None:
    model = build("llama")
    mask = (ROWS != 0).long()
    plain = model.generate(ROWS, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    settings = {
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": int(plain[0, ROWS.shape[1] + 2]),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = model.generate(ROWS, attention_mask=mask, **settings)
    found = model.generate(ROWS, attention_mask=mask, **settings, custom_generate=tables())
    assert torch.equal(found.sequences, expected.sequences)
    ended = torch.zeros(len(ROWS), dtype=torch.bool)
    for step, (own, theirs) in enumerate(zip(found.scores, expected.scores, strict=True)):
        assert (own[ended] == 0).all()
        assert torch.allclose(own[~ended], theirs[~ended], atol=1e-4)
        ended |= found.sequences[:, ROWS.shape[1] + step] == settings["eos_token_id"]
    assert ended.any()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
def test_streamers_get_the_same_values(reference: Loaded, fast: CustomGenerate, prompts: list[str]) -> None:
    expected, found = Kept(), Kept()
    for streamer, using in ((expected, None), (found, fast)):
        reference.model.generate(
            **encoded(reference, prompts),
            do_sample=False,
            max_new_tokens=15,
            streamer=streamer,
            custom_generate=using,
        )
    assert found.values == expected.values
    assert found.values[-1] == ["end"]
    assert len(found.values) == 17


def test_text_is_streamed_from_another_thread(reference: Loaded, fast: CustomGenerate) -> None:
    inputs = encoded(reference, PROMPTS[:1])
    streamer = TextIteratorStreamer(reference.tokenizer, skip_prompt=True, timeout=60)
    settings = {**inputs, "do_sample": False, "max_new_tokens": 20}
    thread = threading.Thread(
        target=reference.model.generate, kwargs={**settings, "streamer": streamer, "custom_generate": fast}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = reference.model.generate(**settings)[0, inputs.input_ids.shape[1] :]
    assert text == reference.tokenizer.decode(expected)


def test_pipeline(reference: Loaded, fast: CustomGenerate) -> None:
    tokenizer = copy.deepcopy(reference.tokenizer)
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=reference.model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 20, "do_sample": False, "batch_size": 3}
    assert write(PROMPTS, **settings, custom_generate=fast) == write(PROMPTS, **settings)
    stopped = {**settings, "stop_sequence": "e"}
    assert write(PROMPTS[0], **stopped, custom_generate=fast) == write(PROMPTS[0], **stopped)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "falcon_rope", "gpt_neo", "mamba"])
def test_families(family: str, rounds: list[Round], caplog: pytest.LogCaptureFixture) -> None:
    """Left-padded rows in one batch; row by row where the cache cannot hold them; plainly where nothing is drafted."""
    model = build(family)
    fn = tables()
    for rows in (ROWS[:1], ROWS):
        mask = (rows != 0).long()
        expected = model.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=16)
        found = model.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=16, custom_generate=fn)
        assert torch.equal(found, expected)
    if family == "mamba":
        assert not any(turn.drafted for turn in rounds)
        assert "decoding plainly" in caplog.text
        assert len([record for record in caplog.records if record.name.startswith("restpoint")]) == 1
    else:
        assert sum(turn.accepted for turn in rounds) > 0


def test_rows_padded_on_the_right_go_on_from_their_last_token() -> None:
    model = build("llama")
    rows = torch.stack([row.roll(-int((row == 0).sum())) for row in ROWS])
    found = model.generate(
        rows, attention_mask=(rows != 0).long(), do_sample=False, max_new_tokens=10, custom_generate=tables()
    )
    assert torch.equal(found[:, : rows.shape[1]], rows)
    for row, own in zip(rows, found, strict=True):
        alone = row[row != 0][None]
        expected = model.generate(alone, do_sample=False, max_new_tokens=10)
        new = expected[0, alone.shape[1] :]
        assert torch.equal(own[rows.shape[1] : rows.shape[1] + len(new)], new)
        assert (own[rows.shape[1] + len(new) :] == 0).all()


def test_text_goes_on_beyond_the_context() -> None:
    """Rotary positions have no end; there generate goes on, and drafts stop at the end of the context."""
    model = build("llama")
    prompt = ROWS[:1].repeat(1, 15)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=None)
    assert torch.equal(
        model.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=None, custom_generate=tables()),
        expected,
    )


def test_learned_positions_are_filled_to_the_last() -> None:
    model = build("gpt2")
    prompt = ROWS[:1].repeat(1, 15)
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    ends = {**settings, "max_new_tokens": 40, "eos_token_id": int(expected[0, -1])}
    expected = model.generate(prompt, **ends)
    assert torch.equal(model.generate(prompt, **ends, custom_generate=tables()), expected)


def test_constraints_are_asked_about_their_own_row() -> None:
    model = build("llama")
    mask = (ROWS != 0).long()
    width = ROWS.shape[1]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        new = ids[width:].tolist()
        assert torch.equal(ids[:width], ROWS[row])
        assert all(token % 3 == row for token in new)
        return [token for token in range(3 + row, VOCABULARY, 3) if token != (new or [0])[-1]]

    settings = {"do_sample": False, "max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed, "eos_token_id": None}
    expected = model.generate(ROWS, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ROWS, attention_mask=mask, **settings, custom_generate=tables()), expected)


# --- sampling ---


def test_samples_follow_the_law(rounds: list[Round]) -> None:
    """G-test of three tokens, under temperature, top_k and a processor that reads each path; a wrong law is noticed."""
    model = build("llama")
    sampler = Sampler(SETTINGS, LogitsProcessorList([NeverTwice()]))
    law = exact_law(model, TEXT, sampler, 3)
    fn = generate_fn(drafters=TABLES, draft_tokens=4)
    torch.manual_seed(11)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(SAMPLES // 20):
        texts = model.generate(
            torch.tensor([TEXT]),
            do_sample=True,
            temperature=SETTINGS.temperature,
            top_k=SETTINGS.top_k,
            logits_processor=LogitsProcessorList([NeverTwice()]),
            max_new_tokens=3,
            eos_token_id=None,
            num_return_sequences=20,
            custom_generate=fn,
        )
        counts.update(tuple(text) for text in texts[:, len(TEXT) :].tolist())
    assert sum(turn.accepted for turn in rounds) > SAMPLES / 10
    assert g_test(counts, law) > 0.01
    other = exact_law(model, TEXT, Sampler(SETTINGS.__class__(temperature=0.9, top_k=3), sampler.by_prefix), 3)
    assert g_test(counts, other) < 1e-4


def test_sampling_is_reproducible(reference: Loaded, fast: CustomGenerate) -> None:
    inputs = encoded(reference, PROMPTS[:1])
    settings = {
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "num_return_sequences": 3,
        "max_new_tokens": 6,
        "custom_generate": fast,
    }

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return reference.model.generate(**inputs, **settings)

    first = seeded(5)
    assert first.shape[0] == 3
    assert torch.equal(first, seeded(5))
    assert not torch.equal(first[0], first[1])
    following = reference.model.generate(**inputs, **settings)
    assert following.shape != first.shape or not torch.equal(following, first)
    given = [
        reference.model.generate(**inputs, **settings, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert torch.equal(*given)


# --- what is refused ---


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "assistant_model": {"assistant_model": "itself"},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "synced_gpus": {"synced_gpus": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    CACHE: {CACHE: DynamicCache()},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 8, 32)},
    "position_ids": {"position_ids": torch.arange(8)[None] + 4},
    "cache_implementation": {"cache_implementation": "offloaded"},
    "watermarking_config": {
        "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]),
        "do_sample": True,
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tiny: PreTrainedModel, name: str) -> None:
    settings = dict(REFUSED[name])
    if "assistant_model" in settings:
        settings["assistant_model"] = tiny
    with pytest.raises(RestpointError, match=f"^{name}"):
        tiny.generate(ROWS[:1], max_new_tokens=4, custom_generate=tables(), **{"do_sample": False, **settings})


def test_other_inputs_of_the_model_are_refused() -> None:
    with pytest.raises(RestpointError, match=r"^token_type_ids"):
        build("gpt2").generate(ROWS[:1], token_type_ids=ROWS[:1], max_new_tokens=4, custom_generate=tables())


def test_encoder_decoders_are_refused() -> None:
    config = BartConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with pytest.raises(RestpointError, match="encoder-decoder"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, num_beams=1, custom_generate=tables())


def test_a_row_without_tokens_is_refused(tiny: PreTrainedModel) -> None:
    mask = (ROWS != 0).long()
    mask[1] = 0
    with pytest.raises(RestpointError, match="row 1 has no token"):
        tiny.generate(ROWS, attention_mask=mask, max_new_tokens=4, custom_generate=tables())


def test_a_profile_wants_its_model_and_a_tokenizer(reference: Loaded, tiny: PreTrainedModel) -> None:
    profile = Profile.load(bundled.PROFILE_PATH)
    with pytest.raises(RestpointError, match=r"tokenizer: .*generate_fn\(profile, tokenizer\)"):
        tiny.generate(ROWS[:1], max_new_tokens=4, custom_generate=generate_fn(profile))
    with pytest.raises(RestpointError, match="profile: it belongs to another model"):
        tiny.generate(ROWS[:1], max_new_tokens=4, custom_generate=generate_fn(profile, reference.tokenizer))


def test_wrong_options_are_refused(tiny: PreTrainedModel) -> None:
    with pytest.raises(RestpointError, match="draft_tokens is -1"):
        generate_fn(draft_tokens=-1)
    with pytest.raises(RestpointError, match="did you mean 'block'"):
        generate_fn(verifier="blok")
    with pytest.raises(RestpointError, match="predictor needs a profile"):
        tiny.generate(ROWS[:1], max_new_tokens=4, custom_generate=generate_fn(drafters=["predictor"]))


# --- early exits ---


@pytest.fixture(scope="module")
def exiting() -> CustomGenerate:
    return generate_fn(Profile.load(bundled.PROFILE_PATH), exits=True)


def test_exits_write_what_the_decoder_writes(
    reference: Loaded, exiting: CustomGenerate, rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    """Each row of a padded batch as it is decoded alone, which is tested against transformers."""
    inputs = encoded(reference, PROMPTS)
    ids = reference.model.generate(
        **inputs, max_new_tokens=20, do_sample=False, eos_token_id=None, custom_generate=exiting
    )
    decoder = Decoder(reference, exiting.profile, exits=True)
    for prompt, row in zip(PROMPTS, ids, strict=True):
        alone = decoder.generate(prompt, max_tokens=20, ignore_end=True)
        assert row[inputs.input_ids.shape[1] :].tolist() == alone.tokens
    assert len(rounds) == 3 * 20, "each pass emits one token of every row"
    depths = Counter(turn.depth for turn in rounds)
    assert set(depths) == {*decoder.exits.rule.candidates(16), 16}, "some tokens stopped early, some did not"
    assert "expected disagreement at most 0.05 with probability 0.9" in caplog.text


def test_exits_end_and_stream_as_generate_does(reference: Loaded, exiting: CustomGenerate) -> None:
    inputs = encoded(reference, PROMPTS[:1])
    settings = {"max_new_tokens": 20, "do_sample": False, "custom_generate": exiting}
    width = inputs.input_ids.shape[1]
    whole = reference.model.generate(**inputs, **settings, eos_token_id=None)[0].tolist()
    end = whole[width + 7]
    place = whole.index(end, width)
    streamer = Kept()
    cut = reference.model.generate(**inputs, **settings, eos_token_id=end, streamer=streamer)
    assert cut[0].tolist() == whole[: place + 1]
    assert streamer.values == [[whole[:width]], *([token] for token in whole[width : place + 1]), ["end"]]
    write = pipeline("text-generation", model=reference.model, tokenizer=reference.tokenizer)
    told = write(PROMPTS[0], **settings, eos_token_id=None, return_full_text=False)
    assert told[0]["generated_text"] == reference.tokenizer.decode(whole[width:], skip_special_tokens=True)


def test_logits_are_of_the_law_that_is_emitted(tiny: PreTrainedModel) -> None:
    """A depth by position: the first token at full depth, the others by the lens after layer 2, over some tokens."""
    vocabulary = torch.arange(1, 90, 2)
    policy = ExitPolicy(PositionRule(2, 2), vocabulary=vocabulary)
    found = tiny.generate(
        ROWS[:1], max_new_tokens=6, do_sample=False, custom_generate=generate_fn(exits=policy),
        return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    out = tiny(found.sequences, output_hidden_states=True)
    torch.testing.assert_close(found.logits[0][0], out.logits[0, 7], atol=1e-4, rtol=1e-4)
    lens = tiny.lm_head(tiny.model.norm(out.hidden_states[2][0]))
    for step in range(1, 6):
        own = found.logits[step][0]
        torch.testing.assert_close(own[vocabulary], lens[7 + step][vocabulary], atol=1e-4, rtol=1e-4)
        assert int(own.isfinite().sum()) == len(vocabulary)
        assert int(found.sequences[0, 8 + step]) == int(vocabulary[lens[7 + step][vocabulary].argmax()])


def test_layers_are_left_out_of_rows_that_are_padded(tiny: PreTrainedModel) -> None:
    policy = ExitPolicy(LayerSkipRule.leaving_out(1, 4))
    mask = (ROWS != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    shorter = build("llama")
    shorter.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(shorter.model.layers) if index != 1)
    expected = shorter.generate(ROWS, **settings, pad_token_id=0, use_cache=False)
    own = tiny.generate(ROWS, **settings, pad_token_id=0, custom_generate=generate_fn(exits=policy))
    assert own.tolist() == expected.tolist()
    assert own.tolist() != tiny.generate(ROWS, **settings, pad_token_id=0).tolist()


def test_exits_that_are_refused(reference: Loaded, exiting: CustomGenerate) -> None:
    profile = Profile.load(bundled.PROFILE_PATH)
    for message, options in (
        (r"^exits: early exits and drafters exclude", {"drafters": ["lookup"]}),
        (r"^exits: early exits and drafters exclude", {"brought": {"mine": lambda target: None}}),
        (r"^verifier: early exits draft nothing", {"verifier": "block"}),
        (r"^tree: early exits draft nothing", {"tree": TreeSettings()}),
        (r"^share: early exits draft nothing", {"share": True}),
        (r"^draft_tokens: early exits draft nothing", {"draft_tokens": 3}),
    ):
        with pytest.raises(RestpointError, match=message):
            generate_fn(profile, exits=True, **options)
    with pytest.raises(RestpointError, match=r"^exits: the profile has none"):
        generate_fn(exits=True)
    inputs = encoded(reference, PROMPTS[:1])
    with pytest.raises(RestpointError, match=r"^do_sample: early exits are certified for greedy decoding"):
        reference.model.generate(**inputs, max_new_tokens=4, do_sample=True, custom_generate=exiting)
    half = copy.deepcopy(reference.model).to(torch.bfloat16)
    with pytest.raises(RestpointError, match=r"^dtype: the exits were calibrated in float32"):
        half.generate(**inputs, max_new_tokens=4, do_sample=False, custom_generate=exiting)


# --- what is kept ---


def test_a_model_is_taken_apart_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    original = custom.check
    monkeypatch.setattr(custom, "check", lambda layered: checked.append(1) or original(layered))
    model = build("llama")
    fn = restpoint.generate_fn(drafters=TABLES)
    for _ in range(3):
        model.generate(ROWS[:1], max_new_tokens=2, do_sample=False, custom_generate=fn)
    assert len(checked) == 1
    other = copy.deepcopy(model)
    other.generate(ROWS[:1], max_new_tokens=2, do_sample=False, custom_generate=fn)
    assert len(checked) == 2
    model.to(torch.bfloat16)
    model.generate(ROWS[:1], max_new_tokens=2, do_sample=False, custom_generate=fn)
    assert len(checked) == 3
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
