"""Recycling: the memory against the logits it has seen, and the tree that is read from it."""

import pytest
import torch

from drafts import check_tree
from restpoint.decode.draft import ROOT, Candidates, Draft, TokenPath, Verified
from restpoint.decode.drafters.recycling import RANKS, RecyclingDrafter, RecyclingMemory
from restpoint.errors import RestpointError

VOCABULARY = 40


def verified(tokens: tuple[int, ...], parents: tuple[int, ...], nodes: list[int]) -> Verified:
    return Verified(Draft(tokens, parents), torch.randn(len(tokens) + 1, VOCABULARY), nodes, next_token=1)


def test_every_node_updates_its_token() -> None:
    drafter = RecyclingDrafter(VOCABULARY)
    outcome = verified((3, 4, 5), (ROOT, 0, ROOT), [0])
    drafter.learn(TokenPath([8, 2], None), outcome)
    for row, token in enumerate((2, 3, 4, 5)):
        assert drafter.memory.after(token) == outcome.logits[row].topk(8).indices.tolist()
    untouched = [token for token in range(VOCABULARY) if token not in (2, 3, 4, 5)]
    assert (drafter.memory.successors[untouched] == -1).all()


def test_of_a_token_twice_the_one_that_stood_counts_and_of_two_that_stood_the_last() -> None:
    memory = RecyclingDrafter(VOCABULARY)
    outcome = verified((3, 6, 3), (ROOT, ROOT, 1), [0])
    memory.learn(TokenPath([2], None), outcome)
    assert memory.memory.after(3) == outcome.logits[1].topk(8).indices.tolist()
    outcome = verified((3, 3), (ROOT, 0), [0, 1])
    memory.learn(TokenPath([3], None), outcome)
    assert memory.memory.after(3) == outcome.logits[2].topk(8).indices.tolist()


def test_the_tree_follows_the_memory_best_first() -> None:
    drafter = RecyclingDrafter(VOCABULARY, nodes=12, deepest=3)
    memory = drafter.memory
    memory.update(range(VOCABULARY), torch.randn(VOCABULARY, VOCABULARY))
    found = drafter.candidates(TokenPath([2], None), 10)
    check_tree(found, 3)
    assert len(found.tokens) == 12
    shares: list[float] = []
    for token, parent, confidence in zip(found.tokens, found.parents, found.confidences, strict=True):
        rank = memory.after(2 if parent == ROOT else found.tokens[parent]).index(token)
        assert confidence == RANKS[rank]
        shares.append(confidence * (1.0 if parent == ROOT else shares[parent]))
    assert shares == sorted(shares, reverse=True)
    assert list(found.tokens[:1]) == memory.after(2)[:1]


@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_room_and_what_is_not_known_yet_cut_the_tree(room: int) -> None:
    drafter = RecyclingDrafter(VOCABULARY)
    assert drafter.candidates(TokenPath([2], None), 5) == Candidates([], [], [])
    drafter.learn(TokenPath([2], None), verified((), (), []))
    assert set(drafter.candidates(TokenPath([2], None), 5).parents) == {ROOT}
    drafter.memory.update(range(0, VOCABULARY, 2), torch.randn(VOCABULARY // 2, VOCABULARY))
    check_tree(drafter.candidates(TokenPath([2], None), room), room)


def test_only_a_shared_memory_outlives_a_text() -> None:
    shared = RecyclingMemory(VOCABULARY)
    for drafter, kept in ((RecyclingDrafter(VOCABULARY), False), (RecyclingDrafter(VOCABULARY, shared=shared), True)):
        drafter.learn(TokenPath([2], None), verified((), (), []))
        drafter.begin([1, 2])
        assert bool(drafter.candidates(TokenPath([1, 2], None), 3).tokens) is kept
    assert RecyclingDrafter(VOCABULARY, shared=shared).candidates(TokenPath([2], None), 3).tokens


def test_half_precision_and_small_vocabularies() -> None:
    memory = RecyclingMemory(3)
    memory.update([1], torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.bfloat16))
    assert memory.after(1) == [1, 2, 0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RestpointError, match="shared: its vocabulary is 5, the target's is 6"):
        RecyclingDrafter(6, shared=RecyclingMemory(5))
    with pytest.raises(RestpointError, match="nodes=0"):
        RecyclingDrafter(6, nodes=0)
    with pytest.raises(RestpointError, match="vocabulary=0"):
        RecyclingMemory(0)
    with pytest.raises(RestpointError, match="the target has 7 logits"):
        RecyclingMemory(6).update([1], torch.randn(1, 7))


def test_there_is_a_prior_for_every_bin() -> None:
    assert len(RecyclingDrafter.prior) == len(RecyclingDrafter.edges) + 1
    assert list(RecyclingDrafter.prior) == sorted(RecyclingDrafter.prior)
