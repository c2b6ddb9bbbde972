"""The semantic branch: its loss, and its map at any size."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.semantic_head import SemanticHead, resize_logits, semantic_argmax, semantic_loss


def test_all_levels_meet_at_stride_4() -> None:
    torch.manual_seed(0)
    head = SemanticHead(8, 3, channels=32)
    logits = head([torch.randn(2, 8, 16 // 2**i, 24 // 2**i) for i in range(4)])
    assert logits.shape == (2, 3, 16, 24)
    assert [type(m).__name__ for m in head.get_submodule("p5")] == ["ConvNorm", "Upsample"] * 3


def test_loss_is_the_mean_over_pixels_that_are_not_ignored() -> None:
    logits, targets = torch.zeros(1, 4, 2, 2), torch.full((1, 8, 8), 255, dtype=torch.uint8)
    targets[0, 3, 3] = 2
    assert math.isclose(semantic_loss(logits, targets).item(), math.log(4), rel_tol=1e-6)


def test_loss_of_ignored_pixels_alone_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(1, 4, 2, 2, requires_grad=True)
    loss = semantic_loss(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("max_values", [1, 2 * 20 * 30, 10**9])
def test_the_map_does_not_depend_on_how_many_classes_are_resized_at_once(max_values: int) -> None:
    logits = torch.randn(7, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = resize_logits(logits, (30, 27), (20, 30)).argmax(0)
    label = semantic_argmax(logits, (30, 27), (20, 30), max_values=max_values)
    assert label.dtype == torch.uint8
    assert torch.equal(label.long(), expected)


def test_of_equal_classes_the_lowest_wins() -> None:
    logits = torch.ones(3, 8, 8)
    assert not semantic_argmax(logits, (32, 32), (32, 32), max_values=1).any()


def test_the_published_loss(shared_dir: Path) -> None:
    reference = Reference(shared_dir)
    loss = 0.5 * semantic_loss(reference.tensor("unit/sem/pred"), reference.tensor("unit/sem/target"))
    torch.testing.assert_close(loss.double()[None], reference.tensor("unit/sem/loss"), rtol=1e-5, atol=0)
