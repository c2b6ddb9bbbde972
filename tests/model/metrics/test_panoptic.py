"""Panoptic quality against the COCO evaluator, and the one-to-one mapping."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.metrics.panoptic import (
    PanopticQuality,
    PanopticResult,
    Quality,
    hungarian_mapping,
    panoptic_quality,
    segment_overlaps,
)

CATEGORIES = {1: True, 2: True, 3: False}
Segments = list[dict[str, Any]]


def row_of(*runs: tuple[int, int]) -> np.ndarray:
    """A (1, w) id map of (id, pixels) runs."""
    return np.concatenate([np.full((1, pixels), segment_id, dtype=np.int32) for segment_id, pixels in runs], axis=1)


def segments(**categories: int) -> Segments:
    return [{"id": int(name[1:]), "category": category} for name, category in categories.items()]


def score(gt: np.ndarray, gt_segments: Segments, pred: np.ndarray, pred_segments: Segments) -> PanopticResult:
    return panoptic_quality([(gt, gt_segments, pred, pred_segments)], CATEGORIES)


def read_coco_panoptic(folder: Path, name: str) -> dict[int, tuple[np.ndarray, Segments]]:
    annotations = json.loads((folder / f"{name}.json").read_text())["annotations"]
    images = {}
    for annotation in annotations:
        rgb = np.asarray(Image.open(folder / name / annotation["file_name"])).astype(np.int64)
        images[annotation["image_id"]] = (rgb @ [1, 256, 65536], annotation["segments_info"])
    return images


def test_equals_the_coco_evaluator_with_crowd_and_void(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "panoptic-quality"
    expected = json.loads((folder / "expected.json").read_text())
    categories = {c["id"]: bool(c["isthing"]) for c in json.loads((folder / "gt.json").read_text())["categories"]}
    truth, predicted = read_coco_panoptic(folder, "gt"), read_coco_panoptic(folder, "pred")
    result = panoptic_quality(((*truth[image], *predicted[image]) for image in truth), categories)
    for name, quality in (("All", result.all), ("Things", result.things), ("Stuff", result.stuff)):
        for field in ("pq", "sq", "rq", "n"):
            assert getattr(quality, field) == pytest.approx(expected[name][field], abs=1e-6)
    assert {str(category) for category in result.per_class} == expected["per_class"].keys()
    for category, numbers in expected["per_class"].items():
        for field, value in numbers.items():
            assert getattr(result.per_class[int(category)], field) == pytest.approx(value, abs=1e-6)


def test_the_parts_by_hand() -> None:
    gt = row_of((1, 10), (2, 10), (3, 20))
    pred = row_of((1, 8), (2, 6), (5, 6), (3, 20))
    result = score(gt, segments(s1=1, s2=1, s3=3), pred, segments(s1=1, s2=2, s5=1, s3=3))
    # Category 1: (1, 1) has IoU 8/10, (2, 5) has IoU 6/10. Category 2: one false alarm. Category 3: exact.
    assert result.per_class[1] == Quality(pq=pytest.approx(0.7), sq=pytest.approx(0.7), rq=1.0, n=2)
    assert result.per_class[2] == Quality(0.0, 0.0, 0.0, 1)
    assert result.per_class[3] == Quality(1.0, 1.0, 1.0, 1)
    assert result.things == Quality(pytest.approx(0.35), pytest.approx(0.35), 0.5, 2)
    assert result.all.pq == pytest.approx(1.7 / 3)


def test_a_half_is_no_match() -> None:
    result = score(row_of((1, 10), (0, 10)), segments(s1=1), row_of((1, 5), (0, 15)), segments(s1=1))
    assert result.per_class[1] == Quality(0.0, 0.0, 0.0, 2)


def test_predicted_pixels_on_void_count_for_nobody() -> None:
    gt = row_of((1, 10), (0, 10))
    assert score(gt, segments(s1=1), row_of((1, 20)), segments(s1=1)).per_class[1].pq == 1.0
    mostly_void = score(gt, segments(s1=1), row_of((0, 6), (7, 14)), segments(s7=2))
    assert mostly_void.per_class[2].n == 0
    half_void = score(gt, segments(s1=1), row_of((7, 20)), segments(s7=2))
    assert half_void.per_class[2].n == 1


def test_a_crowd_is_neither_missed_nor_found_and_excuses_its_own_category() -> None:
    gt = row_of((1, 10), (2, 10))
    gt_segments = [{"id": 1, "category_id": 1, "iscrowd": 1}, {"id": 2, "category_id": 2, "iscrowd": 0}]
    excused = score(gt, gt_segments, row_of((1, 10), (2, 10)), segments(s1=1, s2=2))
    assert (excused.per_class[1].n, excused.per_class[2].pq) == (0, 1.0)
    other_category = score(gt, gt_segments, row_of((1, 10), (2, 10)), segments(s1=3, s2=2))
    assert other_category.per_class[3].n == 1


def test_segments_may_be_objects() -> None:
    @dataclass(frozen=True)
    class Painted:
        id: int
        category: int

    ids = row_of((1, 4), (2, 4))
    result = panoptic_quality([(ids, [Painted(1, 1), Painted(2, 3)], ids, [Painted(1, 1), Painted(2, 3)])], CATEGORIES)
    assert result.all == Quality(1.0, 1.0, 1.0, 2)


def test_nothing_at_all_scores_zero_over_no_category() -> None:
    assert PanopticQuality(CATEGORIES).result().all == Quality(0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("pred", "pred_segments", "message"),
    [
        (row_of((1, 4)), segments(s1=9), r"unknown categories \[9\]"),
        (row_of((1, 4)), segments(s1=1, s2=1), r"without a segment or without a pixel: \[2\]"),
        (row_of((1, 2), (7, 2)), segments(s1=1), r"\[7\]"),
        (row_of((1, 5)), segments(s1=1), r"\(1, 4\) and prediction \(1, 5\)"),
        (row_of((-1, 4)), segments(s1=1), "negative, got -1"),
    ],
)
def test_contradictions_are_refused(pred: np.ndarray, pred_segments: Segments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(row_of((1, 4)), segments(s1=1), pred, pred_segments)


@st.composite
def labelled_maps(draw: st.DrawFn) -> tuple[np.ndarray, Segments]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.kron(rng.integers(0, 6, size=(3, 3)), np.ones((4, 4), dtype=int)).astype(np.int32)
    return ids, [{"id": int(i), "category": int(rng.integers(1, 4))} for i in np.unique(ids[ids > 0])]


def without_void(ids: np.ndarray, labels: Segments) -> tuple[np.ndarray, Segments]:
    shifted = [{**segment, "id": segment["id"] + 1} for segment in labels]
    return ids + 1, [*shifted, {"id": 1, "category": 3}] if (ids == 0).any() else shifted


@given(labelled_maps(), labelled_maps())
def test_quality_is_a_product_per_class_and_symmetric_without_void(
    first: tuple[np.ndarray, Segments], second: tuple[np.ndarray, Segments]
) -> None:
    result = score(*first, *second)
    for quality in result.per_class.values():
        assert quality.pq == pytest.approx(quality.sq * quality.rq)
        assert 0 <= quality.pq <= quality.rq <= 1
    (a, a_segments), (b, b_segments) = without_void(*first), without_void(*second)
    forth, back = score(a, a_segments, b, b_segments), score(b, b_segments, a, a_segments)
    assert forth.all.pq == pytest.approx(back.all.pq)
    assert score(a, a_segments, a, a_segments).all.pq == 1.0


def test_overlaps_hold_ids_beyond_24_bits_apart() -> None:
    gt, pred = np.array([[1 << 24, 0]]), np.array([[0, (1 << 31) - 1]])
    assert segment_overlaps(gt, pred) == {(1 << 24, 0): 1, (0, (1 << 31) - 1): 1}


def test_mapping_is_one_to_one_and_leftovers_get_minus_one() -> None:
    counts = [[10, 9, 0], [9, 1, 0], [8, 0, 0], [0, 0, 5], [0, 0, 0]]
    assert hungarian_mapping(counts).tolist() == [1, 0, -1, 2, -1]  # greedy would take 10 + 1, this is 9 + 9


def test_a_pair_without_a_shared_pixel_is_no_mapping() -> None:
    assert hungarian_mapping([[3, 0], [2, 0]]).tolist() == [0, -1]
    assert hungarian_mapping(np.zeros((0, 4))).shape == (0,)
    assert hungarian_mapping(np.zeros((2, 0))).tolist() == [-1, -1]


@pytest.mark.parametrize("counts", [[1, 2], [[-1, 2]], [[np.nan, 1.0]]])
def test_mapping_refuses_what_is_no_count(counts: list[Any]) -> None:
    with pytest.raises(ValueError, match="counts must be"):
        hungarian_mapping(counts)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_no_other_one_to_one_mapping_explains_more_pixels(seed: int, classes: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 20, size=(4, classes))
    mapping = hungarian_mapping(counts)
    used = mapping[mapping >= 0]
    assert len(set(used.tolist())) == len(used)
    explained = counts[np.flatnonzero(mapping >= 0), used].sum()
    best = max(sum(counts[k, c] for c, k in enumerate(chosen)) for chosen in permutations(range(4), classes))
    assert explained == best
