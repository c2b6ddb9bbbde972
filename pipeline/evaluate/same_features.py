"""What a run's classes are worth beside k-means of the same patch features: the gain of the method itself.

The features are those that the run has learnt its stuff classes from, a sample of patches whose places it has kept. The
clusters are as many as the run's classes, and both are scored on the labels at these places alone, so that neither has
the advantage of a finer map. A method that does not gain is not worth its fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.semantic import ConfusionCounts, one_to_one, score
from pipeline.engine.done import is_fitted, usable_shards
from pipeline.engine.shards import read_columns
from pipeline.engine.stage import Stage
from pipeline.evaluate.class_maps import Predictions
from pipeline.evaluate.labels import IGNORED
from pipeline.evaluate.results import mean_of_known, number
from pipeline.semantics.patches import read_conditioning
from pipeline.semantics.sample import sample_size
from pipeline.stages.base import Run
from workers.kmeans import assign, spherical_kmeans
from workers.semantics.patches import patch_places
from workers.semantics.stego import Crops, read_features, teacher_squares

STARTS = 3  # of k-means; their scores are averaged
MOST_PATCHES = 1 << 16  # of the sample, about

ROWS = 16  # photos of STEGO's features decoded at a time
MAPPINGS = {"one_to_one": False, "other_half": True}  # whether learnt on the other half

Scores = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Sample:
    """Patches of one image: (n, C) features, and (n, 2) places as (y, x) in shares of height and width: of the image,
    or where there are `crops`, of one of STEGO's squares, (n,) numbers of which are `squares`."""

    image_id: str
    places: NDArray[np.float32]
    features: NDArray[np.float32]
    squares: NDArray[np.int64] | None = None
    crops: Crops = "centre"

    def pixels(self, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the pixels at the places, in the image of this size."""
        if self.squares is None:
            y, x = (self.places * np.array([height, width])).T
        else:
            left, top, side = np.array(teacher_squares(height, width, self.crops))[self.squares].T
            y, x = top + side * self.places[:, 0], left + side * self.places[:, 1]
        return y.astype(np.int64), x.astype(np.int64)


class SameFeatures:
    """Counts at the places of a sample: of the run's maps, and of each start of k-means, by halves of the images."""

    def __init__(self, samples: Sequence[Sample], clusters: int, classes: int, *, seed: int, void: int) -> None:
        """`samples`: at least `clusters` patches in all. Counts are as `ConfusionCounts` has them."""
        rows = np.concatenate([sample.features for sample in samples])
        fitted = [spherical_kmeans(rows, clusters, seed + start, restarts=1) for start in range(STARTS)]
        labels_SN = np.stack([assign(rows, each, spherical=True, threads=1)[0] for each in fitted])
        ends = np.cumsum([len(sample.places) for sample in samples])
        of_images = np.split(labels_SN, ends[:-1], axis=1)
        self._of_image = {sample.image_id: (sample, labels) for sample, labels in zip(samples, of_images, strict=True)}
        self._counts = [
            [ConfusionCounts(clusters, classes, void=void, ignore=(IGNORED,)) for _ in range(2)]
            for _ in range(STARTS + 1)
        ]

    def add(self, image_id: str, half: int, predicted_hw: NDArray[np.integer], truth_hw: NDArray[np.integer]) -> None:
        """One image of half 0 or 1; an image that the sample has not is passed over."""
        if image_id not in self._of_image:
            return
        sample, labels_Sn = self._of_image[image_id]
        y, x = sample.pixels(*truth_hw.shape)
        truth = truth_hw[y, x][None]
        for counts, found in zip(self._counts, [predicted_hw[y, x], *labels_Sn], strict=True):
            counts[half].add(found[None], truth)

    def summary(self) -> dict[str, Any] | None:
        """Strict scores of the `run`, of `kmeans` (the mean of its starts) and the `gain`, with the customary mapping
        and with that of the other half; None when no place has a label."""
        places = int((self._counts[0][0] + self._counts[0][1]).matrix.sum())
        if not places:
            return None
        run, *starts = (
            {key: _scores(even, odd, other) for key, other in MAPPINGS.items()} for even, odd in self._counts
        )
        kmeans = {key: _mean([start[key] for start in starts]) for key in MAPPINGS}
        gain = {key: {name: _less(run[key][name], kmeans[key][name]) for name in run[key]} for key in MAPPINGS}
        return {"places": places, "starts": STARTS, "run": run, "kmeans": kmeans, "gain": gain}


def same_features(run: Run, found: Predictions, classes: int) -> SameFeatures | None:
    """Of a run with class maps; None when it has kept no patch features, as published DatUS2, or fewer than classes."""
    samples = list(_samples(run))
    if sum(len(sample.places) for sample in samples) < found.clusters:
        return None
    return SameFeatures(samples, found.clusters, classes, seed=run.config.seed, void=found.void)


def _samples(run: Run) -> Iterator[Sample]:
    stages = run.stages
    if "conditioning" in stages and is_fitted(stages["conditioning"]):
        conditioning = read_conditioning(stages["conditioning"].folder)
        for part in _parts(stages["patches"]):
            for row in read_columns(part, ["image_id", "places", "embedding"]).to_pylist():
                if row["places"]:
                    features = conditioning(np.array(row["embedding"], np.float32))
                    yield Sample(row["image_id"], np.array(row["places"], np.float32), features)
    elif "features" in stages:
        yield from _of_crops(run)


def _of_crops(run: Run) -> Iterator[Sample]:
    """Of STEGO's features as published: some patches of each image, or of so many images one."""
    rng, images = np.random.default_rng(run.config.seed), sample_size(run.index.images, run.config.semantics.max_images)
    most = max(1, MOST_PATCHES // images)
    for part in _parts(run.stages["features"]):
        for batch in read_columns(part, ["image_id", "shape", "features"]).to_batches(max_chunksize=ROWS):
            for row in batch.to_pylist():
                if row["shape"] is not None and rng.random() * images < MOST_PATCHES:
                    yield _of_squares(row["image_id"], read_features(row), run.config.semantics.crops, most, rng)


def _of_squares(
    image_id: str, feats_nChw: NDArray[np.float16], crops: Crops, most: int, rng: np.random.Generator
) -> Sample:
    count, channels, *grid = feats_nChw.shape
    rows = feats_nChw.transpose(0, 2, 3, 1).reshape(-1, channels)
    kept = np.sort(rng.permutation(len(rows))[:most])
    square, place = np.divmod(kept, len(rows) // count)
    return Sample(image_id, patch_places(*grid)[place], rows[kept].astype(np.float32), square, crops)


def _parts(stage: Stage) -> list[str]:
    return [stage.part(shard) for shard in sorted(usable_shards(stage))]


def _scores(even: ConfusionCounts, odd: ConfusionCounts, other_half: bool) -> Scores:
    if not other_half:
        total = even + odd
        return _strict(total, total)
    if not (even.matrix.any() and odd.matrix.any()):
        return {"miou": None, "accuracy": None}
    return _mean([_strict(odd, even), _strict(even, odd)])


def _strict(scored: ConfusionCounts, learnt: ConfusionCounts) -> Scores:
    found = score(scored, one_to_one(learnt)).strict
    return {"miou": number(found.miou), "accuracy": number(found.accuracy)}


def _mean(each: Sequence[Scores]) -> Scores:
    return {name: mean_of_known(one[name] for one in each) for name in each[0]}


def _less(run: float | None, kmeans: float | None) -> float | None:
    return None if run is None or kmeans is None else run - kmeans
