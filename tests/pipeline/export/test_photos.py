"""Copies of photos: byte by byte where every reader sees them upright, and encoded anew where not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.export.photos import photo_file
from tests.pipeline.export.labelled_runs import photo_bytes
from workers.decode import DecodeError, DecodeLimits, decode_image

LIMITS = DecodeLimits()


@pytest.mark.parametrize(("format", "ending"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")])
def test_a_photo_that_is_not_turned_keeps_its_bytes(format: str, ending: str) -> None:
    data = photo_bytes(20, 30, 0, format=format)
    assert photo_file(data, LIMITS) == (data, ending, (20, 30), False)


@pytest.mark.parametrize(("format", "ending"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".png"), ("TIFF", ".png")])
def test_a_turned_photo_is_stored_upright(format: str, ending: str) -> None:
    data = photo_bytes(20, 30, 0, turned=True, format=format)
    photo = photo_file(data, LIMITS)
    assert (photo.ending, photo.size, photo.turned) == (ending, (20, 30), True)
    with Image.open(io.BytesIO(photo.data)) as copy:
        assert (copy.height, copy.width, copy.getexif().get(0x0112, 1)) == (20, 30, 1)
        difference = np.asarray(copy.convert("RGB")).astype(int) - decode_image(data, LIMITS)
    assert np.abs(difference).mean() < (5 if format == "JPEG" else 0.01)


def test_a_format_that_few_read_becomes_png() -> None:
    photo = photo_file(photo_bytes(20, 30, 0, format="GIF"), LIMITS)
    assert (photo.ending, photo.size, photo.turned) == (".png", (20, 30), False)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_end_is_written_whole(progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 96, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, progressive=progressive)
    data = stream.getvalue()
    assert photo_file(data + b"and more behind its end", LIMITS).data == data + b"and more behind its end"
    cut = data[: -len(data) // 50]
    photo = photo_file(cut, LIMITS)
    with Image.open(io.BytesIO(photo.data)) as copy:
        assert np.abs(np.asarray(copy).astype(int) - decode_image(cut, LIMITS)).mean() < 5
    assert (photo.ending, photo.size, photo.turned) == (".jpg", (400, 96), False)


def test_what_is_no_photo_says_so() -> None:
    with pytest.raises(DecodeError):
        photo_file(b"no photo", LIMITS)
