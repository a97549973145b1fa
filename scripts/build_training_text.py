"""Build the text that the bundled recurrent-depth model is trained on: one JSON object a line, ``domain`` and ``text``.

Usage: ``python scripts/build_training_text.py DATA_FOLDER OUTPUT.jsonl``

DATA_FOLDER is that of ``build_bundled_text.py``. Prose is all of prose.jsonl.xz, maths GSM8K train, plays the first
nine tenths of tiny Shakespeare, code the running interpreter's standard library and installed packages; so the result
depends on those. Documents are in the order of their hashes. None that shares 50 consecutive characters with a bundled
prompt, white space and case apart, is used.
"""

import json
import lzma
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from build_bundled_text import ROOT, _hash, _question, _rows, _shuffled, shingles

MOST = 16_000_000  # characters of any domain
MOST_FILE = 60_000  # characters: longer ones are tables and generated code
LONG_LINE = 200


def main(data: Path, output: Path) -> None:
    """Write the file and print what is in it."""
    prompts = (json.loads(line)["text"] for line in (ROOT / "text" / "prompts.jsonl").open(encoding="utf-8"))
    held_out = {shingle for prompt in prompts for shingle in shingles(prompt)}
    play = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    sources = {
        "prose": _shuffled(_prose(data)),
        "maths": (f"{_question(row)} {row['answer']}" for row in _rows(data / "gsm8k-train.jsonl")),
        "plays": _scenes(play[: play.index("\n\n", len(play) * 9 // 10)]),
        "code": _code(),
    }
    kept: dict[str, tuple[str, str]] = {}
    for domain, texts in sources.items():
        characters = 0
        for text in texts:
            if characters > MOST:
                break
            if text.strip() and held_out.isdisjoint(shingles(text)):
                kept.setdefault(_hash(text), (domain, text))
                characters += len(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for key in sorted(kept):
            domain, text = kept[key]
            file.write(json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n")
    for domain in sources:
        texts = [text for kind, text in kept.values() if kind == domain]
        print(f"{domain:6} {len(texts):6} documents {sum(map(len, texts)):10} characters")


def _prose(data: Path) -> Iterator[str]:
    with lzma.open(data / "prose.jsonl.xz", "rt", encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def _scenes(play: str) -> Iterator[str]:
    """Whole speeches, about 4000 characters of them at once."""
    scene: list[str] = []
    for speech in play.split("\n\n"):
        scene.append(speech)
        if sum(map(len, scene)) > 4000:
            yield "\n\n".join(scene)
            scene = []
    yield "\n\n".join(scene)


def _code() -> Iterator[str]:
    """Modules that a reader would call code, by the hashes of their names."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = {file for root in roots for file in root.rglob("*.py") if "test" not in str(file.relative_to(root))}
    for file in sorted(files, key=lambda file: _hash(file.name + file.parent.name)):
        text = file.read_text(encoding="utf-8", errors="replace")
        readable = max(map(len, text.split("\n"))) <= LONG_LINE and "�" not in text
        if 500 <= len(text) <= MOST_FILE and readable:
            yield text


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
