"""Anchors, proposals and the losses of the region proposal network."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.anchors import cell_anchors, grid_anchors
from model.panoptic.boxes import BoxCoder
from model.panoptic.rpn import RPN, anchor_losses
from model.panoptic.sampling import even_choice
from model.panoptic.targets import Target


def test_shapes_of_a_cell() -> None:
    cells = cell_anchors(32, (0.5, 1.0, 2.0))
    half = 8 * 2**0.5
    torch.testing.assert_close(
        cells,
        torch.tensor([[-2 * half, -half, 2 * half, half], [-16.0, -16, 16, 16], [-half, -2 * half, half, 2 * half]]),
    )


def test_anchors_go_by_row_column_and_shape() -> None:
    anchors = grid_anchors(torch.tensor([[-1.0, -1, 1, 1], [-2, -1, 2, 1]]), (2, 2), 8)
    assert anchors[:, 0].tolist() == [-1, -2, 7, 6, -1, -2, 7, 6]
    assert anchors[:, 1].tolist() == [-1, -1, -1, -1, 7, 7, 7, 7]


def truth(boxes: list[list[float]]) -> Target:
    n = len(boxes)
    return Target(
        torch.tensor(boxes).reshape(-1, 4),
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, 64, 64, dtype=torch.bool),
        torch.zeros(64, 64, dtype=torch.uint8),
    )


def small_rpn(**settings: object) -> RPN:
    torch.manual_seed(0)
    return RPN(4, strides=(16, 32), sizes=(16, 32), choose=even_choice, **settings)  # type: ignore[arg-type]


def levels() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 4, 4, 4, generator=generator), torch.rand(2, 4, 2, 2, generator=generator)]


def test_proposals_are_sorted_inside_the_image_and_as_many_as_allowed() -> None:
    rpn = small_rpn(pre_nms=(20, 10), post_nms=(12, 6), nms_threshold=1.0)
    proposals, losses = rpn(levels(), [(60, 64), (64, 50)])
    assert losses == {}
    assert [len(p.boxes) for p in proposals] == [6, 6]
    for p, (h, w) in zip(proposals, [(60, 64), (64, 50)], strict=True):
        assert (p.logits.diff() <= 0).all()
        assert (p.boxes >= 0).all() and (p.boxes[:, 2] <= w).all() and (p.boxes[:, 3] <= h).all()
        assert not p.boxes.requires_grad
    training, _ = rpn(levels(), [(60, 64), (64, 50)], [truth([]), truth([])])
    assert [len(p.boxes) for p in training] == [12, 12]


def test_losses_by_hand() -> None:
    """With zero weights each sampled anchor costs log 2, and each object the size of its deltas."""
    rpn = small_rpn(sampled=8)
    for parameter in rpn.parameters():
        torch.nn.init.zeros_(parameter)
    box = [0.0, 0, 12, 12]
    _, losses = rpn(levels(), [(64, 64), (64, 64)], [truth([box]), truth([])])
    assert math.isclose(losses["loss_rpn_cls"].item(), math.log(2), rel_tol=1e-6)
    anchors = torch.cat(rpn.anchors(levels()))
    matches = rpn.match(anchors, truth([box]))
    objects = anchors[matches.labels == 1]
    wanted = BoxCoder((1, 1, 1, 1)).encode(objects, torch.tensor([box]).expand(len(objects), 4))
    assert 1 <= len(objects) <= 4
    assert math.isclose(losses["loss_rpn_loc"].item(), wanted.abs().sum().item() / 16, rel_tol=1e-5)


def test_without_objects_every_parameter_still_has_a_gradient() -> None:
    rpn = small_rpn()
    _, losses = rpn(levels(), [(64, 64), (64, 64)], [truth([]), truth([])])
    assert losses["loss_rpn_loc"] == 0
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())


def test_the_published_losses(shared_dir: Path) -> None:
    reference = Reference(shared_dir)
    boxes, coder = reference.tensor("unit/boxes"), BoxCoder((1, 1, 1, 1))
    losses = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        names = ("logits", "deltas", "labels", "gt_boxes")
        logits, deltas, labels, true_boxes = (reference.tensor(f"unit/rpn_loss/{name}")[i] for name in names)
        positive, negative = (labels == 1).nonzero().flatten(), (labels == 0).nonzero().flatten()
        wanted = coder.encode(boxes[positive], true_boxes[positive])
        losses += torch.stack(anchor_losses(logits, deltas, positive, negative, wanted))
    torch.testing.assert_close(losses / (2 * 256), reference.tensor("unit/rpn_loss/value"), rtol=1e-5, atol=0)
