"""Load a causal language model and its tokenizer, or say in one line why that cannot be done."""

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from restpoint.bundled import MODELS, REFERENCE
from restpoint.errors import RestpointError
from restpoint.model.explain import explained, quiet
from restpoint.model.recurrent import deq  # noqa: F401  (registers the models that iterate a block)
from restpoint.model.recurrent.huginn import MODEL_TYPE as HUGINN
from restpoint.model.recurrent.huginn import load_huginn
from restpoint.model.refuse import (
    require_blind_to_the_future,
    require_causal,
    require_complete,
    require_vocabulary,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager")

_CONTEXT_LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode whose weights want no gradient, with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context_length(self) -> int | None:
        """The most tokens that the config says the model can attend to; None where it names no limit."""
        return context_length(self.model)

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, from the model's generation config, else its tokenizer."""
        ends: Any = getattr(self.model.generation_config, "eos_token_id", None)
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def context_length(model: PreTrainedModel) -> int | None:
    """See :attr:`Loaded.context_length`."""
    config = model.config.get_text_config()
    lengths = (getattr(config, name, None) for name in _CONTEXT_LENGTH_NAMES)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def load(
    name: str = REFERENCE,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    causal: bool = True,
) -> Loaded:
    """Load a Hugging Face causal language model, unchanged.

    Args:
        name: `reference` or `recurrent` (the bundled models, no network needed), a checkpoint folder, or a Hub name.
        dtype: auto, float32, bfloat16 or float16. `auto` is the checkpoint's own on a GPU, and float32 on a
            CPU, where half precision is slower on most machines, and one-token and block passes differ more.
        device: auto (cuda, else mps, else cpu) or a torch device such as cpu or cuda:1.
        device_map: how accelerate spreads the model over devices, for example `auto`; instead of `device`.
        revision: branch, tag or commit of a Hub model.
        attention: sdpa or eager; the only two that take the masks that restpoint builds.
        trust_remote_code: run the Python code that the checkpoint brings along.
        causal: refuse what is no causal language model; if False, others are loaded as their bare stack of layers.

    Raises:
        RestpointError: in one line, what was wrong, what is allowed and which argument to change.
    """
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("attention", attention, ATTENTIONS, "; restpoint gives the layers masks that others do not take")
    target = _placement(device, device_map)
    source = _source(name, revision)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    with explained(name, revision), quiet(source):
        if not trust_remote_code and _model_type(source, revision) == HUGINN:
            if device_map is not None:
                raise RestpointError("device_map: a Huginn checkpoint goes to one device; give device instead")
            return _load_huginn(name, source, revision, _resolve_dtype(dtype, target), attention, target)
        config = AutoConfig.from_pretrained(source, **common)
        kind: Any = AutoModelForCausalLM
        try:
            require_causal(name, config)
        except RestpointError:
            if causal:
                raise
            kind = AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        require_vocabulary(name, tokenizer)
        how = {
            "dtype": _resolve_dtype(dtype, target),
            "device_map": device_map,
            "attn_implementation": attention,
        }
        loaded: Any = kind.from_pretrained(source, output_loading_info=True, **how, **common)
        model, report = loaded
        require_complete(name, config, report["missing_keys"], causal=kind is AutoModelForCausalLM)
        if device_map is None:
            model.to(target)
    model.eval().requires_grad_(False)
    if kind is AutoModelForCausalLM and getattr(config, "is_decoder", None) is False:
        require_blind_to_the_future(name, model)
    return Loaded(name, model, tokenizer)


def _model_type(source: str, revision: str | None) -> str | None:
    return PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")


def _load_huginn(
    name: str, source: str, revision: str | None, dtype: torch.dtype | str, attention: str, target: torch.device
) -> Loaded:
    """A Huginn checkpoint in our own architecture: the Python code that it brings along is not run."""
    folder = source
    if not Path(source).is_dir():
        folder = snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    require_vocabulary(name, tokenizer)
    model: Any = load_huginn(folder, None if isinstance(dtype, str) else dtype, attention)
    return Loaded(name, model.to(target).eval().requires_grad_(False), tokenizer)


def _check_choice(argument: str, given: str, allowed: tuple[str, ...], why: str = "") -> None:
    if given in allowed:
        return
    near = difflib.get_close_matches(given.removeprefix("torch."), allowed, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise RestpointError(f"{argument}={given!r} is not known{hint}: choose one of {', '.join(allowed)}{why}")


def _placement(device: str, device_map: str | None) -> torch.device:
    """Where the model goes; with a device map, where most of it will be."""
    if device_map is not None:
        if device != "auto":
            raise RestpointError(f"device={device!r} and device_map={device_map!r} contradict each other: give one")
        if importlib.util.find_spec("accelerate") is None:
            raise RestpointError("device_map needs the package accelerate: pip install accelerate, or give device")
    elif device != "auto":
        return _device(device)
    if torch.cuda.is_available() and device_map != "cpu":
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RestpointError(f"device={device!r} is not known: use auto, cpu, cuda, cuda:N or mps") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RestpointError(f"device={device!r}, but torch finds no CUDA GPU here: use device='cpu' or 'auto'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RestpointError(f"device={device!r}, but the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise RestpointError(f"device={device!r}, but torch finds no Apple GPU here: use device='cpu' or 'auto'")
    if found.type not in ("cpu", "cuda", "mps"):
        raise RestpointError(f"device={device!r} is not supported: use auto, cpu, cuda, cuda:N or mps")
    return found


def _resolve_dtype(dtype: str, target: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if target.type == "cpu" else "auto"
    return getattr(torch, dtype)


def _source(name: str, revision: str | None) -> str:
    """The folder or the Hub name that `name` stands for."""
    path = MODELS.get(name) or Path(name).expanduser()
    if path.exists():
        if not path.is_dir():
            raise RestpointError(f"model {name!r} is a file: give the checkpoint folder that it lies in")
        if not (path / "config.json").exists():
            raise RestpointError(f"model folder {name!r} has no config.json: give a Hugging Face checkpoint")
        if revision is not None:
            raise RestpointError(f"revision={revision!r} is for Hub names, but {name!r} is a folder: leave it out")
        return str(path)
    if _looks_local(name):
        raise RestpointError(
            f"model folder {name!r} does not exist: give a checkpoint folder, a Hub name or {REFERENCE!r}"
        )
    return name


def _looks_local(name: str) -> bool:
    if re.search(r"^[./~]|^[A-Za-z]:|\\|/.*/|/$", name):
        return True
    return "/" in name and Path(name).parent.is_dir()
