"""What a GPU decides for a batch against what `workers.maskcut` decides photo by photo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.workers.test_maskcut import blobs
from workers import devices, maskcut
from workers.batch_cuts import bipartitions, seed_components
from workers.maskcut import Cut, bipartition, maskcut_stages


def snake(height: int, width: int) -> np.ndarray:
    """One path, a patch wide, through all rows."""
    side = np.zeros((height, width), bool)
    side[::2] = True
    side[1::4, -1] = side[3::4, 0] = True
    return side


def component(side: np.ndarray, seed: int) -> np.ndarray:
    labels, _ = ndimage.label(side)
    return labels == labels.flat[seed]


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 14), width=st.integers(1, 14), density=st.floats(0.3, 1), seed=st.integers(0, 999))
def test_components_are_scipys(height: int, width: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sides = rng.random((3, height, width)) < density
    seeds = [int(rng.choice(np.flatnonzero(side))) if side.any() else 0 for side in sides]
    found = seed_components(torch.from_numpy(sides).flatten(1), torch.tensor(seeds), (height, width))
    for side, at, mask in zip(sides, seeds, found, strict=True):
        if side.any():
            np.testing.assert_array_equal(mask.view(height, width), component(side, at))
        else:
            assert not mask.any()


@pytest.mark.parametrize("turn", range(4))
def test_the_longest_paths_are_followed_to_their_end(turn: int) -> None:
    for way in (snake(60, 60), np.tri(60, dtype=bool) & ~np.tri(60, k=-2, dtype=bool), snake(61, 7)):
        side = np.rot90(way, turn).copy()
        seed = int(np.flatnonzero(side)[0])
        found = seed_components(torch.from_numpy(side).view(1, -1), torch.tensor([seed]), side.shape)
        np.testing.assert_array_equal(found.view(side.shape), component(side, seed))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 999))
def test_bipartitions_are_those_of_each_photo(height: int, width: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(4, height, width)) ** 3
    sides, seeds, exchanged = bipartitions(torch.from_numpy(vectors).flatten(1), (height, width))
    for i, vector in enumerate(vectors):
        side, at, reverse = bipartition(vector)
        np.testing.assert_array_equal(sides[i].view(height, width), side)
        assert (int(seeds[i]), bool(exchanged[i])) == (at, reverse)


def batch() -> torch.Tensor:
    """Photos with two blobs, one, a complete graph, one without edges, noise, and much to cut."""
    grid = (10, 14)
    noise = torch.randn(1, 140, 8, generator=torch.Generator().manual_seed(1))
    return torch.cat(
        [
            blobs(grid, [(1, 1, 5, 6), (6, 8, 9, 12)]),
            blobs(grid, [(3, 3, 9, 9)]),
            torch.ones(1, 140, 8),
            torch.zeros(1, 140, 8),
            noise,
            blobs(grid, [(0, 0, 3, 3), (0, 5, 3, 8), (5, 0, 9, 4), (5, 6, 9, 9), (1, 10, 9, 13)]),
        ]
    )


def assert_same(stages: list[list[Cut]], expected: list[list[Cut]]) -> None:
    for mine, others in zip(stages, expected, strict=True):
        for cut, other in zip(mine, others, strict=True):
            np.testing.assert_allclose(cut.eigenvector, other.eigenvector, atol=1e-5)
            for name in ("side", "seed", "reversed", "component", "accepted", "mask"):
                np.testing.assert_array_equal(getattr(cut, name), getattr(other, name), name)


@pytest.mark.parametrize("first_steps", [32, 8])
def test_all_decisions_of_all_stages_are_those_of_each_photo(first_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where most photos need more steps than the first."""
    expected = maskcut_stages(batch(), (10, 14), tau=0.3, max_masks=5)
    monkeypatch.setattr(devices, "many_threads", lambda where: True)
    monkeypatch.setattr(maskcut, "FIRST_STEPS", first_steps)
    assert_same(maskcut_stages(batch(), (10, 14), tau=0.3, max_masks=5), expected)
