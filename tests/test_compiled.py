"""The compiled engine: it says what the LayeredModel says, and the same in every block to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from families import VOCABULARY, build
from restpoint.errors import RestpointError
from restpoint.model import kernels
from restpoint.model.compiled import CompiledModel
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree

TREE = Tree((-1, 0, 0, 1, 2, 1))
UNCOMPILED = ["llama", "gpt2", "opt", "mistral", "qwen3", "gemma2"]
BOTH = [torch.float32, torch.bfloat16]


def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> CompiledModel:
    return CompiledModel(LayeredModel(build(family, dtype=dtype)), **{"widths": (2, 8), **options})


def tokens(count: int, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, count))


def eager(layered: LayeredModel, text: Tensor, block: Tensor, tree: Tree | None = None) -> Tensor:
    cache = layered.cache(text.shape[0])
    layered.run(layered.plan(text, cache))
    cache.commit([text.shape[1]] * text.shape[0])
    return layered.logits(layered.run(layered.plan(block, cache, tree=tree)))


def largest_difference(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("tokens_at_once", [1, 3, 8, 13, 32])
def test_product_is_the_exact_one_rounded(dtype: torch.dtype, tokens_at_once: int) -> None:
    kernels.load()
    weight, bias, x = (
        torch.randn(70, 24).to(dtype),
        torch.randn(70).to(dtype),
        torch.randn(tokens_at_once, 24).to(dtype),
    )
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    found = kernels.linear(x, kernels.pack(weight), bias, 70)
    assert largest_difference(found, exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [8, 24, 64])
def test_attention_is_the_exact_one_rounded(dtype: torch.dtype, size: int) -> None:
    kernels.load()
    q = torch.randn(2, 6, 5, size).to(dtype)
    keys, values = (torch.randn(2, 3, 40, size).to(dtype) for _ in range(2))
    visible = torch.rand(2, 5, 40) < 0.4
    visible[..., 7] = True
    repeated = [kept.double().repeat_interleave(2, 1) for kept in (keys, values)]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *repeated, visible[:, None], scale=0.3)
    found = kernels.attention(q, keys, values, visible, 0.3)
    assert largest_difference(found, exact.transpose(1, 2)) < 2 * max(torch.finfo(dtype).eps, 1e-6)


def test_attention_caps_scores() -> None:
    kernels.load()
    q, keys, values = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    scores = torch.tanh(q @ keys.mT / 0.7) * 0.7
    found = kernels.attention(q, keys, values, torch.ones(1, 3, 9, dtype=torch.bool), 1.0, 0.7)
    torch.testing.assert_close(found, (scores.softmax(-1) @ values).transpose(1, 2))


@pytest.mark.parametrize("dtype", BOTH)
def test_kernels_do_not_depend_on_company_or_gaps(dtype: torch.dtype) -> None:
    kernels.load()
    weight, x = kernels.pack(torch.randn(100, 48).to(dtype)), torch.randn(32, 48).to(dtype)
    whole = kernels.linear(x, weight, None, 100)
    assert all(torch.equal(kernels.linear(x[:n], weight, None, 100), whole[:n]) for n in range(1, 32))

    q, keys, values = torch.randn(1, 4, 9, 16).to(dtype), *(torch.randn(1, 2, 20, 16).to(dtype) for _ in range(2))
    visible = torch.ones(1, 9, 20, dtype=torch.bool).tril()
    together = kernels.attention(q, keys, values, visible, 0.25)
    slots = torch.randperm(50)[:20].sort().values
    spread = [torch.randn(1, 2, 50, 16).to(dtype).index_copy(2, slots, kept) for kept in (keys, values)]
    apart = torch.zeros(1, 9, 50, dtype=torch.bool).index_copy(2, slots, visible)
    assert torch.equal(kernels.attention(q, *spread, apart, 0.25), together)
    assert all(
        torch.equal(
            kernels.attention(q[:, :, n : n + 1], keys, values, visible[:, n : n + 1], 0.25)[:, 0], together[:, n]
        )
        for n in range(9)
    )


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in UNCOMPILED), ("gemma2", torch.bfloat16)]
)
def test_families_agree_without_torch_compile(family: str, dtype: torch.dtype) -> None:
    compiled = make(family, dtype, compiled=False)
    compiled.warm_up()  # raises where a chain or a tree differs
    assert compiled.row_invariant


@pytest.mark.slow
@pytest.mark.parametrize("family", UNCOMPILED)
@pytest.mark.parametrize("dtype", BOTH)
def test_families_agree_compiled(family: str, dtype: torch.dtype) -> None:
    compiled = make(family, dtype)
    compiled.warm_up()
    assert compiled.row_invariant


@pytest.fixture(scope="module")
def llama() -> CompiledModel:
    compiled = make("llama")
    compiled.warm_up()
    return compiled


def test_chain_tree_rollback_and_keep(llama: CompiledModel) -> None:
    layered, text = llama.layered, tokens(6)
    cache = llama.cache()
    assert largest_difference(llama.score(text, cache)[0], layered.model(input_ids=text).logits) < 1e-4
    cache.commit([6])
    llama.score(tokens(8), cache)  # rejected
    chain = tokens(3)
    logits, hidden = llama.score(chain, cache)
    assert largest_difference(logits, eager(layered, text, chain)) < 1e-4
    torch.testing.assert_close(layered.logits(hidden), logits)
    nodes = tokens(6)
    logits, _ = llama.score(nodes, cache, TREE)
    assert largest_difference(logits, eager(layered, text, nodes, TREE)) < 1e-4
    cache.keep(0, [0, 2, 4])
    assert cache.lengths == [9]
    last = tokens(1)
    expected = layered.model(input_ids=torch.cat([text, nodes[:, [0, 2, 4]], last], 1)).logits[:, -1:]
    assert largest_difference(llama.score(last, cache)[0], expected) < 1e-4


def test_a_long_chain_runs_in_several_passes(llama: CompiledModel) -> None:
    text, cache = tokens(21), llama.cache()
    logits, hidden = llama.score(text, cache)
    assert cache.lengths == [0]
    assert hidden.shape[:2] == (1, 21)
    assert largest_difference(logits, llama.layered.model(input_ids=text).logits) < 1e-4


def test_layered_model_works_on_the_same_cache(llama: CompiledModel) -> None:
    layered, text, cache = llama.layered, tokens(9), llama.cache()
    layered.run(layered.plan(text[:, :4], cache))
    cache.commit([4])
    llama.score(text[:, 4:6], cache)
    cache.commit([2])
    logits = layered.logits(layered.run(layered.plan(text[:, 6:], cache)))
    assert largest_difference(logits, layered.model(input_ids=text).logits[:, 6:]) < 1e-4


def test_ragged_rows_with_a_tree_each() -> None:
    compiled = make("llama", compiled=False)
    layered, rows, nodes = compiled.layered, tokens(7, 2), tokens(3, 2)
    cache = compiled.cache(batch=2)
    compiled.score(rows, cache)
    cache.commit([7, 4])
    trees = (Tree((-1, 0, 0)), Tree((-1, 0, 1)))
    logits, _ = compiled.score(nodes, cache, trees)
    for row, (length, tree) in enumerate(zip((7, 4), trees, strict=True)):
        expected = eager(layered, rows[row : row + 1, :length], nodes[row : row + 1], tree)
        assert largest_difference(logits[row : row + 1], expected) < 1e-4


def test_padding_leaves_no_trace(llama: CompiledModel) -> None:
    text, block = tokens(5), tokens(3)
    cache = llama.cache()
    llama.score(text, cache)
    cache.commit([5])
    before, _ = llama.score(block, cache)
    for layer in cache.slot_layers:
        for kept in layer.stored:
            kept[:, :, 8:] = 1e4  # what padding or a rejected draft may have left
    after, _ = llama.score(block, cache)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("dtype", "one_shape"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_speculation_is_bitwise_lossless(reference: Any, dtype: torch.dtype, one_shape: bool) -> None:
    from restpoint.model.load import load

    model = reference.model if dtype == torch.float32 else load(dtype="bfloat16", device="cpu").model
    compiled = CompiledModel(LayeredModel(model), (2, 8, 16), one_shape=one_shape, compiled=False)
    speculation_is_plain_decoding(compiled, 10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_speculation_is_bitwise_lossless(dtype: str) -> None:
    from restpoint.model.load import load

    compiled = CompiledModel(LayeredModel(load(dtype=dtype, device="cpu").model))
    compiled.warm_up()
    assert compiled.row_invariant
    speculation_is_plain_decoding(compiled, 200)


def speculation_is_plain_decoding(compiled: CompiledModel, length: int) -> None:
    """Random chains and trees, of which a random part is right, against one-token passes: equal logits, equal text."""
    vocabulary = compiled.layered.vocabulary_size
    prompt = torch.randint(1, vocabulary, (1, 20))
    plain = compiled.cache()
    compiled.score(prompt, plain)
    plain.commit([20])
    text, expected = [7], []
    while len(text) <= length + 15:
        logits, _ = compiled.score(torch.tensor([[text[-1]]]), plain)
        plain.commit([1])
        expected.append(logits[0, 0])
        text.append(int(logits.argmax()))

    cache = compiled.cache()
    compiled.score(prompt, cache)
    cache.commit([20])
    done = 0
    generator = torch.Generator().manual_seed(1)
    while done < length:
        count, right = (int(torch.randint(1, 15, (), generator=generator)) for _ in range(2))
        right = min(right, count)
        wrong = torch.randint(1, vocabulary, (count,), generator=generator).tolist()
        if done % 2:  # a chain, right at first
            parents = range(-1, count - 1)
            path = list(range(right))
        else:  # the right path and, between its nodes, others
            path = sorted({0, *torch.randperm(count, generator=generator)[:right].tolist()})
            parents = [-1] * count
            for node in range(1, count):
                parents[node] = max(place for place in path if place < node)
        for depth, node in enumerate(path):
            wrong[node] = text[done + depth]
        logits, _ = compiled.score(torch.tensor([wrong]), cache, Tree(tuple(parents)))
        for depth, node in enumerate(path):
            assert torch.equal(logits[0, node], expected[done + depth])
        cache.keep(0, path)
        done += len(path)


def test_growth_past_the_capacity() -> None:
    compiled = make("llama", compiled=False, capacity=16)
    cache, text = compiled.cache(), tokens(40)
    parts = []
    for chunk in text.split(5, dim=1):
        parts.append(compiled.score(chunk, cache)[0])
        cache.commit([5])
    assert cache.capacity == 64
    assert largest_difference(torch.cat(parts, 1), compiled.layered.model(input_ids=text).logits) < 1e-4


def test_the_model_is_left_as_it_was() -> None:
    model = build("gemma2")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CompiledModel(LayeredModel(model), (2, 8), compiled=False).warm_up()
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_work_is_counted_where_it_is_done(llama: CompiledModel) -> None:
    work, cache = llama.layered.work, llama.cache()
    before = (work.layer_calls, work.token_layers)
    llama.score(tokens(3), cache)
    assert (work.layer_calls - before[0], work.token_layers - before[1]) == (4, 12)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "take no attention mask"),
        ("falcon_alibi", "ALiBi"),
        ("bloom", "positions of its tokens"),
        ("gpt_oss", "s_aux"),
        ("gpt_neo", "cannot be compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_families_that_cannot_be_compiled_are_refused(family: str, reason: str) -> None:
    with pytest.raises(RestpointError, match=reason) as caught:
        make(family, compiled=False).warm_up()
    assert "leave compile out" in str(caught.value)


def test_refused_arguments(llama: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layered = llama.layered
    with pytest.raises(RestpointError, match="widths="):
        CompiledModel(layered, ())
    with pytest.raises(RestpointError, match="capacity=4"):
        CompiledModel(layered, (8,), 4)
    cache = llama.cache()
    cache.lengths = [125]
    with pytest.raises(RestpointError, match="context of 128"):
        llama.score(tokens(8), cache)
    with pytest.raises(RestpointError, match="one tree of 3 nodes"):
        llama.score(tokens(3), llama.cache(), TREE)
    with pytest.raises(RestpointError, match="widest compiled pass"):
        llama.score(tokens(9), llama.cache(), Tree(tuple(range(-1, 8))))
    with pytest.raises(RestpointError, match="float16"):
        CompiledModel(LayeredModel(build("llama").to(torch.float16)))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RestpointError, match="no C"):
        kernels.compiler()
