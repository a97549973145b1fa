"""A walked draft tree: every node must have the logits of its own path as a plain sequence."""

import pytest
import torch

from families import VOCABULARY, build
from restpoint.decode.drafters.walk import LayeredWalk
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

TEXT = [5, 17, 40, 3, 88, 21, 9, 60]
LEVELS = [([-1, -1], [11, 12]), ([0, 0, 1], [13, 14, 15]), ([3, 4], [16, 17])]


def native(layered: LayeredModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return layered.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def paths(walk: LayeredWalk) -> list[list[int]]:
    found = [[]]
    for parent, token in zip(walk.parents, walk.tokens, strict=True):
        found.append([*found[parent + 1], token])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "bloom"])
def test_every_node_has_the_logits_of_its_path(family: str) -> None:
    layered = LayeredModel(build(family))
    cache = layered.cache()
    walk = LayeredWalk(layered, lambda: cache, reads=(0, 2))
    walk.start(TEXT[-1], TEXT[:-1])
    assert cache.lengths == [len(TEXT) - 1]
    for parents, tokens in LEVELS:
        added = walk.extend(parents, tokens)
        assert added.shape[1] == len(tokens)
        assert torch.equal(added, walk.states()[:, -len(tokens) :])
        assert torch.equal(walk.newest(2), walk.states(2)[:, -len(tokens) :])
    logits = layered.logits(walk.states())[0]
    assert len(logits) == 1 + 7
    for row, path in zip(logits, paths(walk), strict=True):
        torch.testing.assert_close(row, native(layered, TEXT + path), rtol=1e-4, atol=1e-4)

    resumed = layered.run(
        layered.plan(torch.tensor([[TEXT[-1], *walk.tokens]]), cache, tree=_tree(walk)), 2, hidden=walk.states(2)
    )
    torch.testing.assert_close(resumed, walk.states(), rtol=1e-4, atol=1e-4)

    walk.keep(walk.follow([12, 15, 17, 90]))
    assert cache.lengths == [len(TEXT) + 3]
    after = layered.logits(walk.start(90))[0, 0]
    torch.testing.assert_close(after, native(layered, [*TEXT, 12, 15, 17, 90]), rtol=1e-4, atol=1e-4)


def _tree(walk: LayeredWalk):
    from restpoint.model.masks import Tree

    return Tree((-1, *(parent + 1 for parent in walk.parents)))


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_chains_need_no_tree(family: str) -> None:
    layered = LayeredModel(build(family))
    cache = layered.cache()
    walk = LayeredWalk(layered, lambda: cache, trees=False)
    rows = [walk.start(TEXT[-1], TEXT[:-1])]
    rows += [walk.extend([node - 1], [30 + node]) for node in range(4)]
    for row, path in zip(rows, paths(walk), strict=True):
        torch.testing.assert_close(layered.logits(row)[0, 0], native(layered, TEXT + path), rtol=1e-4, atol=1e-4)
    with pytest.raises(RestpointError, match="chains"):
        walk.extend([1], [7])
    with pytest.raises(RestpointError, match="chains"):
        walk.extend([3, 3], [7, 8])


def test_a_chain_may_branch_later() -> None:
    layered = LayeredModel(build("llama"))
    cache = layered.cache()
    walk = LayeredWalk(layered, lambda: cache)
    walk.start(TEXT[-1], TEXT[:-1])
    for parents, tokens in [([-1], [11]), ([0], [12]), ([0, 1], [13, 14]), ([3], [15])]:
        walk.extend(parents, tokens)
    for row, path in zip(layered.logits(walk.states())[0], paths(walk), strict=True):
        torch.testing.assert_close(row, native(layered, TEXT + path), rtol=1e-4, atol=1e-4)


def test_stop_and_skip() -> None:
    layered = LayeredModel(build("llama"))
    cache = layered.cache()
    walk = LayeredWalk(layered, lambda: cache, stop=3, skip=(1,), reads=(0, 1, 2))
    walk.start(TEXT[0])
    walk.extend([-1], [TEXT[1]])
    assert torch.equal(walk.states(1), walk.states(2))
    assert torch.equal(walk.states(0), layered.embed(torch.tensor([TEXT[:2]])))
    expected = layered.run(layered.plan(torch.tensor([TEXT[:2]])), stop=3, skip=(1,))
    torch.testing.assert_close(walk.states(), expected, rtol=1e-4, atol=1e-5)
    assert walk.follow([VOCABULARY]) == []


def test_layers_that_do_not_exist_are_refused() -> None:
    layered = LayeredModel(build("llama"))
    for wrong in ({"stop": 5}, {"stop": 2, "reads": (3,)}, {"stop": -1}):
        with pytest.raises(RestpointError, match=r"stop, reads: layer"):
            LayeredWalk(layered, layered.cache, **wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_walk_through_no_layer_gives_embeddings(family: str) -> None:
    layered = LayeredModel(build(family))
    cache = layered.cache()
    layered.run(layered.plan(torch.tensor([TEXT]), cache))
    cache.commit([len(TEXT)])
    walk = LayeredWalk(layered, lambda: cache, stop=0)
    walk.start(7)
    walk.extend([-1, -1], [8, 9])
    expected = [layered.plan(torch.tensor([[*TEXT, 7, token]])).hidden[:, -1:] for token in (8, 9)]
    assert torch.equal(walk.states()[:, 1:], torch.cat(expected, 1))
