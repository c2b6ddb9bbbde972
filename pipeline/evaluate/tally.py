"""What is measured of pairs of labels: under one mapping, under that of each half, and without any.

Everything here adds up over a stream of images and holds none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.instances import Instance
from model.metrics.panoptic import VOID_ID, PanopticQuality, PanopticResult
from model.metrics.semantic import ConfusionCounts, score
from pipeline.evaluate.instances import InstanceScores, TrueInstances, found_instances
from pipeline.evaluate.mapping import ClassOf, Evidence, relabel, rename_overlaps
from pipeline.evaluate.panoptic import LabelPair
from pipeline.evaluate.results import mean_of_known, plain
from pipeline.sources.coco import Categories

MERGED = "_merged"  # of the stuff of a class in an image: one segment, on either side
SEMANTIC = {"mIoU": "miou", "accuracy": "accuracy"}


class Tally:
    """The scores of all images under one mapping, of each half under its own, and those that need no mapping."""

    def __init__(
        self, clusters: Categories, classes: Categories, class_of: ClassOf, by_half: tuple[ClassOf, ClassOf] | None
    ) -> None:
        self._things = {category.id for category in clusters.values() if category.is_thing}
        self._all = MappingScores(clusters, classes, class_of)
        self._halves = None if by_half is None else [MappingScores(clusters, classes, learnt) for learnt in by_half]
        self._agnostic = InstanceScores(class_agnostic=True)
        self._segments = self._without_class = self._without_score = self._pixels = self._void = 0

    def add(self, pair: LabelPair, objects: TrueInstances) -> None:
        true, found = objects.of(pair.truth), found_instances(pair.predicted, self._things)
        self._all.add(pair, true, found)
        if self._halves is not None:
            self._halves[pair.half].add(pair, true, found)
        self._agnostic.add(true, found, {})
        self._pixels += pair.truth.ids.size
        self._void += sum(shared for (true_id, _), shared in pair.overlaps.items() if true_id == VOID_ID)
        segments = pair.predicted.segments
        self._segments += len(segments)
        self._without_class += sum(s.category not in self._all.class_of for s in segments)
        self._without_score += sum(s.category in self._things and s.score is None for s in segments)

    def result(self) -> dict[str, Any]:
        return {
            "segments": self._segments,
            "segments_without_class": self._without_class,
            "things_without_score": self._without_score,
            "void_share": self._void / self._pixels,
            "class_agnostic": plain(self._agnostic.numbers()),
            "all_images": plain(self._all.numbers()),
            "other_half": self._other_half(),
            "per_class": {str(category): plain(numbers) for category, numbers in self._all.per_class().items()},
        }

    def _other_half(self) -> dict[str, Any] | None:
        """The mean of both halves' scores, and each of them."""
        if self._halves is None:
            return None
        folds = [plain(half.numbers()) for half in self._halves]
        return {key: mean_of_known(fold[key] for fold in folds) for key in folds[0]} | {"folds": folds}


class MappingScores:
    """What one mapping is worth over a stream of images."""

    def __init__(self, clusters: Categories, classes: Categories, class_of: ClassOf) -> None:
        kinds = {category.id: category.is_thing for category in classes.values()}
        self.class_of = class_of
        self._classes = classes
        self._same = {category: category for category in classes}
        self._stuff = {category for category, is_thing in kinds.items() if not is_thing}
        self._quality = {"": PanopticQuality(kinds), MERGED: PanopticQuality(kinds)}
        self._instances = InstanceScores()
        self._evidence = Evidence(clusters, classes)

    def add(self, pair: LabelPair, true: Sequence[Instance], found: Sequence[Instance]) -> None:
        for suffix, quality in self._quality.items():
            merge = self._stuff if suffix == MERGED else set()
            true_ids, true_segments = relabel(pair.truth.segments, self._same, merge)
            new_ids, segments = relabel(pair.predicted.segments, self.class_of, merge)
            quality.update_overlaps(rename_overlaps(pair.overlaps, true_ids, new_ids), true_segments, segments)
        self._instances.add(true, found, self.class_of)
        self._evidence.add_pixels(pair)

    def numbers(self) -> dict[str, float]:
        """Every headline number, NaN where there is nothing to average."""
        found: dict[str, float] = {}
        for suffix, quality in self._quality.items():
            found |= _quality_numbers(quality.result(), suffix)
        found |= self._instances.numbers()
        for suffix, (counts, table) in {"": self._classwise(), "_things_as_one": self._things_as_one()}.items():
            scores = score(counts, table)
            for convention, one in {"": scores.strict, "_published": scores.published}.items():
                found |= {f"{key}{suffix}{convention}": getattr(one, field) for key, field in SEMANTIC.items()}
        return found

    def per_class(self) -> dict[int, dict[str, float]]:
        """By class: panoptic quality, AP and AR of things, IoU (strict)."""
        counts, table = self._classwise()
        ious = score(counts, table).strict
        instances = self._instances.per_class()
        return {
            category: {"PQ": q.pq, "SQ": q.sq, "RQ": q.rq, "n": q.n, "IoU": float(iou), **instances.get(category, {})}
            for (category, q), iou in zip(
                sorted(self._quality[""].result().per_class.items()), ious.iou.tolist(), strict=True
            )
        }

    def _classwise(self) -> tuple[ConfusionCounts, NDArray[np.int64]]:
        return self._evidence.pixels, self._evidence.table(self.class_of)

    def _things_as_one(self) -> tuple[ConfusionCounts, NDArray[np.int64]]:
        """All things are class 0, as in the semantic head's maps and in U2Seg's score; stuff follows by its id."""
        pixels, table = self._classwise()
        classes = [self._classes[number] for number in sorted(self._classes)]
        stuff = [c for c, category in enumerate(classes) if not category.is_thing]
        column = np.array([0 if category.is_thing else 1 + stuff.index(c) for c, category in enumerate(classes)])
        counts = ConfusionCounts(pixels.num_clusters, 1 + len(stuff), void=-1, ignore=(-1,))
        np.add.at(counts.matrix.T, column, pixels.matrix.T)
        clusters = [self._evidence.clusters[number] for number in sorted(self._evidence.clusters)]
        mapped = [0 if k.is_thing else -1 if c < 0 else column[c] for k, c in zip(clusters, table, strict=True)]
        return counts, np.array(mapped, np.int64)


def _quality_numbers(result: PanopticResult, suffix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for group, quality in (("", result.all), ("_things", result.things), ("_stuff", result.stuff)):
        for key in ("PQ", "SQ", "RQ"):
            found[f"{key}{group}{suffix}"] = getattr(quality, key.lower()) if quality.n else math.nan
    return found
