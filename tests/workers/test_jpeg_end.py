"""JPEGs that were cut: one that lacks only its end is read, one that lacks more is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.workers.pictures import LIMITS, encode, exif, photo
from workers.decode import DecodeError, decode_image


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": exif(6)}])
def test_a_jpeg_that_lacks_only_its_end_is_read(options: dict[str, object]) -> None:
    whole = encode(noisy(240, 240), "JPEG", **options)
    expected = decode_image(whole, LIMITS).astype(int)
    for missing in (1, 2, 3, len(whole) // 40):
        pixels = decode_image(whole[:-missing], LIMITS)
        assert pixels.shape == expected.shape
        assert (np.abs(pixels - expected).max(axis=-1) > 40).mean() < 0.1
    assert np.array_equal(decode_image(whole[:-2], LIMITS), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_jpeg_that_lacks_more_is_not(options: dict[str, object], share: float) -> None:
    whole = encode(noisy(240, 240), "JPEG", **options)
    with pytest.raises(DecodeError, match="image file is truncated"):
        decode_image(whole[: int(len(whole) * (1 - share))], LIMITS)


def noisy(height: int, width: int) -> Image.Image:
    """As many bytes in each row of blocks."""
    grain = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(photo(height, width)) + grain, 0, 255).astype(np.uint8))
