"""Training samples of the panoptic model: one image with its instances and its semantic map.

They come from a row of a panoptic part, or from COCO panoptic annotations. Ids of categories are 1..K for things and
K+1..K+S for stuff there; the classes of a sample are 0..K-1, and its semantic map says 0 for things, 1..S for stuff and
255 for void (U2Seg, arXiv 2312.17243, prepare_stuff_panoptic_fpn.py).

U2Seg trains on whole instance masks, which overlap, while a panoptic map has only what is visible of them. Give the row
of the instances part too, and the masks are the whole ones; without it they are the visible ones. Hidden instances, of
which no pixel is visible, are in no segment list and are not trained on.

Shapes: (h, w) pixels, n instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.panoptic.targets import THINGS, Target
from workers.masks import BoolArray, decode_panoptic_png, decode_rle, mask_box
from workers.merge import VOID_ID, VOID_LABEL, whole_masks
from workers.records import READABLE


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What the model sees of one image, and what it should find there.

    image: (h, w, 3) uint8 RGB. boxes: (n, 4) float32 xyxy in pixels, x1 and y1 exclusive. classes: (n,) int64 in
    0..K-1. masks: (n, h, w) bool, none empty. semantic: (h, w) uint8, 0 = things, 1..S = stuff, 255 = void. scores:
    (n,) float32 in [0, 1], how surely each is an object, or None: all are.
    """

    image_id: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    masks: BoolArray
    semantic: NDArray[np.uint8]
    scores: NDArray[np.float32] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        height, width = self.semantic.shape
        return height, width


class Label(NamedTuple):
    """A segment of an id map: its category in 1..K+S, and whether it is a crowd of things that cannot be told apart."""

    id: int
    category: int
    is_crowd: bool = False


def from_panoptic_row(
    row: Mapping[str, Any],
    image: NDArray[np.uint8],
    *,
    num_things: int,
    num_stuff: int,
    instances: Mapping[str, Any] | None = None,
    nested: bool = False,
) -> Sample:
    """A row of `workers.records.PANOPTIC_SCHEMA` and its decoded (h, w, 3) uint8 image -> the sample.

    `instances` is the row of the same image in the instances part from which the panoptic row was merged; its `rle`
    then give the masks and boxes (see above). With `nested` its `category` gives the classes, and all its masks are
    instances, seen in the map or not, with its `score` (1 where there is none). An image without instances or without
    stuff is a sample like any other.

    Raises:
        ValueError: names the image and the values, when the row is not readable; sizes of image, row and map differ;
            a category is outside 1..K+S or on the wrong side of K; the ids of map and segments differ; or the
            instances are those of another image or of another run.
    """
    image_id = str(row["image_id"])
    if row["status"] not in READABLE or row["panoptic"] is None:
        raise ValueError(f"{image_id}: a row of status {row['status']} ({row['error']}) is no training sample; skip it")
    ids = decode_panoptic_png(row["panoptic"])
    _check_sizes(image_id, image, {"row": (row["height"], row["width"]), "panoptic map": ids.shape})
    segments = row["segments"]
    crossed = [(s["id"], s["category"]) for s in segments if s["is_thing"] != (s["category"] <= num_things)]
    if crossed:
        raise ValueError(f"{image_id}: (id, category) {crossed[:5]} disagree with is_thing at {num_things} things")
    labels = [Label(segment["id"], segment["category"]) for segment in segments]
    _check_labels(image_id, ids, labels, num_things, num_stuff)
    things = [label for label in labels if label.category <= num_things]
    if nested and instances is not None:
        return _nested_sample(image_id, image, ids, labels, instances, num_things)
    masks = _visible_masks(ids, things) if instances is None else _whole_masks(image_id, ids, things, instances)
    return _sample(image_id, image, ids, labels, masks, num_things)


def from_coco(
    annotation: Mapping[str, Any],
    png: bytes,
    image: NDArray[np.uint8],
    categories: Mapping[int, int],
    *,
    num_things: int,
    num_stuff: int,
) -> Sample:
    """An entry of `annotations` of a COCO panoptic JSON, its PNG and its decoded image -> the sample.

    `categories` leads from COCO's `category_id` to 1..K+S (see `coco_categories`). A crowd is no instance, and its
    pixels are things in the semantic map, as in detectron2's prepare_panoptic_fpn.py. ValueError as
    `from_panoptic_row`, and for a `category_id` that is not in `categories`.
    """
    image_id = str(annotation["image_id"])
    segments = annotation["segments_info"]
    unknown = sorted({segment["category_id"] for segment in segments} - set(categories))
    if unknown:
        raise ValueError(f"{image_id}: category_id {unknown[:5]} is not among the {len(categories)} given categories")
    ids = decode_panoptic_png(png)
    _check_sizes(image_id, image, {"panoptic map": ids.shape})
    labels = [Label(s["id"], categories[s["category_id"]], bool(s.get("iscrowd", 0))) for s in segments]
    _check_labels(image_id, ids, labels, num_things, num_stuff)
    things = [label for label in labels if label.category <= num_things and not label.is_crowd]
    return _sample(image_id, image, ids, labels, _visible_masks(ids, things), num_things)


class CocoCategories(NamedTuple):
    """`ids` leads from a COCO `category_id` to 1..K+S; K and S are the numbers of things and stuff."""

    ids: dict[int, int]
    num_things: int
    num_stuff: int


def coco_categories(categories: Sequence[Mapping[str, Any]]) -> CocoCategories:
    """`categories` of a COCO panoptic JSON -> contiguous ids: things 1..K, then stuff, each by ascending COCO id.

    ValueError when an id occurs twice.
    """
    things = sorted(category["id"] for category in categories if category["isthing"])
    stuff = sorted(category["id"] for category in categories if not category["isthing"])
    ids = {category: number for number, category in enumerate([*things, *stuff], start=1)}
    if len(ids) != len(categories):
        raise ValueError(f"{len(categories)} COCO categories, but only {len(ids)} different ids")
    return CocoCategories(ids, len(things), len(stuff))


def to_target(sample: Sample) -> tuple[Tensor, Target]:
    """The sample as the model takes it: (3, h, w) uint8 RGB, and the target with the same arrays as tensors."""
    image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
    arrays = (sample.boxes, sample.classes, sample.masks, sample.semantic)
    boxes, classes, masks, semantic = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    scores = None if sample.scores is None else torch.from_numpy(sample.scores)
    return image, Target(boxes, classes, masks, semantic, scores)


def mask_boxes(masks_nhw: BoolArray) -> NDArray[np.float32]:
    """(n, h, w) bool -> (n, 4) float32 smallest boxes, xyxy, x1 and y1 exclusive; zeros for an empty mask."""
    return np.array([mask_box(mask) for mask in masks_nhw], np.float32).reshape(-1, 4)


def _sample(
    image_id: str,
    image: NDArray[np.uint8],
    ids: NDArray[np.int32],
    labels: Sequence[Label],
    masks: Mapping[int, BoolArray],
    num_things: int,
) -> Sample:
    """`masks` holds, by id, those of the segments that are instances."""
    found = np.stack(list(masks.values())) if masks else np.zeros((0, *ids.shape), bool)
    classes = [label.category - 1 for label in labels if label.id in masks]
    semantic = _semantic(ids, labels, num_things)
    return Sample(image_id, image, mask_boxes(found), np.array(classes, np.int64).reshape(-1), found, semantic)


def _nested_sample(
    image_id: str,
    image: NDArray[np.uint8],
    ids: NDArray[np.int32],
    labels: Sequence[Label],
    instances: Mapping[str, Any],
    num_things: int,
) -> Sample:
    _check_instances(image_id, ids, instances)
    classes = np.array(instances["category"], np.int64).reshape(-1) - 1
    if ((classes < 0) | (classes >= num_things)).any():
        raise ValueError(f"{image_id}: categories {instances['category'][:5]} of masks are not all in 1..{num_things}")
    masks = [decode_rle(counts, *ids.shape) for counts in instances["rle"]]
    found = np.stack(masks) if masks else np.zeros((0, *ids.shape), bool)
    seen = found.any(axis=(1, 2))
    semantic = _semantic(ids, labels, num_things)
    scores = np.array([1.0 if score is None else score for score in instances["score"]], np.float32)
    return Sample(image_id, image, mask_boxes(found[seen]), classes[seen], found[seen], semantic, scores[seen])


def _semantic(ids: NDArray[np.int32], labels: Sequence[Label], num_things: int) -> NDArray[np.uint8]:
    """(h, w) classes of the semantic head from an id map."""
    semantic_of_id = np.full(int(ids.max()) + 1, VOID_LABEL, np.uint8)
    for label in labels:
        semantic_of_id[label.id] = max(THINGS, label.category - num_things)
    return semantic_of_id[ids]


def _visible_masks(ids: NDArray[np.int32], things: Sequence[Label]) -> dict[int, BoolArray]:
    return {thing.id: ids == thing.id for thing in things}


def _whole_masks(
    image_id: str, ids: NDArray[np.int32], things: Sequence[Label], instances: Mapping[str, Any]
) -> dict[int, BoolArray]:
    """The masks of the instances part that the visible things are parts of."""
    _check_instances(image_id, ids, instances)
    try:
        return whole_masks(
            ids, [thing.id for thing in things], [decode_rle(counts, *ids.shape) for counts in instances["rle"]]
        )
    except ValueError as error:
        raise ValueError(f"{image_id}: {error}") from error


def _check_instances(image_id: str, ids: NDArray[np.int32], instances: Mapping[str, Any]) -> None:
    of_row = (instances["image_id"], instances["height"], instances["width"])
    if of_row != (image_id, *ids.shape):
        raise ValueError(f"{image_id}: a row of instances of {of_row}, wanted one of {(image_id, *ids.shape)}")


def _check_sizes(image_id: str, image: NDArray[np.uint8], sizes: Mapping[str, tuple[int, ...]]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{image_id}: an image is (h, w, 3) uint8, got {image.shape} {image.dtype}")
    for name, size in sizes.items():
        if tuple(size) != image.shape[:2]:
            raise ValueError(f"{image_id}: the image is {image.shape[:2]}, its {name} {tuple(size)} (height, width)")


def _check_labels(
    image_id: str, ids: NDArray[np.int32], labels: Sequence[Label], num_things: int, num_stuff: int
) -> None:
    if not 0 <= num_stuff < VOID_LABEL:
        raise ValueError(f"num_stuff must be in 0..{VOID_LABEL - 1}, got {num_stuff}")
    last = num_things + num_stuff
    outside = sorted({label.category for label in labels if not 1 <= label.category <= last})
    if outside:
        raise ValueError(
            f"{image_id}: categories {outside[:5]} are outside 1..{last} ({num_things} things, {num_stuff} stuff); "
            "train with the K and S of the labels"
        )
    present = np.zeros(int(ids.max()) + 1, bool)
    present[ids] = True
    drawn, listed = set(np.flatnonzero(present).tolist()) - {VOID_ID}, [label.id for label in labels]
    problems = {
        "listed twice": {number for number in listed if listed.count(number) > 1},
        "listed but not in the map": set(listed) - drawn,
        "in the map but not listed": drawn - set(listed),
    }
    if any(problems.values()):
        words = "; ".join(f"{sorted(found)[:5]} {kind}" for kind, found in problems.items() if found)
        raise ValueError(f"{image_id}: segment ids {words}")
