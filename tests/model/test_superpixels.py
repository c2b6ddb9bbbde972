"""Superpixels follow the edges of a photo, cover it once, and know their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from model.superpixels import patch_weights, raster_size, region_graph, superpixels, to_lab


def halves(height: int = 60, width: int = 90) -> np.ndarray:
    """A photo that is red on the left and blue on the right of column 40."""
    photo = np.zeros((height, width, 3), np.uint8)
    photo[:, :40, 0], photo[:, 40:, 2] = 200, 200
    return photo


def lab_raster(photo_hw3: np.ndarray, side: int, cell: int) -> torch.Tensor:
    """The photo's raster by its nearest pixels, in Lab."""
    rows, columns = (
        np.arange(n) * old // n
        for n, old in zip(raster_size(*photo_hw3.shape[:2], side, cell), photo_hw3.shape[:2], strict=True)
    )
    return to_lab(torch.from_numpy(photo_hw3[rows][:, columns]).permute(2, 0, 1).float() / 255)


def test_lab_of_known_colours() -> None:
    photo = np.array([[[255, 255, 255], [0, 0, 0]], [[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)
    lab = lab_raster(photo, 16, 2)
    assert lab.shape == (3, 16, 16)
    corners = lab[:, [1, 1, -2, -2], [1, -2, 1, -2]].T
    expected = [[100, 0, 0], [0, 0, 0], [53.2, 80.1, 67.2], [32.3, 79.2, -107.9]]
    np.testing.assert_allclose(corners, expected, atol=0.5)


@pytest.mark.parametrize("size", [(60, 90), (400, 30), (1, 1), (3, 2), (7, 500)])
def test_every_pixel_is_in_one_connected_superpixel(size: tuple[int, int]) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    labels = superpixels(lab_raster(photo, 96, 6), 6).numpy()
    assert set(np.unique(labels)) == set(range(labels.max() + 1))
    assert all(ndimage.label(labels == label)[1] == 1 for label in range(0, labels.max() + 1, 7))


def test_they_keep_to_the_edges_of_the_photo() -> None:
    lab = lab_raster(halves(), 90, 6)
    labels = superpixels(lab, 6)
    left = torch.arange(labels.shape[1]) < 40
    for label in labels.unique():
        columns = (labels == label).any(0)
        assert not (columns & left).any() or not (columns & ~left).any()


def test_the_graph_counts_pixels_edges_and_steps() -> None:
    lab = torch.zeros(3, 4, 6)
    lab[0, :, 3:] = 10
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)
    graph = region_graph(labels, lab)
    assert graph.size.tolist() == [12, 12]
    assert graph.border.tolist() == [10, 10]  # two rows of three and a side of four
    assert (graph.pairs.tolist(), graph.length.tolist(), graph.step.tolist()) == ([[0], [1]], [4], [10])
    assert graph.colour[:, 0].tolist() == [0, 10]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_patches_are_seen_with_weights_that_sum_to_one_and_keep_planes(h: int, w: int, seed: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, (12, 18)))
    labels[0, :5] = torch.arange(5)
    weights = patch_weights(labels, 5, (h, w))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert (weights >= 0).all()


def test_a_superpixel_sees_the_patches_where_it_lies() -> None:
    labels = torch.zeros(8, 8, dtype=torch.long)
    labels[:, 4:] = 1
    weights = patch_weights(labels, 2, (2, 4)).view(2, 2, 4)
    assert weights[0, :, 3].abs().max() == 0 and weights[1, :, 0].abs().max() == 0
    torch.testing.assert_close(weights[0], weights[1].flip(1))
