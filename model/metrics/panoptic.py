"""What the labels are worth against a known truth: panoptic quality, one-to-one class mapping.

Panoptic quality is that of the COCO panoptic evaluator (Kirillov et al., arXiv 1801.00868, section 4), including its
treatment of void and crowd. All of it streams: an image is reduced to the pixel counts of its overlapping segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

VOID_ID = 0
MATCH_IOU = 0.5  # above one half, a segment has at most one partner

Overlaps = dict[tuple[int, int], int]  # (truth id, predicted id) -> shared pixels; 0 is void on either side


class LabelledSegment(NamedTuple):
    """A segment as the metrics see it: its id in the id map, its category, and whether the truth calls it a crowd."""

    id: int
    category: int
    crowd: bool = False


class HasCategory(Protocol):
    """Any object with the two attributes, such as a segment of the merge."""

    @property
    def id(self) -> int: ...

    @property
    def category(self) -> int: ...


SegmentLike = Mapping[str, Any] | HasCategory


def labelled_segments(segments: Iterable[SegmentLike]) -> list[LabelledSegment]:
    """Segments of a panoptic part (`id`, `category`), of COCO (`id`, `category_id`, `iscrowd`) or of the merge."""
    labelled = []
    for s in segments:
        if isinstance(s, LabelledSegment):
            labelled.append(s)
        elif isinstance(s, Mapping):
            category = s["category"] if "category" in s else s["category_id"]
            labelled.append(LabelledSegment(int(s["id"]), int(category), bool(s.get("iscrowd", False))))
        else:
            labelled.append(LabelledSegment(int(s.id), int(s.category)))
    return labelled


def segment_overlaps(gt_ids: ArrayLike, pred_ids: ArrayLike) -> Overlaps:
    """Two (h, w) id maps, ids in [0, 2**31) -> shared pixels of every pair that meets. ValueError: they do not fit."""
    truth, predicted = np.asarray(gt_ids), np.asarray(pred_ids)
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(f"id maps must be of one size, got truth {truth.shape} and prediction {predicted.shape}")
    if truth.size and min(truth.min(), predicted.min()) < 0:
        raise ValueError(f"ids must not be negative, got {min(truth.min(), predicted.min())}")
    pairs, counts = np.unique((truth.astype(np.int64) << 32) | predicted.astype(np.int64), return_counts=True)
    return {(int(p >> 32), int(p & 0xFFFFFFFF)): int(n) for p, n in zip(pairs, counts, strict=True)}


@dataclass(frozen=True, slots=True)
class Quality:
    """Panoptic quality `pq`, segmentation quality `sq` and recognition quality `rq` in [0, 1], and their basis.

    For one category `n` is the number of its true positives, misses and false alarms; for a group it is the number
    of categories that occur, over which pq, sq and rq are averaged (so pq is not sq * rq). All 0 when `n` is 0.
    """

    pq: float
    sq: float
    rq: float
    n: int


@dataclass(frozen=True, slots=True)
class PanopticResult:
    """The quality of all categories, of things, of stuff, and of each category by its id."""

    all: Quality
    things: Quality
    stuff: Quality
    per_class: dict[int, Quality]


@dataclass(slots=True)
class _Tally:
    iou: float = 0.0
    matched: int = 0
    false_alarms: int = 0
    missed: int = 0

    def quality(self) -> Quality:
        n = self.matched + self.false_alarms + self.missed
        if n == 0:
            return Quality(0.0, 0.0, 0.0, 0)
        weight = self.matched + 0.5 * self.false_alarms + 0.5 * self.missed
        return Quality(self.iou / weight, self.iou / self.matched if self.matched else 0.0, self.matched / weight, n)


class PanopticQuality:
    """Panoptic quality over a stream of images, in memory that grows with the categories alone.

    Args:
        categories: category id -> whether it is a thing.
    """

    def __init__(self, categories: Mapping[int, bool]) -> None:
        self.categories = dict(categories)
        self._tallies = {category: _Tally() for category in self.categories}

    def update(
        self,
        gt_ids: ArrayLike,
        gt_segments: Iterable[SegmentLike],
        pred_ids: ArrayLike,
        pred_segments: Iterable[SegmentLike],
    ) -> None:
        """Add one image: two (h, w) id maps (0 = void) and their segments (see `labelled_segments`).

        Raises:
            ValueError: sizes differ, a category is unknown, or map and segments of the prediction disagree.
        """
        self.update_overlaps(
            segment_overlaps(gt_ids, pred_ids), labelled_segments(gt_segments), labelled_segments(pred_segments)
        )

    def update_overlaps(
        self, overlaps: Overlaps, gt_segments: Sequence[LabelledSegment], pred_segments: Sequence[LabelledSegment]
    ) -> None:
        """Add one image of which only the overlaps of the segments are left. Raises as `update` does."""
        gt_areas, pred_areas = _areas(overlaps)
        self._check(gt_segments, pred_segments, pred_areas)
        gt, pred = {s.id: s for s in gt_segments}, {s.id: s for s in pred_segments}
        matched_gt, matched_pred = set(), set()
        for (gt_id, pred_id), shared in overlaps.items():
            if gt_id not in gt or pred_id not in pred or gt[gt_id].crowd:
                continue
            if gt[gt_id].category != pred[pred_id].category:
                continue
            # Predicted pixels on void count for nobody.
            union = gt_areas[gt_id] + pred_areas[pred_id] - shared - overlaps.get((VOID_ID, pred_id), 0)
            if shared / union > MATCH_IOU:
                tally = self._tallies[gt[gt_id].category]
                tally.iou += shared / union
                tally.matched += 1
                matched_gt.add(gt_id)
                matched_pred.add(pred_id)
        self._count_missed([s for s in gt_segments if s.id not in matched_gt])
        unmatched = [s for s in pred_segments if s.id not in matched_pred]
        self._count_false_alarms(unmatched, gt_segments, overlaps, pred_areas)

    def result(self) -> PanopticResult:
        per_class = {category: tally.quality() for category, tally in self._tallies.items()}
        things = [q for category, q in per_class.items() if self.categories[category]]
        stuff = [q for category, q in per_class.items() if not self.categories[category]]
        return PanopticResult(_mean(things + stuff), _mean(things), _mean(stuff), per_class)

    def _count_missed(self, unmatched: Iterable[LabelledSegment]) -> None:
        for segment in unmatched:
            if not segment.crowd:
                self._tallies[segment.category].missed += 1

    def _count_false_alarms(
        self,
        unmatched: Iterable[LabelledSegment],
        gt_segments: Iterable[LabelledSegment],
        overlaps: Overlaps,
        pred_areas: Mapping[int, int],
    ) -> None:
        # As in the COCO evaluator, the last crowd of a category stands for all of them.
        crowd_of = {s.category: s.id for s in gt_segments if s.crowd}
        for segment in unmatched:
            ignored = overlaps.get((VOID_ID, segment.id), 0)
            if segment.category in crowd_of:
                ignored += overlaps.get((crowd_of[segment.category], segment.id), 0)
            if ignored / pred_areas[segment.id] <= 0.5:
                self._tallies[segment.category].false_alarms += 1

    def _check(
        self,
        gt_segments: Sequence[LabelledSegment],
        pred_segments: Sequence[LabelledSegment],
        pred_areas: Mapping[int, int],
    ) -> None:
        unknown = sorted({s.category for s in (*gt_segments, *pred_segments)} - self.categories.keys())
        if unknown:
            raise ValueError(f"segments of unknown categories {unknown}")
        listed, painted = {s.id for s in pred_segments}, pred_areas.keys() - {VOID_ID}
        if listed != painted:
            raise ValueError(f"predicted ids without a segment or without a pixel: {sorted(listed ^ painted)}")


def panoptic_quality(
    pairs: Iterable[tuple[ArrayLike, Iterable[SegmentLike], ArrayLike, Iterable[SegmentLike]]],
    categories: Mapping[int, bool],
) -> PanopticResult:
    """Panoptic quality of a stream of images (truth ids, truth segments, predicted ids, predicted segments).

    Ids are (h, w) integers, 0 = void; segments as in `labelled_segments`; `categories` maps a category's id to
    whether it is a thing. ValueError as `PanopticQuality.update`.
    """
    quality = PanopticQuality(categories)
    for gt_ids, gt_segments, pred_ids, pred_segments in pairs:
        quality.update(gt_ids, gt_segments, pred_ids, pred_segments)
    return quality.result()


def _areas(overlaps: Overlaps) -> tuple[dict[int, int], dict[int, int]]:
    gt_areas: dict[int, int] = defaultdict(int)
    pred_areas: dict[int, int] = defaultdict(int)
    for (gt_id, pred_id), shared in overlaps.items():
        gt_areas[gt_id] += shared
        pred_areas[pred_id] += shared
    return gt_areas, pred_areas


def _mean(qualities: Iterable[Quality]) -> Quality:
    present = [q for q in qualities if q.n]
    n = max(len(present), 1)
    return Quality(
        sum(q.pq for q in present) / n, sum(q.sq for q in present) / n, sum(q.rq for q in present) / n, len(present)
    )


def hungarian_mapping(counts_KxC: ArrayLike) -> NDArray[np.int64]:
    """(K, C) pixels of cluster k on class c -> (K,) class of each cluster, one to one, most pixels explained.

    A cluster that is left over, or that was paired with a class it shares no pixel with, gets -1. Things and stuff
    are to be mapped apart. ValueError when the counts are not a matrix of numbers >= 0.
    """
    counts = np.asarray(counts_KxC)
    if counts.ndim != 2 or (counts.size and not counts.min() >= 0):
        raise ValueError(f"counts must be a (clusters, classes) matrix of numbers >= 0, got shape {counts.shape}")
    from scipy.optimize import linear_sum_assignment  # which a look at a run need not wait for

    clusters, classes = linear_sum_assignment(counts, maximize=True)
    shared = counts[clusters, classes] > 0
    mapping = np.full(len(counts), -1, dtype=np.int64)
    mapping[clusters[shared]] = classes[shared]
    return mapping
