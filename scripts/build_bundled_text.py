"""Build the bundled corpora: ``fit.jsonl.xz`` to fit with, ``prompts.jsonl`` to measure with.

Usage: ``python scripts/build_bundled_text.py DATA_FOLDER [OUTPUT_FOLDER]``

DATA_FOLDER holds gsm8k-train.jsonl, gsm8k-test.jsonl, HumanEval.jsonl.gz, tinyshakespeare.txt and
prose.jsonl.xz (lines with ``source`` and ``text``; only ``source == "pep"`` is used). The code comes from the
running interpreter's standard library, so the result depends on its version, and on nothing else: every
choice is an order by hash.

What is made sure of, or the build stops:

* four domains of equal size in tokens, interleaved so that any prefix of the file is balanced too;
* no prompt shares 50 consecutive characters with the fitting text, white space and case apart.
"""

import gzip
import hashlib
import json
import lzma
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1] / "src" / "restpoint" / "bundled"
DOMAINS = ("code", "maths", "prose", "plays")
TOKENS_PER_DOMAIN = 75_000
PIECE_TOKENS = 900  # with the leading <|endoftext|>, a piece fits the reference model's context of 1024
PROMPTS_PER_DOMAIN = 50
CODE_PROMPT_TOKENS = 400
TEXT_PROMPT_TOKENS = (60, 100)
SHINGLE = 50

# Modules of plain Python that a reader would call ordinary code; test suites and tables are left out.
STANDARD_LIBRARY = """
    abc argparse ast base64 bisect calendar cmd codecs collections concurrent/futures/thread
    configparser contextlib copy csv dataclasses datetime difflib dis doctest email/message enum
    filecmp fileinput fnmatch fractions ftplib functools getopt glob gzip html/parser http/client
    http/server imaplib inspect ipaddress json/decoder json/encoder linecache mailbox mimetypes
    numbers operator os pathlib pdb pickle pkgutil platform plistlib poplib posixpath pprint profile
    pstats queue random reprlib sched selectors shelve shlex shutil smtplib socket socketserver
    sqlite3/dump ssl stat statistics string tempfile timeit tokenize traceback types typing
    unittest/case unittest/mock urllib/parse urllib/request warnings weakref xmlrpc/server zipfile
    asyncio/base_events asyncio/locks asyncio/queues asyncio/streams asyncio/tasks importlib/util
    logging/config
""".split()  # noqa: SIM905

Count = Callable[[str], int]


def main(data: Path, output: Path) -> None:
    """Write both files and print what is in them."""
    tokenizer = Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    peps = _shuffled(_peps(data))
    cut = len(peps) * 3 // 4
    play = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    edge = play.index("\n\n", len(play) * 9 // 10)

    sources = {
        "code": _shuffled(piece for text in _standard_library() for piece in _pieces(text, count)),
        "maths": _shuffled(f"{_question(row)} {row['answer']}" for row in _rows(data / "gsm8k-train.jsonl")),
        "prose": _shuffled(piece for text in peps[:cut] for piece in _pieces(text, count)),
        "plays": _shuffled(_pieces(play[:edge], count)),
    }
    fit = {domain: _take(texts, count) for domain, texts in sources.items()}
    seen = {shingle for texts in fit.values() for text in texts for shingle in shingles(text)}

    candidates = {
        "code": _humaneval_prompts(data, count),
        "maths": ((f"gsm8k-test/{i}", _question(row)) for i, row in enumerate(_rows(data / "gsm8k-test.jsonl"))),
        "prose": _pep_prompts(peps[cut:], count),
        "plays": _play_prompts(play, edge, count),
    }
    prompts = {domain: _held_out(found, seen) for domain, found in candidates.items()}
    _write(output, fit, prompts, count)


def shingles(text: str) -> set[str]:
    """All runs of 50 characters, white space collapsed and case folded so that no layout hides a copy."""
    plain = re.sub(r"\s+", " ", text).strip().lower()
    return {plain[i : i + SHINGLE] for i in range(len(plain) - SHINGLE + 1)}


def _write(output: Path, fit: dict[str, list[str]], prompts: dict[str, list[tuple[str, str]]], count: Count) -> None:
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"domain": d, "text": text}, ensure_ascii=False) for d, text in _balanced(fit, count)]
    packed = lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME)
    (output / "fit.jsonl.xz").write_bytes(packed)

    in_turns = [(d, *prompts[d][i]) for i in range(PROMPTS_PER_DOMAIN) for d in DOMAINS]
    with (output / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for domain, name, text in in_turns:
            file.write(json.dumps({"domain": domain, "id": name, "text": text}, ensure_ascii=False) + "\n")

    print(f"standard library of Python {platform.python_version()}")
    for domain in DOMAINS:
        tokens = sum(map(count, fit[domain]))
        lengths = [count(text) for _, text in prompts[domain]]
        mean = sum(lengths) / len(lengths)
        print(f"{domain:6} {len(fit[domain]):4} documents {tokens:6} tokens; prompts: mean {mean:.0f} tokens")


# --- sources ---


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in STANDARD_LIBRARY:
        path = root / f"{name}.py"
        if not path.exists():
            path = root / name / "__init__.py"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if "copyright" not in text.lower():  # some modules carry another author's terms; the rest are the PSF's
            yield text


def _peps(data: Path) -> Iterator[str]:
    with lzma.open(data / "prose.jsonl.xz", "rt", encoding="utf-8") as lines:
        peps = (row["text"] for row in map(json.loads, lines) if row["source"] == "pep")
        yield from (text for text in peps if "public domain" in text.lower())  # some old ones have other terms


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _question(row: dict[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer:"


# --- prompts: (name, text) ---


def _humaneval_prompts(data: Path, count: Count) -> Iterator[tuple[str, str]]:
    with gzip.open(data / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if count(row["prompt"]) <= CODE_PROMPT_TOKENS:
                yield row["task_id"], row["prompt"]


def _pep_prompts(peps: Iterable[str], count: Count) -> Iterator[tuple[str, str]]:
    for text in peps:
        number = re.match(r"PEP:\s*(\d+)", text)
        if number is None:
            continue
        # One section of each PEP, title included: the first that opens with prose, not with a list.
        for section in re.finditer(r"^([A-Z][^\n]{3,60})\n([=-])\2{3,}\n\n+(?=[A-Z][a-z])", text, flags=re.MULTILINE):
            title = section[1].strip()
            if title in ("Copyright", "References", "Footnotes", "Abstract"):
                continue
            following = re.search(r"\n\n[^\n]+\n([=-])\1{3,}\n", text[section.end() :])
            end = section.end() + following.start() + 1 if following else len(text)
            opening = _opening(text[section.start() : end][:1500], count)
            if opening:
                yield f"pep-{int(number[1])}/{title}", opening
                break


def _play_prompts(play: str, edge: int, count: Count) -> Iterator[tuple[str, str]]:
    speeches = [match.end() for match in re.finditer(r"\n\n", play[edge:])]
    for offset in sorted(speeches, key=lambda offset: _hash(play[edge + offset : edge + offset + 200])):
        opening = _opening(play[edge + offset : edge + offset + 1500], count)
        if opening:
            yield f"tinyshakespeare/{edge + offset}", opening


def _opening(text: str, count: Count) -> str | None:
    """The longest run of whole lines at the start of `text` with the length of a prompt, if any."""
    least, most = TEXT_PROMPT_TOKENS
    lines = text.split("\n")[:-1]  # the last one may be cut
    for n in range(len(lines), 0, -1):
        opening = "\n".join(lines[:n]).rstrip()
        if count(opening) <= most:
            return opening if count(opening) >= least else None
    return None


def _held_out(candidates: Iterable[tuple[str, str]], seen: set[str]) -> list[tuple[str, str]]:
    """The first candidates, by hash, that share nothing with the fitting text nor with one another."""
    kept: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name, text in sorted(candidates, key=lambda candidate: _hash(candidate[1])):
        own = shingles(text)
        if own and own.isdisjoint(seen) and own.isdisjoint(taken):
            kept.append((name, text))
            taken |= own
        if len(kept) == PROMPTS_PER_DOMAIN:
            return kept
    raise SystemExit(f"only {len(kept)} held-out prompts of {PROMPTS_PER_DOMAIN} found: use less fitting text")


# --- fitting text ---


def _pieces(text: str, count: Count) -> Iterator[str]:
    """Cut before top-level paragraphs, or at any blank line if need be, into at most `PIECE_TOKENS`."""
    piece, size = "", 0
    for paragraph in _paragraphs(text, count):
        length = count(paragraph)
        if piece and size + length > PIECE_TOKENS:
            yield piece.strip("\n") + "\n"
            piece, size = "", 0
        if length <= PIECE_TOKENS:  # a longer one without a blank line is a table: left out
            piece, size = piece + paragraph, size + length
    if piece.strip():
        yield piece.strip("\n") + "\n"


def _paragraphs(text: str, count: Count) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n\n)(?=\S)", text):
        if count(paragraph) <= PIECE_TOKENS:
            yield paragraph
        else:
            yield from re.split(r"(?<=\n\n)(?=[^\n])", paragraph)


def _take(texts: list[str], count: Count) -> list[str]:
    taken, total = [], 0
    for text in texts:
        if total >= TOKENS_PER_DOMAIN:
            return taken
        taken.append(text)
        total += count(text)
    raise SystemExit(f"a source has only {total} tokens of {TOKENS_PER_DOMAIN}")


def _balanced(fit: dict[str, list[str]], count: Count) -> Iterator[tuple[str, str]]:
    """All documents, always one of the domain with the fewest tokens so far."""
    waiting = {domain: list(reversed(texts)) for domain, texts in fit.items()}
    given = dict.fromkeys(fit, 0)
    while any(waiting.values()):
        domain = min((d for d in DOMAINS if waiting[d]), key=lambda d: given[d])
        text = waiting[domain].pop()
        given[domain] += count(text)
        yield domain, text


def _shuffled(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=_hash)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: build_bundled_text.py DATA_FOLDER [OUTPUT_FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else ROOT / "text")
