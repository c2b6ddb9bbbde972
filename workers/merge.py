"""Instances over stuff: the panoptic merge of U2Seg (arXiv 2312.17243, generate_pseudo_panoptic.py).

Three faults of the published program are not repeated: ids restart at 1 in every image (a running id leaves 24 bits),
categories of things are 1..num_things (not 0-based), and area and box are those of the visible pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workers.masks import BoolArray, Box, mask_box

VOID_ID = 0  # in an id map: no segment
VOID_LABEL = 255  # in a semantic map: no class


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a panoptic id map; the fields are those of `workers.records.SEGMENT_TYPE`.

    `area` in pixels and `bbox` (xyxy) are of what is visible. `score` is None for stuff and where none was given.
    """

    id: int
    category: int
    is_thing: bool
    area: int
    bbox: Box
    score: float | None


@dataclass(frozen=True, slots=True)
class MergedLabels:
    """`ids` (h, w) int32 with 0 = void, its segments in the order of their ids, and how many instances are hidden.

    Unpacks as `ids, segments = merge_panoptic(...)`.
    """

    ids: NDArray[np.int32]
    segments: list[Segment]
    hidden: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.segments))

    def __getitem__(self, item: int | slice) -> Any:
        return (self.ids, self.segments)[item]


def merge_panoptic(
    masks_nhw: ArrayLike,
    categories_n: ArrayLike,
    semantic_hw: ArrayLike | None,
    *,
    num_things: int,
    num_stuff: int,
    scores_n: Sequence[float] | NDArray[np.floating] | None = None,
    max_cover: float = 0.7,
    min_visible: float = 0.0,
) -> MergedLabels:
    """Paint instances over a semantic map, each pixel in one segment or void (U2Seg, section 3.3 and its program).

    Things are painted in descending bounding-box area, ties in input order, later ones on top, and are numbered from
    1 in that order; a hidden one keeps its number, which then occurs nowhere. Stuff follows by ascending class where
    no thing lies; a class of which things cover more than `max_cover` stays void.

    Args:
        masks_nhw: (n, h, w) bool, whole (overlapping) instance masks.
        categories_n: (n,) integers in 1..num_things.
        semantic_hw: (h, w) integer classes in 0..num_stuff-1, 255 = void; None when there is no semantic map.
            Class c becomes category num_things + 1 + c.
        num_things: number of thing categories.
        num_stuff: number of stuff classes, at most 255.
        scores_n: (n,) scores of the instances, or None.
        max_cover: largest fraction of a stuff class under things at which its rest is still labelled.
        min_visible: an instance of which less than this fraction of its mask is visible is dropped as hidden, its
            pixels are free for stuff. 0 drops only those without any visible pixel, as published.

    Raises:
        ValueError: shapes or dtypes do not fit, or a category, class or fraction is out of its range.
    """
    masks, categories, semantic = _checked(masks_nhw, categories_n, semantic_hw, num_things, num_stuff)
    scores = _checked_scores(scores_n, len(masks))
    for name, fraction in (("max_cover", max_cover), ("min_visible", min_visible)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {fraction}")
    order = painting_order(masks)
    ids = _paint_things(masks, order, min_visible)
    labels = [(int(categories[i]), None if scores is None else float(scores[i])) for i in order]
    if semantic is not None:
        classes = _paint_stuff(ids, semantic, num_stuff, first_id=len(masks) + 1, max_cover=max_cover)
        labels += [(num_things + 1 + int(c), None) for c in classes]
    segments = _visible_segments(ids, labels, num_things)
    return MergedLabels(ids, segments, hidden=len(masks) - sum(s.is_thing for s in segments))


def painting_order(masks_nhw: BoolArray) -> NDArray[np.int64]:
    """(n,) indices of the masks by descending area of their bounding boxes (not of the masks), ties in input order."""
    return box_order(np.array([mask_box(mask) for mask in masks_nhw]).reshape(-1, 4))


def box_order(boxes_n4: NDArray[np.floating]) -> NDArray[np.int64]:
    """(n, 4) boxes of masks, xyxy -> (n,) indices as of `painting_order`."""
    boxes = np.asarray(boxes_n4, np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.argsort(-areas, kind="stable").astype(np.int64)


def whole_masks(ids_hw: NDArray[np.int32], things: Sequence[int], masks_n: Sequence[BoolArray]) -> dict[int, BoolArray]:
    """Id of a visible thing -> its whole mask: of the `masks_n` that were merged to `ids_hw`, each (h, w).

    The merge numbers instances from 1 in its painting order, hidden ones too. ValueError when a thing has pixels off
    its mask: they are of different runs.
    """
    order = painting_order(np.stack(masks_n)) if masks_n else np.zeros(0, np.int64)
    whole = {thing: masks_n[order[thing - 1]] for thing in things if 0 < thing <= len(order)}
    foreign = [thing for thing in things if thing not in whole or not whole[thing][ids_hw == thing].all()]
    if foreign:
        raise ValueError(
            f"the segments {foreign[:5]} do not lie on the {len(masks_n)} masks of the instances; give those that the "
            "labels were merged from"
        )
    return whole


def _paint_things(masks: BoolArray, order: NDArray[np.int64], min_visible: float) -> NDArray[np.int32]:
    ids = np.zeros(masks.shape[1:], dtype=np.int32)
    for thing_id, index in enumerate(order, start=1):
        ids[masks[index]] = thing_id
    if min_visible > 0:
        visible = np.bincount(ids.ravel(), minlength=len(masks) + 1)[1:]
        kept = visible >= min_visible * masks[order].sum(axis=(1, 2))
        ids[~np.append(True, kept)[ids]] = VOID_ID
    return ids


def _paint_stuff(
    ids: NDArray[np.int32], semantic: NDArray[np.uint8], num_stuff: int, *, first_id: int, max_cover: float
) -> NDArray[np.int64]:
    """Number the free pixels of each stuff class in `ids`, in place, from `first_id`; the classes that were kept."""
    free = ids == VOID_ID
    total = np.bincount(semantic.ravel(), minlength=VOID_LABEL + 1)[:num_stuff]
    uncovered = np.bincount(semantic[free], minlength=VOID_LABEL + 1)[:num_stuff]
    cover = (total - uncovered) / np.maximum(total, 1)
    classes = np.flatnonzero((uncovered > 0) & (cover <= max_cover))
    # One look-up for all classes: a remap class by class in place would remap what it has just written.
    id_of_class = np.zeros(VOID_LABEL + 1, dtype=np.int32)
    id_of_class[classes] = np.arange(first_id, first_id + len(classes))
    ids[free] = id_of_class[semantic[free]]
    return classes


def _visible_segments(
    ids: NDArray[np.int32], labels: Sequence[tuple[int, float | None]], num_things: int
) -> list[Segment]:
    """The segments that occur in `ids`; `labels[i]` is the category and score of id i + 1."""
    from scipy import ndimage  # which a look at a run need not wait for

    areas = np.bincount(ids.ravel(), minlength=len(labels) + 1)
    segments = []
    for segment_id, window in enumerate(ndimage.find_objects(ids, max_label=len(labels)), start=1):
        if window is None:
            continue
        rows, columns = window
        box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        category, score = labels[segment_id - 1]
        segments.append(Segment(segment_id, category, category <= num_things, int(areas[segment_id]), box, score))
    return segments


def _checked(
    masks_nhw: ArrayLike, categories_n: ArrayLike, semantic_hw: ArrayLike | None, num_things: int, num_stuff: int
) -> tuple[BoolArray, NDArray[np.integer], NDArray[np.uint8] | None]:
    masks, categories = np.asarray(masks_nhw), np.asarray(categories_n)
    if num_things < 0 or not 0 <= num_stuff <= VOID_LABEL:
        raise ValueError(f"need num_things >= 0 and num_stuff in 0..{VOID_LABEL}, got {num_things} and {num_stuff}")
    if masks.ndim != 3 or masks.dtype != np.bool_ or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be (n, h, w) bool, got {masks.shape} {masks.dtype}")
    if categories.shape != masks.shape[:1]:
        raise ValueError(f"{masks.shape[0]} masks, but categories of shape {categories.shape}")
    if categories.size and not np.issubdtype(categories.dtype, np.integer):
        raise ValueError(f"categories must be integers, got {categories.dtype}")
    if categories.size and not 1 <= categories.min() <= categories.max() <= num_things:
        raise ValueError(f"categories must be in 1..{num_things}, got {categories.min()}..{categories.max()}")
    return (
        masks,
        categories,
        None if semantic_hw is None else _checked_semantic(semantic_hw, masks.shape[1:], num_stuff),
    )


def _checked_semantic(semantic_hw: ArrayLike, size: tuple[int, ...], num_stuff: int) -> NDArray[np.uint8]:
    semantic = np.asarray(semantic_hw)
    if semantic.shape != size or not np.issubdtype(semantic.dtype, np.integer):
        raise ValueError(f"the semantic map must be {size} integers, got {semantic.shape} {semantic.dtype}")
    wrong = np.unique(semantic[(semantic != VOID_LABEL) & ((semantic < 0) | (semantic >= num_stuff))])
    if wrong.size:
        raise ValueError(f"stuff classes must be in 0..{num_stuff - 1} or {VOID_LABEL} (void), got {wrong.tolist()}")
    return semantic.astype(np.uint8)


def _checked_scores(scores_n: ArrayLike | None, count: int) -> NDArray[np.float64] | None:
    if scores_n is None:
        return None
    scores = np.asarray(scores_n, dtype=np.float64)
    if scores.shape != (count,):
        raise ValueError(f"{count} masks, but scores of shape {scores.shape}")
    return scores
