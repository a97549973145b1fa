"""Several heads at once: their fit against direct least squares, and the tree they draft against an enumeration."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from drafts import check_tree
from families import build
from restpoint.decode.draft import ROOT, Candidates, TokenPath
from restpoint.decode.drafters.heads import HeadsDrafter, HeadsSettings, best_first
from restpoint.decode.drafters.precision import draft_dtype
from restpoint.equilibrium import (
    AffineMap,
    Chunk,
    FitProgress,
    FitSettings,
    MultiTokenHeads,
    RandomFeatures,
    fit_heads,
)
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel

HIDDEN, HEADS = 5, 3
EXACT = FitSettings(strengths=(0.0,), features=0, steps=HEADS, chunk_rows=128)
Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def parameters(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


DEPTH, TIME, OFFSET = parameters(HIDDEN, HIDDEN, seed=1), parameters(HIDDEN, HIDDEN, seed=2), parameters(HIDDEN, seed=3)


def stream(seed: int, *, noise: float = 1.0, chunks: int = 3, length: int = 40) -> Callable[[], Iterator[Chunk]]:
    """Rest states that follow a linear recurrence in time, driven by embeddings and layers of noise."""

    def chunk(number: int) -> Chunk:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        states = torch.randn(4, length, 2, HIDDEN, dtype=torch.float64, generator=generator) * noise
        states[:, ::HEADS] += torch.randn(4, len(range(0, length, HEADS)), 2, HIDDEN, generator=generator).double()
        rest = [torch.randn(4, HIDDEN, dtype=torch.float64, generator=generator)]
        for t in range(1, length):
            rest.append(states[:, t, 0] @ DEPTH + rest[-1] @ TIME + OFFSET)
        return Chunk(states, torch.stack(rest, 1))

    return lambda: (chunk(number) for number in range(chunks))


def design(of: Callable[[], Iterator[Chunk]], layers: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs and the targets of every head, gathered row by row."""
    inputs, targets = [], [[] for _ in range(HEADS)]
    for chunk in of():
        for states, rest in zip(chunk.states, chunk.rest, strict=True):
            for t in range(1, len(rest) - HEADS + 1):
                inputs.append(torch.cat((states[t, layers].flatten(), rest[t - 1])).numpy())
                for j in range(HEADS):
                    targets[j].append(rest[t + j].numpy())
    return np.array(inputs), [np.array(target) for target in targets]


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_no_penalty_is_least_squares_for_every_head(layers: tuple[int, ...]) -> None:
    fit = fit_heads(stream(0), stream(1), layers, EXACT)
    x, targets = design(stream(0), list(layers))
    assert fit.rows == (len(x),) * HEADS == (3 * 4 * (40 - HEADS),) * HEADS
    oracle = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), np.hstack(targets), rcond=None)[0]
    np.testing.assert_allclose(fit.predictor.affine.matrix, oracle[:-1], atol=1e-9)
    np.testing.assert_allclose(fit.predictor.affine.offset, oracle[-1], atol=1e-9)


def test_every_head_has_the_ridge_solution_of_its_own_strength() -> None:
    """Normal equations with penalty strength * variance; a score that prefers small maps for one head only."""

    def score(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        head = (len(calls) - 1) % HEADS
        return -(predicted if head == 1 else predicted - true).square().sum(-1)

    calls: list[int] = []
    settings = replace(EXACT, strengths=(1e-6, 10.0))
    fit = fit_heads(stream(0), stream(1), (0,), settings, score=score)
    assert fit.chosen == (1e-6, 10.0, 1e-6)
    assert fit.scores.shape == (HEADS, 2)
    x, targets = design(stream(0), [0])
    centred = x - x.mean(0)
    for head, (strength, target) in enumerate(zip(fit.chosen, targets, strict=True)):
        system = centred.T @ centred / len(x) + strength * np.diag(x.var(0))
        matrix = np.linalg.solve(system, centred.T @ (target - target.mean(0)) / len(x))
        found = fit.predictor.affine.matrix.unflatten(1, (HEADS, HIDDEN))[:, head]
        np.testing.assert_allclose(found, matrix, atol=1e-9)
        offset = fit.predictor.affine.offset.unflatten(0, (HEADS, HIDDEN))[head]
        np.testing.assert_allclose(offset, target.mean(0) - x.mean(0) @ matrix, atol=1e-9)


def test_exact_where_the_future_is_a_linear_function_of_what_is_known() -> None:
    """No embedding moves the state, so the next rest states are powers of the time map."""

    def still(of: Callable[[], Iterator[Chunk]]) -> Callable[[], Iterator[Chunk]]:
        def chunks() -> Iterator[Chunk]:
            for chunk in of():
                rest = [chunk.rest[:, 0]]
                for _ in range(1, chunk.rest.shape[1]):
                    rest.append(rest[-1] @ TIME * 2 + OFFSET)
                starts = torch.stack(rest, 1)[:, : HEADS + 1]
                yield Chunk(chunk.states[:, : HEADS + 1] * 0, starts)

        return chunks

    fit = fit_heads(still(stream(0, chunks=9)), still(stream(1)), (0,), replace(EXACT, strengths=(0.0, 1e-1)))
    assert fit.chosen == (0.0,) * HEADS
    held = next(still(stream(2))())
    predicted = fit.predictor.predict([held.states[:, 1, 0]], held.rest[:, 0])
    torch.testing.assert_close(predicted, held.rest[:, 1:], atol=1e-6, rtol=1e-6)


def test_random_features_beat_linear_heads_on_a_curved_rule() -> None:
    def folded(seed: int) -> Callable[[], Iterator[Chunk]]:
        """The rest state is a folded image of the first layer, and the second layer sees one position ahead."""

        def chunks() -> Iterator[Chunk]:
            for chunk in stream(seed, chunks=6)():
                drive = chunk.states[:, :, 0].float()
                rest = (drive @ DEPTH.float()).abs()
                yield Chunk(torch.stack((drive[:, :-1], drive[:, 1:]), 2), rest[:, :-1])

        return chunks

    settings = FitSettings(strengths=(1e-4, 1e-2), steps=2, chunk_rows=512)
    fits = [fit_heads(folded(0), folded(1), (0, 1), replace(settings, features=f)) for f in (0, 200)]
    linear, lifted = (fit.scores.max(1).values for fit in fits)
    assert bool((lifted > 0.6 * linear).all())  # scores are negative squared errors
    assert fits[1].predictor.affine.offset.dtype is torch.float32


def test_progress_counts_rows_of_both_stages() -> None:
    seen: list[FitProgress] = []
    fit = fit_heads(stream(0), stream(1), (0,), EXACT, progress=seen.append)
    assert {entry.stage: entry.rows for entry in seen} == {"fit": fit.rows[0], "score": fit.held_out_rows[0]}


def test_fitting_errors() -> None:
    short, good = stream(0, length=HEADS), stream(1)
    for features in (0, 8):
        with pytest.raises(RestpointError, match="stream gave no row"):
            fit_heads(short, good, (0,), replace(EXACT, features=features))
    with pytest.raises(RestpointError, match=f"longer than {HEADS} tokens"):
        fit_heads(good, short, (0,), EXACT)
    with pytest.raises(RestpointError, match="layer 4"):
        fit_heads(good, good, (4,), EXACT)
    with pytest.raises(RestpointError, match="one number for each"):
        fit_heads(good, good, (0,), EXACT, score=lambda predicted, true: predicted - true)
    with pytest.raises(RestpointError, match="not finite"):
        fit_heads(good, good, (0,), EXACT, score=lambda predicted, true: predicted[:, 0] * float("nan"))


# --- the heads ------------------------------------------------------------------------------------


def some_heads(features: int = 7, layers: tuple[int, ...] = (0,)) -> MultiTokenHeads:
    inputs = (len(layers) + 1) * HIDDEN
    affine = AffineMap(parameters(inputs + features, HEADS * HIDDEN, seed=4), parameters(HEADS * HIDDEN, seed=5))
    drawn = RandomFeatures(parameters(inputs, features, seed=6), parameters(features, seed=7)) if features else None
    return MultiTokenHeads(layers, HEADS, affine, drawn)


@pytest.mark.parametrize("features", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(features: int, dtype: torch.dtype) -> None:
    heads = some_heads(features, (0, 2)).to(dtype=dtype)
    config, tensors = heads.state()
    again = MultiTokenHeads.from_state(json.loads(json.dumps(config)), load(save(tensors)))
    assert (again.name, again.state_layers, again.positions) == ("heads@2", (0, 2), HEADS)
    states, rest = [torch.randn(2, 4, HIDDEN).to(dtype) for _ in range(2)], torch.randn(2, 4, HIDDEN).to(dtype)
    predicted = again.predict(states, rest)
    assert predicted.shape == (2, 4, HEADS, HIDDEN)
    assert torch.equal(predicted, heads.predict(states, rest))
    assert again.parameters_read() == 15 * features + (15 + features) * HEADS * HIDDEN


def test_predict_evaluates_its_formula() -> None:
    heads = some_heads()
    assert heads.features is not None
    embedded, rest = parameters(HIDDEN, seed=8), parameters(HIDDEN, seed=9)
    x = torch.cat((embedded, rest))
    lifted = torch.cat((x, (x @ heads.features.weight + heads.features.bias).relu()))
    for head in range(HEADS):
        columns = slice(head * HIDDEN, (head + 1) * HIDDEN)
        expected = lifted @ heads.affine.matrix[:, columns] + heads.affine.offset[columns]
        torch.testing.assert_close(heads.predict([embedded], rest)[head], expected)


def test_head_errors() -> None:
    heads = some_heads()
    with pytest.raises(RestpointError, match="ascending"):
        replace(heads, state_layers=(1, 0))
    with pytest.raises(RestpointError, match="does not divide"):
        replace(heads, positions=HEADS - 1)
    with pytest.raises(RestpointError, match=r"fit the map on \[x, features"):
        replace(heads, features=some_heads(3).features)
    with pytest.raises(RestpointError, match="15 entries together"):
        heads.predict([torch.zeros(HIDDEN)] * 2, torch.zeros(HIDDEN))
    config, tensors = heads.state()
    with pytest.raises(RestpointError, match="not 'heads'; read it with Predictor"):
        MultiTokenHeads.from_state(config | {"kind": "affine"}, tensors)
    with pytest.raises(RestpointError, match=r"lacks 'features\.bias'"):
        MultiTokenHeads.from_state(config, {name: t for name, t in tensors.items() if name != "features.bias"})


# --- drafting -------------------------------------------------------------------------------------


def paths(found: Candidates) -> list[tuple[int, ...]]:
    texts: list[tuple[int, ...]] = []
    for token, parent in zip(found.tokens, found.parents, strict=True):
        texts.append((*(() if parent == ROOT else texts[parent]), token))
    return texts


@pytest.mark.parametrize("nodes", [1, 2, 5, 9, 1000])
def test_best_first_finds_the_most_probable_paths(nodes: int) -> None:
    laws = torch.softmax(parameters(3, 4, seed=nodes, scale=1.5), -1).sort(-1, descending=True).values.tolist()
    tokens = [[10 * depth + rank for rank in range(4)] for depth in range(3)]
    found = best_first(tokens, laws, nodes)
    reach = {}
    for depth in range(1, 4):
        for ranks in itertools.product(range(4), repeat=depth):
            reach[tuple(tokens[d][r] for d, r in enumerate(ranks))] = np.prod([laws[d][r] for d, r in enumerate(ranks)])
    assert len(reach) == 4 + 16 + 64
    assert set(paths(found)) == set(sorted(reach, key=lambda path: -reach[path])[:nodes])
    assert all(
        confidence == laws[t // 10][t % 10] for t, confidence in zip(found.tokens, found.confidences, strict=True)
    )


def test_impossible_tokens_are_left_out() -> None:
    found = best_first([[1, 2], [3, 4]], [[1.0, 0.0], [float("nan"), float("nan")]], 10)
    assert (found.tokens, found.parents, found.confidences) == ((1,), (ROOT,), (1.0,))
    assert best_first([[1]], [[0.0]], 3) == Candidates()


def tiny_heads(layered: LayeredModel, positions: int = 4) -> MultiTokenHeads:
    width = layered.hidden_size
    affine = AffineMap(parameters(2 * width, positions * width, seed=1), parameters(positions * width, seed=2))
    return MultiTokenHeads((0,), positions, affine).to(dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: positions are part of the embedding
def test_candidates_are_the_best_tree_of_the_heads_own_laws(family: str) -> None:
    layered = LayeredModel(build(family))
    heads = tiny_heads(layered)
    path = TokenPath([5, 17, 33], torch.randn(1, 1, layered.hidden_size))
    allowed = torch.arange(3, 93, 2)
    for vocabulary in (None, allowed):
        drafter = HeadsDrafter.of_model(heads, layered, HeadsSettings(nodes=12, width=3), vocabulary)
        for room in range(6):
            found = drafter.candidates(path, room)
            texts = paths(found)
            assert len(found.tokens) == (12 if room > 1 else 3 * room)
            check_tree(found, min(room, 4))
        rest = heads.predict([layered.embed(torch.tensor([[33]]), 2)[0]], path.rest[0])
        logits = layered.logits(rest)[0]
        exact = draft_dtype(layered) == layered.dtype
        if vocabulary is not None:
            masked = torch.full_like(logits, float("-inf"))
            masked[:, allowed] = logits[:, allowed]
            logits = masked
        laws = torch.softmax(logits, -1)
        depths = [len(text) - 1 for text in texts]
        expected = [float(laws[depth, token]) for depth, token in zip(depths, found.tokens, strict=True)]
        assert found.confidences == pytest.approx(expected, rel=1e-4 if exact else 0.03)
        assert laws[0, found.tokens[0]] >= laws[0].max() * (1 if exact else 0.97)


def test_no_rest_state_no_draft() -> None:
    layered = LayeredModel(build("llama"))
    drafter = HeadsDrafter.of_model(tiny_heads(layered), layered)
    assert drafter.candidates(TokenPath([1, 2], None), 4) == Candidates()


def test_drafter_errors() -> None:
    layered = LayeredModel(build("llama"))
    deep = replace(tiny_heads(layered), state_layers=(2,))
    with pytest.raises(RestpointError, match=r"state_layers=\(0,\)"):
        HeadsDrafter.of_model(deep, layered)
    for wrong in ({"nodes": 0}, {"width": 0}):
        with pytest.raises(RestpointError, match="at least 1"):
            HeadsSettings(**wrong)
    assert len(HeadsDrafter.prior) == len(HeadsDrafter.edges) + 1
    assert list(HeadsDrafter.prior) == sorted(HeadsDrafter.prior)
