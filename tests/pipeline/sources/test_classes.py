"""Classes that labels are written with: as they are, merged, moved to stuff, or left out as noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.metrics.instances import Instance
from pipeline.errors import ConfigError
from pipeline.sources.classes import Classes, classes_as_they_are, look_up
from pipeline.sources.coco import Category, PanopticImage, PanopticSegment, check_image, read_categories
from tests.pipeline.label_files import categories

IMAGE = PanopticImage(
    "a.jpg",
    "a.png",
    np.array([[1, 1, 2, 70000], [3, 4, 5, 0]], np.int32),
    (
        PanopticSegment(1, 1, score=0.5),
        PanopticSegment(2, 2, score=0.25),
        PanopticSegment(70000, 2),
        PanopticSegment(3, 3, score=0.75),
        PanopticSegment(4, 4),
        PanopticSegment(5, 5),
    ),
)
LISTED = read_categories(categories(3, 2), "here")
NAMED = Classes(
    {1: Category(1, "dog", True), 2: Category(2, "grass", False), 3: Category(3, "sky", False)},
    {1: 1, 2: 1, 3: 2, 4: 2},  # two kinds of things are dogs, one is grass as the first stuff; the second is noise
)


def test_as_they_are_nothing_changes() -> None:
    assert classes_as_they_are(LISTED).apply(IMAGE) is IMAGE


def test_merged_classes_stuff_and_noise() -> None:
    named = NAMED.apply(IMAGE)
    assert named.ids.tolist() == [[1, 1, 2, 70000], [3, 3, 0, 0]]
    assert named.ids.dtype == np.int32
    assert named.segments == (
        PanopticSegment(1, 1, score=0.5),
        PanopticSegment(2, 1, score=0.25),
        PanopticSegment(70000, 1),
        PanopticSegment(3, 2),  # stuff is one segment, without a score
    )
    check_image(named, NAMED.categories)


def test_detections_of_what_is_no_thing_any_more_are_left_out() -> None:
    found = tuple(Instance(k, {}, (0, 0, 1, 1), 1, False, 0.5) for k in (1, 2, 3))
    named = NAMED.apply(replace(IMAGE, detections=found))
    assert [one.category for one in named.detections or ()] == [1, 1]


def test_detections_are_renamed_where_all_that_is_seen_keeps_its_class() -> None:
    found = tuple(Instance(k, {}, (0, 0, 1, 1), 1, False, 0.5) for k in (1, 2, 3, 5))
    for segments in (IMAGE.segments[:1], ()):
        image = replace(IMAGE, ids=np.minimum(IMAGE.ids, len(segments)), segments=segments, detections=found)
        assert [one.category for one in NAMED.apply(image).detections or ()] == [1, 1]


def test_coco_lists_names_colours_and_groups() -> None:
    assert NAMED.as_coco()[1] | {"color": None} == {
        "id": 2,
        "name": "grass",
        "supercategory": "grass",
        "isthing": 0,
        "color": None,
    }
    assert read_categories(NAMED.as_coco(), "here").keys() == {1, 2, 3}


def test_no_two_of_a_thousand_classes_share_a_colour_and_none_is_black() -> None:
    listed = read_categories(categories(800, 254), "here")
    colors = classes_as_they_are(listed).colors
    assert len({*colors.values(), (0, 0, 0)}) == 1055
    assert all(0 <= part < 256 for color in colors.values() for part in color)


@pytest.mark.parametrize(
    ("kinds", "written", "message"),
    [
        ({1: False, 2: True}, {}, r"needs things 1..1 and then stuff, got \[2, 1\]"),
        ({1: True, 3: False}, {}, "needs things 1..1 and then stuff"),
        ({}, {}, "needs things 1..0 and then stuff"),
        ({1: True}, {1: 1, 4: 2}, r"written as \[2\], which are not among the categories 1..1"),
    ],
)
def test_classes_that_formats_cannot_number_are_refused(
    kinds: dict[int, bool], written: dict[int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Classes({i: Category(i, str(i), thing) for i, thing in kinds.items()}, written)


def test_a_large_id_needs_no_large_table() -> None:
    assert look_up(np.array([[0, 2**24 - 1]], np.int32), {2**24 - 1: 7, 0: 1}).tolist() == [[1, 7]]
