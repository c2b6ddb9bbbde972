"""Samples of more than 8 bits: each picture by the range that it uses."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from tests.workers.pictures import ANY_SIZE, decoded, png_chunk
from workers.decode import decode_image


def tiff16(samples: np.ndarray) -> bytes:
    """(H, W, 3) uint16 -> an uncompressed TIFF, which Pillow does not write."""
    height, width, _ = samples.shape
    data = samples.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128)]
    tags += [(277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + struct.pack("<HHH", 16, 16, 16) + data


def png16(samples: np.ndarray) -> bytes:
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("greatest", "white"),
    [(4095, 4095), (4032, 4095), (1000, 1023), (200, 255), (16000, 16383), (20000, 65535)],
)
def test_samples_are_scaled_by_the_range_that_they_use(greatest: int, white: int) -> None:
    grey = np.tile(np.linspace(0, greatest, 9).astype(np.uint16), (9, 1))
    expected = np.rint(grey[0].astype(int) * 255 / white).astype(int).tolist()
    for format in ("PNG", "TIFF"):
        assert decoded(grey, format)[4, :, 0].tolist() == expected
    colours = np.stack([grey, grey[:, ::-1], grey], -1)
    for data in (png16(colours), tiff16(colours)):
        found = decode_image(data, ANY_SIZE)
        wanted = expected if white < 65535 else [value >> 8 for value in grey[0].tolist()]  # Pillow's upper bytes
        assert found[4, :, 0].tolist() == wanted
        assert found[4, :, 1].tolist() == wanted[::-1]


def test_a_tiff_tells_its_range() -> None:
    dark = np.tile(np.array([0, 250, 500, 1000], np.uint16), (9, 3))
    assert decoded(dark, "TIFF", tiffinfo={281: 4000})[4, :4, 0].tolist() == [0, 16, 32, 64]
