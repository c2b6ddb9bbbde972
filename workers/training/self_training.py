"""Self-training: what a trained model sees surely, and the old labels that it does not contradict (CutLER).

CutLER (arXiv 2301.11320, section 3.3) trains again on its predictions above a score together with the old masks that
overlap none of them. Its program suppresses duplicates by boxes alone, writes the area of the box for that of the mask
and swaps height and width; here duplicates are suppressed by masks, and areas and sizes are those of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco

from model.panoptic.targets import THINGS
from workers.masks import BoolArray, Box, decode_rle, encode_panoptic_png, encode_rle, mask_box, open_png
from workers.merge import VOID_LABEL, merge_panoptic
from workers.predict import encode_class_map
from workers.records import PREDICTIONS_SCHEMA, READABLE, Status
from workers.training.samples import from_panoptic_row

CUTLER_THRESHOLDS = (0.7, 0.65)  # scores of the first and the second round
MOST_PREDICTIONS = 30  # an image, as CutLER's
WHEN_REPLACED = "where the photo was replaced between two stages, u2label run --extend does its shard again"


@dataclass(frozen=True, slots=True, eq=False)
class MergedInstances:
    """Instances of one image: the predictions by falling score, then the old ones in their order.

    masks: (n, h, w) bool, none empty; categories: (n,) int64; scores: (n,) float64, NaN for an old one without any.
    """

    masks: BoolArray
    categories: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def areas(self) -> list[int]:
        """Pixels of each mask."""
        return [int(mask.sum()) for mask in self.masks]

    @property
    def boxes(self) -> list[Box]:
        """The smallest box around each mask, xyxy, x1 and y1 exclusive."""
        return [mask_box(mask) for mask in self.masks]


def merge_predictions(
    pred_masks: ArrayLike,
    pred_scores: ArrayLike,
    pred_categories: ArrayLike,
    old_masks: ArrayLike,
    old_categories: ArrayLike,
    *,
    threshold: float,
    old_scores: ArrayLike | None = None,
    max_iou: float = 0.5,
    nms_iou: float = 0.5,
    most: int = MOST_PREDICTIONS,
) -> MergedInstances:
    """The predictions that are sure, and the old masks that are none of them (CutLER, section 3.3).

    Args:
        pred_masks: (n, h, w) bool. pred_scores: (n,) in [0, 1]. pred_categories: (n,) integers.
        old_masks: (m, h, w) bool. old_categories: (m,) integers.
        threshold: least score of a prediction that is kept.
        old_scores: (m,), with which the old ones were learnt; None where it was with certainty.
        max_iou: an old mask is kept when its mask IoU with every kept prediction is below this.
        nms_iou: of two predictions whose mask IoU is above this the surer is kept, whatever their categories.
        most: predictions that are looked at, the surest first.

    Masks without a pixel are left out. ValueError: shapes, dtypes or sizes do not fit, or a number is out of range.
    """
    for name, value in (("threshold", threshold), ("max_iou", max_iou), ("nms_iou", nms_iou)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    predictions, categories = _checked_masks("predicted", pred_masks, pred_categories)
    old, old_labels = _checked_masks("old", old_masks, old_categories)
    if predictions.shape[1:] != old.shape[1:]:
        raise ValueError(f"predicted masks are {predictions.shape[1:]}, old ones {old.shape[1:]} (height, width)")
    scores = _checked_scores(pred_scores, len(predictions))
    learnt = np.full(len(old), np.nan) if old_scores is None else _checked_scores(old_scores, len(old))
    order = np.argsort(-scores, kind="stable")[:most]
    sure = order[(scores[order] >= threshold) & predictions[order].any(axis=(1, 2))]
    kept = sure[suppress(predictions[sure], nms_iou)]
    # Without a kept prediction there is none that an old mask could overlap, even when no overlap is allowed.
    unseen = old.any(axis=(1, 2)) & (mask_ious(old, predictions[kept]).max(axis=1, initial=-1.0) < max_iou)
    return MergedInstances(
        np.concatenate([predictions[kept], old[unseen]]),
        np.concatenate([categories[kept], old_labels[unseen]]),
        np.concatenate([scores[kept], learnt[unseen]]),
    )


def suppress(masks_nhw: BoolArray, max_iou: float) -> NDArray[np.intp]:
    """(k,) ascending indices of the masks, best first, that no better kept one overlaps with more than `max_iou`."""
    ious = mask_ious(masks_nhw, masks_nhw)
    kept: list[int] = []
    for i in range(len(masks_nhw)):
        if not (ious[i, kept] > max_iou).any():
            kept.append(i)
    return np.array(kept, dtype=np.intp)


def mask_ious(masks_nhw: BoolArray, others_mhw: BoolArray) -> NDArray[np.float64]:
    """(n, m) intersection over union of bool masks of one size; 0 where both are empty."""
    if len(masks_nhw) == 0 or len(others_mhw) == 0:
        return np.zeros((len(masks_nhw), len(others_mhw)))
    # From run lengths: the product of two matrices of pixels would need a float for every pixel of every mask.
    runs = [coco.encode(np.asfortranarray(m.transpose(1, 2, 0), np.uint8)) for m in (masks_nhw, others_mhw)]
    return np.nan_to_num(np.asarray(coco.iou(*runs, [False] * len(others_mhw)), np.float64))


@dataclass(frozen=True, slots=True)
class SelfTrainingParams:
    """What decides the new labels; the first four as in `merge_predictions`, `max_cover` as in `merge_panoptic`.

    `semantics` says whose stuff lies behind the instances: that of the old labels or the model's. Where an image has no
    old label, it is the model's. `nested`: the old masks are all that the instances list, with their categories, and if
    `soft` with their scores, as they were learnt with these.
    """

    threshold: float = CUTLER_THRESHOLDS[0]
    max_iou: float = 0.5
    nms_iou: float = 0.5
    most: int = MOST_PREDICTIONS
    max_cover: float = 0.7
    semantics: Literal["old", "model"] = "old"
    nested: bool = False
    soft: bool = False


class _Old(NamedTuple):
    """Arguments of `merge_predictions` of the same names."""

    masks: BoolArray
    categories: NDArray[np.int64]
    scores: NDArray[np.float32] | None


class SelfTrainingWorker:
    """Parts of predictions and of old labels of the same images -> the labels of the next round."""

    def __init__(self, params: SelfTrainingParams, *, num_things: int, num_stuff: int) -> None:
        self._params = params
        self._num_things, self._num_stuff = num_things, num_stuff

    def process(
        self,
        predictions: pa.Table,
        panoptic: pa.Table,
        *,
        instances: pa.Table | None = None,
        semantics: pa.Table | None = None,
    ) -> pa.Table:
        """Tables of the same images in the same order -> table of PREDICTIONS_SCHEMA, one row each.

        It is a panoptic part, and with its list columns also the instances part that this was merged from: whole masks
        with their categories, `bbox` around the mask, `score` null for an old one that was learnt without. `labels` is
        the stuff behind them. A photo that could not be read for its prediction keeps that row; one without old labels
        has the predictions.

        Args:
            predictions: of PREDICTIONS_SCHEMA.
            panoptic: the old labels, of PANOPTIC_SCHEMA; of a later round, the result of the one before.
            instances: the part that the old labels were merged from (of a later round, the same result): old masks are
                then whole. Without it they are what is visible. Hidden instances have no category and are left out.
            semantics: the old stuff maps, of SEMANTICS_SCHEMA; without them, what is visible of the old stuff.

        Raises:
            ValueError: names the image that differs between the tables, has another size in one of them, or whose
                labels do not fit `num_things` and `num_stuff`.
        """
        tables = (predictions, panoptic, instances, semantics)
        counts = [table.num_rows for table in tables if table is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"the parts to merge hold {counts} images; delete the one that is wrong")
        rows = []
        for number in range(predictions.num_rows):
            found, *old = (None if table is None else _row_of(table, number) for table in tables)
            assert found is not None
            try:
                rows.append(self._row(found, *old))
            except ValueError as error:
                raise ValueError(f"{found['image_id']}: {error}; {WHEN_REPLACED}") from error
        return pa.Table.from_pylist(rows, schema=PREDICTIONS_SCHEMA)

    def _row(
        self,
        found: Mapping[str, Any],
        panoptic: Mapping[str, Any] | None,
        instances: Mapping[str, Any] | None,
        semantics: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        others = [row["image_id"] for row in (panoptic, instances, semantics) if row is not None]
        if any(name != found["image_id"] for name in others):
            raise ValueError(f"the parts to merge have {others} in its place")
        if found["status"] not in READABLE:
            return dict(found)
        old, stuff = self._old(found, panoptic, instances, semantics)
        height, width = found["height"], found["width"]
        params = self._params
        merged = merge_predictions(
            _decode_all(found["rle"], height, width),
            found["score"],
            np.array(found["category"], np.int64),
            old.masks,
            old.categories,
            threshold=params.threshold,
            old_scores=old.scores,
            max_iou=params.max_iou,
            nms_iou=params.nms_iou,
            most=params.most,
        )
        return self._merged_row(found, merged, stuff)

    def _old(
        self,
        found: Mapping[str, Any],
        panoptic: Mapping[str, Any] | None,
        instances: Mapping[str, Any] | None,
        semantics: Mapping[str, Any] | None,
    ) -> tuple[_Old, NDArray[np.uint8] | None]:
        """The old instances, and the stuff to lie behind the merged ones; None without stuff."""
        height, width = found["height"], found["width"]
        model_map = _decode_map(found["labels"], height, width)
        if panoptic is None or panoptic["status"] not in READABLE:
            return _Old(np.zeros((0, height, width), bool), np.zeros(0, np.int64), None), self._stuff(model_map)
        sample = from_panoptic_row(
            panoptic,
            np.broadcast_to(np.uint8(0), (height, width, 3)),  # the labels alone matter
            num_things=self._num_things,
            num_stuff=self._num_stuff,
            instances=instances,
            nested=self._params.nested,
        )
        if self._params.semantics == "model":
            stuff = model_map
        elif semantics is not None and semantics["labels"] is not None:
            stuff = _decode_map(semantics["labels"], height, width)
        else:
            hidden = (sample.semantic == THINGS) | (sample.semantic == VOID_LABEL)
            stuff = np.where(hidden, np.uint8(VOID_LABEL), sample.semantic - np.uint8(1))
        old = _Old(sample.masks, sample.classes + 1, sample.scores if self._params.soft else None)
        return old, self._stuff(stuff)

    def _stuff(self, classes_hw: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        return classes_hw if self._num_stuff else None

    def _merged_row(
        self, found: Mapping[str, Any], merged: MergedInstances, stuff: NDArray[np.uint8] | None
    ) -> dict[str, Any]:
        labels = merge_panoptic(
            merged.masks,
            merged.categories,
            stuff,
            num_things=self._num_things,
            num_stuff=self._num_stuff,
            scores_n=merged.scores,
            max_cover=self._params.max_cover,
        )
        segments = [asdict(segment) for segment in labels.segments]
        return {
            **{name: found[name] for name in ("image_id", "uri", "height", "width", "error")},
            "status": str(Status.OK if segments else Status.NO_MASKS),
            "panoptic": encode_panoptic_png(labels.ids),
            "segments": [segment | {"score": _score(segment["score"])} for segment in segments],
            "hidden_instances": labels.hidden,
            "labels": None if stuff is None else encode_class_map(stuff),
            "rle": [encode_rle(mask) for mask in merged.masks],
            "bbox": merged.boxes,
            "area": merged.areas,
            "score": [_score(score) for score in merged.scores.tolist()],
            "category": merged.categories.tolist(),
        }


def _row_of(table: pa.Table, number: int) -> dict[str, Any] | None:
    rows = table.slice(number, 1).to_pylist()
    return rows[0] if rows else None


def _score(score: float | None) -> float | None:
    return None if score is None or np.isnan(score) else score


def _decode_all(rles: Sequence[str], height: int, width: int) -> BoolArray:
    masks = [decode_rle(counts, height, width) for counts in rles]
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)


def _decode_map(png: bytes, height: int, width: int) -> NDArray[np.uint8]:
    with open_png(png) as image:
        classes = np.asarray(image, np.uint8)
    if classes.shape != (height, width):
        raise ValueError(f"its class map is {classes.shape}, its prediction {(height, width)} (height, width)")
    return classes


def _checked_masks(which: str, masks_nhw: ArrayLike, categories_n: ArrayLike) -> tuple[BoolArray, NDArray[np.int64]]:
    masks, categories = np.asarray(masks_nhw), np.asarray(categories_n)
    if masks.ndim != 3 or masks.dtype != np.bool_ or 0 in masks.shape[1:]:
        raise ValueError(f"{which} masks must be (n, h, w) bool, got {masks.shape} {masks.dtype}")
    if categories.shape != masks.shape[:1] or (categories.size and not np.issubdtype(categories.dtype, np.integer)):
        raise ValueError(f"{len(masks)} {which} masks need as many integer categories, got {categories.shape}")
    return masks, categories.astype(np.int64)


def _checked_scores(scores_n: ArrayLike, count: int) -> NDArray[np.float64]:
    scores = np.asarray(scores_n, np.float64)
    if scores.shape != (count,) or not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"{count} masks need as many scores in [0, 1], got {scores.tolist()[:5]}")
    return scores
