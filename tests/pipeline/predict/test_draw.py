"""Labels on a photo: colours of categories, and texts inside their segments."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.predict.draw import LONGEST, draw_labels, text_places
from workers.merge import MergedLabels, merge_panoptic
from workers.overlay import category_color


def labels_of(height: int, width: int) -> MergedLabels:
    """A thing of category 2 in the left half, stuff of category 4 in the rest."""
    thing = np.zeros((1, height, width), bool)
    thing[:, :, : width // 2] = True
    return merge_panoptic(thing, np.array([2]), np.zeros((height, width), int), num_things=3, num_stuff=1)


def drawn(photo: np.ndarray, labels: MergedLabels, names: dict[int, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw_labels(photo, labels, names)))).astype(int)


def test_segments_have_the_colour_of_their_category() -> None:
    photo = np.full((120, 200, 3), 128, np.uint8)
    picture = drawn(photo, labels_of(120, 200), {})
    assert picture.shape == (120, 200, 3)
    for column, category in ((20, 2), (180, 4)):
        expected = (np.array(category_color(category)) + 128) / 2
        assert np.abs(picture[20, column] - expected).max() < 12, "half of it, but for what JPEG changes"


def test_the_text_is_the_name_or_the_number_of_the_category() -> None:
    photo, labels = np.full((120, 200, 3), 128, np.uint8), labels_of(120, 200)
    plain, named = drawn(photo, labels, {}), drawn(photo, labels, {2: "2", 4: "sky"})
    assert np.array_equal(plain[:, :95], named[:, :95])
    changed = np.abs(plain - named)[:, 105:].max(axis=2) > 60
    assert changed[40:80].any() and not changed[:30].any()


def test_large_photos_become_smaller_pictures_and_small_ones_stay() -> None:
    assert drawn(np.zeros((100, 4 * LONGEST, 3), np.uint8), labels_of(100, 4 * LONGEST), {}).shape == (25, LONGEST, 3)
    assert drawn(np.zeros((1, 1, 3), np.uint8), labels_of(1, 1), {}).shape == (1, 1, 3)


def test_a_photo_without_segments_is_the_photo() -> None:
    labels = MergedLabels(np.zeros((30, 40), np.int32), [], 0)
    assert np.abs(drawn(np.full((30, 40, 3), 77, np.uint8), labels, {}) - 77).max() <= 2


def test_the_place_of_a_text_is_the_deepest_pixel() -> None:
    ids = np.zeros((20, 40), np.int32)
    ids[5:14, 10:19] = 1  # with a thin arm that moves the centre of mass
    ids[9, 19:40] = 1
    assert text_places(ids, [1]) == {1: (pytest.approx(14.5 / 40), pytest.approx(9.5 / 20))}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_text_lies_on_its_segment(height: int, width: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 4, (height, width)).astype(np.int32)
    for segment, (x, y) in text_places(ids, [1, 2, 3]).items():
        assert ids[int(y * height), int(x * width)] == segment


def test_a_segment_too_small_to_be_seen_has_no_text() -> None:
    ids = np.zeros((3000, 3000), np.int32)
    ids[1, 1] = 1
    assert text_places(ids, [1]) == {}
