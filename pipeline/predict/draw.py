"""A photo with its panoptic labels drawn on it: coloured segments, each with its cluster id or name."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from workers.merge import MergedLabels, Segment
from workers.overlay import category_color, draw_overlay

LONGEST = 1280  # pixels of a side of the picture
PLACING = 320  # pixels of a side of the map in which the places of texts are looked for
TEXT = 1 / 45  # height of a text to the longer side of the picture, and at least:
LEAST_TEXT = 11  # pixels
QUALITY = 88  # of the JPEG


def draw_labels(photo_hw3: NDArray[np.uint8], labels: MergedLabels, names: Mapping[int, str]) -> bytes:
    """(H, W, 3) uint8 and its labels -> JPEG, with a longer side of at most 1280 pixels.

    A segment has the colour of its category and in it the name of the category, or its number where `names` lacks it.
    """
    height, width = photo_hw3.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = max(1, round(scale * height)), max(1, round(scale * width))
    colors = {segment.id: category_color(segment.category) for segment in labels.segments}
    picture = Image.fromarray(draw_overlay(photo_hw3, labels.ids, colors, *size))
    _write_names(picture, labels.segments, text_places(labels.ids, [s.id for s in labels.segments]), names)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=QUALITY)
    return stream.getvalue()


def text_places(ids_hw: NDArray[np.int32], segments: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Of each segment (x, y) in [0, 1] of the picture's sides: the pixel farthest from its edges, about.

    A segment too small for the coarse map that is searched has none.
    """
    height, width = ids_hw.shape
    scale = min(1.0, PLACING / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    coarse = np.asarray(Image.fromarray(ids_hw).resize(size, Image.Resampling.NEAREST))
    windows = ndimage.find_objects(coarse)
    places = {}
    for segment in segments:
        window = windows[segment - 1] if segment <= len(windows) else None
        if window is not None:
            depth = ndimage.distance_transform_edt(np.pad(coarse[window] == segment, 1))
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            # The pad of 1 and the middle of the pixel.
            x, y = window[1].start + int(column) - 0.5, window[0].start + int(row) - 0.5
            places[segment] = (x / size[0], y / size[1])
    return places


def _write_names(
    picture: Image.Image,
    segments: Sequence[Segment],
    places: Mapping[int, tuple[float, float]],
    names: Mapping[int, str],
) -> None:
    height = max(LEAST_TEXT, round(TEXT * max(picture.size)))
    font = ImageFont.load_default(height)
    draw = ImageDraw.Draw(picture)
    for segment in segments:
        if segment.id in places:
            text = names.get(segment.category, str(segment.category))
            stroke = max(1, height // 8)
            reach = draw.textbbox((0, 0), text, font, anchor="mm", stroke_width=stroke)[2:]
            x, y = (
                # A long name at the edge of a narrow picture stays inside it, or in its middle.
                min(max(at * side, half), max(side - half, side / 2))
                for at, side, half in zip(places[segment.id], picture.size, reach, strict=True)
            )
            draw.text((x, y), text, "white", font, anchor="mm", stroke_width=stroke, stroke_fill="black")
