"""Run lengths, boxes, overlaps, panoptic PNGs and the mask resize."""

from __future__ import annotations

import io

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from workers.masks import (
    decode_panoptic_png,
    decode_rle,
    encode_panoptic_png,
    encode_rle,
    mask_box,
    open_png,
    resize_mask,
)

SIZES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)
MASKS = hnp.arrays(np.bool_, SIZES)


def block(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = True
    return mask


def test_rle_is_the_compressed_string_of_coco() -> None:
    assert encode_rle(block(5, 7, slice(1, 3), slice(2, 6))) == ";23000004"


@given(MASKS)
def test_rle_round_trip(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), *mask.shape), mask)


def test_rle_of_a_large_mask_round_trips() -> None:
    mask = np.random.default_rng(0).random((480, 640)) > 0.5
    mask[100:300] = True  # long and short runs, so that differences take several characters and both signs
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), 480, 640), mask)


@pytest.mark.parametrize(
    "counts", ["", ";2300000", ";230000045", ";23000004é", "\x01\x02", "oooo", "`" * 60, "`" * 59 + "0", "!", ";24"]
)
def test_rle_that_does_not_fill_the_mask_is_refused(counts: str) -> None:
    with pytest.raises(ValueError, match="RLE"):
        decode_rle(counts, 5, 7)


def test_rle_of_another_size_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"5x8: \d+ runs, 35 pixels"):
        decode_rle(";23000004", 5, 8)


@pytest.mark.parametrize("mask", [np.zeros((2, 3), np.uint8), np.zeros((2, 3, 1), bool), np.zeros((0, 3), bool)])
def test_a_mask_is_a_bool_matrix(mask: np.ndarray) -> None:
    for function in (encode_rle, mask_box, lambda m: resize_mask(m, 4, 4)):
        with pytest.raises(ValueError, match="bool mask"):
            function(mask)


def test_box_ends_after_the_last_pixel() -> None:
    assert mask_box(block(5, 7, slice(1, 3), slice(2, 6))) == (2.0, 1.0, 6.0, 3.0)
    assert mask_box(np.ones((5, 7), dtype=bool)) == (0.0, 0.0, 7.0, 5.0)
    assert mask_box(np.zeros((5, 7), dtype=bool)) == (0.0, 0.0, 0.0, 0.0)


def test_what_is_no_png_is_not_opened_whatever_pillow_would_do_with_it() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(OSError, match="cannot identify"):
        decode_panoptic_png(eps)
    jpeg = io.BytesIO()
    Image.new("RGB", (2, 2)).save(jpeg, format="JPEG")
    with pytest.raises(OSError, match="cannot identify"):
        open_png(jpeg.getvalue())


def test_panoptic_png_stores_the_low_byte_in_red() -> None:
    ids = np.array([[0, 1, 255], [256, 65536, (1 << 24) - 1]], dtype=np.int32)
    image = np.asarray(Image.open(io.BytesIO(encode_panoptic_png(ids))))
    assert image.tolist() == [[[0, 0, 0], [1, 0, 0], [255, 0, 0]], [[0, 1, 0], [0, 0, 1], [255, 255, 255]]]


@given(hnp.arrays(np.int32, SIZES, elements=st.integers(0, (1 << 24) - 1)))
def test_panoptic_png_round_trip(ids: np.ndarray) -> None:
    decoded = decode_panoptic_png(encode_panoptic_png(ids))
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, ids)


@pytest.mark.parametrize("wrong", [1 << 24, -1])
def test_an_id_beyond_24_bits_is_refused_not_wrapped(wrong: int) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        encode_panoptic_png(np.array([[1, wrong]], dtype=np.int32))


def test_panoptic_png_refuses_other_arrays_and_pictures() -> None:
    with pytest.raises(ValueError, match="float64"):
        encode_panoptic_png(np.zeros((2, 2)))
    stream = io.BytesIO()
    Image.new("L", (3, 2)).save(stream, format="PNG")
    with pytest.raises(ValueError, match="L"):
        decode_panoptic_png(stream.getvalue())
    with pytest.raises(OSError, match="cannot identify"):
        decode_panoptic_png(b"not a picture")


def test_resize_is_pillows_bicubic_cut_at_half() -> None:
    mask = np.random.default_rng(3).random((60, 60)) > 0.4
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((131, 97), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_mask(mask, 97, 131), np.asarray(grey) > 127.5)


def test_resize_keeps_shape_order_and_straight_edges() -> None:
    mask = block(6, 8, slice(2, 4), slice(4, 8))
    np.testing.assert_array_equal(resize_mask(mask, 12, 32), block(12, 32, slice(4, 8), slice(16, 32)))
    np.testing.assert_array_equal(resize_mask(mask, 6, 8), mask)
    with pytest.raises(ValueError, match="0x8"):
        resize_mask(mask, 0, 8)
