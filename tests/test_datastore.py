"""Retrieval from a corpus: against a search of all of it; and files that are whole, of this version and tokenizer."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafts import check_tree
from restpoint.decode.draft import ROOT, Candidates, TokenPath
from restpoint.decode.drafters.datastore import CONTEXT, Datastore, tokenizer_hash
from restpoint.decode.drafters.retrieval import RetrievalDrafter
from restpoint.errors import RestpointError


class Words:
    """A tokenizer of words."""

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def corpus(letters: int, documents: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(letters) for _ in range(draw.randrange(30))] for _ in range(documents)] + [[0]]


def by_search(documents: list[list[int]], text: list[int]) -> tuple[int, list[list[int]]]:
    """Length of the longest suffix that occurs, and what follows its occurrences."""
    for length in range(min(CONTEXT, len(text)), 0, -1):
        found = [
            document[stop:]
            for document in documents
            for stop in range(length, len(document) + 1)
            if document[stop - length : stop] == text[-length:]
        ]
        if found:
            return length, found
    return 0, []


@pytest.mark.parametrize(("letters", "scale"), [(2, 1), (3, 1), (9, 7), (3, 30_000), (5, 2_000_000)])
def test_find_against_a_search(tmp_path: Path, letters: int, scale: int) -> None:
    documents = [[token * scale for token in document] for document in corpus(letters, 12, seed=letters)]
    store = Datastore.build(documents, tmp_path, "words")
    draw = random.Random(3)
    for length in range(40):
        text = [scale * draw.randrange(letters + 1) for _ in range(length)]
        if length % 2:
            whole = draw.choice(documents)
            text += whole[: draw.randrange(len(whole) + 1)]
        match, places = store.find(text)
        expected, following = by_search(documents, text)
        assert match == expected
        assert sorted(store.after(place, 30) for place in places) == sorted(following)


def test_long_repetitions_and_a_text_of_other_tokens(tmp_path: Path) -> None:
    store = Datastore.build([[5] * 100], tmp_path, "words")
    match, places = store.find([5] * 50)
    assert (match, len(places)) == (CONTEXT, 100 - CONTEXT + 1)
    for text in ([], [6], [4], [70_000]):
        assert store.find(text)[0] == 0
        assert list(store.find(text)[1]) == []
    assert store.find([65_535, 5])[0] == 1  # the number of the separator is no token of the corpus


def test_candidates_are_counted_continuations(tmp_path: Path) -> None:
    documents = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [9, 2, 7]]
    drafter = RetrievalDrafter(Datastore.build(documents, tmp_path, "words"))
    found = drafter.candidates(TokenPath([8, 1, 2], None), 2)
    doubt = 24 / 2**1.5
    assert list(found.tokens[:2]) == [3, 6]
    assert list(found.confidences[:2]) == pytest.approx([2 / (3 + doubt), 1 / (3 + doubt)])
    assert set(found.tokens[2:]) == {4, 5}
    assert set(found.parents[2:]) == {0}
    assert found.confidences[2] == pytest.approx(1 / (2 + 24 / 3**1.5))
    assert drafter.candidates(TokenPath([8], None), 2) == Candidates([], [], [])
    assert set(drafter.candidates(TokenPath([8, 1, 2], None), 1).parents) == {ROOT}
    with pytest.raises(RestpointError, match="nodes=0"):
        RetrievalDrafter(drafter.datastore, nodes=0)


@pytest.mark.parametrize("letters", [2, 4])
def test_candidates_are_trees(tmp_path: Path, letters: int) -> None:
    drafter = RetrievalDrafter(Datastore.build(corpus(letters, 60, 1), tmp_path, "words"))
    draw = random.Random(2)
    for room in (0, 1, 3, 20):
        for _ in range(20):
            text = [draw.randrange(letters) for _ in range(10)]
            found = drafter.candidates(TokenPath(text, None), room)
            check_tree(found, room)
            assert len(found.tokens) <= drafter.nodes


def test_a_datastore_is_opened_as_it_was_built(tmp_path: Path) -> None:
    own = tokenizer_hash(Words("a", "b"))
    built = Datastore.build([[0, 1, 0], [], [1]], tmp_path / "new" / "folder", own)
    opened = Datastore.open(tmp_path / "new" / "folder")
    assert opened.described == built.described
    assert (opened.described.tokens, opened.described.documents) == (4, 2)
    assert opened.find([0, 1]) == built.find([0, 1])
    opened.require(own)
    with pytest.raises(RestpointError, match=r"another tokenizer.*Datastore\.build"):
        opened.require(tokenizer_hash(Words("b", "a")))


def test_files_that_are_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RestpointError, match=r"no datastore\.json; make one"):
        Datastore.open(tmp_path)
    store = Datastore.build([[1, 2, 3] * 50], tmp_path, "words")
    described, tensors = tmp_path / "datastore.json", tmp_path / store.described.file
    whole = tensors.read_bytes()
    del store

    def refused(message: str) -> None:
        with pytest.raises(RestpointError, match=message):
            Datastore.open(tmp_path)

    tensors.write_bytes(whole[:-10])
    refused("damaged or cut short")
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("damaged; build it again")
    Datastore.open(tmp_path, check=False)
    tensors.unlink()
    refused("damaged or cut short")
    tensors.write_bytes(whole)
    Datastore.open(tmp_path)
    entries = json.loads(described.read_text())
    for change, message in (
        ({"format": 0}, "has format 0, this version reads 2"),
        ({"extra": 1}, "not of this form"),
    ):
        described.write_text(json.dumps({**entries, **change}))
        refused(message)
    for content, message in (("{}", "not of this form"), ("[1]", "not of this form"), ("{", "damaged or cut short")):
        described.write_text(content)
        refused(message)


def test_an_interrupted_build_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> Iterator[list[int]]:
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Datastore.build(documents(), tmp_path / "none", "words")
    assert not (tmp_path / "none").exists()

    Datastore.build([[1, 2, 3]], tmp_path, "words")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    replace = os.replace
    for allowed in (0, 1):
        done: list[Path] = []

        def interrupted(source: Path, target: Path, allowed: int = allowed, done: list[Path] = done) -> None:
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Datastore.build([[4, 5, 6]], tmp_path, "words")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    Datastore.build([[4, 5, 6]], tmp_path, "words")
    assert len(list(tmp_path.iterdir())) == 2
    assert Datastore.open(tmp_path).find([4, 5])[0] == 2


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "no token"), ([[]], "no token"), ([[1], [-1]], "document 1 is no sequence"), ([[2**32]], "document 0")],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(RestpointError, match=message):
        Datastore.build(documents, tmp_path, "words")
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_prior_for_every_bin() -> None:
    assert len(RetrievalDrafter.prior) == len(RetrievalDrafter.edges) + 1
    assert list(RetrievalDrafter.prior) == sorted(RetrievalDrafter.prior)
