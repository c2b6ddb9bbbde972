"""Box codes, clipping, overlap and matching."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.boxes import BoxCoder, box_iou, boxes_of_masks, clip_boxes, is_usable, match_boxes


def test_a_box_twice_as_wide_and_moved_by_its_width() -> None:
    reference, box = torch.tensor([[10.0, 10, 20, 30]]), torch.tensor([[15.0, 10, 35, 30]])
    deltas = BoxCoder((10, 10, 5, 5)).encode(reference, box)
    torch.testing.assert_close(deltas, torch.tensor([[10.0, 0, 5 * 0.6931472, 0]]))


boxes_in_an_image = st.tuples(*(st.floats(0, 500, width=32) for _ in range(2)), *(st.floats(1, 500) for _ in range(2)))


@given(boxes_in_an_image, boxes_in_an_image)
def test_decoding_undoes_encoding(reference: tuple[float, ...], box: tuple[float, ...]) -> None:
    a, b = (torch.tensor([[x, y, x + w, y + h]]) for x, y, w, h in (reference, box))
    coder = BoxCoder((30, 30, 15, 15))
    growth = torch.log((b[:, 2:] - b[:, :2]) / (a[:, 2:] - a[:, :2]))
    if (growth < 4.1).all():
        torch.testing.assert_close(coder.decode(a, coder.encode(a, b)), b, atol=0.05, rtol=1e-4)


def test_a_side_grows_by_at_most_62_and_a_half() -> None:
    decoded = BoxCoder((1, 1, 1, 1)).decode(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 50, 0]]))
    torch.testing.assert_close(decoded, torch.tensor([[1 - 62.5, 0, 1 + 62.5, 2]]))


def test_half_precision_deltas_are_decoded_in_float32() -> None:
    reference, deltas = torch.tensor([[1000.0, 1000, 1100, 1100]]), torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    decoded = BoxCoder((10, 10, 5, 5)).decode(reference, deltas.bfloat16())
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, BoxCoder((10, 10, 5, 5)).decode(reference, deltas))


def test_clipping_and_what_is_left() -> None:
    boxes = torch.tensor([[-5.0, 2, 5, 20], [30, 1, 40, 2], [float("nan"), 0, 1, 1], [0, 0, 20, 10]])
    clipped = clip_boxes(boxes, (10, 20))
    assert clipped[0].tolist() == [0, 2, 5, 10]
    assert is_usable(clipped).tolist() == [True, False, False, True]


def test_boxes_end_after_the_last_pixels_of_masks() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2, 3] = masks[1, 1:4, 2] = masks[1, 5, 7] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [2, 1, 8, 6]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


def test_overlap() -> None:
    iou = box_iou(
        torch.tensor([[0.0, 0, 2, 2], [0, 0, 0, 0]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2]])
    )
    torch.testing.assert_close(iou, torch.tensor([[1 / 3, 0, 1], [0, 0, 0]]))


def test_labels_by_thresholds() -> None:
    matches = match_boxes(torch.tensor([[0.29, 0.3, 0.69, 0.7], [0.1, 0.6, 0.2, 0.1]]), low=0.3, high=0.7)
    assert matches.index.tolist() == [0, 1, 0, 0]
    assert matches.labels.tolist() == [0, -1, -1, 1]


def test_the_best_box_of_each_truth_is_an_object_with_all_that_tie() -> None:
    iou = torch.tensor([[0.2, 0.2, 0.1, 0.0], [0.0, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert match_boxes(iou, low=0.3, high=0.7).labels.tolist() == [0, 0, 0, 0]
    kept = match_boxes(iou, low=0.3, high=0.7, keep_best=True)
    assert kept.labels.tolist() == [1, 1, 0, 0], "the third truth meets no box, and makes none an object"
    assert kept.index.tolist() == [0, 1, 0, 0]


def test_without_truth_everything_is_background() -> None:
    matches = match_boxes(torch.zeros(0, 3), low=0.3, high=0.7, keep_best=True)
    assert matches.labels.tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> Reference:
    return Reference(shared_dir)


def test_the_published_matching(reference: Reference) -> None:
    iou = box_iou(reference.tensor("unit/gt_boxes"), reference.tensor("unit/boxes"))
    torch.testing.assert_close(iou, reference.tensor("unit/iou"))
    matches = match_boxes(iou, low=0.3, high=0.7, keep_best=True)
    assert torch.equal(matches.labels, reference.tensor("unit/rpn_labels"))
    assert torch.equal(matches.index, reference.tensor("unit/rpn_match"))
    for threshold in (0.5, 0.6, 0.7):
        matches = match_boxes(iou, low=threshold, high=threshold)
        assert torch.equal(matches.labels, reference.tensor(f"unit/labels_{threshold}"))
        assert torch.equal(matches.index, reference.tensor(f"unit/match_{threshold}"))


@pytest.mark.parametrize("i", range(4))
def test_the_published_box_code(reference: Reference, i: int) -> None:
    coder, boxes = BoxCoder(tuple(reference.arrays[f"unit/transform{i}_weights"])), reference.tensor("unit/boxes")
    decoded = coder.decode(boxes, reference.tensor("unit/deltas"))
    torch.testing.assert_close(decoded, reference.tensor(f"unit/transform{i}_apply"), atol=1e-3, rtol=1e-5)
    wanted = reference.tensor("unit/gt_boxes")[reference.tensor("unit/rpn_match")]
    encoded = coder.encode(boxes, wanted)
    torch.testing.assert_close(encoded, reference.tensor(f"unit/transform{i}_get"), atol=1e-5, rtol=1e-5)
