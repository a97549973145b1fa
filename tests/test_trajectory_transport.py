import math

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

import families
from restpoint.bundled import prompts
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory import bounds as bounds_module
from restpoint.trajectory.bounds import Bounds
from restpoint.trajectory.measure import Measure, Trajectory
from restpoint.trajectory.record import states_of
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.trajectory.transport import Transport
from restpoint.transport.divergence import sinkhorn_divergence
from restpoint.transport.sliced import random_projections


def walk(index: int, depth: int = 6, tokens: int = 9, hidden: int = 12) -> Trajectory:
    generator = torch.Generator().manual_seed(index)
    return Trajectory(torch.randn(depth, tokens, hidden, generator=generator).cumsum(0), index)


def measured(measure: Measure, *texts: Trajectory) -> dict[str, torch.Tensor]:
    for text in texts:
        measure.add(text)
    return measure.results()


def close(found: torch.Tensor, expected: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


def test_evenly_spaced_tokens():
    assert evenly_spaced(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert evenly_spaced(10, 1).tolist() == [0]
    for tokens, most in ((17, 16), (1000, 7)):
        chosen = evenly_spaced(tokens, most)
        assert len(set(chosen.tolist())) == most
        assert chosen[[0, -1]].tolist() == [0, tokens - 1]


# --- transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [5, 12])
def test_distances_are_those_of_pot(hidden):
    """Fewer dimensions than tokens, and more: moments and Gram matrices.

    POT takes no singular covariances, so the clouds of more dimensions are turned ones of five.
    """
    flat = walk(0, hidden=5).states.double()
    turn = torch.linalg.qr(torch.randn(hidden, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).Q
    text = Trajectory(flat @ turn.T, 0)
    found = measured(Transport(every=1, projections=32, regularisation=0.5, seed=3), text)
    lines = random_projections(hidden, 32, torch.Generator().manual_seed(3)).numpy()
    raw = text.states
    for kind, clouds in (("raw", raw), ("unit", raw / raw.norm(dim=-1, keepdim=True))):
        centred = clouds - clouds.mean(1, keepdim=True)
        spread = float(centred[-1].square().sum(-1).mean().sqrt())
        inner = centred @ turn
        means, covariances = (clouds @ turn).mean(1).numpy(), (inner.mT @ inner / clouds.shape[1]).numpy()

        def gaussian(i: int, j: int, means: np.ndarray = means, covariances: np.ndarray = covariances) -> float:
            return float(ot.gaussian.bures_wasserstein_distance(means[i], means[j], covariances[i], covariances[j]))

        def sliced(i: int, j: int, clouds: torch.Tensor = clouds) -> float:
            return float(ot.sliced_wasserstein_distance(clouds[i].numpy(), clouds[j].numpy(), projections=lines, p=2))

        def sinkhorn(i: int, j: int, clouds: torch.Tensor = clouds, strength: float = spread**2) -> float:
            return float(sinkhorn_divergence(clouds[i], clouds[j], strength, tolerance=1e-7).value) ** 0.5

        for name, distance, tolerance in (
            ("gaussian", gaussian, 1e-6),
            ("sliced", sliced, 1e-9),
            ("sinkhorn", sinkhorn, 1e-4),
        ):
            profile = [distance(layer, 5) for layer in range(5)] + [0.0]
            between = [distance(layer, layer + 1) for layer in range(5)]
            close(found[f"{kind}.{name}.to_final"], profile, tolerance)
            close(found[f"{kind}.{name}.between"], between, tolerance)
            close(found[f"{kind}.{name}.to_final.relative"], np.array(profile) / spread, tolerance)
            close(found[f"{kind}.{name}.between.relative"], np.array(between) / spread, tolerance)
    assert float(found["raw.sinkhorn.unconverged"]) == 0


def test_a_cloud_that_only_moves_is_as_far_as_it_moved():
    generator = torch.Generator().manual_seed(1)
    cloud, shift = torch.randn(7, 9, generator=generator), torch.randn(9, generator=generator)
    places = torch.tensor([0.0, 1.0, 4.0, 6.0])
    found = measured(Transport(every=1, regularisation=1.0), Trajectory(cloud + places[:, None, None] * shift, 0))
    length = float(shift.norm())
    for name in ("gaussian", "sinkhorn"):
        close(found[f"raw.{name}.to_final"], length * np.array([6, 5, 2, 0]), 1e-4)
        close(found[f"raw.{name}.between"], length * np.array([1, 3, 2]), 1e-4)
    seen = found["raw.sliced.to_final"]
    close(seen / seen[0], np.array([6, 5, 2, 0]) / 6, 1e-5)


@pytest.mark.parametrize(("profile", "layer"), [([1, 0.5, 0.04, 0.06, 0.01, 0], 4), ([1, 1, 1, 0], 3), ([0, 0, 0], 0)])
def test_the_profile_has_flattened_from_where_it_stays_flat(profile, layer):
    """Clouds (1 + x) X around 0 are x sqrt(tr cov X) apart, in units of the last one's spread x."""
    cloud = torch.randn(8, 20, generator=torch.Generator().manual_seed(2))
    cloud = cloud - cloud.mean(0)
    found = measured(Transport(every=1), Trajectory((1 + torch.tensor(profile))[:, None, None] * cloud, 0))
    close(found["raw.gaussian.to_final.relative"], profile, 1e-5)
    assert float(found["raw.gaussian.flat_from"]) == layer
    assert float(found["raw.sliced.flat_from"]) == layer
    close(found["unit.gaussian.to_final"], np.zeros(len(profile)), 1e-5)


def test_mean_and_deviation_over_the_texts_chosen_by_index():
    texts = [walk(index, tokens=6 + index) for index in range(10)]
    found = measured(Transport(every=3, tokens=7), *texts)
    assert float(found["texts"]) == 4
    cut = [Trajectory(text.states[:, evenly_spaced(text.states.shape[1], 7)], 0) for text in texts[::3]]
    single = [measured(Transport(every=1), text) for text in cut]
    for name in ("raw.gaussian.to_final", "unit.sliced.between.relative"):
        values = torch.stack([one[name] for one in single]).numpy()
        close(found[name], values.mean(0), 1e-12)
        close(found[f"{name}.std"], values.std(0), 1e-7)
        assert float(single[0][f"{name}.std"].abs().max()) == 0


def test_halves_of_a_corpus_merge_to_one_pass():
    texts = [walk(index) for index in range(8)]
    matrix = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def transport() -> Transport:
        return Transport(every=2, regularisation=0.5)

    def bounds() -> Bounds:
        return Bounds(lambda states: states.double() @ matrix, matrix.T, every=2, tokens=5, support=4)

    for make in (transport, bounds):
        whole = measured(make(), *texts)
        first, second = make(), make()
        measured(second, *texts[5:])
        measured(first, *texts[:5])
        restored = make()
        restored.restore(first.sums)
        restored.merge(second)
        merged = restored.results()
        assert merged.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)
        assert float(make().results()["texts"]) == 0


def test_tokens_without_a_direction_are_left_out_of_directions_only():
    text = walk(3)
    states = text.states.clone()
    states[0, 2] = 0
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    found = measured(Transport(every=1), Trajectory(states, 0))
    others = measured(Transport(every=1), Trajectory(states[:, kept], 0))
    close(found["unit.gaussian.to_final"], others["unit.gaussian.to_final"], 1e-10)
    assert float((found["raw.gaussian.to_final"] - others["raw.gaussian.to_final"]).abs()[0]) > 1e-3
    with pytest.raises(RestpointError, match=r"^states: those of text 7"):
        Transport(every=1).add(Trajectory(states / states.norm(dim=-1, keepdim=True), 7))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Transport(every=0), "every"),
        (lambda: Transport(tokens=1), "tokens"),
        (lambda: Transport(projections=0), "projections"),
        (lambda: Transport(regularisation=-0.1), "regularisation"),
        (lambda: Bounds(lambda states: states, tokens=0), "tokens"),
        (lambda: Bounds(lambda states: states, bins=0), "bins"),
        (lambda: Bounds(lambda states: states * math.inf).add(walk(0)), "readout"),
    ],
)
def test_bad_settings_are_refused_by_name(call, name):
    with pytest.raises(RestpointError, match=f"^{name}[: ]"):
        call()


# --- bounds ---------------------------------------------------------------------------------------


def test_bounds_of_a_model_by_brute_force():
    layered = LayeredModel(families.build("llama"))
    ids = torch.randint(3, families.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))
    states = states_of(layered, ids, tuple(range(layered.depth)))[0].transpose(0, 1).contiguous()
    depth = layered.depth + 1
    calls: list[tuple[int, ...]] = []

    def readout(states: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(states.shape))
        return layered.logits(states[None])[0]

    embeddings = layered.unembedding.weight
    found = measured(Bounds(readout, embeddings, every=1, tokens=4, bins=400, support=8), Trajectory(states, 0))
    assert calls == [(4, layered.hidden_size)] * depth  # the last layer and then one after another
    chosen = evenly_spaced(12, 4)
    with torch.no_grad():
        logits = layered.logits(states[:, chosen]).double().numpy()
    laws = np.exp(logits - logits.max(-1, keepdims=True))
    laws /= laws.sum(-1, keepdims=True)
    variation = np.abs(laws[:-1] - laws[-1]).sum(-1) / 2
    apart = logits[:-1] - logits[-1]
    bound = np.tanh((apart.max(-1) - apart.min(-1)) / 4)
    close(found["variation"], variation.mean(1), 1e-6)
    close(found["variation.bound"], bound.mean(1), 1e-6)
    close(found["tightness"], (variation / bound).mean(1), 1e-6)
    assert found["violations"].tolist() == [0] * (depth - 1)
    assert (float(found["texts"]), float(found["tokens"])) == (1, 4)
    vectors = embeddings.detach().double().numpy()
    cost = cdist(vectors, vectors)
    exact = np.array([[ot.emd2(p, q, cost) for p, q in zip(row, laws[-1], strict=True)] for row in laws[:-1]]).mean(1)
    assert bool((found["transport.lower"].numpy() <= exact + 1e-6).all())
    assert bool((found["transport.upper"].numpy() >= exact - 1e-6).all())
    assert bool((found["transport.covered"] > 0.2).all())


def test_quantiles_of_tightness_are_within_a_bin_and_violations_are_counted(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(3, 500, 6, generator=generator)
    found = measured(Bounds(lambda x: x, every=1, tokens=500, bins=100), Trajectory(states, 0))
    laws = states.double().softmax(-1)
    apart = (states[:-1] - states[-1]).double()
    tightness = (laws[:-1] - laws[-1]).abs().sum(-1) / 2 / torch.tanh((apart.amax(-1) - apart.amin(-1)) / 4)
    for name, share in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
        expected = torch.quantile(tightness, share, dim=1)
        np.testing.assert_allclose(found[f"tightness.{name}"].numpy(), expected.numpy(), atol=0.012)
    monkeypatch.setattr(bounds_module, "softmax_variation_bound", lambda a, b: torch.zeros(a.shape[:-1]).double())
    found = measured(Bounds(lambda x: x, every=1, tokens=500), Trajectory(states, 0))
    assert found["violations"].tolist() == [500, 500]


def test_steps_that_shrink_at_one_rate_are_estimated_by_their_limit():
    rate, depth, tokens = 0.7, 8, 5
    direction = torch.randn(tokens, 10, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    path = torch.tensor([(1 - rate**layer) / (1 - rate) for layer in range(depth)], dtype=torch.float64)
    states = (path[:, None, None] * direction).float()
    found = measured(Bounds(lambda x: x, every=1), Trajectory(states, 0))
    expected = [1 / (1 - rate ** (depth - 1 - layer)) for layer in range(1, depth - 1)]
    close(found["contraction.share"], np.ones(depth - 2))
    close(found["contraction.holds"], np.ones(depth - 2))
    close(found["contraction.ratio"], expected, 1e-4)
    close(found["contraction.geometric_ratio"], expected, 1e-4)


def test_the_estimate_fails_where_later_steps_grow_and_is_not_made_where_steps_grow():
    """Steps 4, 1, 8, 16 on a line: at layer 1 the rate 1/4 promises 4/3, and 25 are left."""
    places = torch.tensor([0.0, 4.0, 5.0, 13.0, 29.0])
    states = places[:, None, None] * torch.eye(2, 6)
    found = measured(Bounds(lambda x: x, every=1), Trajectory(states, 0))
    close(found["contraction.share"], [1, 0, 0])
    close(found["contraction.holds"], [0, math.nan, math.nan])
    close(found["contraction.ratio"], [4 / 3 / 25, math.nan, math.nan], 1e-6)


def test_on_the_bundled_model(reference):
    layered = LayeredModel(reference.model)
    ids = torch.tensor([reference.tokenizer(prompts()[0].text)["input_ids"][:48]])
    states = states_of(layered, ids, tuple(range(layered.depth)))[0].transpose(0, 1).contiguous()
    text = Trajectory(states, 0)
    found = measured(Transport(regularisation=0.2), text)
    for name in ("raw.gaussian", "unit.gaussian", "unit.sinkhorn"):
        profile, between = found[f"{name}.to_final"], found[f"{name}.between"]
        assert profile.shape == (17,)
        assert between.shape == (16,)
        assert float(profile[-1]) == 0
        # A distance: from one layer to the next the way still to go shrinks by the step between them at most.
        assert bool((profile[:-1] - profile[1:] <= between + 1e-3 * profile[0]).all())
        assert 8 < float(found[f"{name}.flat_from"]) <= 16
    assert float(found["unit.gaussian.to_final"][15] / found["unit.gaussian.to_final"][0]) < 0.6
    laws = measured(
        Bounds(lambda x: layered.logits(x[None])[0], layered.unembedding.weight, tokens=4, support=16), text
    )
    assert float(laws["violations"].sum()) == 0
    assert bool((laws["variation"] <= laws["variation.bound"]).all())
    assert bool((laws["transport.lower"] > 0.5 * laws["transport.upper"]).all())
    assert float(laws["transport.upper"][15]) < 0.6 * float(laws["transport.lower"][0])
