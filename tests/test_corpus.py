import bz2
import gzip
import io
import json
import lzma

import pytest

from restpoint.bundled import REFERENCE
from restpoint.corpus import model_and_prompt, read_texts
from restpoint.errors import RestpointError

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def write(path, text):
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("packed", OPENERS)
def test_plain_text_is_read_whole(tmp_path, packed):
    path = write(tmp_path / f"a.txt{packed}", "ein Wörtchen\n\nund zwei\n")
    assert list(read_texts([path])) == ["ein Wörtchen\n\nund zwei\n"]


@pytest.mark.parametrize("packed", OPENERS)
def test_json_lines_are_documents(tmp_path, packed):
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one\ntwo", "  ", "drei ü")]
    path = write(tmp_path / f"a.jsonl{packed}", "\n".join([lines[0], "", *lines[1:]]))
    assert list(read_texts([path])) == ["one\ntwo", "drei ü"]


def test_files_follow_each_other(tmp_path):
    one, two = write(tmp_path / "1.txt", "first"), write(tmp_path / "2.jsonl", '{"text": "second"}\n')
    assert list(read_texts([two, one])) == ["second", "first"]


def test_a_large_file_comes_in_blocks_of_whole_lines(tmp_path):
    text = "".join(f"line {number}\n" for number in range(40_000))
    blocks = list(read_texts([write(tmp_path / "a.txt", text)]))
    assert len(blocks) > 3
    assert "".join(blocks) == text
    assert all(block.endswith("\n") for block in blocks)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("blank.jsonl", b'{"text": " "}\n', "blank.jsonl is empty"),
        ("latin.txt", b"W\xf6rtchen", "latin.txt is not text in UTF-8"),
        ("broken.jsonl", b'{"text": "a"', "broken.jsonl, line 1 is no JSON object with a field 'text'"),
        ("other.jsonl", b'{"body": "a"}', "other.jsonl, line 1 is no JSON object with a field 'text'"),
        ("list.jsonl", b"[1]", "list.jsonl, line 1 is no JSON object with a field 'text'"),
        ("number.jsonl", b'{"text": 3}', "number.jsonl, line 1: the field 'text' is no string"),
        ("no.txt.gz", b"plain", "no.txt.gz cannot be read"),
        ("no.txt.xz", b"plain", "no.txt.xz cannot be read"),
        ("cut.txt.gz", gzip.compress(b"some text " * 99, mtime=0)[:-12], "cut.txt.gz cannot be read"),
    ],
)
def test_unusable_files_are_refused_at_once_by_name(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RestpointError, match=says):
        read_texts([path])


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(RestpointError, match=r"text: .*gone.txt does not exist"):
        read_texts([tmp_path / "gone.txt"])
    with pytest.raises(RestpointError, match="is a folder"):
        read_texts([tmp_path])


def test_a_later_broken_line_is_told_by_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\nnonsense\n')
    texts = read_texts([path])
    assert next(texts) == "a"
    with pytest.raises(RestpointError, match="line 2"):
        next(texts)


def test_a_single_word_is_the_prompt():
    assert model_and_prompt(["Once"], None) == (REFERENCE, "Once")
    assert model_and_prompt(["gpt2", "Once"], None) == ("gpt2", "Once")


def test_a_prompt_comes_from_a_file_or_from_standard_input(tmp_path, monkeypatch):
    path = write(tmp_path / "p.txt", "Once upon\na time")
    assert model_and_prompt([], path) == (REFERENCE, "Once upon\na time")
    assert model_and_prompt(["gpt2"], path) == ("gpt2", "Once upon\na time")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert model_and_prompt(["-"], None) == (REFERENCE, "from a pipe")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "prompt: none is given"),
        ([""], "prompt: it is empty"),
        (["gpt2", " "], "prompt: it is empty"),
        (["reference"], "prompt: none is given after the model reference"),
        (["-"], "prompt: standard input is empty"),
    ],
)
def test_a_missing_prompt_is_refused(words, says, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(RestpointError, match=says):
        model_and_prompt(words, None)


def test_two_prompts_are_refused(tmp_path):
    with pytest.raises(RestpointError, match="contradict"):
        model_and_prompt(["gpt2", "Once"], write(tmp_path / "p.txt", "x"))
    with pytest.raises(RestpointError, match=r"prompt_file: .* is empty"):
        model_and_prompt([], write(tmp_path / "e.txt", ""))
