"""Formats that an installation may lack."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tests.workers.pictures import LIMITS, photo
from workers.decode import DecodeError, decode_image
from workers.formats import remedy
from workers.records import Status


def test_heic_is_read_where_pillow_heif_is() -> None:
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(photo()).save(stream, format="HEIF", quality=95)
    pixels = decode_image(stream.getvalue(), LIMITS)
    assert pixels.shape == (90, 120, 3)
    assert np.abs(pixels.astype(int) - np.asarray(photo())).mean() < 6
    for cut in (20, 200, len(stream.getvalue()) // 2):
        with pytest.raises(DecodeError) as caught:
            decode_image(stream.getvalue()[:cut], LIMITS)
        assert caught.value.status is Status.UNDECODABLE


def test_heic_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.decode.HAS_HEIC", False)
    with pytest.raises(DecodeError, match=r"HEIC needs pillow-heif: pip install 'u2label\[heic\]'"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", LIMITS)
    with pytest.raises(DecodeError, match="not a readable image of the formats JPEG"):
        decode_image(b"\0\0\0\x18ftypmp42\0\0\0\0mp41mp42", LIMITS)


def test_only_photos_that_are_not_read_have_a_remedy() -> None:
    assert remedy(".jpg") is remedy(".txt") is None
    assert remedy(".cr2") == "photos ending in .cr2 are not read; convert them"
