"""The panoptic merge: painting order, the cover rule, ids and categories, and what the published program got wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.masks import encode_panoptic_png, mask_box
from workers.merge import MergedLabels, Segment, merge_panoptic
from workers.records import SEGMENT_TYPE

K, S = 300, 27


def boxes(size: tuple[int, int], *corners: tuple[int, int, int, int]) -> np.ndarray:
    """Masks of full rectangles (x0, y0, x1, y1)."""
    masks = np.zeros((len(corners), *size), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def merge(
    masks: np.ndarray, categories: list[int], semantic: np.ndarray | None = None, **options: object
) -> MergedLabels:
    return merge_panoptic(masks, categories, semantic, num_things=K, num_stuff=S, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", range(8))
def test_identical_to_the_published_program(shared_dir: Path, case: int) -> None:
    reference = np.load(shared_dir / "parity" / "merge.npz")
    masks, categories, semantic = (reference[f"{case}_{name}"] for name in ("masks", "categories", "semantic"))
    merged = merge_panoptic(masks, categories, semantic, num_things=int(reference["K"]), num_stuff=int(reference["S"]))
    np.testing.assert_array_equal(merged.ids, reference[f"{case}_expected_ids"])
    assert [[s.id, s.category] for s in merged.segments] == reference[f"{case}_expected_segments"].tolist()
    category_of = np.zeros(merged.ids.max() + 1, dtype=np.int32)
    for segment in merged.segments:
        category_of[segment.id] = segment.category
    np.testing.assert_array_equal(category_of[merged.ids], reference[f"{case}_expected_category_map"])
    if (semantic == 255).all():
        np.testing.assert_array_equal(merge(masks, categories).ids, merged.ids)


def test_a_small_scene_in_full() -> None:
    masks = boxes((4, 6), (1, 1, 3, 3), (0, 0, 4, 4))
    semantic = np.zeros((4, 6), dtype=np.uint8)
    semantic[:, 5] = 26
    ids, segments = merge(masks, [7, 300], semantic, scores_n=[0.25, 0.5])
    outer, inner = [1, 1, 1, 1, 0, 3], [1, 2, 2, 1, 0, 3]  # of stuff class 0 things cover 16 of 20 pixels: void
    assert ids.tolist() == [outer, inner, inner, outer]
    assert ids.dtype == np.int32
    assert segments == [
        Segment(1, 300, True, 12, (0.0, 0.0, 4.0, 4.0), 0.5),
        Segment(2, 7, True, 4, (1.0, 1.0, 3.0, 3.0), 0.25),
        Segment(3, 327, False, 4, (5.0, 0.0, 6.0, 4.0), None),
    ]


def test_result_unpacks_in_two() -> None:
    merged = merge(boxes((4, 4), (0, 0, 2, 2)), [1])
    ids, segments = merged[:2]
    again, _ = merged
    assert again is ids is merged.ids
    assert segments is merged.segments


def test_order_is_by_box_area_not_mask_area() -> None:
    thin = np.eye(10, dtype=bool)  # 10 pixels in a box of 100
    block = boxes((10, 10), (0, 0, 5, 5))[0]  # 25 pixels in a box of 25
    ids, segments = merge(np.stack([block, thin]), [1, 2])
    assert [(s.id, s.category, s.area) for s in segments] == [(1, 2, 5), (2, 1, 25)]
    assert ids[2, 2] == 2


def test_ties_keep_the_input_order_and_the_later_is_on_top() -> None:
    merged = merge(boxes((4, 6), (0, 0, 4, 4), (2, 0, 6, 4)), [5, 6])
    assert merged.ids[0].tolist() == [1, 1, 2, 2, 2, 2]
    assert [s.bbox for s in merged.segments] == [(0.0, 0.0, 2.0, 4.0), (2.0, 0.0, 6.0, 4.0)]


def test_a_hidden_instance_keeps_its_number_and_is_counted() -> None:
    semantic = np.zeros((4, 6), dtype=np.uint8)
    merged = merge(boxes((4, 6), (0, 0, 2, 2), (0, 0, 2, 2)), [135, 1], semantic)
    assert [(s.id, s.category) for s in merged.segments] == [(2, 1), (3, 301)]
    assert merged.hidden == 1


def test_stuff_covered_beyond_the_limit_stays_void() -> None:
    semantic = np.zeros((1, 10), dtype=np.uint8)
    seven, eight = boxes((1, 10), (0, 0, 7, 1)), boxes((1, 10), (0, 0, 8, 1))
    assert merge(seven, [1], semantic).ids[0, 7:].tolist() == [2, 2, 2]  # exactly 0.7 is kept
    assert merge(eight, [1], semantic).ids[0, 8:].tolist() == [0, 0]
    assert merge(eight, [1], semantic, max_cover=0.8).ids[0, 8:].tolist() == [2, 2]


def test_mostly_hidden_instances_can_be_dropped_in_favour_of_stuff() -> None:
    masks = boxes((1, 10), (0, 0, 10, 1), (0, 0, 9, 1))
    semantic = np.full((1, 10), 3, dtype=np.uint8)
    assert merge(masks, [1, 2], semantic).hidden == 0
    merged = merge(masks, [1, 2], semantic, min_visible=0.25, max_cover=0.9)
    assert merged.hidden == 1
    assert merged.ids[0].tolist() == [2] * 9 + [3]


def test_every_category_from_first_to_last_is_used() -> None:
    """The published labels are 0-based: class 0 is nowhere and class K is never used."""
    masks = boxes((2, 6), (0, 0, 1, 2), (1, 0, 2, 2))
    semantic = np.array([[0, 0, 0, 26, 26, 26]] * 2, dtype=np.uint8)
    assert {s.category for s in merge(masks, [1, K], semantic).segments} == {1, K, K + 1, K + S}
    for wrong in (0, K + 1):
        with pytest.raises(ValueError, match=rf"1\.\.{K}, got {wrong}\.\.{wrong}"):
            merge(masks, [wrong, wrong])


def test_stuff_is_not_remapped_twice() -> None:
    """Ids are written into the map that is read: class 0 becomes id 1, which must not then be taken for class 1."""
    semantic = np.arange(S, dtype=np.uint8)[None]
    ids, segments = merge(np.zeros((0, 1, S), bool), [], semantic)
    assert ids[0].tolist() == list(range(1, S + 1))
    assert [s.category for s in segments] == list(range(K + 1, K + S + 1))


def test_ids_restart_in_every_image() -> None:
    """A running id over a data set leaves the 24 bits of a panoptic PNG; 70,000 images of 240 would."""
    masks = np.zeros((240, 15, 16), dtype=bool)
    masks.reshape(240, 240)[np.arange(240), np.arange(240)] = True
    for _ in range(3):
        ids, _ = merge(masks, [1] * 240)
        assert (ids.min(), ids.max()) == (1, 240)
    encode_panoptic_png(ids)


def test_an_image_without_instances_keeps_its_stuff_and_one_without_anything_is_void() -> None:
    none = np.zeros((0, 2, 3), dtype=bool)
    assert [s.category for s in merge(none, [], np.full((2, 3), 4, np.uint8)).segments] == [305]
    merged = merge(none, [])
    assert (merged.ids == 0).all()
    assert (merged.segments, merged.hidden) == ([], 0)


def test_inputs_are_left_as_they_were() -> None:
    masks, semantic = boxes((3, 3), (0, 0, 2, 2)), np.full((3, 3), 2, dtype=np.uint8)
    masks.flags.writeable = semantic.flags.writeable = False
    assert merge(masks, [1], semantic).segments[1].area == 5


def test_segments_are_rows_of_the_panoptic_table() -> None:
    segments = merge(boxes((3, 3), (0, 0, 2, 2)), [9], scores_n=[0.75]).segments
    rows = pa.array([[asdict(s) for s in segments]], type=pa.list_(SEGMENT_TYPE)).to_pylist()
    expected = {"id": 1, "category": 9, "is_thing": True, "area": 4, "bbox": [0, 0, 2, 2], "score": 0.75}
    assert rows == [[expected]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks_nhw": np.zeros((3, 3), bool)}, r"\(n, h, w\) bool, got \(3, 3\)"),
        ({"masks_nhw": np.zeros((1, 3, 3), np.uint8)}, "uint8"),
        ({"categories_n": [1, 2]}, r"1 masks, but categories of shape \(2,\)"),
        ({"categories_n": [1.0]}, "integers, got float64"),
        ({"categories_n": [-1]}, r"1\.\.300, got -1"),
        ({"semantic_hw": np.zeros((3, 4), np.uint8)}, r"\(3, 3\) integers, got \(3, 4\)"),
        ({"semantic_hw": np.zeros((3, 3))}, "float64"),
        ({"semantic_hw": np.full((3, 3), 27)}, r"0\.\.26 or 255 \(void\), got \[27\]"),
        ({"semantic_hw": np.full((3, 3), -1)}, r"got \[-1\]"),
        ({"semantic_hw": np.full((3, 3), 256)}, r"got \[256\]"),
        ({"scores_n": [0.1, 0.2]}, r"scores of shape \(2,\)"),
        ({"max_cover": 1.5}, r"max_cover must be in \[0, 1\], got 1.5"),
        ({"min_visible": -0.5}, "min_visible"),
        ({"num_stuff": 256}, "256"),
    ],
)
def test_wrong_input_is_named_with_its_numbers(change: dict[str, object], message: str) -> None:
    right = {"masks_nhw": np.zeros((1, 3, 3), bool), "categories_n": [1], "semantic_hw": np.zeros((3, 3), np.uint8)}
    with pytest.raises(ValueError, match=message):
        merge_panoptic(**{**right, "num_things": K, "num_stuff": S, **change})  # type: ignore[arg-type]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    masks = rng.random((draw(st.integers(0, 6)), *size)) < draw(st.floats(0, 1))
    semantic = rng.choice([0, 1, 2, 3, 26, 255], size=size).astype(np.uint8) if draw(st.booleans()) else None
    return masks, rng.integers(1, K + 1, size=len(masks)), semantic


@settings(max_examples=200)
@given(scenes())
def test_every_pixel_is_in_one_segment_or_void(scene: tuple[np.ndarray, np.ndarray, np.ndarray | None]) -> None:
    masks, categories, semantic = scene
    merged = merge_panoptic(masks, categories, semantic, num_things=K, num_stuff=S)
    segment_ids = [s.id for s in merged.segments]
    assert segment_ids == np.unique(merged.ids[merged.ids > 0]).tolist()
    assert sum(s.area for s in merged.segments) + (merged.ids == 0).sum() == merged.ids.size
    for segment in merged.segments:
        mask = merged.ids == segment.id
        assert (segment.area, segment.bbox) == (mask.sum(), mask_box(mask))
        assert segment.is_thing == (segment.id <= len(masks)) == (segment.category <= K)
    things = [s for s in merged.segments if s.is_thing]
    assert merged.hidden + len(things) == len(masks)
    np.testing.assert_array_equal((merged.ids > 0) & (merged.ids <= len(masks)), masks.any(axis=0))
    stuff_ids = [s.id for s in merged.segments if not s.is_thing]
    assert stuff_ids == list(range(len(masks) + 1, len(masks) + 1 + len(stuff_ids)))
