"""Pixel counts, mappings and scores of class maps without names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics.semantic import ConfusionCounts, many_to_one, one_to_one, score

VOID = IGNORE = 255


def counted(pred: object, truth: object, clusters: int, classes: int) -> ConfusionCounts:
    counts = ConfusionCounts(clusters, classes)
    counts.add(np.atleast_2d(np.array(pred, np.uint8)), np.atleast_2d(np.array(truth, np.uint8)))
    return counts


def test_counts_are_clusters_by_classes_with_void_in_the_last_row_and_ignored_truth_left_out() -> None:
    counts = counted([[0, 0, 1], [VOID, 1, VOID]], [[0, 1, 1], [1, IGNORE, IGNORE]], clusters=2, classes=2)
    assert counts.matrix.tolist() == [[1, 1], [0, 1], [0, 1]]
    counts.add(np.array([[1]]), np.array([[0]]))
    assert counts.matrix.tolist() == [[1, 1], [1, 1], [0, 1]]


def test_scores_of_a_small_map_by_hand() -> None:
    counts = counted([2, 2, 2, 0, 0, 1], [0, 0, 1, 1, 1, 2], clusters=3, classes=3)
    scores = score(counts, one_to_one(counts))
    assert scores.mapping.tolist() == [1, 2, 0]
    assert scores.strict.accuracy == pytest.approx(5 / 6)
    assert scores.strict.iou.tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert scores.strict.miou == pytest.approx(7 / 9)
    assert scores.strict.pixels == scores.published.pixels == 6


def test_a_chain_of_ids_is_not_remapped_twice() -> None:
    """Cluster 0 is class 1, 1 is 2 and 2 is 0: renaming pixels in place, one cluster after the other, merges them."""
    counts = counted([0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0], clusters=3, classes=3)
    scores = score(counts, one_to_one(counts))
    assert scores.mapping.tolist() == [1, 2, 0]
    assert scores.strict.accuracy == scores.strict.miou == 1


def test_pixels_of_extra_clusters_are_errors_when_strict_and_absent_as_published() -> None:
    # Two clusters share class 0 (3 and 1 pixels): one of them is left over.
    counts = counted([0, 0, 0, 2, 1, 1], [0, 0, 0, 0, 1, 1], clusters=3, classes=2)
    scores = score(counts, one_to_one(counts))
    assert scores.mapping.tolist() == [0, 1, -1]
    assert (scores.strict.accuracy, scores.strict.miou) == pytest.approx((5 / 6, (3 / 4 + 1) / 2))
    assert (scores.published.accuracy, scores.published.miou) == (1, 1)
    assert (scores.strict.pixels, scores.published.pixels) == (6, 5)
    merged = score(counts, many_to_one(counts))
    assert merged.mapping.tolist() == [0, 1, 0]
    assert merged.strict.accuracy == 1


def test_fewer_clusters_than_classes_leave_a_class_at_zero() -> None:
    counts = counted([0, 0, 0, 1, 1], [0, 0, 2, 1, 1], clusters=2, classes=3)
    scores = score(counts, one_to_one(counts))
    assert scores.strict.iou.tolist() == pytest.approx([2 / 3, 1, 0])
    assert scores.strict.accuracy == scores.published.accuracy == pytest.approx(4 / 5)
    assert scores.strict.miou == pytest.approx(5 / 9)


def test_a_class_that_is_absent_from_the_truth_is_left_out_of_the_mean() -> None:
    counts = counted([0, 0, 1, 1], [0, 0, 1, 1], clusters=3, classes=3)
    scores = score(counts, one_to_one(counts))
    assert np.isnan(scores.strict.iou[2])
    assert (scores.strict.miou, scores.strict.classes) == (1, 2)
    # Also when a mapping learnt elsewhere predicts it: the error shows in the class that lost the pixels.
    elsewhere = score(counts, [2, 1, -1])
    assert np.isnan(elsewhere.strict.iou[2])
    assert elsewhere.strict.miou == pytest.approx(0.5)


def test_a_prediction_of_nothing_but_void_scores_zero_when_strict_and_nothing_as_published() -> None:
    counts = counted([VOID] * 4, [0, 0, 1, 1], clusters=2, classes=2)
    scores = score(counts, one_to_one(counts))
    assert scores.mapping.tolist() == [-1, -1]
    assert (scores.strict.accuracy, scores.strict.miou, scores.strict.classes) == (0, 0, 2)
    assert np.isnan([scores.published.accuracy, scores.published.miou]).all()
    assert (scores.published.pixels, scores.published.classes) == (0, 0)


def test_void_pixels_are_errors_of_their_class_when_strict() -> None:
    counts = counted([0, VOID, 1, 1], [0, 0, 1, 1], clusters=2, classes=2)
    scores = score(counts, one_to_one(counts))
    assert (scores.strict.accuracy, scores.strict.miou) == pytest.approx((3 / 4, 3 / 4))
    assert (scores.published.accuracy, scores.published.miou) == (1, 1)


def test_counts_of_two_halves_add_up() -> None:
    total = counted([0, 1], [0, 1], 2, 2) + counted([1, VOID], [0, 1], 2, 2)
    assert total.matrix.tolist() == [[1, 0], [1, 1], [0, 1]]
    with pytest.raises(ValueError, match="different kinds"):
        counted([0], [0], 2, 2) + counted([0], [0], 3, 2)


def test_more_than_255_clusters_need_another_void() -> None:
    with pytest.raises(ValueError, match="void is 255, which is also one of the 300 clusters"):
        ConfusionCounts(300, 2)
    counts = ConfusionCounts(300, 2, void=-1)
    counts.add(np.array([[299, -1]]), np.array([[1, 0]]))
    assert counts.matrix[299].tolist() == [0, 1]
    assert counts.matrix[300].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        ([[0, 1]], [[0]], r"of one size, got prediction \(1, 2\) and truth \(1, 1\)"),
        ([[2]], [[0]], r"cluster 2 is out of range 0\.\.1"),  # not taken for the row of void
        ([[0]], [[2]], r"class 2 is out of range 0\.\.1"),
        ([[-1]], [[0]], r"cluster -1 is out of range"),
        ([[0.0]], [[0]], "must be integer"),
    ],
)
def test_maps_that_do_not_fit_are_refused(pred: list[list[float]], truth: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfusionCounts(2, 2).add(pred, truth)


def test_mappings_and_sizes_that_do_not_fit_are_refused() -> None:
    counts = ConfusionCounts(2, 2)
    for mapping, message in (([0], "must have that shape"), ([0, 2], "mapped class 2"), ([0, -2], "mapped class -2")):
        with pytest.raises(ValueError, match=message):
            score(counts, mapping)
    with pytest.raises(ValueError, match="at least one"):
        ConfusionCounts(0, 2)
    with pytest.raises(ValueError, match=r"ignored values \[1\] are also among the 2 classes"):
        ConfusionCounts(2, 2, ignore=(1,))


maps = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).choice([0, 1, 2, 3, VOID], (6, 7)),
        np.random.default_rng(seed + 1).choice([0, 1, 2, IGNORE], (6, 7)),
    )
)


@given(maps, st.permutations(range(4)))
def test_names_of_clusters_mean_nothing_and_published_is_never_below_strict(
    pair: tuple[np.ndarray, np.ndarray], names: list[int]
) -> None:
    pred, truth = pair
    counts = counted(pred, truth, 4, 3)
    scores = score(counts, one_to_one(counts))
    lookup = np.arange(256)
    lookup[:4] = names
    renamed = counted(lookup[pred], truth, 4, 3)
    again = score(renamed, one_to_one(renamed))
    assert again.strict.accuracy == pytest.approx(scores.strict.accuracy, nan_ok=True)
    assert scores.strict.pixels == (truth != IGNORE).sum()
    if scores.published.pixels:
        assert scores.published.accuracy >= scores.strict.accuracy
        merged = score(counts, many_to_one(counts))
        assert merged.strict.accuracy >= scores.strict.accuracy
