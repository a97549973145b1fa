"""N-grams: probabilities against the formula, bounded tables, and the tree that is drawn up by them."""

import random

import pytest
import torch

from drafts import check_tree
from restpoint.decode.draft import ROOT, Candidates, Draft, TokenPath, Verified
from restpoint.decode.drafters.ngrams import NgramDrafter, NgramTables
from restpoint.errors import RestpointError

VOCABULARY = 30


def test_probabilities_are_the_formula() -> None:
    tables = NgramTables()
    for before, last, token, weight in ((1, 2, 3, 1.0), (1, 2, 3, 1.0), (1, 2, 4, 0.5), (9, 2, 4, 1.0)):
        tables.count(before, last, token, weight)
    bigram = {3: 2 / 4.5, 4: 1.5 / 4.5}
    assert tables.following(8, 2) == pytest.approx(bigram)
    assert tables.following(1, 2) == pytest.approx({3: (2 + bigram[3]) / 3.5, 4: (0.5 + bigram[4]) / 3.5})
    assert tables.following(2, 1) == {}


def test_memory_is_bounded_and_the_oldest_and_the_rarest_go() -> None:
    tables = NgramTables(contexts=3)
    for before in range(3):
        tables.count(before, 10 + before, 5)
    tables.count(0, 10, 6)
    tables.count(7, 17, 5)
    assert list(tables.pairs) == [(2, 12), (0, 10), (7, 17)]
    assert list(tables.singles) == [(12,), (10,), (17,)]
    for token in range(50):
        tables.count(0, 10, token, 2.0 if token == 20 else 1.0)
    assert len(tables.pairs[0, 10]) == 8
    assert {20, 49} <= set(tables.pairs[0, 10])


def test_text_and_the_targets_probabilities_are_counted() -> None:
    drafter = NgramDrafter()
    drafter.begin([1, 2, 3])
    logits = torch.full((3, VOCABULARY), -50.0)
    logits[0, 4] = logits[1, 6] = logits[2, 8] = 50.0
    draft = Draft((4, 5), (ROOT, ROOT))  # 4 stood, 5 did not; the target would follow it by 8
    drafter.learn(TokenPath([1, 2, 3], None), Verified(draft, logits, [0], next_token=6))
    counted = {
        context: {token: round(count, 3) for token, count in counts.items() if count > 1e-6}
        for context, counts in drafter.tables.pairs.items()
    }
    assert counted == {(1, 2): {3: 1}, (2, 3): {4: 2}, (3, 4): {6: 2}, (3, 5): {8: 1}}


def test_the_tree_is_best_first() -> None:
    drafter = NgramDrafter(nodes=10)
    draw = random.Random(1)
    drafter.begin([draw.randrange(5) for _ in range(300)])
    found = drafter.candidates(TokenPath([0, 1], None), 6)
    check_tree(found, 6)
    assert len(found.tokens) == 10
    contexts, shares = [(0, 1)], [1.0]
    for token, parent, confidence in zip(found.tokens, found.parents, found.confidences, strict=True):
        before, last = contexts[parent + 1]
        assert confidence == drafter.tables.following(before, last)[token]
        contexts.append((last, token))
        shares.append(shares[parent + 1] * confidence)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("letters", [2, 5, 20])
def test_candidates_are_trees(letters: int) -> None:
    draw = random.Random(letters)
    drafter = NgramDrafter()
    drafter.begin([])
    text = [draw.randrange(letters)]
    for _ in range(40):
        for room in (0, 1, 3, 20):
            check_tree(drafter.candidates(TokenPath(text, None), room), room)
        new = draw.randrange(letters)
        drafter.learn(TokenPath(text, None), Verified(Draft(), torch.randn(1, VOCABULARY), [], new))
        text = [*text, new]


def test_only_shared_tables_outlive_a_text() -> None:
    shared = NgramTables()
    for drafter, kept in ((NgramDrafter(), False), (NgramDrafter(shared=shared), True)):
        drafter.begin([1, 2, 3])
        drafter.begin([4])
        assert bool(drafter.candidates(TokenPath([1, 2], None), 3).tokens) is kept
    assert NgramDrafter().candidates(TokenPath([1, 2], None), 3) == Candidates([], [], [])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RestpointError, match="nodes=0"):
        NgramDrafter(nodes=0)
    with pytest.raises(RestpointError, match="contexts=0"):
        NgramTables(contexts=0)


def test_there_is_a_prior_for_every_bin() -> None:
    assert len(NgramDrafter.prior) == len(NgramDrafter.edges) + 1
    assert list(NgramDrafter.prior) == sorted(NgramDrafter.prior)
