"""Labels in the classes that came of names: merged, moved to stuff, or dropped as noise."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.masks import decode_panoptic_png, encode_panoptic_png
from workers.merge import MergedLabels, Segment, whole_masks
from workers.renaming import NOISE, Renaming, rename_labels, rename_row

# Things 1..4 and stuff 5, 6. Of these 1 and 2 are one, 3 is stuff together with 5, 4 is noise, 6 stays.
RENAMING = Renaming((0, 1, 1, 2, NOISE, 2, 3), num_things=1, num_stuff=2)
IDS = np.array([[1, 2, 3, 3], [4, 5, 6, 0]], np.int32)


def segment(number: int, category: int, box: tuple[float, ...], score: float | None = None) -> Segment:
    is_thing = category <= 4
    return Segment(number, category, is_thing, int((number == IDS).sum()), box, score)  # type: ignore[arg-type]


SEGMENTS = [
    segment(1, 1, (0, 0, 1, 1), 0.5),
    segment(2, 2, (1, 0, 2, 1), 0.25),
    segment(3, 3, (2, 0, 4, 1), 0.75),
    segment(4, 4, (0, 1, 1, 2), 0.5),
    segment(5, 5, (1, 1, 2, 2)),
    segment(6, 6, (2, 1, 3, 2)),
]
ROW: dict[str, Any] = {
    "image_id": "a.jpg",
    "panoptic": encode_panoptic_png(IDS),
    "segments": [asdict(one) for one in SEGMENTS],
}


def test_merged_things_stay_apart_and_stuff_becomes_one_segment() -> None:
    renamed = rename_labels(MergedLabels(IDS, SEGMENTS, 7), RENAMING)
    assert renamed.ids.tolist() == [[1, 2, 3, 3], [0, 3, 6, 0]]
    assert renamed.segments == [
        Segment(1, 1, True, 1, (0, 0, 1, 1), 0.5),
        Segment(2, 1, True, 1, (1, 0, 2, 1), 0.25),
        Segment(3, 2, False, 3, (1, 0, 4, 2), None),
        Segment(6, 3, False, 1, (2, 1, 3, 2), None),
    ]
    assert renamed.hidden == 7


def test_other_numbers_alone_leave_the_map_as_it_is() -> None:
    labels = MergedLabels(IDS, SEGMENTS, 0)
    assert rename_labels(labels, Renaming((0, 2, 1, 4, 3, 6, 5), 4, 2)).ids is IDS


def test_a_row_has_the_same_labels_in_its_png() -> None:
    renamed = rename_row(ROW, RENAMING)
    assert decode_panoptic_png(renamed["panoptic"]).tolist() == [[1, 2, 3, 3], [0, 3, 6, 0]]
    assert [one["category"] for one in renamed["segments"]] == [1, 1, 2, 3]
    assert renamed["image_id"] == "a.jpg" and ROW["segments"][1]["category"] == 2


def test_a_row_without_labels_stays_as_it_is() -> None:
    row = {"image_id": "b.jpg", "panoptic": None, "segments": []}
    assert rename_row(row, RENAMING) == row


def test_a_category_that_is_not_known_is_refused() -> None:
    strange = [Segment(1, 7, False, 1, (0, 0, 1, 1), None)]
    with pytest.raises(IndexError):
        rename_labels(MergedLabels(IDS, strange, 0), RENAMING)


def test_whole_masks_are_still_found_by_the_ids_of_things() -> None:
    whole = np.zeros((3, 2, 4), bool)
    whole[0, :, :3] = whole[1, 0, 1:3] = whole[2, 0, 3] = True
    ids = np.array([[1, 2, 2, 3], [1, 1, 1, 0]], np.int32)
    segments = [segment(number, number, (0, 0, 1, 1), 0.5) for number in (1, 2, 3)]
    renamed = rename_labels(MergedLabels(ids, segments, 0), RENAMING)
    things = [one.id for one in renamed.segments if one.is_thing]
    assert things == [1, 2]
    assert whole_masks(renamed.ids, things, list(whole))[2].tolist() == whole[1].tolist()


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 2**32 - 1))
def test_every_pixel_has_the_class_that_its_old_class_became(new: list[int], seed: int) -> None:
    renaming = Renaming((0, *new), 2, 1)
    old = np.random.default_rng(seed).integers(0, 7, (5, 6)).astype(np.int32)  # the ids are the categories
    segments = [
        Segment(int(c), int(c), c <= 4, int((old == c).sum()), (0, 0, 1, 1), 0.5) for c in np.unique(old[old > 0])
    ]
    renamed = rename_labels(MergedLabels(old, segments, 0), renaming)
    category = {0: 0} | {one.id: one.category for one in renamed.segments}
    assert [category[i] for i in renamed.ids.ravel().tolist()] == [renaming.category_of[c] for c in old.ravel()]
    assert all(one.area == (renamed.ids == one.id).sum() > 0 for one in renamed.segments)
    stuff = [one.category for one in renamed.segments if not one.is_thing]
    assert len(stuff) == len(set(stuff))
