"""Generated scenes with known ground truth: what `make demo` labels, and what tests label when no photo is at hand.

A scene is one to three objects of six kinds, lit, textured and turned at random, on one of five textured backgrounds,
under uneven light and with sensor noise. Everything is drawn from a seed; a pixel belongs to an object when the object
covers at least half of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.operations.demo.drawing import BACKGROUNDS, OBJECTS, draw_object, expose, make_frame
from pipeline.store import storage
from workers.masks import encode_panoptic_png, mask_box

OBJECT_KINDS = tuple(OBJECTS)
BACKGROUND_KINDS = tuple(BACKGROUNDS)
DIAMETERS = (0.20, 0.40)  # of an object, over the shorter side of the scene
MAX_OBJECTS = 3
CLEARANCE = 0.95  # least distance of two centres over the sum of the radii; below 1 corners may overlap a little
PLACEMENT_TRIES = 30
MIN_SIDE = 64  # pixels; below it an object is a handful of pixels
JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and its truth.

    `image` (h, w, 3) uint8 RGB; `masks` (n, h, w) bool, the visible pixels of each object, disjoint and none empty;
    `kinds` (n,) int64 indices into OBJECT_KINDS; `background` an index into BACKGROUND_KINDS.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    kinds: NDArray[np.int64]
    background: int


def categories() -> list[dict[str, Any]]:
    """The truth's categories as COCO panoptic lists them: the object kinds from 1, then the backgrounds as stuff."""
    names = [(name, 1) for name in OBJECT_KINDS] + [(name, 0) for name in BACKGROUND_KINDS]
    return [{"id": i, "name": name, "isthing": is_thing} for i, (name, is_thing) in enumerate(names, start=1)]


def make_scene(rng_seed: int | Sequence[int], size: tuple[int, int] = (320, 320)) -> Scene:
    """The scene of a seed; the same seed and size give the same pixels.

    Args:
        rng_seed: what `numpy.random.default_rng` takes.
        size: (height, width) in pixels, each at least 64.

    Raises:
        ValueError: a side is below 64 pixels.
    """
    if min(size) < MIN_SIDE:
        raise ValueError(f"a scene needs sides of at least {MIN_SIDE} pixels, got {size}")
    rng = np.random.default_rng(rng_seed)
    background = int(rng.integers(len(BACKGROUND_KINDS)))
    canvas = BACKGROUNDS[BACKGROUND_KINDS[background]](rng, size)
    circles = _place_circles(rng, size)
    kinds = rng.integers(len(OBJECT_KINDS), size=len(circles))
    top = np.full(size, -1, dtype=np.int64)  # the object that is on top at each pixel
    for index, (y, x, radius) in enumerate(circles):
        frame = make_frame(size, y, x, radius, rng.uniform(0, 2 * np.pi))
        shadow = BACKGROUND_KINDS[background] != "sky"
        covered = draw_object(rng, canvas, OBJECT_KINDS[kinds[index]], frame, shadow=shadow)
        top[frame.window][covered] = index
    masks = top == np.arange(len(circles))[:, None, None]
    visible = masks.any(axis=(1, 2))
    return Scene(expose(rng, canvas), masks[visible], kinds[visible], background)


def _place_circles(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float, float]]:
    """One to three circles (y, x, radius) in pixels inside the scene; one that finds no room is left out."""
    circles: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        for _ in range(PLACEMENT_TRIES):
            radius = 0.5 * min(size) * rng.uniform(*DIAMETERS)
            y, x = (rng.uniform(radius + 1, side - radius - 1) for side in size)
            if all(np.hypot(y - b, x - a) >= CLEARANCE * (radius + other) for b, a, other in circles):
                circles.append((y, x, radius))
                break
    return circles


def panoptic_truth(scene: Scene) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """A scene's (h, w) int32 id map without void, and its COCO panoptic segments: objects 1..n, background n + 1."""
    background_id = len(scene.masks) + 1
    ids = np.full(scene.image.shape[:2], background_id, dtype=np.int32)
    for thing_id, mask in enumerate(scene.masks, start=1):
        ids[mask] = thing_id
    labels = [*(int(kind) + 1 for kind in scene.kinds), len(OBJECT_KINDS) + 1 + scene.background]
    return ids, [_truth_segment(ids, segment_id, category) for segment_id, category in enumerate(labels, start=1)]


def _truth_segment(ids: NDArray[np.int32], segment_id: int, category: int) -> dict[str, Any]:
    mask = ids == segment_id
    x0, y0, x1, y1 = mask_box(mask)
    box = [x0, y0, x1 - x0, y1 - y0]  # COCO's boxes are xywh
    return {"id": segment_id, "category_id": category, "iscrowd": 0, "area": int(mask.sum()), "bbox": box}


def write_scenes(folder: str, count: int, seed: int, size: tuple[int, int] = (320, 320)) -> list[str]:
    """Write `count` scenes and their truth below `folder` (a path or URI); returns the names of the images, in order.

    The images are `images/scene-00000.jpg` and so on; the truth is COCO panoptic: `truth.json` beside `truth/*.png`.
    Scene i depends on `seed`, i and `size` alone.
    """
    images, annotations = [], []
    for index in range(count):
        scene, name = make_scene((seed, index), size), f"scene-{index:05d}"
        ids, segments = panoptic_truth(scene)
        storage.write_bytes(storage.join(folder, "images", f"{name}.jpg"), _jpeg(scene.image))
        storage.write_bytes(storage.join(folder, "truth", f"{name}.png"), encode_panoptic_png(ids))
        images.append({"id": index, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]})
        annotations.append({"image_id": index, "file_name": f"{name}.png", "segments_info": segments})
    truth = {"images": images, "annotations": annotations, "categories": categories()}
    storage.write_bytes(storage.join(folder, "truth.json"), json.dumps(truth).encode())
    return [str(image["file_name"]) for image in images]


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()
