"""The augmentation of the panoptic model's training: resize to a random short side, horizontal flip (detectron2).

Pure functions of a sample and a generator; every call of `augment` draws two numbers, whatever the image, so that a
generator that is seeded per sample gives the same result in any order of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.panoptic.resize import test_size
from workers.training.samples import Sample

SHORT_SIDES = (240, 320, 480, 640, 672, 704, 736, 768, 800, 1024)  # U2Seg, u2seg_R50_{300,800}.yaml
MAX_SIDE = 1333
LEAST_BOX = 1e-5  # pixels; a side that is not longer makes a box empty (detectron2, Boxes.nonempty)


def augment(
    sample: Sample,
    rng: np.random.Generator,
    *,
    short_sides: Sequence[int] = SHORT_SIDES,
    max_side: int = MAX_SIDE,
    flip_probability: float = 0.5,
) -> Sample:
    """The sample with a short side drawn uniformly from `short_sides` (pixels), flipped with `flip_probability`."""
    short, flipped = short_sides[int(rng.integers(len(short_sides)))], rng.random() < flip_probability
    resized = resize_shortest_edge(sample, short, max_side)
    return flip(resized) if flipped else resized


def resize_shortest_edge(sample: Sample, short: int, max_side: int = MAX_SIDE) -> Sample:
    """The sample with its shorter side `short` pixels, or less where the longer would pass `max_side`; see `resize`."""
    return resize(sample, *test_size(*sample.size, short, max_side))


def resize(sample: Sample, height: int, width: int) -> Sample:
    """The sample at height x width, each at least 1.

    The image is resized with Pillow's bilinear filter on uint8, masks and semantic map by nearest pixel, and boxes are
    scaled and clipped, not taken from the masks. Instances whose box or mask became empty are dropped.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{sample.image_id}: cannot resize to {height} x {width}")
    old_height, old_width = sample.size
    rows, columns = nearest(old_height, height), nearest(old_width, width)
    masks = sample.masks.take(rows, axis=1).take(columns, axis=2)
    scale = np.array([width / old_width, height / old_height] * 2)
    boxes = np.clip(sample.boxes * scale, 0, [width, height, width, height]).astype(np.float32)
    kept = (boxes[:, 2:] - boxes[:, :2] > LEAST_BOX).all(axis=1) & masks.any(axis=(1, 2))
    return Sample(
        image_id=sample.image_id,
        image=np.array(Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR)),
        boxes=boxes[kept],
        classes=sample.classes[kept],
        masks=masks if kept.all() else masks[kept],
        semantic=sample.semantic.take(rows, axis=0).take(columns, axis=1),
        scores=None if sample.scores is None else sample.scores[kept],
    )


def flip(sample: Sample) -> Sample:
    """The sample mirrored left to right."""
    width = sample.size[1]
    x0, y0, x1, y1 = sample.boxes.T
    return replace(
        sample,
        image=np.ascontiguousarray(sample.image[:, ::-1]),
        boxes=np.stack([width - x1, y0, width - x0, y1], axis=1),
        masks=np.ascontiguousarray(sample.masks[:, :, ::-1]),
        semantic=np.ascontiguousarray(sample.semantic[:, ::-1]),
    )


def nearest(old: int, new: int) -> NDArray[np.intp]:
    """(new,) indices of the `old` pixels of a side that Pillow's nearest filter takes when it becomes `new` long."""
    line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.intp)
