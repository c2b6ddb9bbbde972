"""Clusters to classes: one to one on pixels, by the published vote, and not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics.panoptic import LabelledSegment, segment_overlaps
from pipeline.errors import ConfigError
from pipeline.evaluate.instances import visible_instances
from pipeline.evaluate.mapping import (
    Evidence,
    VoteThresholds,
    by_vote,
    identity,
    one_to_one,
    relabel,
    rename_overlaps,
)
from pipeline.evaluate.panoptic import LabelPair
from pipeline.sources.coco import Categories, Category, PanopticImage, PanopticSegment

CLUSTERS: Categories = {i: Category(i, str(i), i <= 3) for i in range(1, 7)}  # things 1..3, stuff 4..6
CLASSES: Categories = {10: Category(10, "cat", True), 20: Category(20, "dog", True), 30: Category(30, "sky", False)}
CLASSES[40] = Category(40, "sea", False)


def label(pixels: Any, **category: int) -> PanopticImage:
    """`label([[1, 2]], s1=10, s2=30)`: ids and the category of each."""
    segments = tuple(PanopticSegment(int(name[1:]), number) for name, number in category.items())
    return PanopticImage("a.jpg", "a.png", np.array(pixels, np.int32), segments)


def pair(truth: PanopticImage, predicted: PanopticImage) -> LabelPair:
    return LabelPair(truth, predicted, segment_overlaps(truth.ids, predicted.ids), 0)


def counted(*pairs: LabelPair) -> Evidence:
    evidence = Evidence(CLUSTERS, CLASSES)
    for one in pairs:
        evidence.add_pixels(one)
    return evidence


def voted(one: LabelPair, **thresholds: float) -> Evidence:
    evidence = Evidence(CLUSTERS, CLASSES)
    truth, found = visible_instances(one.truth, {10, 20}), visible_instances(one.predicted, {1, 2, 3})
    evidence.add_votes(one, truth, found, VoteThresholds(**thresholds))
    return evidence


def test_things_and_stuff_are_mapped_apart() -> None:
    truth = label([[1] * 6 + [2] * 4], s1=10, s2=30)
    # The thing cluster 1 covers more of the sky than of the cat, and may not have it.
    predicted = label([[1] * 2 + [4] * 4 + [1] * 4], s1=1, s4=4)
    assert one_to_one(counted(pair(truth, predicted))) == {1: 10}


def test_one_to_one_takes_what_explains_most_pixels() -> None:
    truth = label([[1] * 10 + [2] * 10], s1=10, s2=20)
    predicted = label([[1] * 10 + [1] * 4 + [2] * 6], s1=1, s2=2)
    assert one_to_one(counted(pair(truth, predicted))) == {1: 10, 2: 20}


def test_a_cluster_left_over_has_no_class_or_its_commonest() -> None:
    truth = label([[1] * 10], s1=10)
    predicted = label([[1] * 6 + [2] * 4], s1=1, s2=2)
    evidence = counted(pair(truth, predicted))
    assert one_to_one(evidence) == {1: 10}
    assert one_to_one(evidence, leftover="argmax") == {1: 10, 2: 10}


def test_void_of_the_truth_is_not_counted_and_void_of_the_prediction_is() -> None:
    evidence = counted(pair(label([[0, 1, 1]], s1=30), label([[4, 4, 0]], s4=4)))
    assert evidence.pixels.matrix.sum() == 2
    assert evidence.pixels.matrix[3, 2] == 1
    assert evidence.pixels.matrix[-1, 2] == 1


def test_halves_add_up() -> None:
    one = counted(pair(label([[1, 1]], s1=10), label([[1, 1]], s1=1)))
    two = counted(pair(label([[1, 1]], s1=20), label([[1, 1]], s1=1)))
    assert (one + two).pixels.matrix[0].tolist() == [2, 2, 0, 0]


def boxes(score: float) -> LabelPair:
    """A cat of 10x10 and a detection of cluster 2 with an IoU of 0.8."""
    truth, found = np.zeros((12, 12), np.int32), np.zeros((12, 12), np.int32)
    truth[:10, :10], found[:10, :8] = 1, 7
    predicted = PanopticImage("a.jpg", "a.png", found, (PanopticSegment(7, 2, score=score),))
    return pair(PanopticImage("a.jpg", "a.png", truth, (PanopticSegment(1, 10, True),)), predicted)


def test_a_sure_detection_votes_for_the_box_it_covers_even_of_a_crowd() -> None:
    assert by_vote(voted(boxes(0.6))) == {2: 10}
    assert by_vote(voted(boxes(0.59))) == {}
    assert by_vote(voted(boxes(0.9), box_iou=0.8)) == {}  # 0.8 is not more than 0.8
    assert by_vote(voted(boxes(0.1), score=0.1, box_iou=0.79)) == {2: 10}


def test_votes_are_many_to_one_and_ties_go_to_the_lowest_class() -> None:
    evidence = Evidence(CLUSTERS, CLASSES)
    evidence.votes[:2, :2] = [[2, 2], [3, 1]]
    assert by_vote(evidence) == {1: 10, 2: 10}


def test_stuff_votes_once_an_image_by_the_iou_of_whole_masks() -> None:
    truth = label([[1] * 10 + [2] * 10], s1=30, s2=40)
    predicted = label([[4] * 10 + [5] * 2 + [4] * 8], s4=4, s5=5)
    # Cluster 4: sky 10/18, sea 8/20. Cluster 5: sea 2/10, above 0.15.
    evidence = voted(pair(truth, predicted))
    assert evidence.votes.tolist()[3:5] == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert by_vote(evidence) == {4: 30, 5: 40}
    assert by_vote(voted(pair(truth, predicted), stuff_iou=0.2)) == {4: 30}


def test_void_of_the_truth_counts_in_the_union_of_a_stuff_vote() -> None:
    predicted = label([[4] * 10], s4=4)
    assert by_vote(voted(pair(label([[1] * 2 + [0] * 8], s1=30), predicted))) == {4: 30}
    assert by_vote(voted(pair(label([[1] * 1 + [0] * 9], s1=30), predicted))) == {}


def test_segments_of_one_cluster_vote_together() -> None:
    predicted = label([[4] * 5 + [5] * 5], s4=4, s5=4)
    evidence = voted(pair(label([[1] * 10], s1=30), predicted), stuff_iou=0.9)
    assert evidence.votes[3].tolist() == [0, 0, 1, 0]


def test_a_thing_never_votes_for_stuff() -> None:
    assert not voted(pair(label([[1] * 10], s1=30), label([[1] * 10], s1=1))).votes.any()


def test_a_chain_of_classes_is_looked_up_once() -> None:
    # Cluster 1 is class 2, cluster 2 is class 3: replaced in place, cluster 1 would end as 3.
    _, segments = relabel([PanopticSegment(1, 1), PanopticSegment(2, 2)], {1: 2, 2: 3}, set())
    assert segments == [LabelledSegment(1, 2), LabelledSegment(2, 3)]


def test_segments_without_a_class_become_void_and_stuff_of_one_class_one_segment() -> None:
    segments = [PanopticSegment(i, c) for i, c in ((1, 1), (2, 4), (3, 5), (4, 6), (5, 1))]
    new_id, kept = relabel(segments, {1: 10, 4: 30, 5: 30}, {30, 40})
    assert new_id == {0: 0, 1: 1, 2: 2, 3: 2, 4: 0, 5: 5}
    assert kept == [LabelledSegment(1, 10), LabelledSegment(2, 30), LabelledSegment(5, 10)]
    assert relabel(segments, {4: 30, 5: 30}, set())[1] == [LabelledSegment(2, 30), LabelledSegment(3, 30)]


def test_a_crowd_is_not_merged() -> None:
    segments = [PanopticSegment(1, 30, True), PanopticSegment(2, 30), PanopticSegment(3, 30)]
    new_id, kept = relabel(segments, {30: 30}, {30})
    assert new_id == {0: 0, 1: 1, 2: 2, 3: 2}
    assert kept == [LabelledSegment(1, 30, True), LabelledSegment(2, 30)]


ids = st.integers(0, 5)


@given(
    st.lists(st.tuples(ids, ids), min_size=1, max_size=40),
    st.dictionaries(st.integers(1, 6), st.sampled_from([10, 20, 30, 40])),
    st.sets(st.sampled_from([30, 40])),
)
def test_new_ids_lose_no_pixel_and_leave_no_segment_without_one(
    pixels: list[tuple[int, int]], class_of: dict[int, int], merge: set[int]
) -> None:
    truth, predicted = (np.array([side], np.int32) for side in zip(*pixels, strict=True))
    segments = [PanopticSegment(i, i) for i in sorted(set(predicted[0].tolist()) - {0})]
    new_id, kept = relabel(segments, class_of, merge)
    overlaps = rename_overlaps(segment_overlaps(truth, predicted), {i: i for i in range(6)}, new_id)
    renamed = np.array([[new_id[i] for i in predicted[0].tolist()]])
    assert overlaps == segment_overlaps(truth, renamed)
    assert {segment.id for segment in kept} == set(renamed[0].tolist()) - {0}
    stuff = [segment.category for segment in kept if segment.category in merge]
    assert len(stuff) == len(set(stuff))


def test_the_table_of_a_mapping_is_in_rows_and_columns() -> None:
    assert Evidence(CLUSTERS, CLASSES).table({1: 20, 5: 40}).tolist() == [1, -1, -1, -1, 3, -1]


def test_identity_needs_the_same_names_and_kinds() -> None:
    assert identity({10: CLASSES[10]}, CLASSES) == {10: 10}
    with pytest.raises(ConfigError, match=r"category 11 is the thing 'cat', and the truth does not have it"):
        identity({11: CLASSES[10]}, CLASSES)
    with pytest.raises(ConfigError, match=r"10 is the stuff 'cat', and the truth calls it the thing 'cat'"):
        identity({10: Category(10, "cat", False)}, CLASSES)
    with pytest.raises(ConfigError, match=r"10 is the thing 'thing 10', and the truth calls it the thing 'cat'"):
        identity({10: Category(10, "thing 10", True)}, CLASSES)
