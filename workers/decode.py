"""Encoded bytes -> upright RGB pixels, and the resizes of the photo before the backbone.

Decoding is safe on any input: whatever is wrong with the bytes ends as a `DecodeError` with a status, the size is
checked before a pixel is decoded, and only the formats named here are tried. Left out on purpose: colour management
(ICC profiles are ignored) and all frames of an animation but the first.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from workers import deep, jpeg_end
from workers.formats import FORMATS, GET_HEIC, HAS_HEIC, is_heic, register_heic
from workers.records import Status

PILLOW_MAX_PIXELS = 178_956_970  # Pillow itself refuses more, whatever `max_pixels` says
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # EXIF 2.3, table 6: what puts row 0 at the top and column 0 at the left
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow itself takes for a broken file where it reads a header; in reading pixels and EXIF it lets them through.
# RuntimeError is what the decoders of AVIF and HEIC raise.
BAD_DATA = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, RuntimeError, struct.error)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Sizes that are decoded. `max_pixels` above 178 956 970 has no effect: Pillow refuses such images."""

    max_pixels: int = 50_000_000
    min_side: int = 8  # pixels


class DecodeError(ValueError):
    """Bytes that give no image: `status` is EMPTY, UNDECODABLE, TOO_LARGE or TOO_SMALL, the text says why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode_image(data: bytes, limits: DecodeLimits) -> Pixels:
    """Encoded bytes -> (H, W, 3) uint8 RGB, upright as EXIF says, C-contiguous and writable.

    Transparent parts are white. Samples of up to 16 bits are scaled by the range of 8, 10, 12, 14 or 16 bits that they
    use (`workers.deep`); 32-bit integers and floats have no range of their own, so [0, 1] floats are scaled by 255 and
    all else from its least to its greatest finite value. A JPEG that lacks only its end is read, and grey there.
    DecodeError for anything that is not an image within the limits.
    """
    if not data:
        raise DecodeError(Status.EMPTY, "the file is empty")
    try:
        with open_photo(data) as image:
            _check_size(image.size, limits)
            rgb = _loaded_rgb(image, data)
            turn = UPRIGHT.get(orientation(image))  # only now: Pillow turns TIFFs itself as it loads them
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = min(limits.max_pixels, PILLOW_MAX_PIXELS)
        raise DecodeError(Status.TOO_LARGE, f"more than {limit} pixels (decode.max_pixels)") from error
    except Image.UnidentifiedImageError as error:
        raise DecodeError(Status.UNDECODABLE, f"not a readable image of the formats {', '.join(FORMATS)}") from error
    except BAD_DATA as error:
        reason = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)) or type(error).__name__
        raise DecodeError(Status.UNDECODABLE, reason) from error


def open_photo(data: bytes) -> Image.Image:
    """A photo whose header has been read, of the formats that are named alone. `BAD_DATA` when it is none."""
    formats: tuple[str, ...] = FORMATS
    if is_heic(data):
        if not HAS_HEIC:
            raise DecodeError(Status.UNDECODABLE, GET_HEIC)
        formats = (register_heic(),)
    return Image.open(io.BytesIO(data), formats=formats)


def orientation(image: Image.Image) -> int:
    """How EXIF data says that a photo is to be turned, 1..8; 1 (not at all) where it says nothing, or nonsense."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except BAD_DATA:  # the pixels are good all the same
        return 1
    return found if isinstance(found, int) and found in UPRIGHT else 1


def resize_square(image: Pixels, size: int) -> Pixels:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, Lanczos; the aspect is not kept (as MaskCut does)."""
    return _resize(image, size, size)


def resize_keep_aspect(image: Pixels, size: int, multiple: int, max_ratio: float = 4.0) -> Pixels:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, Lanczos; h and w are multiples of `multiple`, the shorter about `size`.

    The longer side is at most `max_ratio * size`; a longer image shrinks as a whole, down to one `multiple` high.
    """
    height, width = image.shape[:2]
    scale = min(size / min(height, width), max_ratio * size / max(height, width))
    most = max(1, int(max_ratio * size) // multiple)
    height, width = (multiple * min(max(1, round(side * scale / multiple)), most) for side in (height, width))
    return _resize(image, height, width)


def _resize(image: Pixels, height: int, width: int) -> Pixels:
    if image.shape[:2] == (height, width):
        return image.copy()
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise DecodeError(
            Status.TOO_LARGE, f"{width}x{height} is more than {limits.max_pixels} pixels (decode.max_pixels)"
        )
    if min(width, height) < limits.min_side:
        raise DecodeError(
            Status.TOO_SMALL, f"{width}x{height} has a side below {limits.min_side} pixels (decode.min_side)"
        )


def _loaded_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """The pixels of an opened picture of these bytes, as they are stored."""
    tiles = deep.swapped_tiles(image)
    try:
        image.load()
    except OSError as error:
        if image.format != "JPEG" or not str(error).startswith("image file is truncated"):
            raise
        return _without_end(data, error)
    if tiles is None or np.asarray(image).max(initial=0) > deep.DARK:
        return _to_rgb(image)
    with open_photo(data) as lower:
        lower.tile = tiles  # type: ignore[attr-defined]  # of every picture that is read from a file
        lower.load()
        return deep.join_bytes(image, lower)


def _without_end(data: bytes, error: OSError) -> Image.Image:
    """The picture of a JPEG that was cut short; raises `error` when it lacks more than its end."""

    def decode(whole: bytes) -> NDArray[np.uint8]:
        with open_photo(whole) as image:
            return np.asarray(_to_rgb(image))

    pixels = jpeg_end.without_end(data, decode)
    if pixels is None:
        raise error
    return Image.fromarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        return Image.fromarray(deep.to_eight_bits(samples, deep.white_of(image, samples))).convert("RGB")
    if image.mode in {"I", "F"}:
        return Image.fromarray(_stretch(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _stretch(samples: NDArray[np.generic]) -> Pixels:
    values = samples.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 1.0)
    if samples.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255
    values /= (high - low) or 1.0
    return np.rint(values, out=values).astype(np.uint8)
