"""What the pseudo-labels of the generated scenes are worth against their truth: mask AP and panoptic quality.

Pseudo-classes have no names, so things and stuff are each mapped to the truth's categories one to one, by the pixels
they share (Hungarian assignment). A pseudo-class that is left over has no category: its segments count as void.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics import (
    VOID_ID,
    LabelledSegment,
    Overlaps,
    PanopticQuality,
    PanopticResult,
    ScoredMask,
    SegmentLike,
    class_agnostic_ap,
    hungarian_mapping,
    labelled_segments,
    segment_overlaps,
)
from pipeline import storage
from workers.masks import decode_panoptic_png, encode_rle

PanopticRow = tuple[str, NDArray[np.integer], Sequence[SegmentLike], Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Truth:
    """A COCO panoptic truth: the images' names, category id -> is a thing, and the annotation of each name."""

    folder: str
    categories: dict[int, bool]
    annotations: dict[str, dict[str, Any]]

    def ids(self, image_id: str) -> NDArray[np.int32]:
        """The (h, w) int32 id map of one image, 0 = void."""
        name = self.annotations[image_id]["file_name"]
        return decode_panoptic_png(storage.read_bytes(storage.join(self.folder, "truth", name)))


def read_truth(folder: str) -> Truth:
    """The truth that `pipeline.demo.scenes.write_scenes` wrote below `folder`. FileNotFoundError when there is none."""
    document = json.loads(storage.read_bytes(storage.join(folder, "truth.json")))
    name_of = {image["id"]: image["file_name"] for image in document["images"]}
    annotations = {name_of[annotation["image_id"]]: annotation for annotation in document["annotations"]}
    return Truth(folder, {c["id"]: bool(c["isthing"]) for c in document["categories"]}, annotations)


def score_labels(truth_folder: str, rows: Iterable[PanopticRow]) -> dict[str, float]:
    """Score panoptic labels against the truth below `truth_folder`; every value but the counts is in [0, 1].

    Args:
        truth_folder: path or URI of what `pipeline.demo.scenes.write_scenes` wrote.
        rows: (image_id, (h, w) integer ids with 0 = void, segments, their scores); segments are those of a panoptic
            part or of the merge, `scores[i]` belongs to `segments[i]` (None for stuff). Images of the truth without
            a row count as images without labels.

    Returns:
        `AP`, `AP50`, `AP75`, `AR100` of the things' visible masks, classes ignored; `PQ`, `SQ`, `RQ` over all
        categories that occur, and `PQ_things` ... `RQ_stuff` over theirs (stuff is 0 when none was predicted, and
        then weighs on PQ); `images`, `segments`, and `unmapped_segments`, those of pseudo-classes left over.

    Raises:
        ValueError: a row's image is not in the truth or comes twice, or sizes, segments and scores do not fit.
    """
    truth = read_truth(truth_folder)
    images = _compare(truth, rows)
    mapping = {**_map_classes(images, truth, things=True), **_map_classes(images, truth, things=False)}
    quality = PanopticQuality(truth.categories)
    for image in images:
        overlaps, predicted = _relabel(image, mapping)
        quality.update_overlaps(overlaps, image.gt_segments, predicted)
    predicted_segments = [s for image in images for s in image.pred_segments]
    return {
        **class_agnostic_ap([image.gt_masks for image in images], [image.pred_masks for image in images]),
        **_quality_numbers(quality.result()),
        "images": len(images),
        "segments": len(predicted_segments),
        "unmapped_segments": sum(s.category not in mapping for s in predicted_segments),
    }


@dataclass(slots=True)
class _Comparison:
    """What is kept of an image: its segments, the pixels they share, and the masks of its things as RLE."""

    overlaps: Overlaps
    gt_segments: list[LabelledSegment]
    gt_masks: list[dict[str, Any]]
    pred_segments: list[LabelledSegment] = field(default_factory=list)
    pred_masks: list[ScoredMask] = field(default_factory=list)
    pred_things: set[int] = field(default_factory=set)  # categories


def _compare(truth: Truth, rows: Iterable[PanopticRow]) -> list[_Comparison]:
    compared: dict[str, _Comparison] = {}
    for image_id, ids, segments, scores in rows:
        if image_id not in truth.annotations or image_id in compared:
            problem = "comes twice" if image_id in compared else f"is not in {truth.folder}/truth.json"
            raise ValueError(f"image {image_id!r} {problem}")
        compared[image_id] = _compare_image(truth, image_id, np.asarray(ids), segments, scores)
    for image_id in truth.annotations:
        if image_id not in compared:
            compared[image_id] = _compare_image(truth, image_id, None, [], [])
    return [compared[image_id] for image_id in truth.annotations]


def _compare_image(
    truth: Truth,
    image_id: str,
    ids: NDArray[np.integer] | None,
    segments: Sequence[SegmentLike],
    scores: Sequence[float | None],
) -> _Comparison:
    gt_ids = truth.ids(image_id)
    pred_ids = np.zeros_like(gt_ids) if ids is None else ids
    gt_segments = labelled_segments(truth.annotations[image_id]["segments_info"])
    gt_masks = [_rle(gt_ids, s.id) for s in gt_segments if truth.categories[s.category]]
    found = _Comparison(segment_overlaps(gt_ids, pred_ids), gt_segments, gt_masks, labelled_segments(segments))
    for raw, segment, score in zip(segments, found.pred_segments, scores, strict=True):
        if _is_thing(raw):
            found.pred_things.add(segment.category)
            found.pred_masks.append(ScoredMask(_rle(pred_ids, segment.id), 1.0 if score is None else float(score)))
    return found


def _is_thing(segment: SegmentLike) -> bool:
    return bool(segment["is_thing"] if isinstance(segment, Mapping) else segment.is_thing)  # type: ignore[attr-defined]


def _rle(ids: NDArray[np.integer], segment_id: int) -> dict[str, Any]:
    return {"size": list(ids.shape), "counts": encode_rle(ids == segment_id)}


def _map_classes(images: Sequence[_Comparison], truth: Truth, *, things: bool) -> dict[int, int]:
    """Pseudo-class -> category of the truth, one to one, by shared pixels, among things or among stuff."""
    categories = [category for category, is_thing in truth.categories.items() if is_thing == things]
    thing_classes = {category for image in images for category in image.pred_things}
    seen = {s.category for image in images for s in image.pred_segments}
    classes = sorted(seen & thing_classes if things else seen - thing_classes)
    row = {pseudo_class: i for i, pseudo_class in enumerate(classes)}
    column = {category: j for j, category in enumerate(categories)}
    counts = np.zeros((len(classes), len(categories)), dtype=np.int64)
    for image in images:
        gt = {s.id: s.category for s in image.gt_segments}
        pred = {s.id: s.category for s in image.pred_segments}
        for (gt_id, pred_id), shared in image.overlaps.items():
            if gt.get(gt_id) in column and pred.get(pred_id) in row:
                counts[row[pred[pred_id]], column[gt[gt_id]]] += shared
    matches = hungarian_mapping(counts)
    return {classes[i]: categories[j] for i, j in enumerate(matches) if j >= 0}


def _relabel(image: _Comparison, mapping: Mapping[int, int]) -> tuple[Overlaps, list[LabelledSegment]]:
    """The image's prediction in the truth's categories; segments of pseudo-classes left over become void."""
    kept = [LabelledSegment(s.id, mapping[s.category]) for s in image.pred_segments if s.category in mapping]
    kept_ids = {s.id for s in kept}
    overlaps: Overlaps = {}
    for (gt_id, pred_id), shared in image.overlaps.items():
        key = (gt_id, pred_id if pred_id in kept_ids else VOID_ID)
        overlaps[key] = overlaps.get(key, 0) + shared
    return overlaps, kept


def _quality_numbers(result: PanopticResult) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for suffix, quality in (("", result.all), ("_things", result.things), ("_stuff", result.stuff)):
        numbers |= {f"PQ{suffix}": quality.pq, f"SQ{suffix}": quality.sq, f"RQ{suffix}": quality.rq}
    return numbers
