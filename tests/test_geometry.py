"""Motion and shape of clouds along depth: closed forms, NumPy and scikit-free least squares as oracles."""

import math

import numpy as np
import pytest
import torch

from families import VOCABULARY, build
from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.predictors import AffinePredictor, RestPointRecurrence
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.geometry import Geometry, rank_collapse
from restpoint.trajectory.histogram import Scale
from restpoint.trajectory.kinematics import MOTIONS, kinematics
from restpoint.trajectory.lens import FittedLens, Lens
from restpoint.trajectory.measure import Measure, Trajectory
from restpoint.trajectory.pairs import Pairs
from restpoint.trajectory.sampling import evenly_spaced


def cloud(index: int = 0, depth: int = 5, tokens: int = 40, hidden: int = 6) -> Trajectory:
    generator = torch.Generator().manual_seed(index)
    states = torch.randn(depth, tokens, hidden, generator=generator, dtype=torch.float64).cumsum(0) + 1.0
    return Trajectory(states.float(), index)


# --- motion ---


def test_a_circle_has_constant_speed_angle_and_curvature() -> None:
    """Points at equal angles on a circle of radius r: chords 2 r sin(a/2), turning by a at each."""
    turn, radius = 0.3, 5.0
    angles = turn * torch.arange(9, dtype=torch.float64)
    states = radius * torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    found = kinematics(states)
    chord = 2 * radius * math.sin(turn / 2)
    expected = {
        "norm": radius,
        "step": chord,
        "relative_step": chord / radius,
        "state_angle": math.cos(turn),
        "angle": math.cos(turn),
        "acceleration": 2 * chord * math.sin(turn / 2),
        "curvature": 2 * math.sin(turn / 2) / chord,
    }
    assert set(found) == set(expected) == set(MOTIONS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], value), atol=1e-9, rtol=1e-9)
    assert [len(found[name]) for name in MOTIONS] == [9, 8, 8, 8, 7, 7, 7]


def test_a_straight_line_has_no_curvature_and_a_token_at_rest_no_angle() -> None:
    line = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])[:, None]
    assert kinematics(line)["curvature"].item() == 0
    assert kinematics(line)["acceleration"].item() == 1
    still = torch.ones(3, 1, 2)
    found = kinematics(still)
    assert found["step"].tolist() == [[0.0], [0.0]]
    assert found["angle"].isnan().all()
    assert found["curvature"].isnan().all()
    assert kinematics(torch.tensor([[0.0], [1.0]])[:, None])["relative_step"].isnan().all()


def test_means_quantiles_and_places_over_several_texts() -> None:
    measure, texts = Geometry(), [cloud(index) for index in range(6)]
    for text in texts:
        measure.add(text)
    found = measure.results()
    for name in MOTIONS:
        every = np.concatenate([kinematics(text.states)[name].numpy() for text in texts], 1).astype(np.float64)
        np.testing.assert_allclose(found[f"{name}.mean"], every.mean(1), rtol=1e-6)
        np.testing.assert_allclose(found[f"{name}.std"], every.std(1), rtol=1e-5)
        even = np.concatenate([kinematics(text.states)[name].numpy() for text in texts[::2]], 1).astype(np.float64)
        for label, share in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
            np.testing.assert_allclose(found[f"{name}.{label}"], np.quantile(even, share, 1), rtol=0.1, atol=0.05)
        places = found[f"{name}.position"]
        assert places.shape[1] == 7  # 0, 1, 2-3, 4-7, 8-15, 16-31, 32-39
        third = np.stack([kinematics(text.states)[name].numpy()[:, 4:8] for text in texts[::2]]).mean((0, 2))
        np.testing.assert_allclose(places[:, 3], third, rtol=1e-5)


def test_undefined_motions_are_left_out_of_means() -> None:
    states = torch.tensor([[[1.0], [1.0]], [[2.0], [1.0]], [[4.0], [1.0]]])  # the second token rests
    measure = Geometry()
    measure.add(Trajectory(states, 1))
    assert measure.results()["angle.mean"].tolist() == [1.0]
    assert measure.results()["step.mean"].tolist() == [0.5, 1.0]


# --- clouds ---


def test_anisotropy_is_the_mean_cosine_of_two_tokens() -> None:
    measure, texts = Geometry(), [cloud(index) for index in (1, 2, 3)]
    for text in texts:
        measure.add(text)
    every = torch.cat([text.states for text in texts], 1).double()
    units = every / every.norm(dim=-1, keepdim=True)
    cosines = units @ units.mT
    count = units.shape[1]
    mean = (cosines.sum((1, 2)) - count) / (count * (count - 1))
    torch.testing.assert_close(measure.results()["anisotropy"], mean, atol=1e-6, rtol=1e-5)


def test_ranks_are_those_of_the_covariance() -> None:
    """Two directions of equal variance: rank 2 by either count; a sink far away spoils it where it is not left out."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4000, 2), generator=generator) * 2.0 - 1
    flat = torch.cat([signs, torch.zeros(4000, 4)], 1)
    flat[7] = torch.tensor([0, 0, 0, 0, 0, 500.0])
    measure = Geometry(every=1)
    measure.add(Trajectory(flat.expand(3, -1, -1).contiguous(), 1))
    found = measure.results()
    np.testing.assert_allclose(found["effective_rank.without_sinks"], 2.0, rtol=2e-3)
    np.testing.assert_allclose(found["participation_ratio.without_sinks"], 2.0, rtol=2e-3)
    assert (found["participation_ratio"] < 1.2).all()
    eigenvalues = np.linalg.eigvalsh(np.cov(flat.double().T.numpy(), bias=True)).clip(0)
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    np.testing.assert_allclose(found["participation_ratio"], expected, rtol=1e-6)


def test_clusters_and_energy_are_means_over_sampled_texts() -> None:
    """Three directions, tokens spread over them: three components; E_b of that configuration in closed form."""
    corners = torch.eye(3).repeat(4, 1)
    measure = Geometry(every=1, betas=(2.0,))
    measure.add(Trajectory(corners.expand(2, -1, -1).contiguous(), 0))
    measure.add(Trajectory(corners.expand(2, -1, -1).contiguous(), 4))
    measure.add(Trajectory(torch.ones(2, 5, 3), 3))  # not sampled: 3 is odd
    found = measure.results()
    assert found["clusters.components"].tolist() == [3, 3]
    assert found["clusters.rank"].tolist() == [3, 3]
    np.testing.assert_allclose(found["clusters.share"], 3 * 12 / (12 * 11))
    energy = (math.exp(2) + 2) / 3 / 4
    np.testing.assert_allclose(found["energy"], [[energy, energy]], rtol=1e-9)


def test_rank_collapse_is_zero_for_one_vector_repeated_and_falls_towards_it() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, vector = torch.randn(30, 8, generator=generator), torch.full((8,), 5.0)
    assert rank_collapse(vector.expand(30, -1)) == 0
    values = [float(rank_collapse(vector + share * noise)) for share in (1.0, 0.1, 0.01)]
    assert values[0] > 5 * values[1] > 25 * values[2] > 0
    R = (noise - noise.mean(0)).abs()
    expected = (R.sum(0).max() * R.sum(1).max()).sqrt() / (noise.abs().sum(0).max() * noise.abs().sum(1).max()).sqrt()
    torch.testing.assert_close(rank_collapse(noise), expected)


# --- pairs of layers ---


def test_r2_of_every_pair_is_that_of_least_squares() -> None:
    measure = Pairs(every=1)
    texts = [cloud(index) for index in range(20)]
    for text in texts:
        measure.add(text)
    every = torch.cat([text.states for text in texts], 1).double().numpy()
    count = every.shape[1]
    found = measure.results()["r2"]
    for i in range(5):
        inputs = np.concatenate([every[i], np.ones((count, 1))], 1)
        for j in range(5):
            rest = every[j] - inputs @ np.linalg.lstsq(inputs, every[j], rcond=None)[0]
            plain = 1 - (rest**2).sum() / ((every[j] - every[j].mean(0)) ** 2).sum()
            np.testing.assert_allclose(found[i, j], 1 - (1 - plain) * (count - 1) / (count - 7), atol=1e-6)
    np.testing.assert_allclose(found.diagonal(), 1.0, atol=1e-7)


def test_too_few_tokens_give_no_r2_and_wide_states_are_projected() -> None:
    measure = Pairs(every=1)
    measure.add(cloud(tokens=9))
    assert "r2" not in measure.results()
    wide = Pairs(every=1)
    generator = torch.Generator().manual_seed(0)
    wide.add(Trajectory(torch.randn(2, 8, 3100, generator=generator), 0))
    assert wide.results()["directions"] == 3072
    directions = wide._projected(torch.eye(3100).expand(2, -1, -1).contiguous())[0]
    torch.testing.assert_close(directions.T @ directions, torch.eye(3072), atol=1e-4, rtol=0)


# --- lens ---


def test_lens_against_laws_taken_one_by_one() -> None:
    model = build("llama")
    layered = LayeredModel(model)
    text = cloud(depth=layered.depth + 1, tokens=70, hidden=layered.hidden_size)
    generator = torch.Generator().manual_seed(3)
    size = layered.hidden_size
    maps = [
        AffineMap(torch.randn(rows, size, generator=generator) / size, torch.zeros(size)) for rows in (size, 2 * size)
    ]
    fitted = {1: AffinePredictor((1,), maps[0]), 2: RestPointRecurrence((2,), (maps[1],))}
    measure = Lens(lambda states: layered.logits(states[None])[0], {"fitted": FittedLens(fitted)}, 1)
    measure.add(text)
    found = measure.results()
    places = evenly_spaced(70, 64)
    chosen = text.states[:, places]
    logs = [model.lm_head(model.model.norm(own)).log_softmax(-1).double() for own in chosen]
    assert logs[0].shape[-1] == VOCABULARY
    for layer, own in enumerate(logs):
        law, last = own.exp(), logs[-1].exp()
        expected = {
            "entropy": -(law * own).sum(-1).mean(),
            "kl": (last * (logs[-1] - own)).sum(-1).mean(),
            "tv": 0.5 * (law - last).abs().sum(-1).mean(),
            "agreement": (own.argmax(-1) == logs[-1].argmax(-1)).double().mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[f"logit.{name}"][layer], value.detach(), atol=1e-5)
    assert found["fitted.kl"].isfinite().tolist() == [layer in fitted for layer in range(layered.depth + 1)]
    alone = chosen[1] @ maps[0].matrix
    later = places[places > 0]  # no token comes before the first
    together = torch.cat([text.states[2, later], text.states[-1, later - 1]], -1) @ maps[1].matrix
    for layer, rest, last in ((1, alone, chosen[-1]), (2, together, text.states[-1, later])):
        laws = [model.lm_head(model.model.norm(own)).softmax(-1).double() for own in (rest, last)]
        apart = 0.5 * (laws[0] - laws[1]).abs().sum(-1).mean()
        np.testing.assert_allclose(found["fitted.tv"][layer], apart.detach(), atol=1e-5)
    assert found["logit.kl"][-1] == 0
    assert found["logit.agreement"][-1] == 1


@pytest.mark.parametrize(("count", "most"), [(3, 64), (64, 64), (65, 64), (1000, 64)])
def test_tokens_looked_at_are_spread_and_even_and_keeps_the_last(count: int, most: int) -> None:
    places = evenly_spaced(count, most)
    assert len(places) == len(set(places.tolist())) == min(count, most)
    assert places[-1] == count - 1


# --- adding up ---


def measures() -> list[Measure]:
    weights = torch.randn(6, 11, generator=torch.Generator().manual_seed(9))
    return [Geometry(every=2), Pairs(every=2), Lens(lambda states: states @ weights, every=2)]


def test_two_halves_make_a_whole() -> None:
    texts = [cloud(index) for index in range(12)]
    for whole, one, other in zip(measures(), measures(), measures(), strict=True):
        for place, text in enumerate(texts):
            whole.add(text)
            (one if place < 5 else other).add(text)
        again = type(one).__new__(type(one))
        again.__dict__.update(one.__dict__)
        again.restore(one.sums)
        again.merge(other)
        merged, expected = again.results(), whole.results()
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(merged[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


def test_measures_of_models_of_other_shapes_do_not_merge() -> None:
    from restpoint.errors import RestpointError

    one, other = Geometry(), Geometry()
    one.add(cloud())
    other.add(cloud(depth=7))
    with pytest.raises(RestpointError, match=r"^geometry: .*merge only measurements of one model"):
        one.merge(other)


def test_memory_does_not_grow_with_texts() -> None:
    def size(measure: Measure) -> int:
        return sum(value.numel() for value in measure.sums.values())

    for measure in measures():
        measure.add(cloud(0))
        measure.add(cloud(2))
        first = size(measure)
        for index in range(4, 20):
            measure.add(cloud(index))
        assert size(measure) == first


# --- histograms ---


@pytest.mark.parametrize("scale", [Scale(-1.0, 1.0, 500), Scale(1e-3, 1e3, 2000, logarithmic=True)])
def test_quantiles_are_known_to_a_bin(scale: Scale) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 5000, generator=generator) * 0.9 + 0.05
    values[1, :10] = float("nan")
    counts = scale.count(values)
    assert counts.sum(-1).tolist() == [5000, 4990, 5000]
    found = scale.quantiles(counts, (0.01, 0.5, 0.99))
    expected = np.nanquantile(values.numpy(), (0.01, 0.5, 0.99), 1).T
    np.testing.assert_allclose(found, expected, atol=0.008)


def test_what_lies_outside_counts_as_the_nearer_end() -> None:
    scale = Scale(0.0, 1.0, 10)
    counts = scale.count(torch.tensor([[-5.0, -4.0, 0.55, 7.0]]))
    assert counts[0, 0] == 2
    assert counts[0, -1] == 1
    assert scale.quantiles(counts, (0.25,)).item() == 0
    assert scale.quantiles(counts, (0.99,)).item() == 1
    assert scale.quantiles(torch.zeros(1, 12, dtype=torch.int64), (0.5,)).isnan().all()
