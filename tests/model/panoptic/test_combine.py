"""Instances and stuff become one map in which every pixel has at most one segment."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.combine import CombineSettings, PanopticMap, PanopticSegment, combine_panoptic

NO_MASKS = torch.zeros(0, 2, 4, dtype=torch.bool)
TOY = CombineSettings(overlap=0.5, stuff_area=2, confidence=0.5)


def combine(
    masks: Tensor, scores: list[float], classes: list[int], semantic: Tensor, toy: CombineSettings = TOY
) -> PanopticMap:
    return combine_panoptic(
        masks, torch.tensor(scores), torch.tensor(classes, dtype=torch.int64), semantic, num_things=10, settings=toy
    )


def columns(*names: str) -> Tensor:
    """Masks of 2 x 4 pixels, each of the columns whose digits are in its name."""
    masks = NO_MASKS.new_zeros(len(names), 2, 4)
    for mask, name in zip(masks, names, strict=True):
        mask[:, [int(digit) for digit in name]] = True
    return masks


def test_things_by_score_then_stuff_by_class() -> None:
    semantic = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 1]], dtype=torch.uint8)
    ids, segments = combine(columns("01", "0"), [0.6, 0.9], [3, 4], semantic)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[1, 2, 4, 4], [1, 2, 3, 3]]
    assert [(s.id, s.category, s.is_thing, s.area) for s in segments] == [
        (1, 5, True, 2),
        (2, 4, True, 2),
        (3, 11, False, 2),
        (4, 12, False, 2),
    ]
    assert segments[2:] == [PanopticSegment(3, 11, False, None, 2), PanopticSegment(4, 12, False, None, 2)]


def test_an_instance_that_is_mostly_covered_is_dropped_and_one_half_covered_is_not() -> None:
    semantic = torch.zeros(2, 4, dtype=torch.uint8)
    ids, segments = combine(columns("012", "123", "23"), [0.9, 0.8, 0.7], [0, 1, 2], semantic)
    assert [(s.category, s.area) for s in segments] == [(1, 6), (3, 2)]
    assert ids[0].tolist() == [1, 1, 1, 2]


def test_a_score_at_the_threshold_counts_and_an_empty_mask_does_not() -> None:
    semantic = torch.zeros(2, 4, dtype=torch.uint8)
    _, segments = combine(columns("0", "", "2"), [0.5, 0.9, 0.49], [0, 1, 2], semantic)
    assert [s.category for s in segments] == [1]


def test_little_stuff_and_things_of_the_semantic_map_stay_void() -> None:
    semantic = torch.tensor([[0, 0, 1, 2], [0, 0, 2, 2]], dtype=torch.uint8)
    ids, segments = combine(NO_MASKS, [], [], semantic)
    assert ids.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert [s.category for s in segments] == [12]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 5), st.floats(0, 1))
def test_areas_add_up_and_ids_are_those_of_the_segments(seed: int, count: int, area: int, overlap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, 5, 6, generator=generator) < 0.4
    semantic = torch.randint(0, 4, (5, 6), generator=generator, dtype=torch.uint8)
    scores = torch.rand(count, generator=generator).tolist()
    ids, segments = combine(masks, scores, list(range(count)), semantic, CombineSettings(overlap, area, 0.3))
    assert [s.id for s in segments] == list(range(1, len(segments) + 1))
    assert sum(s.area for s in segments) == int((ids > 0).sum())
    for s in segments:
        pixels = ids == s.id
        assert int(pixels.sum()) == s.area
        allowed = masks[s.category - 1] if s.is_thing else semantic == s.category - 10
        assert bool(allowed[pixels].all())
        assert (s.score is not None and s.score >= 0.3) if s.is_thing else s.area >= area


def test_the_published_combination(shared_dir: Path) -> None:
    reference = Reference(shared_dir)
    ids, segments = combine_panoptic(
        reference.bits("unit/panoptic/masks_packed", 200),
        reference.tensor("unit/panoptic/scores"),
        reference.tensor("unit/panoptic/classes"),
        reference.tensor("unit/panoptic/sem"),
        num_things=300,
    )
    assert torch.equal(ids, reference.tensor("unit/panoptic/map").to(torch.int32))
    expected = reference.json("unit/panoptic/segments_json")
    assert [(s.id, s.is_thing) for s in segments] == [(s["id"], s["isthing"]) for s in expected]
    assert [s.category for s in segments] == [s["category_id"] + (1 if s["isthing"] else 300) for s in expected]
    assert [s.area for s in segments if not s.is_thing] == [s["area"] for s in expected if not s["isthing"]]
