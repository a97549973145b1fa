"""Copying from the text: the automaton against a search of all of it, and the tree of what is copied."""

import random

import pytest

from drafts import check_tree
from restpoint.decode.draft import Candidates, TokenPath
from restpoint.decode.drafters.lookup import LONGEST_MATCH, LookupDrafter, SuffixIndex, match_confidences


def longest_by_search(tokens: list[int]) -> tuple[int, int]:
    """Where the longest earlier match of the text's end stops, and its length; the latest of equally long ones."""
    best = (0, 0)
    for stop in range(1, len(tokens)):
        length = 0
        while length < stop and tokens[stop - 1 - length] == tokens[-1 - length]:
            length += 1
        if length and length >= best[1]:
            best = (stop, length)
    return best


def occurrences(piece: list[int], tokens: list[int]) -> list[int]:
    """How many tokens the text has after each occurrence of a piece."""
    return [stop for stop in range(len(piece), len(tokens) + 1) if tokens[stop - len(piece) : stop] == piece]


def text(letters: int, length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(letters) for _ in range(length)]


@pytest.mark.parametrize("letters", [2, 3, 5, 9])
def test_longest_and_latest_match_against_a_search(letters: int) -> None:
    for seed in range(40):
        tokens = text(letters, 2 + seed, seed)
        index = SuffixIndex()
        for stop in range(1, len(tokens) + 1):
            index.extend(tokens[:stop])
            copied, length = index.longest(3)
            start, expected = longest_by_search(tokens[:stop])
            assert length == expected
            assert len(copied) == (3 if expected else 0)
            written = tokens[:stop]
            for token in copied:
                assert token == written[start + len(written) - stop]
                written.append(token)


@pytest.mark.parametrize("letters", [2, 4])
def test_what_else_followed_is_counted_right(letters: int) -> None:
    found = 0
    for seed in range(60):
        tokens = text(letters, 24, seed)
        index = SuffixIndex()
        index.extend(tokens)
        copied, _ = index.longest(3)
        seen = set()
        for depth, other in index.others(copied):
            assert other.token != copied[depth]
            assert (depth, other.token) not in seen
            seen.add((depth, other.token))
            suffix = [*tokens, *copied[:depth]][-other.match :]
            before = occurrences(suffix, tokens[:-1])
            after = occurrences([*suffix, other.token], tokens[:-1])
            assert other.latest == after[-1]
            assert other.share == len(after) / len(before)
            assert other.match > depth
            found += 1
    assert found > 60


def test_texts_that_go_round_in_circles_take_linear_time_and_memory() -> None:
    index = SuffixIndex()
    index.extend([7] * 5000)
    assert index.longest(4) == ([7] * 4, 4999)
    assert len(index._link) == 5001
    index.extend([7] * 5000 + [8, 7, 7, 7])
    copied, length = index.longest(3)
    assert (copied, length) == ([7, 7, 7], 3)  # which occurrence it was is not known any more
    assert all(0 < other.share <= 1 for _, other in index.others(copied))


def test_copies_repeat_where_the_match_overlaps() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 1, 2, 3, 1, 2])
    assert index.longest(7) == ([3, 1, 2, 3, 1, 2, 3], 5)
    assert match_confidences(LONGEST_MATCH - 1, 3) == [15 / 16, 1.0, 1.0]


def test_branches_are_what_followed_other_occurrences() -> None:
    drafter = LookupDrafter()
    #         after 1 2: 3 and 4, then 4, then 5; the latest counts most
    prompt = [1, 2, 3, 3, 1, 2, 4, 6, 1, 2, 4, 9, 1, 2, 5, 8, 1, 2]
    drafter.begin(prompt)
    found = drafter.candidates(TokenPath(prompt, None), 3)
    assert list(found.tokens) == [5, 8, 1, 4, 9, 1, 3, 3, 1]
    assert list(found.parents) == [-1, 0, 1, -1, 3, 4, -1, 6, 7]
    assert list(found.confidences[:3]) == [2 / 16, 3 / 16, 4 / 16]
    assert list(found.confidences[4:6]) == [3 / 16, 4 / 16]
    assert found.confidences[0] > found.confidences[3] > found.confidences[6] > 0


@pytest.mark.parametrize("letters", [2, 3, 12])
def test_candidates_are_trees(letters: int) -> None:
    for seed in range(12):
        tokens = text(letters, 40, seed)
        drafter = LookupDrafter()
        drafter.begin(tokens[:20])
        for stop in range(21, 41):
            for room in (0, 1, 2, 7, 30):
                check_tree(drafter.candidates(TokenPath(tokens[:stop], None), room), room)


def test_nothing_is_kept_from_the_text_before() -> None:
    drafter = LookupDrafter()
    drafter.begin([1, 2, 3, 4])
    drafter.begin([9, 1, 2])
    assert drafter.candidates(TokenPath([9, 1, 2, 3], None), 5) == Candidates()


def test_there_is_a_prior_for_every_bin() -> None:
    assert len(LookupDrafter.prior) == len(LookupDrafter.edges) + 1
    assert list(LookupDrafter.edges) == sorted(LookupDrafter.edges)
    assert list(LookupDrafter.prior) == sorted(LookupDrafter.prior)
