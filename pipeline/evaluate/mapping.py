"""From clusters without names to the classes of the truth: one to one, by vote, or not at all.

What a mapping is learnt on is counted first (`Evidence`, one object a half of the images), so that any mapping can be
learnt on any half. A mapping is a table {cluster: class}, applied in one look-up; a cluster that is not in it has no
class, and its segments become void. Things are only ever mapped to things, stuff to stuff.

K clusters, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.metrics.instances import Instance
from model.metrics.panoptic import VOID_ID, LabelledSegment, Overlaps, hungarian_mapping
from model.metrics.semantic import ConfusionCounts
from pipeline.errors import ConfigError
from pipeline.evaluate.panoptic import LabelPair
from pipeline.sources.coco import Categories, PanopticSegment

Mode = Literal["hungarian", "vote", "identity"]
Leftover = Literal["error", "argmax"]
ClassOf = dict[int, int]  # cluster -> class


@dataclass(frozen=True, slots=True)
class VoteThresholds:
    """U2Seg's: a detection of at least this score votes for each true box it overlaps more than this (IoU); a stuff
    cluster votes for a stuff class that it overlaps more than this in the image (IoU)."""

    score: float = 0.6
    box_iou: float = 0.7
    stuff_iou: float = 0.15


class Evidence:
    """Shared pixels of clusters and classes, and votes, over a stream of images.

    `pixels.matrix` is (K + 1, C), its last row void, crowds included, void of the truth left out; `votes` is (K, C).
    Rows are the clusters and columns the classes by ascending id.
    """

    def __init__(self, clusters: Categories, classes: Categories) -> None:
        self.clusters, self.classes = clusters, classes
        self._row = {cluster: k for k, cluster in enumerate(sorted(clusters))}
        self._column = {category: c for c, category in enumerate(sorted(classes))}
        self.pixels = ConfusionCounts(len(clusters), len(classes), void=-1, ignore=(-1,))
        self.votes = np.zeros((len(clusters), len(classes)), np.int64)

    def __add__(self, other: Evidence) -> Evidence:
        total = Evidence(self.clusters, self.classes)
        total.pixels = self.pixels + other.pixels
        total.votes = self.votes + other.votes
        return total

    def add_pixels(self, pair: LabelPair) -> None:
        """Count the pixels of an image."""
        self.pixels.matrix += self._shared_pixels(pair)[:, :-1]

    def add_votes(
        self, pair: LabelPair, truth: Sequence[Instance], found: Sequence[Instance], thresholds: VoteThresholds
    ) -> None:
        """Count the votes of an image as U2Seg does (coco_evaluation.py, sem_seg_evaluation.py): true boxes of crowds
        count as any other, votes are not weighted, and the stuff of an image votes once a cluster and class."""
        sure = [instance for instance in found if instance.score >= thresholds.score]
        ious = _box_ious(sure, truth)
        for detection, true in zip(*np.nonzero(ious > thresholds.box_iou), strict=True):
            self.votes[self._row[sure[detection].category], self._column[truth[true].category]] += 1
        shared = self._shared_pixels(pair)
        union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0, keepdims=True) - shared
        agree = shared / np.maximum(union, 1) > thresholds.stuff_iou
        self.votes += agree[:-1, :-1] & self._both_stuff()

    def table(self, class_of: ClassOf) -> NDArray[np.int64]:
        """(K,) column of each cluster's class, -1 for none, as `semantic_metrics.score` takes it."""
        return np.array(
            [self._column.get(class_of.get(cluster, -1), -1) for cluster in sorted(self.clusters)], np.int64
        )

    def _shared_pixels(self, pair: LabelPair) -> NDArray[np.int64]:
        """(K + 1, C + 1) pixels of one image, void last on both sides."""
        matrix = np.zeros((len(self.clusters) + 1, len(self.classes) + 1), np.int64)
        row = {s.id: self._row[s.category] for s in pair.predicted.segments} | {VOID_ID: -1}
        column = {s.id: self._column[s.category] for s in pair.truth.segments} | {VOID_ID: -1}
        for (true, predicted), pixels in pair.overlaps.items():
            matrix[row[predicted], column[true]] += pixels
        return matrix

    def _both_stuff(self) -> NDArray[np.bool_]:
        rows, columns = ([not side[i].is_thing for i in sorted(side)] for side in (self.clusters, self.classes))
        return np.outer(rows, columns)


def one_to_one(evidence: Evidence, *, leftover: Leftover = "error") -> ClassOf:
    """Hungarian assignment on pixels, things and stuff apart (ALGORITHMS E.5, the protocol of CUPS).

    A cluster that is left over has no class (`error`), or the class of its kind that it covers most (`argmax`).
    """
    found: ClassOf = {}
    for clusters, classes, block in _blocks(evidence, evidence.pixels.matrix[:-1]):
        assigned = hungarian_mapping(block)
        if leftover == "argmax":
            assigned = np.where((assigned < 0) & block.any(axis=1), block.argmax(axis=1), assigned)
        found |= {clusters[k]: classes[c] for k, c in enumerate(assigned.tolist()) if c >= 0}
    return found


def by_vote(evidence: Evidence) -> ClassOf:
    """Each cluster's class of most votes, ties to the lowest id, many to one; a cluster without a vote has none."""
    found: ClassOf = {}
    for clusters, classes, block in _blocks(evidence, evidence.votes):
        found |= {clusters[k]: classes[int(block[k].argmax())] for k in np.flatnonzero(block.any(axis=1)).tolist()}
    return found


def identity(predicted: Categories, truth: Categories) -> ClassOf:
    """Every category is itself. ConfigError unless the truth knows all of them by the same name and kind."""
    for number, category in predicted.items():
        true = truth.get(number)
        if true is None or (true.is_thing, true.name) != (category.is_thing, category.name):
            other = "does not have it" if true is None else f"calls it {_words(true.name, true.is_thing)}"
            raise ConfigError(
                f"the predicted category {number} is {_words(category.name, category.is_thing)}, and the truth "
                f"{other}: categories must agree to be compared as they are; otherwise use the mapping hungarian"
            )
    return {number: number for number in predicted}


def relabel(
    segments: Iterable[PanopticSegment], class_of: Mapping[int, int], merge: Collection[int]
) -> tuple[dict[int, int], list[LabelledSegment]]:
    """New ids and segments of an image: {old id: new id, 0 where the cluster has no class}, and what is left.

    Segments of one class of `merge` become one, crowds apart.
    """
    new_id: dict[int, int] = {VOID_ID: VOID_ID}
    kept: list[LabelledSegment] = []
    first: dict[int, int] = {}
    for segment in segments:
        category = class_of.get(segment.category)
        if category is None:
            new_id[segment.id] = VOID_ID
        elif category in merge and not segment.is_crowd and category in first:
            new_id[segment.id] = first[category]
        else:
            if not segment.is_crowd:
                first[category] = segment.id
            new_id[segment.id] = segment.id
            kept.append(LabelledSegment(segment.id, category, segment.is_crowd))
    return new_id, kept


def rename_overlaps(overlaps: Overlaps, truth: Mapping[int, int], predicted: Mapping[int, int]) -> Overlaps:
    """The overlaps under the new ids of both sides."""
    renamed: Overlaps = defaultdict(int)
    for (true_id, predicted_id), pixels in overlaps.items():
        renamed[truth[true_id], predicted[predicted_id]] += pixels
    return dict(renamed)


def _blocks(
    evidence: Evidence, matrix_KC: NDArray[np.int64]
) -> Iterable[tuple[list[int], list[int], NDArray[np.int64]]]:
    """Clusters, classes and their part of the matrix, of things and of stuff."""
    for things in (True, False):
        sides = [
            [(i, number) for i, number in enumerate(sorted(side)) if side[number].is_thing == things]
            for side in (evidence.clusters, evidence.classes)
        ]
        rows, columns = ([i for i, _ in side] for side in sides)
        if rows and columns:
            clusters, classes = ([number for _, number in side] for side in sides)
            yield clusters, classes, matrix_KC[np.ix_(rows, columns)]


def _box_ious(found: Sequence[Instance], truth: Sequence[Instance]) -> NDArray[np.float64]:
    from pycocotools import mask as codec

    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    boxes = [np.array([instance.bbox for instance in side]) for side in (found, truth)]
    return np.asarray(codec.iou(*boxes, [0] * len(truth)))


def _words(name: str, is_thing: bool) -> str:
    return f"{'the thing' if is_thing else 'the stuff'} {name!r}"
