"""Load a causal language model and its tokenizer, or say in one line why that cannot be done."""

import difflib
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from restpoint.bundled import MODELS
from restpoint.errors import RestpointError
from restpoint.model.recurrent import deq  # noqa: F401  (registers the models that iterate a block)
from restpoint.model.recurrent.huginn import MODEL_TYPE as HUGINN
from restpoint.model.recurrent.huginn import load_huginn

REFERENCE = "reference"
"""The name of the bundled model."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager")

_CONTEXT_LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
)  # fmt: skip
_LANGUAGE_MODEL_HEADS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")
_NO_TOKENIZER = "has no tokenizer: save one beside the weights (tokenizer.json), or give another model"
_SILENT_BELOW_BYTES = 256 * 2**20  # a checkpoint this small loads before a progress bar could be read


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

    with _explained(name, revision), _quiet(source):
        if not trust_remote_code and _model_type(source, revision) == HUGINN:
            if device_map is not None:
                raise RestpointError("device_map: a Huginn checkpoint goes to one device; give device instead")
            return _load_huginn(name, source, revision, _resolve_dtype(dtype, target), attention, target)
        config = AutoConfig.from_pretrained(source, **common)
        kind: Any = AutoModelForCausalLM
        try:
            _check_is_causal(name, config)
        except RestpointError:
            if causal:
                raise
            kind = AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        _check_has_vocabulary(name, tokenizer)
        how = {
            "dtype": _resolve_dtype(dtype, target),
            "device_map": device_map,
            "attn_implementation": attention,
        }
        loaded: Any = kind.from_pretrained(source, output_loading_info=True, **how, **common)
        model, report = loaded
        _check_complete(name, config, report["missing_keys"], causal=kind is AutoModelForCausalLM)
        if device_map is None:
            model.to(target)
    model.eval().requires_grad_(False)
    if kind is AutoModelForCausalLM and getattr(config, "is_decoder", None) is False:
        _check_ignores_the_future(name, model)
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
    _check_has_vocabulary(name, tokenizer)
    model: Any = load_huginn(folder, None if isinstance(dtype, str) else dtype, attention)
    return Loaded(name, model.to(target).eval().requires_grad_(False), tokenizer)


# --- arguments ---


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


# --- what came back ---


def _check_is_causal(name: str, config: PreTrainedConfig) -> None:
    """Refuse by the config alone, before any weights are fetched."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    written = config.architectures or []
    kind = f"{config.model_type}, {', '.join(written) or type(config).__name__}"
    advice = "restpoint needs a decoder-only causal language model: give another model"
    if getattr(config, "is_encoder_decoder", False):
        raise RestpointError(f"model {name!r} is an encoder-decoder ({kind}); {advice}")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if any(head == expected.__name__ or head.endswith(_LANGUAGE_MODEL_HEADS) for head in written):
            return
        # Left are other heads and the bare stack, which is fine for a decoder if its weights are complete.
        bare = all(head.endswith("Model") for head in written)
        if bare and getattr(config, "is_decoder", None) is not False:
            return
    raise RestpointError(f"model {name!r} is not a causal language model ({kind}); {advice}")


def _check_has_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse the empty tokenizer that transformers makes up for a checkpoint without one."""
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:
        raise RestpointError(f"model {name!r} {_NO_TOKENIZER}")


def _check_complete(name: str, config: PreTrainedConfig, missing: set[str], causal: bool) -> None:
    """Refuse random weights, but for a pooler: a bare stack is built with one, and its layers do not need it."""
    wanted = missing if causal else {weight for weight in missing if "pooler" not in weight}
    if wanted:
        some = ", ".join(sorted(wanted)[:3]) + (", .." if len(wanted) > 3 else "")
        what, remedy = (
            ("a causal language model", "give a complete checkpoint with its language-model head")
            if causal
            else ("its layers", "give a complete checkpoint")
        )
        raise RestpointError(
            f"model {name!r} ({config.model_type}) lacks {len(wanted)} weights of {what} ({some}): {remedy}"
        )


@torch.inference_mode()
def _check_ignores_the_future(name: str, model: PreTrainedModel) -> None:
    """Refuse a stack whose earlier tokens see later ones; a GPT-NeoX says `is_decoder: false` and is fine."""
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise RestpointError(
            f"model {name!r} is not a causal language model ({model.config.model_type}: earlier tokens"
            " see later ones): give another model, or set is_decoder in its config.json"
        )


# --- what transformers says, in one line ---


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except RestpointError:
        raise
    except Exception as error:  # every library below has its own; the cause stays attached for --debug
        raise RestpointError(f"model {name!r} {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str | None) -> str:
    """What is wrong with the model and what to change, as the end of a sentence that begins with its name."""
    causes = _causes(error)
    text = " ".join(str(error).split())

    def has(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if has(GatedRepoError):
        return "is gated: accept its terms on the Hub, then log in with `hf auth login` or set HF_TOKEN"
    if has(RevisionNotFoundError):
        return f"has no revision={revision!r}: give one of its branches, tags or commits, or leave it out"
    if has(RepositoryNotFoundError):
        return "is neither a folder nor on the Hub, or is private: check the name, or use `hf auth login`"
    if has(HFValidationError):
        return f"is neither a folder nor a Hub name: use a folder, owner/name or {REFERENCE!r}"
    if has(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return (
                "is neither a folder nor in the local Hub cache, and HF_HUB_OFFLINE is set:"
                f" unset it to download, give a folder, or use {REFERENCE!r}"
            )
        return (
            "is neither a folder nor in the local Hub cache, and the Hub cannot be reached: check the network"
            f" and the name, set HF_HUB_OFFLINE=1 to use the cache alone, or use {REFERENCE!r}"
        )
    if has(SafetensorError):
        return f"has damaged or truncated weights ({text}): copy or download them again"
    if has(torch.OutOfMemoryError):
        return "does not fit in memory: use dtype='bfloat16', device='cpu' or device_map='auto'"
    if "trust_remote_code" in text:
        return (
            "needs the Python code that it brings along: read it,"
            " then allow it with --trust-remote-code (trust_remote_code=True)"
        )
    if "scaled_dot_product_attention" in text:
        return "has no sdpa attention: use attention='eager'"
    if "no file named" in text:
        return "has no weights: put model.safetensors or its shards beside config.json, or give another folder"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"is of an unknown type ({_first_sentence(text)}): update transformers, or give another model"
    if "tokenizer" in text.lower():
        return f"{_NO_TOKENIZER} ({_first_sentence(text)})"
    return f"could not be loaded: {type(error).__name__}: {text}"


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:]) ", text, maxsplit=1)[0].rstrip(".:")


@contextmanager
def _quiet(source: str) -> Iterator[None]:
    """Leave out the table of missing weights (an error here) and, for a small folder, the progress bars."""
    logger = logging.getLogger("transformers.modeling_utils")
    wanted = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # the user has said whether to show bars
    silent = hf_logging.is_progress_bar_enabled() and not wanted and _is_small(Path(source))
    hub_bars = not are_progress_bars_disabled()
    logger.addFilter(_is_not_report)
    if silent:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(_is_not_report)
        if silent:
            hf_logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()


def _is_not_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _is_small(folder: Path) -> bool:
    """Whether this is a folder whose weights load at once; the download of a Hub name deserves a bar."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    return folder.is_dir() and sum(file.stat().st_size for file in files) < _SILENT_BELOW_BYTES
