"""Masks drawn on photos: outlined, half-transparent segments, and instances cut out of a faded background.

Photos are (H, W, 3) uint8 RGB, id maps (H, W) integers with 0 for void. Everything here is pure; nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from workers.masks import mask_box

Pixels = NDArray[np.uint8]
Ids = NDArray[np.int32]
Color = tuple[int, int, int]

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
FILL = 0.5  # opacity of a segment
FADE = 0.78  # how far the background of a crop goes to white
OVERSAMPLING = 2  # drawn larger and shrunk, so that outlines are smooth
JPEG_QUALITY = 80
WEBP_QUALITIES = (5, 15, 30, 45, 60, 70, 80)
HATCHING = ((0xDD, 0xE1, 0xE6), (0x9A, 0xA5, 0xB1))  # of what has no class: ground and lines
HATCH_STEP, HATCH_LINE = 8, 2  # pixels along a row
HATCHED = "repeating-linear-gradient(135deg, #9aa5b1 0 1.5px, #dde1e6 1.5px 5.5px)"  # the same in CSS


def oklch(lightness: float, chroma: float, turn: float) -> Color:
    """Lightness [0, 1], chroma and hue (turns) -> sRGB bytes, clipped to the gamut (B. Ottosson, Oklab, 2020)."""
    a, b = chroma * math.cos(math.tau * turn), chroma * math.sin(math.tau * turn)
    cones = np.array([
        lightness + 0.3963377774 * a + 0.2158037573 * b,
        lightness - 0.1055613458 * a - 0.0638541728 * b,
        lightness - 0.0894841775 * a - 1.2914855480 * b,
    ]) ** 3  # fmt: skip
    matrix = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])  # fmt: skip
    linear = np.clip(matrix @ cones, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = np.rint(255 * encoded).astype(int).tolist()
    return red, green, blue


def category_color(category: int) -> Color:
    """A colour for each category >= 0, always the same: hues a golden ratio apart, in three strengths."""
    lightness, chroma = ((0.70, 0.19), (0.58, 0.22), (0.80, 0.17))[category % 3]
    return oklch(lightness, chroma, (0.08 + category * GOLDEN_RATIO) % 1)


def css(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def size_within(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """The largest size of the same shape that fits into a box, at least one pixel a side."""
    scale = min(max_height / height, max_width / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink(photo_hw3: Pixels, height: int, width: int) -> Pixels:
    """(H, W, 3) -> (height, width, 3), Lanczos."""
    return np.asarray(Image.fromarray(photo_hw3).resize((width, height), Image.Resampling.LANCZOS))


def paint_masks(masks: Sequence[NDArray[np.bool_]], height: int, width: int) -> Ids:
    """(height, width) bool masks -> id map: mask i has id i + 1, and small masks lie on top of large ones."""
    ids = np.zeros((height, width), np.int32)
    for i in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        ids[masks[i]] = i + 1
    return ids


def draw_overlay(photo_hw3: Pixels, ids_hw: Ids, colors: Mapping[int, Color], height: int, width: int) -> Pixels:
    """The photo at (height, width) with every segment of `colors` (id -> colour) filled and outlined.

    ValueError when the photo and the id map differ in size.
    """
    check_sizes(photo_hw3, ids_hw)
    large = height * OVERSAMPLING, width * OVERSAMPLING
    ids = _resize_ids(ids_hw, *large)
    canvas = shrink(photo_hw3, *large).astype(np.float32)
    outlines = inner_outline(ids, 2 * OVERSAMPLING)
    for segment, color in colors.items():
        inside = ids == segment
        canvas[inside] += FILL * (np.array(color, np.float32) - canvas[inside])
        canvas[inside & outlines] = color
    return shrink(_to_bytes(canvas), height, width)


def draw_classes(classes_hw: Pixels, colors: Sequence[Color], height: int, width: int) -> Pixels:
    """(H, W) classes -> (height, width, 3): class c in `colors[c]`, every value without a colour (void) hatched.

    White lines part the classes, for many classes have colours that are hard to tell apart.
    """
    classes = np.asarray(Image.fromarray(classes_hw).resize((width, height), Image.Resampling.NEAREST))
    painted = np.zeros((256, 3), np.uint8)
    painted[: len(colors)] = colors
    rows, columns = np.mgrid[:height, :width]
    hatching = np.array(HATCHING, np.uint8)[((rows + columns) % HATCH_STEP < HATCH_LINE).astype(int)]
    named = classes < len(colors)
    drawn = np.where(named[..., None], painted[classes], hatching)
    drawn[_first_of_class(classes) & named] = 255
    return drawn


def cut_out(photo_hw3: Pixels, mask_hw: NDArray[np.bool_], color: Color, size: int) -> Pixels:
    """The box of a mask with a little margin, its longer side `size` pixels; what is not the mask fades to white.

    ValueError when the sizes differ or the mask is empty.
    """
    check_sizes(photo_hw3, mask_hw)
    if not mask_hw.any():
        raise ValueError("the mask is empty")
    window = _window(mask_hw)
    photo, mask = photo_hw3[window], mask_hw[window]
    height, width = size_within(mask.shape[0], mask.shape[1], size, size)
    large = height * OVERSAMPLING, width * OVERSAMPLING
    inside = _resize_ids(mask.astype(np.int32), *large)
    canvas = shrink(np.ascontiguousarray(photo), *large).astype(np.float32)
    grey = canvas.mean(axis=2, keepdims=True)
    canvas = np.where(inside[..., None] > 0, canvas, grey + FADE * (255 - grey))
    canvas[inner_outline(inside, OVERSAMPLING)] = color
    return shrink(_to_bytes(canvas), height, width)


def inner_outline(ids_hw: Ids, thickness: int) -> NDArray[np.bool_]:
    """(H, W) bool: pixels of a segment within `thickness` (chessboard) of another id. The photo's edge is not one."""
    from scipy.ndimage import maximum_filter, minimum_filter  # which a look at a run need not wait for

    side = 2 * thickness + 1
    differs: NDArray[np.bool_] = maximum_filter(ids_hw, side, mode="nearest") != minimum_filter(
        ids_hw, side, mode="nearest"
    )
    return differs & (ids_hw > 0)


def jpeg_data_uri(photo_hw3: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(photo_hw3).save(stream, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def png_data_uri(picture_hw3: Pixels) -> str:
    """Exact colours, for pictures of a few flat ones."""
    stream = io.BytesIO()
    Image.fromarray(picture_hw3).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def webp_data_uri(picture_hw3: Pixels, most: int) -> str:
    """The best WebP of at most `most` bytes; at half the size where the worst is larger.

    ValueError when not even one pixel has room.
    """
    best, low, high = b"", 0, len(WEBP_QUALITIES)
    while low < high:
        middle = (low + high) // 2
        stream = io.BytesIO()
        Image.fromarray(picture_hw3).save(stream, format="WEBP", quality=WEBP_QUALITIES[middle], method=2)
        if stream.tell() <= most:
            best, low = stream.getvalue(), middle + 1
        else:
            high = middle
    if best:
        return "data:image/webp;base64," + base64.b64encode(best).decode("ascii")
    height, width = picture_hw3.shape[:2]
    if max(height, width) == 1:
        raise ValueError(f"a picture of one pixel has no room in {most} bytes")
    return webp_data_uri(shrink(picture_hw3, max(1, height // 2), max(1, width // 2)), most)


def check_sizes(photo_hw3: Pixels, labels_hw: NDArray[np.generic]) -> None:
    """ValueError when a photo and its labels differ in size."""
    if photo_hw3.shape[:2] != labels_hw.shape:
        (height, width), (labelled_height, labelled_width) = photo_hw3.shape[:2], labels_hw.shape
        raise ValueError(f"the photo is {width}x{height}, its labels are {labelled_width}x{labelled_height}")


def _window(mask_hw: NDArray[np.bool_]) -> tuple[slice, slice]:
    left, top, right, bottom = map(int, mask_box(mask_hw))
    margin = max(3, round(0.06 * max(right - left, bottom - top)))
    return slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)


def _first_of_class(classes_hw: Pixels) -> NDArray[np.bool_]:
    """(H, W) bool: pixels with another class above them or on their left."""
    first = np.zeros(classes_hw.shape, bool)
    first[1:] |= classes_hw[1:] != classes_hw[:-1]
    first[:, 1:] |= classes_hw[:, 1:] != classes_hw[:, :-1]
    return first


def _resize_ids(ids_hw: Ids, height: int, width: int) -> Ids:
    resized = Image.fromarray(ids_hw).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.int32)


def _to_bytes(canvas: NDArray[np.float32]) -> Pixels:
    return np.rint(canvas).clip(0, 255).astype(np.uint8)
