"""Masks on photos: what is coloured, what is not, and what is refused."""

from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from workers.overlay import (
    HATCHING,
    category_color,
    css,
    cut_out,
    draw_classes,
    draw_overlay,
    inner_outline,
    jpeg_data_uri,
    oklch,
    paint_masks,
    png_data_uri,
    size_within,
)

GREY = np.full((40, 60, 3), 128, np.uint8)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def block(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("lightness", "chroma", "turn", "expected"),
    [
        (0.0, 0.0, 0.0, (0, 0, 0)),
        (1.0, 0.0, 0.3, (255, 255, 255)),
        (0.62796, 0.25768, 29.234 / 360, (255, 0, 0)),
        (0.45201, 0.31321, 264.052 / 360, (0, 0, 255)),
    ],
)
def test_oklch_gives_the_known_srgb_colours(
    lightness: float, chroma: float, turn: float, expected: tuple[int, int, int]
) -> None:
    assert np.abs(np.subtract(oklch(lightness, chroma, turn), expected)).max() <= 1


def test_the_colours_of_the_first_categories_are_well_apart() -> None:
    colors = [category_color(category) for category in range(1, 17)]
    distances = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 40
    assert category_color(7) == category_color(7)


@given(st.integers(0, 10**6))
def test_every_category_has_a_colour(category: int) -> None:
    assert len(css(category_color(category))) == 7


def test_css_writes_six_hexadecimal_digits() -> None:
    assert css((1, 171, 255)) == "#01abff"


@given(st.integers(1, 10**5), st.integers(1, 10**5))
def test_a_size_fits_its_box_and_keeps_its_shape(height: int, width: int) -> None:
    new_height, new_width = size_within(height, width, 240, 480)
    assert 1 <= new_height <= 240 and 1 <= new_width <= 480
    assert new_height == 240 or new_width == 480
    scale = min(240 / height, 480 / width)
    assert abs(new_height - max(1, height * scale)) <= 0.5 and abs(new_width - max(1, width * scale)) <= 0.5


def test_small_masks_are_painted_over_large_ones() -> None:
    ids = paint_masks([block(10, 20, 10, 20), block(0, 40, 0, 60)], 40, 60)
    assert ids[15, 15] == 1 and ids[0, 0] == 2
    assert np.bincount(ids.ravel()).tolist() == [0, 100, 2300]


def test_no_masks_paint_nothing() -> None:
    assert not paint_masks([], 4, 5).any()


def test_the_outline_is_inside_the_segment_and_not_at_the_edge_of_the_photo() -> None:
    ids = np.zeros((6, 8), np.int32)
    ids[:, :4] = 1
    outline = inner_outline(ids, 1)
    assert np.flatnonzero(outline.any(axis=0)).tolist() == [3]
    assert outline[:, 3].all()


def test_an_overlay_fills_half_and_outlines_fully() -> None:
    ids = block(10, 30, 20, 40).astype(np.int32)
    drawn = draw_overlay(GREY, ids, {1: RED}, 40, 60)
    assert drawn[20, 30].tolist() == pytest.approx([192, 64, 64], abs=1)  # half of grey, half of red
    assert drawn[20, 21].tolist() == pytest.approx([255, 0, 0], abs=30)
    assert drawn[2, 2].tolist() == pytest.approx([128, 128, 128], abs=2)


def test_an_overlay_has_the_size_asked_for_and_leaves_the_photo_alone() -> None:
    photo = GREY.copy()
    assert draw_overlay(photo, np.zeros((40, 60), np.int32), {}, 20, 30).shape == (20, 30, 3)
    assert (photo == GREY).all()


def test_each_segment_has_its_own_colour() -> None:
    ids = paint_masks([block(0, 40, 0, 30), block(0, 40, 30, 60)], 40, 60)
    drawn = draw_overlay(GREY, ids, {1: RED, 2: BLUE}, 40, 60)
    assert drawn[20, 10].argmax() == 0
    assert drawn[20, 50].argmax() == 2


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the photo is 60x40, its labels are 61x40"):
        draw_overlay(GREY, np.zeros((40, 61), np.int32), {}, 20, 30)
    with pytest.raises(ValueError, match="61x40"):
        cut_out(GREY, np.ones((40, 61), bool), RED, 32)


def test_a_cut_out_keeps_the_instance_and_fades_the_rest() -> None:
    photo = GREY.copy()
    photo[15:25, 20:40] = (10, 120, 10)
    crop = cut_out(photo, block(15, 25, 20, 40), RED, 104)
    assert crop.shape == (64, 104, 3)  # 10 + 6 by 20 + 6 pixels, four times as large
    assert crop[32, 52].tolist() == pytest.approx([10, 120, 10], abs=2)
    assert crop[2, 2].tolist() == pytest.approx([227, 227, 227], abs=2)


@given(st.integers(0, 39), st.integers(0, 59))
def test_a_single_pixel_can_be_cut_out_anywhere(row: int, column: int) -> None:
    crop = cut_out(GREY, block(row, row + 1, column, column + 1), RED, 32)
    assert max(crop.shape[:2]) == 32


def test_an_empty_mask_cannot_be_cut_out() -> None:
    with pytest.raises(ValueError, match="empty"):
        cut_out(GREY, np.zeros((40, 60), bool), RED, 32)


def test_a_data_uri_holds_a_jpeg_of_the_pixels() -> None:
    uri = jpeg_data_uri(GREY)
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert image.format == "JPEG"
        assert np.asarray(image).tolist() == GREY.tolist()


def test_classes_have_their_colours_parted_by_white_lines_and_void_is_hatched() -> None:
    classes = np.zeros((40, 60), np.uint8)
    classes[:, 20:40] = 1
    classes[:, 40:] = 255
    drawn = draw_classes(classes, [RED, BLUE], 40, 60)
    assert (drawn[:, :20] == RED).all()
    assert (drawn[:, 20] == 255).all()
    assert (drawn[:, 21:40] == BLUE).all()
    ground, lines = ((drawn[:, 40:] == color).all(axis=2) for color in HATCHING)
    assert (ground | lines).all()
    assert lines.mean() == pytest.approx(0.25, abs=0.01)


def test_a_map_is_shrunk_without_classes_that_are_not_there() -> None:
    classes = np.zeros((80, 120), np.uint8)
    classes[:, 60:] = 2
    drawn = draw_classes(classes, [RED, (0, 255, 0), BLUE], 20, 30)
    assert {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()} == {RED, BLUE, (255, 255, 255)}
    assert (drawn[:, :15] == RED).all()


def test_a_png_keeps_every_colour() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    head, _, data = png_data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == picture).all()
