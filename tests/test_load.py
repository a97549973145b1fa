import json
import shutil

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    CLIPConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as hf_logging

from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.load import Loaded, load

BERT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 8,
}
LLAMA = BERT | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 8}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


def save(folder, model, with_tokenizer=True):
    model.save_pretrained(folder)
    if with_tokenizer:
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefg?")}, unk_token="?"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return str(folder)


def refusal(*args, **kwargs):
    """The message with which loading is refused: always one line."""
    with pytest.raises(RestpointError) as caught:
        load(*args, **({"device": "cpu"} | kwargs))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# --- what works ---


def test_reference_loads_as_float32_in_evaluation_mode(reference):
    assert isinstance(reference, Loaded)
    assert reference.name == "reference"
    assert reference.context_length == 1024
    assert reference.model.dtype == torch.float32
    assert not reference.model.training
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert sum(parameter.numel() for parameter in reference.model.parameters()) == 13_902_080
    assert len(reference.tokenizer) == reference.model.config.vocab_size == 8192


def test_reference_predicts_text_as_its_card_says(reference):
    losses = []
    for text in list(bundled.fit_texts("maths"))[:8]:
        ids = torch.tensor([[0, *reference.tokenizer(text)["input_ids"]]])
        losses.append(reference.model(input_ids=ids, labels=ids).loss)
    assert torch.stack(losses).mean() < 2.2  # nats per token


def test_reference_generates(reference):
    prompt = bundled.prompts("maths")[0].text
    ids = torch.tensor([[0, *reference.tokenizer(prompt)["input_ids"]]])
    out = reference.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert out.shape[0] == 1
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 12
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert reference.tokenizer.decode(out[0, ids.shape[1] :]).strip()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_asked_for(folder, dtype):
    path = save(folder, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert load(path, dtype=dtype, device="cpu").model.dtype == getattr(torch, dtype)


def test_dtype_auto_is_float32_on_a_cpu():
    assert load(device="cpu").model.dtype == torch.float32  # the checkpoint is in bfloat16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_as_asked_for(attention):
    assert load(attention=attention, device="cpu").model.config._attn_implementation == attention


def test_device_map_places_the_model(folder):
    pytest.importorskip("accelerate")
    path = save(folder, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert load(path, device_map="cpu").model.device.type == "cpu"


def test_loading_leaves_the_config_as_the_checkpoint_has_it(reference):
    ours = reference.model.config.to_dict()
    theirs = AutoModelForCausalLM.from_pretrained(bundled.MODEL_PATH, dtype=torch.float32).config.to_dict()
    assert ours == theirs
    stored = AutoConfig.from_pretrained(bundled.MODEL_PATH).to_dict()
    assert {key for key in stored if stored[key] != ours[key]} <= {"dtype"}  # which transformers itself sets


def test_weights_are_the_checkpoints(folder):
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    loaded = load(save(folder, model), device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_decoder_that_does_not_call_itself_one_is_fine(folder):
    config = GPTNeoXConfig(**BERT, pad_token_id=None)
    assert config.is_decoder is False
    assert load(save(folder, GPTNeoXForCausalLM(config)), device="cpu").context_length == 2048


def test_a_bare_stack_with_tied_embeddings_is_complete(folder):
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    loaded = load(save(folder, LlamaModel(config)), device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=78), 78),
        (BloomConfig(seq_length=79), 79),
        (MambaConfig(), None),
        (BloomConfig(), None),
    ],
)
def test_context_length_is_read_from_the_config(reference, config, length):
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.config = config
    assert Loaded("any", model, reference.tokenizer).context_length == length


def test_a_model_without_sdpa_loads_with_eager(folder):
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=8)
    path = save(folder, MambaForCausalLM(config))
    assert refusal(path).endswith("has no sdpa attention: use attention='eager'")
    assert load(path, attention="eager", device="cpu").context_length is None


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_silent_and_put_back(capfd, shown):
    before = hf_logging.is_progress_bar_enabled()
    (hf_logging.enable_progress_bar if shown else hf_logging.disable_progress_bar)()
    try:
        load(device="cpu")
        assert hf_logging.is_progress_bar_enabled() is shown
        assert "Loading weights" not in capfd.readouterr().err
    finally:
        (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()


# --- arguments ---


@pytest.mark.parametrize(
    ("dtype", "near"), [("bf16", "bfloat16"), ("torch.float16", "float16"), ("float23", "float32")]
)
def test_unknown_dtype(dtype, near):
    message = refusal(dtype=dtype)
    assert message.startswith(f"dtype='{dtype}' is not known (did you mean '{near}'?)")
    assert "auto, float32, bfloat16, float16" in message


def test_unknown_attention():
    message = refusal(attention="spda")
    assert message.startswith("attention='spda' is not known (did you mean 'sdpa'?): choose one of sdpa, eager")
    assert "did you mean" not in refusal(attention="flash_attention_2")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_device_without_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(device=device) == (
        f"device='{device}', but torch finds no CUDA GPU here: use device='cpu' or 'auto'"
    )


def test_device_beyond_the_last_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal(device="cuda:2") == "device='cuda:2', but the last GPU here is cuda:1"


def test_unknown_device():
    assert refusal(device="gpu") == "device='gpu' is not known: use auto, cpu, cuda, cuda:N or mps"
    assert refusal(device="meta") == "device='meta' is not supported: use auto, cpu, cuda, cuda:N or mps"


def test_device_and_device_map():
    assert refusal(device="cpu", device_map="auto").endswith("contradict each other: give one")


def test_revision_of_a_folder():
    assert refusal(revision="main").startswith("revision='main' is for Hub names")


# --- where the model is ---


@pytest.mark.parametrize(
    "name", ["./no/such/folder", "/no/such/folder", "no/such/folder", "~/no-such-folder", "nothing/"]
)
def test_missing_folder(name):
    assert refusal(name) == (
        f"model folder '{name}' does not exist: give a checkpoint folder, a Hub name or 'reference'"
    )


def test_missing_folder_beside_existing_ones(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("models/typo").startswith("model folder 'models/typo' does not exist")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_hub_name_without_network(name):
    message = refusal(name)
    assert message.startswith(f"model '{name}' is neither a folder nor in the local Hub cache, and HF_HUB_OFFLINE")
    assert message.endswith("unset it to download, give a folder, or use 'reference'")


def test_hub_out_of_reach(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("We couldn't connect") from ConnectionError("no route")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refusal("nobody/model")
    assert "the Hub cannot be reached" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "'reference'" in message


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "model 'some/model' is gated: accept its terms on the Hub, then log in"),
        (RepositoryNotFoundError, "model 'some/model' is neither a folder nor on the Hub, or is private"),
        (RevisionNotFoundError, "model 'some/model' has no revision='v9': give one of its branches"),
    ],
)
def test_hub_refusals(monkeypatch, kind, said):
    def refuse(*args, **kwargs):
        raise OSError("a long\nexplanation") from kind.__new__(kind)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", refuse)
    assert refusal("some/model", revision="v9").startswith(said)


def test_impossible_name():
    assert refusal("what is this?").startswith("model 'what is this?' is neither a folder nor a Hub name")


def test_a_file_and_an_empty_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert refusal(str(file)).endswith("is a file: give the checkpoint folder that it lies in")
    assert "has no config.json" in refusal(str(tmp_path))


# --- what the model is ---


def test_encoders_are_refused_by_name(folder):
    assert "is not a causal language model (bert, BertModel)" in refusal(save(folder, BertModel(BertConfig(**BERT))))
    assert "(bert, BertForMaskedLM)" in refusal(save(folder, BertForMaskedLM(BertConfig(**BERT))))


def test_a_bidirectional_stack_with_a_language_model_head_is_refused_by_what_it_does(folder):
    config = BertConfig(**BERT, initializer_range=1.0)
    message = refusal(save(folder, BertLMHeadModel(config)))
    assert "(bert: earlier tokens see later ones)" in message

    config.is_decoder = True
    assert load(save(folder, BertLMHeadModel(config)), device="cpu").name == str(folder)


def test_encoder_decoders_are_refused(folder):
    config = T5Config(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1, vocab_size=8)
    message = refusal(save(folder, T5ForConditionalGeneration(config)))
    assert "is an encoder-decoder (t5, T5ForConditionalGeneration)" in message


def test_other_kinds_are_refused(folder):
    CLIPConfig().save_pretrained(folder)
    assert "is not a causal language model (clip, CLIPConfig)" in refusal(str(folder))


def test_other_heads_are_refused(folder):
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=0))
    assert "(llama, LlamaForSequenceClassification)" in refusal(save(folder, model))


def test_a_missing_head_is_refused_without_a_report_on_the_terminal(folder, capfd):
    path = save(folder, LlamaModel(LlamaConfig(**LLAMA)))
    capfd.readouterr()
    message = refusal(path)
    assert "(llama) lacks 1 weights of a causal language model (lm_head.weight): give a complete" in message
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("model", [GPT2LMHeadModel(GPT2Config(**GPT2)), LlamaForCausalLM(LlamaConfig(**LLAMA))])
def test_missing_tokenizer(folder, model):
    message = refusal(save(folder, model, with_tokenizer=False))
    assert message.startswith(f"model '{folder}' has no tokenizer: save one beside the weights")


def test_code_of_the_checkpoints_own(folder):
    folder.mkdir()
    own = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    message = refusal(str(folder))
    assert "needs the Python code that it brings along" in message
    assert "--trust-remote-code" in message


def test_unknown_type(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nonsuch"}')
    assert "is of an unknown type" in refusal(str(folder))
    assert "nonsuch" in refusal(str(folder))
    (folder / "config.json").write_text('{"model_type": ')
    assert "could not be loaded: OSError" in refusal(str(folder))


# --- what the weights are ---


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_weights(folder, keep):
    shutil.copytree(bundled.MODEL_PATH, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(keep * weights.stat().st_size)])
    message = refusal(str(folder))
    assert message.startswith(f"model '{folder}' has damaged or truncated weights (")
    assert message.endswith("copy or download them again")


def test_no_weights(folder):
    shutil.copytree(bundled.MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "has no weights: put model.safetensors" in refusal(str(folder))


def test_weights_of_another_shape(folder):
    shutil.copytree(bundled.MODEL_PATH, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    assert "could not be loaded: RuntimeError" in refusal(str(folder))
