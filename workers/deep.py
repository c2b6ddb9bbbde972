"""Pictures of more than 8 bits a sample -> 8 bits, by the range that their samples really use.

A sensor of 10, 12 or 14 bits is stored in 16 as a rule: scaled by 65535, its photos would be dark or black. Pillow
keeps all bits of one channel, and of colours the upper byte alone; the lower comes by reading with the bytes swapped.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RANGES = (255, 1023, 4095, 16383, 65535)  # the largest sample of 8, 10, 12, 14 and 16 bits
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # TIFF tags
DARK = 63  # the largest upper byte that 14 bits reach
NATIVE = "L" if sys.byteorder == "little" else "B"
SWAPPED = {"RGB;16L": "RGB;16B", "RGB;16B": "RGB;16L", "RGB;16N": "RGB;16B" if NATIVE == "L" else "RGB;16L"}


def white_of(image: Image.Image, samples: NDArray[Any]) -> int:
    """The sample that means white: as the TIFF says, else the end of the smallest range with the greatest sample. A
    picture of one value tells no range, and is taken to have 16 bits."""
    least, greatest = int(samples.min(initial=65535)), int(samples.max(initial=0))
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    told = tags.get(MAX_SAMPLE_VALUE, (0,))
    white = max(told) if isinstance(told, tuple) else int(told)
    if greatest <= white < 65535:
        return int(white)
    if 8 < bits < 16:
        return (1 << bits) - 1
    return next(end for end in RANGES if greatest <= end) if least < greatest else RANGES[-1]


def to_eight_bits(samples: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Unsigned samples in [0, white] of any shape -> uint8 in [0, 255], rounded."""
    wide = samples.astype(np.uint32)
    wide *= 255
    wide += white // 2
    wide //= white
    return wide.astype(np.uint8)


def swapped_tiles(image: Image.Image) -> list[Any] | None:
    """How to read the lower bytes of colours of 16 bits, before the picture is loaded; None for other pictures."""
    tiles = getattr(image, "tile", [])
    swapped = [tile._replace(args=_swapped(tile.args)) for tile in tiles]
    return swapped if swapped != tiles else None


def _swapped(args: Any) -> Any:
    if isinstance(args, tuple):
        return tuple(map(_swapped, args))
    return SWAPPED.get(args, args) if isinstance(args, str) else args


def join_bytes(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two RGB pictures of the same samples' bytes -> RGB of 8 bits, by the samples' range."""
    samples = np.asarray(upper).astype(np.uint16) << 8 | np.asarray(lower)
    return Image.fromarray(to_eight_bits(samples, white_of(upper, samples)))
