from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import devices
from workers.permutohedral import build_lattice

F32 = np.float32


class LiteralLattice:
    """The filter word for word, one point and one vertex at a time, with the vertices in a dict."""

    def __init__(self, features_dp: np.ndarray) -> None:
        self.d = len(features_dp)
        self.simplices = [self.simplex(point) for point in features_dp.T]
        self.vertices = {key for simplex in self.simplices for key, _ in simplex}

    def simplex(self, point: np.ndarray) -> list[tuple[tuple[int, ...], np.float32]]:
        d = self.d
        unit = F32(np.sqrt(2 / 3) * (d + 1))
        scaled = [F32(point[i] * F32(float(unit) / np.sqrt((i + 1) * (i + 2)))) for i in range(d)]
        elevated, total = [F32(0)] * (d + 1), F32(0)
        for i in range(d, 0, -1):
            elevated[i] = total - F32(i) * scaled[i - 1]
            total = total + scaled[i - 1]
        elevated[0] = total

        nearest = [(d + 1) * int(np.rint(e * F32(1 / (d + 1)))) for e in elevated]
        offset = [e - F32(n) for e, n in zip(elevated, nearest, strict=True)]
        rank = [0] * (d + 1)
        for i in range(d + 1):
            for j in range(i + 1, d + 1):
                rank[i if offset[i] < offset[j] else j] += 1
        excess = sum(nearest) // (d + 1)
        for i in range(d + 1):
            rank[i] += excess
            turn = (rank[i] < 0) - (rank[i] > d)
            rank[i] += turn * (d + 1)
            nearest[i] += turn * (d + 1)

        weights = np.zeros(d + 2, F32)
        for i in range(d + 1):
            part = (elevated[i] - F32(nearest[i])) * F32(1 / (d + 1))
            weights[d - rank[i]] += part
            weights[d + 1 - rank[i]] -= part
        weights[0] += F32(1) + weights[d + 1]
        keys = [tuple(n + r - (d + 1) * (k > d - r) for n, k in zip(nearest, rank, strict=True)) for r in range(d + 1)]
        return list(zip(keys, weights[: d + 1], strict=True))

    def filter(self, values_pc: np.ndarray) -> np.ndarray:
        zero = np.zeros(values_pc.shape[1])
        table = dict.fromkeys(self.vertices, zero)
        for simplex, value in zip(self.simplices, values_pc, strict=True):
            for key, weight in simplex:
                table[key] = table[key] + weight * value
        for axis in range(self.d + 1):
            step = np.full(self.d + 1, -1)
            step[axis] = self.d
            table = {
                key: value + 0.5 * (table.get(tuple(key + step), zero) + table.get(tuple(key - step), zero))
                for key, value in table.items()
            }
        gain = 1 / (1 + 2.0**-self.d)
        return np.array([gain * sum(weight * table[key] for key, weight in simplex) for simplex in self.simplices])


def assert_same_filter(features_dp: np.ndarray) -> None:
    values_pc = np.random.default_rng(1).random((features_dp.shape[1], 2), F32)
    lattice, literal = build_lattice(torch.from_numpy(features_dp)), LiteralLattice(features_dp)
    assert lattice.neighbours_DV2.shape == (len(features_dp) + 1, len(literal.vertices) + 1, 2)
    np.testing.assert_allclose(lattice.filter(torch.from_numpy(values_pc)), literal.filter(values_pc), rtol=2e-5)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_filter_is_the_literal_one(d: int, spread: float) -> None:
    features_dp = np.random.default_rng(d).normal(0, spread, (d, 120)).astype(F32)
    assert_same_filter(features_dp)


def test_pixels_of_an_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(90, 110, (12, 10, 3)) + 100 * (np.mgrid[:12, :10][1] > 4)[..., None]
    y, x = np.mgrid[:12, :10].astype(F32)
    position = np.stack([x.ravel(), y.ravel()]) / F32(3)
    assert_same_filter(position)
    assert_same_filter(np.concatenate([position, image.reshape(120, 3).T.astype(F32) / F32(5)]))


@pytest.mark.parametrize("levels", [2, 20])
def test_points_on_faces_and_in_the_same_place(levels: int) -> None:
    features_dp = np.random.default_rng(0).integers(0, levels, (5, 150)).astype(F32) / F32(5)
    assert_same_filter(features_dp)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), points=st.integers(1, 12), scale=st.sampled_from([0.05, 1, 50, 5_000]))
def test_any_cloud_of_any_size(seed: int, points: int, scale: float) -> None:
    features_dp = np.random.default_rng(seed).uniform(-scale, scale, (5, points)).astype(F32)
    assert_same_filter(features_dp)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("scale", [1.0, 100.0, 1_000.0, 20_000.0])
def test_vertices_stay_apart_when_their_codes_outgrow_an_integer(scale: float) -> None:
    # Codes are int32, int64, int64 and hashed; pairs of points stay neighbours while the pairs lie far apart.
    pairs = np.random.default_rng(3).uniform(0, scale, (5, 60)).astype(F32)
    assert_same_filter(np.concatenate([pairs, pairs + F32(0.25)], axis=1))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("scale", [1.0, 100.0, 1_000.0, 20_000.0])
def test_clouds_do_not_hear_of_each_other(scale: float) -> None:
    """Not even those in the same place. Codes are int32, int64, int64 and hashed."""
    rng = np.random.default_rng(4)
    first, second = (torch.from_numpy(rng.uniform(0, scale, (5, points)).astype(F32)) for points in (60, 40))
    clouds, values = [first, second, first + 0.1, first], torch.from_numpy(rng.random((220, 3), F32))
    lattice = build_lattice(torch.cat(clouds, 1), [60, 40, 60, 60]).normalised(2.0)
    together = lattice.filter(values).split([60, 40, 60, 60])
    for cloud, value, filtered in zip(clouds, values.split([60, 40, 60, 60]), together, strict=True):
        torch.testing.assert_close(filtered, build_lattice(cloud).normalised(2.0).filter(value), atol=1e-6, rtol=1e-5)


def test_a_search_finds_the_neighbours_that_tables_find(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.from_numpy(np.random.default_rng(0).uniform(0, 30, (5, 500)).astype(F32))
    by_tables = build_lattice(features).neighbours_DV2
    monkeypatch.setattr(devices, "many_threads", lambda where: True)
    assert torch.equal(build_lattice(features).neighbours_DV2, by_tables)


def test_weights_are_barycentric() -> None:
    features = torch.from_numpy(np.random.default_rng(0).uniform(0, 50, (5, 1000)).astype(F32))
    weights = build_lattice(features).slice_weights_PD * (1 + 2**-5)
    assert weights.min() >= -1e-6
    torch.testing.assert_close(weights.sum(1), torch.ones(1000))


def test_impulse_spreads_about_as_a_gaussian_of_unit_variance() -> None:
    side, deviation = 61, 5.0
    y, x = torch.meshgrid(torch.arange(side) - 30.0, torch.arange(side) - 30.0, indexing="ij")
    lattice = build_lattice(torch.stack([x.flatten(), y.flatten()]) / deviation)
    impulse = ((x == 0) & (y == 0)).float().view(-1, 1)
    response = lattice.filter(impulse).view(side, side)
    response = response / response.sum()
    exact = torch.exp(-(x**2 + y**2) / (2 * deviation**2))
    assert (response * x**2).sum().item() == pytest.approx(deviation**2, rel=0.15)
    assert (response * y**2).sum().item() == pytest.approx(deviation**2, rel=0.15)
    assert torch.corrcoef(torch.stack([response.flatten(), exact.flatten()]))[0, 1] > 0.98


def test_normalised_filter_is_n_k_n_times_its_gain() -> None:
    features = torch.from_numpy(np.random.default_rng(0).uniform(0, 4, (2, 300)).astype(F32))
    values = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    lattice = build_lattice(features)
    scale = 1 / lattice.filter(torch.ones(300, 1)).sqrt()
    torch.testing.assert_close(lattice.normalised(4.0).filter(values), 4 * scale * lattice.filter(scale * values))


def test_neighbours_are_mutual_and_row_v_is_never_written() -> None:
    features = torch.from_numpy(np.random.default_rng(0).uniform(0, 4, (3, 200)).astype(F32))
    lattice = build_lattice(features)
    absent = lattice.neighbours_DV2.shape[1] - 1
    for below, above in lattice.neighbours_DV2.long().transpose(1, 2):
        assert below[absent] == above[absent] == absent
        present = (below != absent).nonzero().squeeze(1)
        assert len(present) and torch.equal(above[below[present]], present)
    starts = lattice.splat_starts.tolist()
    assert all(low < high for low, high in pairwise(starts[:-1]))
    assert starts[-2] == starts[-1] == 200 * 4


def test_points_too_far_apart_for_float32_are_an_error() -> None:
    with pytest.raises(ValueError, match="larger standard deviations"):
        build_lattice(torch.tensor([[0.0, 1e7], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="larger standard deviations"):
        build_lattice(torch.tensor([[0.0, float("nan")]]))
