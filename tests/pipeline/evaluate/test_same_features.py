"""Classes of a run beside k-means of the features that they were learnt from, on hand-made features and labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluate.class_maps import Predictions
from pipeline.evaluate.labels import IGNORED
from pipeline.evaluate.same_features import SameFeatures, Sample, same_features
from tests.pipeline.evaluate.test_semantic import stage_at
from workers.records import FEATURES_SCHEMA, Status

GRID = 6


def sample_of(image_id: str, truth: np.ndarray, rng: np.random.Generator) -> Sample:
    """Every patch of a grid over the truth; features tell classes apart, but for 2, which has two kinds of patches."""
    rows, columns = truth.shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    kind = np.where((truth == 2) & (y > 0.5), 3, truth).ravel()
    features = np.eye(4)[kind] + rng.normal(scale=0.05, size=(kind.size, 4))
    return Sample(image_id, np.stack([y, x], -1).reshape(-1, 2).astype(np.float32), features.astype(np.float32))


def images(count: int = 6) -> tuple[list[np.ndarray], list[Sample]]:
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 3, (GRID, GRID)) for _ in range(count)]
    return truths, [sample_of(f"{i}.png", truth, rng) for i, truth in enumerate(truths)]


def test_a_run_gains_what_it_names_better_than_clusters_of_its_features() -> None:
    truths, samples = images()
    beside = SameFeatures(samples, 4, 3, seed=0, void=255)
    for place, (truth, sample) in enumerate(zip(truths, samples, strict=True)):
        beside.add(sample.image_id, place % 2, truth, truth)  # a run that tells every class
    beside.add("outside the sample", 0, truths[0], 1 - np.minimum(truths[0], 1))
    found = beside.summary()
    assert found is not None and found["places"] == 6 * GRID * GRID
    upper = np.mean([(truth[: GRID // 2] == 2).sum() for truth in truths])
    lower = np.mean([(truth[GRID // 2 :] == 2).sum() for truth in truths])
    accuracy = 1 - min(upper, lower) / GRID**2  # k-means splits class 2; the smaller half has no class
    for mapping in ("one_to_one", "other_half"):
        assert found["run"][mapping] == {"miou": 1, "accuracy": 1}
    assert found["kmeans"]["one_to_one"]["accuracy"] == pytest.approx(accuracy)
    assert found["gain"]["one_to_one"]["accuracy"] == pytest.approx(1 - accuracy)
    assert found["gain"]["other_half"]["miou"] == pytest.approx(1 - found["kmeans"]["other_half"]["miou"])


def test_one_image_has_no_other_half_and_ignored_places_do_not_count() -> None:
    truths, samples = images(1)
    truth = truths[0].copy()
    truth[0] = IGNORED
    beside = SameFeatures(samples, 4, 3, seed=0, void=255)
    assert beside.summary() is None
    beside.add("0.png", 0, truths[0], truth)
    found = beside.summary()
    assert found is not None and found["places"] == GRID * (GRID - 1)
    assert found["gain"]["other_half"] == {"miou": None, "accuracy": None}


def test_places_in_a_crop_are_found_in_the_image() -> None:
    places = np.array([[0.125, 0.875], [0.125, 0.875], [0.5, 0.5]], np.float32)
    sample = Sample("a", places, np.zeros((3, 2), np.float32), np.array([0, 3, 4]), "five")
    y, x = sample.pixels(100, 200)  # halves of 50 x 100, of which the middle 50 x 50 is looked at
    assert y.tolist() == [6, 56, 50]
    assert x.tolist() == [25 + 43, 100 + 25 + 43, 100]
    centre = Sample("a", places, np.zeros((3, 2), np.float32), np.zeros(3, np.int64))
    assert [each.tolist() for each in centre.pixels(100, 200)] == [[12, 12, 50], [50 + 87, 50 + 87, 100]]


def features_row(image_id: str, feats: np.ndarray | None) -> dict[str, Any]:
    row = {"image_id": image_id, "height": 8, "width": 8, "status": Status.OK, "error": None}
    stored = {} if feats is None else {"shape": feats.shape, "features": feats.astype("<f2").tobytes()}
    known = set(FEATURES_SCHEMA.names)
    return {key: value for key, value in (row | stored).items() if key in known}


def test_the_published_features_of_stego_are_taken_as_they_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    feats = {f"{i}.png": rng.normal(size=(1, 4, 2, 2)) for i in range(3)}
    rows = [features_row(name, values) for name, values in feats.items()] + [features_row("broken.png", None)]
    stage = stage_at(tmp_path / "features", "features", [pa.Table.from_pylist(rows, FEATURES_SCHEMA)])
    semantics = SimpleNamespace(crops="centre", max_images=None)
    run = SimpleNamespace(
        stages={"features": stage},
        config=SimpleNamespace(seed=0, semantics=semantics),
        index=SimpleNamespace(images=4),
    )
    maps = Predictions("semantics", iter(()), 2, 0, 255, 1, 1)
    beside = same_features(run, maps, 2)  # type: ignore[arg-type]
    assert beside is not None
    truth = np.repeat(np.repeat([[0, 1], [1, 0]], 4, 0), 4, 1)
    for place, name in enumerate(feats):
        beside.add(name, place % 2, truth, truth)
    found = beside.summary()
    assert found is not None and found["places"] == 12 and found["run"]["one_to_one"]["miou"] == 1
    few = Predictions("semantics", iter(()), 13, 0, 255, 1, 1)
    assert same_features(run, few, 2) is None  # type: ignore[arg-type]
    run.stages = {}
    assert same_features(run, maps, 2) is None  # type: ignore[arg-type]
