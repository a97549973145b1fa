"""What transformers and the Hub say while a model is loaded: in one line if it is an error, else little."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants
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
from transformers.utils import logging as hf_logging

from restpoint.bundled import REFERENCE
from restpoint.errors import RestpointError

NO_TOKENIZER = "has no tokenizer: save one beside the weights (tokenizer.json), or give another model"
_SILENT_BELOW_BYTES = 256 * 2**20  # a checkpoint this small loads before a progress bar could be read


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Say in one line what went wrong with a model, whichever library noticed."""
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
        return f"{NO_TOKENIZER} ({_first_sentence(text)})"
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
def quiet(source: str) -> Iterator[None]:
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
