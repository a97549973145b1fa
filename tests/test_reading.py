"""States between layers: hooks against what transformers gives out itself, for models of every kind."""

from collections.abc import Mapping

import pytest
import torch
import transformers as hf
from torch import Tensor

from families import VOCABULARY, build
from restpoint.errors import RestpointError
from restpoint.model.load import Loaded
from restpoint.model.watch import WatchedLayers, stacks
from restpoint.trajectory.reading import Cut, Piece, Reader, Sample, batches, while_writing

IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def bert() -> hf.PreTrainedModel:
    return hf.BertModel(hf.BertConfig(vocab_size=VOCABULARY, **_SMALL)).eval()


def vit() -> hf.PreTrainedModel:
    return hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **_SMALL)).eval()


def whisper() -> hf.PreTrainedModel:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return hf.WhisperModel(config).eval()


def test_text_for_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=2, vocab_size=8)
    reader = Reader(WatchedLayers(hf.T5Model(config).eval(), "encoder"))
    with pytest.raises(RestpointError, match=r"^text: t5 is an encoder-decoder"):
        reader.read([Piece(0, [1, 2, 3])])


def heard() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(1, 8, 40, generator=generator),
        "decoder_input_ids": torch.randint(4, 64, (1, 7), generator=generator),
    }


def read(model: hf.PreTrainedModel, inputs: Mapping[str, Tensor], part: str = "") -> Tensor:
    layers = WatchedLayers(model, part)
    found = Reader(layers).read([Piece(0, [], inputs)])
    return found[0].states


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mamba", "opt", "qwen2"])
def test_states_of_causal_models(family: str) -> None:
    """hidden_states of transformers, up to the last, which it gives after the final norm."""
    model = build(family)
    pieces = [Piece(number, row.tolist()) for number, row in enumerate(IDS)]
    batch = Reader(WatchedLayers(model)).read(pieces)
    with torch.no_grad():
        expected = model.base_model(IDS, output_hidden_states=True).hidden_states
    for row, trajectory in enumerate(batch):
        assert trajectory.states.shape[0] == len(expected)
        first = family == "mamba"  # transformers begins with the state after the first layer there
        for mine, theirs in zip(trajectory.states[first : len(expected) - 1 + first], expected[:-1], strict=True):
            torch.testing.assert_close(mine, theirs[row], atol=1e-5, rtol=1e-5)
        assert trajectory.ids is not None
        assert trajectory.ids.tolist() == pieces[row].ids


def test_last_state_comes_before_the_final_norm() -> None:
    model = build("llama")
    batch = Reader(WatchedLayers(model)).read([Piece(0, IDS[0].tolist())])
    with torch.no_grad():
        expected = model.base_model(IDS[:1], output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(model.model.norm(batch[0].states[-1]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "inputs", "part", "field"),
    [
        (bert, {"input_ids": IDS[:1]}, "", "hidden_states"),
        (vit, {"pixel_values": PIXELS}, "", "hidden_states"),
        (whisper, heard(), "encoder", "encoder_hidden_states"),
        (whisper, heard(), "decoder", "decoder_hidden_states"),
        (whisper, heard(), "", "decoder_hidden_states"),
    ],
    ids=["bert", "vit", "whisper encoder", "whisper decoder", "whisper"],
)
def test_states_of_other_models(make, inputs: dict[str, Tensor], part: str, field: str) -> None:
    torch.manual_seed(0)
    model = make()
    states = read(model, inputs, part)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)[field]
    assert len(states) == len(expected)
    for mine, theirs in zip(states[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(mine, theirs[0], atol=1e-5, rtol=1e-5)


def test_a_layer_that_runs_several_times_gives_several_states() -> None:
    model = build("llama")
    layers = WatchedLayers(model)
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *a, **k: forward(*a, **k)
    with layers.watch() as states, torch.no_grad():
        model.model(IDS)
        again = len(states)
        model.model.layers[1](states[1], position_embeddings=model.model.rotary_emb(states[1], torch.arange(9)[None]))
    assert again == len(layers.layers) + 1
    assert len(states) == again + 1


def test_writing_gives_the_states_of_reading_what_was_written() -> None:
    model = build("llama")
    layers = WatchedLayers(model)
    written = while_writing(layers, IDS[0], 6)
    assert written.ids is not None
    assert written.ids.tolist()[:9] == IDS[0].tolist()
    assert len(written.ids) == 14
    batch = Reader(layers).read([Piece(0, written.ids.tolist())])
    torch.testing.assert_close(written.states, batch[0].states, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        greedy = model(written.ids[None]).logits[0, 8:-1].argmax(-1)
    assert written.ids[9:].tolist() == greedy.tolist()


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = build("llama")
    layers = WatchedLayers(model)
    with pytest.raises(ValueError, match="stop"), layers.watch():
        raise ValueError("stop")
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers.layers)


@pytest.mark.parametrize(
    ("part", "path", "told"),
    [
        ("", "model.nothing", "path: .*nothing at model.nothing; lists of layers: model.layers"),
        ("", "model.norm", "path: model.norm is no list"),
        ("encoder", "", "part: no list of layers .*'encoder'; there are: model.layers"),
    ],
)
def test_a_stack_that_is_not_there_is_refused_by_name(part: str, path: str, told: str) -> None:
    with pytest.raises(RestpointError, match=told):
        WatchedLayers(build("llama"), part, path)


def test_a_model_without_layers_says_what_to_pass() -> None:
    model = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    assert stacks(model) == {}
    with pytest.raises(RestpointError, match=r"path: .*give the path of one"):
        WatchedLayers(model)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(RestpointError, match=r"^model: it is in training mode"):
        WatchedLayers(build("llama").train())


def test_a_state_that_is_not_finite_names_layer_and_text() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    pieces = [Piece(number, row.tolist()) for number, row in enumerate(IDS, 5)]
    with pytest.raises(RestpointError, match="piece 5 after layer 2 is not finite"):
        Reader(WatchedLayers(model)).read(pieces)


# --- cutting a corpus ---


def test_texts_are_cut_counted_and_skipped(reference: Loaded) -> None:
    samples = [
        Sample("", "a"),
        Sample("one two three four five six seven", "a"),
        Sample(" \n", "b"),
        Sample("x y z", "b"),
    ]
    cut = Cut(samples, reference.tokenizer, 4, 1000)
    pieces = list(cut)
    texts = [reference.tokenizer(sample.content).input_ids for sample in samples if sample.content.strip()]
    expected = [ids[at : at + 4] for ids in texts for at in range(0, len(ids), 4)]
    short = [ids for ids in expected if len(ids) < 2]
    assert [piece.ids for piece in pieces] == [ids for ids in expected if len(ids) >= 2]
    assert cut.skipped == 2 + len(short)
    assert cut.tokens == sum(len(piece.ids) for piece in pieces) == sum(cut.domains.values())
    assert [piece.number for piece in pieces] == list(range(len(pieces))) == list(range(cut.texts))


@pytest.mark.parametrize("most", [2, 5, 6, 7, 8, 9, 23])
def test_reading_stops_at_the_tokens_asked_for(reference: Loaded, most: int) -> None:
    cut = Cut([Sample("one two three four five six seven eight nine ten " * 3)], reference.tokenizer, 4, most)
    assert most - 1 <= sum(len(piece.ids) for piece in cut) <= most


def test_what_is_sampled_by_index_is_a_fair_share() -> None:
    picked = [number for number in range(4000) if Piece(number, []).index % 8 == 0]
    assert abs(len(picked) - 500) < 4 * (500 * 7 / 8) ** 0.5
    assert len({Piece(number, []).index for number in range(4000)}) == 4000
    assert all(Piece(number, []).index < 2**63 for number in (0, 1, 10**9))


def test_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RestpointError, match=r"^tokenizer: "):
        list(Cut([Sample("text")], None, 4, 10))


def test_batches_keep_the_order_and_mix_no_lengths() -> None:
    lengths = [4, 4, 4, 2, 2, 4, 3]
    pieces = [Piece(number, [0] * length) for number, length in enumerate(lengths)]
    pieces.append(Piece(7, [], {"x": torch.zeros(1, 2)}))
    found = [[piece.number for piece in batch] for batch in batches(pieces, 2)]
    assert found == [[0, 1], [2], [3, 4], [5], [6], [7]]
