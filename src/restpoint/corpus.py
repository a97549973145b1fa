"""Text from files: documents to fit with, prompts to continue."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from restpoint.bundled import MODELS, REFERENCE
from restpoint.errors import RestpointError

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_BLOCK = 100_000  # characters: a plain text of any size is read in blocks of whole lines


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the documents of text files, one file after the other.

    ``.jsonl`` files hold one JSON object a line, with the document in ``text``; every other file is plain text in
    UTF-8. Either may be compressed (.gz, .xz, .bz2). All files are opened before this returns, so a wrong name is
    told at once.

    Raises:
        RestpointError: a file is missing, empty, damaged, not UTF-8 or not of this form; also while iterating.
    """
    for path in paths:
        if next(_documents(path), None) is None:
            raise RestpointError(f"text: {path} is empty; give a file with text in it")
    return (document for path in paths for document in _documents(path))


def model_and_prompt(words: Sequence[str], file: Path | None) -> tuple[str, str]:
    """The model and the prompt that a command line names as ``[MODEL] PROMPT``.

    A single word is the prompt, and the model is the bundled one; with a file for the prompt, it is the model.

    Args:
        words: at most two. A prompt of ``-`` is read from standard input.
        file: holds the prompt.

    Raises:
        RestpointError: the prompt is missing, given twice, empty, or cannot be read.
    """
    if len(words) == 2 and file is not None:
        raise RestpointError("prompt and --prompt-file contradict each other: give one")
    model = words[0] if len(words) == 2 or (words and file is not None) else REFERENCE
    if file is not None:
        text, source = "".join(_lines(file, "prompt_file")), f"prompt_file: {file}"
    elif not words:
        raise RestpointError("prompt: none is given; write it in quotes, use --prompt-file, or - to read stdin")
    elif len(words) == 1 and (words[0] in MODELS or Path(words[0], "config.json").is_file()):
        raise RestpointError(f"prompt: none is given after the model {words[0]}; write it in quotes")
    elif words[-1] == "-":
        text, source = sys.stdin.read(), "prompt: standard input"
    else:
        text, source = words[-1], "prompt: it"
    if not text.strip():
        raise RestpointError(f"{source} is empty; give at least one character of text")
    return model, text


def _documents(path: Path) -> Iterator[str]:
    lines = _lines(path, "text")
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    documents = _objects(path, lines) if suffixes[-1:] == [".jsonl"] else _blocks(lines)
    return (document for document in documents if document.strip())


def _lines(path: Path, argument: str) -> Iterator[str]:
    if path.is_dir():
        raise RestpointError(f"{argument}: {path} is a folder; give the files in it")
    opener = _OPENERS.get(path.suffix, open)
    try:
        file: IO[str]
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except FileNotFoundError as error:
        raise RestpointError(f"{argument}: {path} does not exist; check the name") from error
    except UnicodeDecodeError as error:
        raise RestpointError(f"{argument}: {path} is not text in UTF-8; convert it or give another file") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise RestpointError(f"{argument}: {path} cannot be read ({error}); give another file") from error


def _objects(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RestpointError(f"text: {path}, line {number} is no JSON object with a field 'text'") from error
        if not isinstance(document, str):
            raise RestpointError(f"text: {path}, line {number}: the field 'text' is no string")
        yield document


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    block: list[str] = []
    length = 0
    for line in lines:
        block.append(line)
        length += len(line)
        if length >= _BLOCK:
            yield "".join(block)
            block, length = [], 0
    if block:
        yield "".join(block)
