"""What ships with restpoint: two small models, the profile of one, text to fit with and prompts to measure with.

Everything here works without a network. ``text/README.md`` gives the source and the licence of each text.
"""

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from restpoint.errors import RestpointError

_HERE = Path(__file__).resolve().parent

MODEL_PATH: Path = _HERE / "model"
"""The reference model: a Hugging Face checkpoint folder."""

RECURRENT_PATH: Path = _HERE / "recurrent"
"""The bundled recurrent-depth model, of the same tokenizer: a Hugging Face checkpoint folder."""

REFERENCE = "reference"
"""The name of the reference model, which is loaded where none is named."""

MODELS: dict[str, Path] = {REFERENCE: MODEL_PATH, "recurrent": RECURRENT_PATH}
"""Names that the bundled models are loaded by."""

PROFILE_PATH: Path = _HERE / "profile"
"""The profile fitted to the reference model."""

TEXT_PATH: Path = _HERE / "text"

DOMAINS = ("code", "maths", "prose", "plays")


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt; no 50 characters of it occur in the fitting text."""

    domain: str
    id: str
    text: str


def fit_texts(domain: str | None = None) -> Iterator[str]:
    """Yield the fitting documents, of one domain or all, interleaved: any prefix is balanced in tokens."""
    _check(domain)
    return _read_fit_texts(domain)


def documents() -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of every fitting document, interleaved as :func:`fit_texts`."""
    for document in _read_documents():
        yield document["domain"], document["text"]


def prompts(domain: str | None = None) -> list[Prompt]:
    """Return the benchmark prompts, of one domain or all, the domains taking turns."""
    _check(domain)
    with (TEXT_PATH / "prompts.jsonl").open(encoding="utf-8") as lines:
        found = [Prompt(**json.loads(line)) for line in lines]
    return [prompt for prompt in found if domain in (None, prompt.domain)]


def _read_fit_texts(domain: str | None) -> Iterator[str]:
    for document in _read_documents():
        if domain in (None, document["domain"]):
            yield document["text"]


def _read_documents() -> Iterator[dict[str, str]]:
    with lzma.open(TEXT_PATH / "fit.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _check(domain: str | None) -> None:
    if domain is not None and domain not in DOMAINS:
        raise RestpointError(f"domain={domain!r} is not bundled: choose one of {', '.join(DOMAINS)}, or None for all")
