"""Pictures and the bytes of their files, for the tests of decoding."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from workers.decode import DecodeLimits, decode_image

LIMITS = DecodeLimits()
ANY_SIZE = DecodeLimits(max_pixels=2_000_000, min_side=1)


def encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def photo(height: int = 90, width: int = 120) -> Image.Image:
    """A smooth colour picture: lossy formats keep it to a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 80], -1).astype(np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> np.ndarray:
    return decode_image(encode(image, format, **options), ANY_SIZE)
