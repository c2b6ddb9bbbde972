from __future__ import annotations

import pytest
import torch

from workers import devices, photo_pixels
from workers.photo_pixels import batches, stack_photos


def test_pixels_keep_their_places_and_colours() -> None:
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in ((2, 3), (2, 3), (4, 1))]
    photos = stack_photos(images, "cpu")
    features_5P = photos.features()
    for image, features_HW5 in zip(images, photos.of_each(features_5P.t().contiguous()), strict=True):
        x, y = torch.meshgrid(torch.arange(image.shape[1]), torch.arange(image.shape[0]), indexing="xy")
        assert torch.equal(features_HW5, torch.cat([x[..., None], y[..., None], image], 2).float())


def test_photos_of_a_size_that_follow_each_other_are_one_map() -> None:
    images = [torch.zeros(*size, 3, dtype=torch.uint8) for size in ((2, 3), (2, 3), (3, 2), (2, 3))]
    photos = stack_photos(images, "cpu")
    assert [tuple(run.shape) for run in photos.maps(photos.colours_P3)] == [(2, 2, 3, 3), (1, 3, 2, 3), (1, 2, 3, 3)]


def test_a_cpu_has_one_photo_at_a_time() -> None:
    assert batches([(4, 4), (2, 2), (4, 4)], [1, 1, 1], "cpu") == [[1], [0], [2]]
    assert batches([], [], "cpu") == []


def test_a_gpu_has_what_fits_and_sizes_stay_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "many_threads", lambda where: True)
    sizes = [(4, 4), (2, 2), (4, 4), (2, 2), (9, 9)]
    assert batches(sizes, [3] * 5, "cpu") == [[1, 3, 0, 2, 4]]
    monkeypatch.setattr(photo_pixels, "MOST_VALUES", 40 * (photo_pixels.LATTICE + 3 * photo_pixels.MAPS))
    assert batches(sizes, [3] * 5, "cpu") == [[1, 3, 0, 2], [4]]  # of 4 + 4 + 16 + 16 pixels, and more than fits
    assert batches(sizes, [3, 3, 4, 3, 3], "cpu") == [[1, 3, 0], [2], [4]]
