"""What a class map without names is worth against human labels: accuracy and IoU after mapping clusters to classes.

Everything is computed from one matrix of pixel counts, clusters x classes, so that images stream through and any
mapping can be scored afterwards, also one that was learnt on other images. Two conventions are always scored side by
side (DatUS2, arXiv 2401.12820, deletes what has no class; STEGO's metric, arXiv 2203.08414, has as many clusters as
classes): *strict*, where void and clusters without a class are errors, and *as published*, where their pixels are
left out.

Shapes: K clusters, C classes, (h, w) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.metrics.panoptic import hungarian_mapping

UNMAPPED = -1  # class of a cluster that has none


class ConfusionCounts:
    """Pixels by predicted cluster and true class, added up over a stream of images.

    `matrix` is (K + 1, C) int64; its last row counts the pixels that were predicted void.

    Args:
        num_clusters, num_classes: K and C, at least 1.
        void: the value of a predicted pixel without a cluster; outside 0..K-1.
        ignore: values of the truth that are not scored; outside 0..C-1.

    Raises:
        ValueError: a size below 1, or a special value that is also a cluster or a class.
    """

    def __init__(self, num_clusters: int, num_classes: int, *, void: int = 255, ignore: Sequence[int] = (255,)) -> None:
        if num_clusters < 1 or num_classes < 1:
            raise ValueError(f"need at least one cluster and one class, got {num_clusters} and {num_classes}")
        if 0 <= void < num_clusters:
            raise ValueError(f"void is {void}, which is also one of the {num_clusters} clusters")
        if clash := [value for value in ignore if 0 <= value < num_classes]:
            raise ValueError(f"ignored values {clash} are also among the {num_classes} classes")
        self.void = void
        self.ignore = tuple(ignore)
        self.matrix = np.zeros((num_clusters + 1, num_classes), np.int64)

    @property
    def num_clusters(self) -> int:
        return len(self.matrix) - 1

    @property
    def num_classes(self) -> int:
        return self.matrix.shape[1]

    def add(self, pred_hw: ArrayLike, truth_hw: ArrayLike) -> None:
        """Count one image: (h, w) integer clusters or `void`, (h, w) integer classes or a value of `ignore`.

        ValueError when the sizes differ, the maps are not integer, or a scored pixel is out of range.
        """
        pred, truth = np.asarray(pred_hw), np.asarray(truth_hw)
        if pred.shape != truth.shape or pred.ndim != 2:
            raise ValueError(f"maps must be of one size, got prediction {pred.shape} and truth {truth.shape}")
        if pred.dtype.kind not in "iu" or truth.dtype.kind not in "iu":
            raise ValueError(f"maps must be integer, got prediction {pred.dtype} and truth {truth.dtype}")
        scored = np.ones(truth.shape, bool)
        for value in self.ignore:
            scored &= truth != value
        clusters, classes = pred[scored].astype(np.int64), truth[scored].astype(np.int64)
        void = clusters == self.void
        _check_range("class", classes, self.num_classes)
        _check_range("cluster", clusters[~void], self.num_clusters)
        clusters[void] = self.num_clusters
        flat = np.bincount(clusters * self.num_classes + classes, minlength=self.matrix.size)
        self.matrix += flat.reshape(self.matrix.shape)

    def __add__(self, other: ConfusionCounts) -> ConfusionCounts:
        """The counts of both streams. ValueError when their shapes or special values differ."""
        mine, theirs = ((*c.matrix.shape, c.void, c.ignore) for c in (self, other))
        if mine != theirs:
            raise ValueError(f"counts of different kinds cannot be added: {mine} and {theirs}")
        total = ConfusionCounts(self.num_clusters, self.num_classes, void=self.void, ignore=self.ignore)
        total.matrix = self.matrix + other.matrix
        return total


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one convention, in [0, 1].

    `iou` (C,) float64 is TP / (TP + FP + FN), NaN for a class without a true pixel; `miou` is the mean of the others,
    `classes` their number. `pixels` are those that count; `accuracy` is the share of them that is right. NaN when
    there is nothing to average.
    """

    accuracy: float
    miou: float
    iou: NDArray[np.float64]
    classes: int
    pixels: int


@dataclass(frozen=True, slots=True)
class SemanticScores:
    """`mapping` (K,) int64 class of each cluster, -1 for none, and what it is worth under both conventions.

    `strict`: every labelled pixel counts; void and clusters without a class are wrong. `published`: their pixels are
    removed first, so a class of which no pixel is left no longer counts either.
    """

    mapping: NDArray[np.int64]
    strict: ClassScores
    published: ClassScores


def one_to_one(counts: ConfusionCounts) -> NDArray[np.int64]:
    """(K,) class of each cluster by Hungarian assignment on the pixel counts; -1 for a cluster that is left over."""
    return hungarian_mapping(counts.matrix[:-1])


def many_to_one(counts: ConfusionCounts) -> NDArray[np.int64]:
    """(K,) class that each cluster covers most, ties to the lowest; -1 for a cluster that never occurs.

    Kinder than `one_to_one`, and the kinder the more clusters there are: for comparison with other work only.
    """
    clusters_KC = counts.matrix[:-1]
    return np.where(clusters_KC.any(axis=1), clusters_KC.argmax(axis=1), UNMAPPED)


def score(counts: ConfusionCounts, mapping: ArrayLike) -> SemanticScores:
    """Score a (K,) mapping of clusters to classes (-1: none), one to one or not. ValueError when it does not fit."""
    mapping_K = np.asarray(mapping, np.int64)
    clusters, classes = counts.num_clusters, counts.num_classes
    if mapping_K.shape != (clusters,):
        raise ValueError(f"a mapping of {clusters} clusters must have that shape, got {mapping_K.shape}")
    _check_range("mapped class", mapping_K, classes, low=UNMAPPED)
    by_class = np.zeros((classes + 1, classes), np.int64)  # the last row: predicted as no class
    np.add.at(by_class, np.append(mapping_K, UNMAPPED), counts.matrix)
    published = by_class.copy()
    published[UNMAPPED] = 0
    return SemanticScores(mapping_K, _class_scores(by_class), _class_scores(published))


def _class_scores(by_class: NDArray[np.int64]) -> ClassScores:
    hits = np.diagonal(by_class).astype(np.float64)
    true, predicted = by_class.sum(axis=0), by_class[:-1].sum(axis=1)
    present = true > 0
    iou = np.full(len(hits), np.nan)
    iou[present] = hits[present] / (true + predicted - hits)[present]
    pixels = int(true.sum())
    return ClassScores(
        accuracy=float(hits.sum() / pixels) if pixels else float("nan"),
        miou=float(iou[present].mean()) if present.any() else float("nan"),
        iou=iou,
        classes=int(present.sum()),
        pixels=pixels,
    )


def _check_range(what: str, values: NDArray[np.int64], limit: int, low: int = 0) -> None:
    if values.size and (values.min() < low or values.max() >= limit):
        bad = int(values.min() if values.min() < low else values.max())
        raise ValueError(f"{what} {bad} is out of range {low}..{limit - 1}")
