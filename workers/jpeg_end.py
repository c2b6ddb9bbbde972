"""JPEGs that were cut short: how much of the picture is missing.

A file that was cut is decoded with an end mark put behind it, and again with junk before the mark: what the junk
changes had not come. That also tells of progressive files, whose scans are each of the whole picture, where the last
bits of all coefficients had begun to come.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

END = b"\xff\xd9"
JUNK = bytes(37 * n % 251 for n in range(2048))
MISSING_SHARE = 1 / 8  # of the rows, up to which a picture lacks only its end
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # SOF of baseline, extended and progressive files
SCAN = 0xDA
MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # what ends the coded data of a scan


def without_end(data: bytes, decode: Callable[[bytes], NDArray[Any]]) -> NDArray[Any] | None:
    """The pixels (H, W) or (H, W, C) of a cut JPEG that is a whole picture but for an eighth of its rows; None of one
    that lacks more. `decode` turns bytes into pixels, and its errors are passed on."""
    if not _all_scans_begun(data):
        return None
    data = data.rstrip(b"\xff")
    pixels = decode(data + END)
    changed = np.flatnonzero((decode(data + JUNK + END) != pixels).reshape(len(pixels), -1).any(axis=1))
    missing = len(pixels) - int(changed[0]) if len(changed) else 0
    return pixels if missing <= MISSING_SHARE * len(pixels) else None


def _all_scans_begun(data: bytes) -> bool:
    """Whether a last scan (successive approximation down to bit 0) of each component's DC and AC has begun."""
    wanted: set[tuple[int, str]] = set()
    begun: set[tuple[int, str]] = set()
    at = 2
    while (found := MARKER.search(data, at)) is not None:
        marker, start = data[found.end() - 1], found.end()
        length = int.from_bytes(data[start : start + 2])
        segment = data[start + 2 : start + length]
        if marker in FRAMES:
            wanted = {(component, band) for component in segment[6::3] for band in ("dc", "ac")}
        elif marker == SCAN and len(segment) == length - 2:
            begun |= _last_bits(segment)
        at = start + max(length, 2)
    return bool(wanted) and wanted <= begun


def _last_bits(scan: bytes) -> set[tuple[int, str]]:
    """The components, and which of their coefficients, that a scan with this header brings to the last bit."""
    components = scan[1 : 1 + 2 * scan[0] : 2]
    first, last, bits = scan[1 + 2 * scan[0] : 4 + 2 * scan[0]]
    if bits & 15:
        return set()
    bands = (["dc"] if first == 0 else []) + (["ac"] if last == 63 else [])
    return {(component, band) for component in components for band in bands}
