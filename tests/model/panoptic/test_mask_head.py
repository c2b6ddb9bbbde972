"""Masks of boxes: the head's class choice, targets, loss, and pasting against a plain restatement."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.mask_head import MaskHead, mask_loss, mask_targets, paste_masks


def test_the_head_gives_the_channel_of_each_boxs_class() -> None:
    torch.manual_seed(0)
    head = MaskHead(4, 5, channels=6)
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    pooled, classes = torch.randn(3, 4, 14, 14), torch.tensor([4, 0, 2])
    hidden = pooled
    for i in range(1, 5):
        hidden = head.get_submodule(f"mask_fcn{i}")(hidden).relu()
    every = head.predictor(head.deconv(hidden).relu())
    own = head(pooled, classes)
    assert own.shape == (3, 28, 28)
    torch.testing.assert_close(own, every[torch.arange(3), classes])


def test_targets_are_what_lies_in_the_box() -> None:
    masks = torch.zeros(2, 60, 60, dtype=torch.bool)
    masks[1, :, 30:] = True
    boxes = torch.tensor([[2.0, 2, 58, 58], [2, 2, 58, 58]])
    targets = mask_targets(masks, boxes, torch.tensor([1, 0]))
    assert targets.shape == (2, 28, 28)
    assert targets[0, :, 14:].all() and not targets[0, :, :14].any() and not targets[1].any()
    assert mask_targets(masks[:0], boxes[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 28, 28)


def test_loss() -> None:
    assert math.isclose(
        mask_loss(torch.zeros(2, 28, 28), torch.ones(2, 28, 28, dtype=torch.bool)).item(), math.log(2), rel_tol=1e-6
    )
    empty = torch.zeros(0, 28, 28, requires_grad=True)
    loss = mask_loss(empty, torch.zeros(0, 28, 28, dtype=torch.bool))
    loss.backward()
    assert loss == 0


def paste_one(prob: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """The probability at every pixel's centre, by torch's own bilinear sampling over the whole image."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    gx, gy = (x - box[0]) / (box[2] - box[0]) * 2 - 1, (y - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], dim=-1)
    return F.grid_sample(prob[None, None], grid[None], align_corners=False)[0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 40), st.floats(-20, 30), st.floats(0.5, 60), st.floats(0.5, 60))
def test_pasting_samples_bilinearly_at_pixel_centres(seed: int, x: float, y: float, w: float, h: float) -> None:
    prob = torch.rand(28, 28, generator=torch.Generator().manual_seed(seed))
    box = torch.tensor([x, y, x + w, y + h])
    pasted, values = paste_masks(prob[None], box[None], (30, 40))[0], paste_one(prob, box, (30, 40))
    assert pasted.dtype == torch.bool
    certain = (values - 0.5).abs() > 1e-4
    assert torch.equal(pasted[certain], (values >= 0.5)[certain])


def test_a_full_mask_fills_its_box() -> None:
    (mask,) = paste_masks(torch.ones(1, 28, 28), torch.tensor([[3.0, 2, 7, 5]]), (6, 9))
    expected = torch.zeros(6, 9, dtype=torch.bool)
    expected[2:5, 3:7] = True
    assert torch.equal(mask, expected)
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (6, 9)).shape == (0, 6, 9)


def test_the_published_targets_and_loss(shared_dir: Path) -> None:
    reference = Reference(shared_dir)
    masks, boxes = reference.bits("unit/mask/gt_packed", 320), reference.tensor("unit/boxes")[:24]
    targets = mask_targets(masks, boxes, reference.tensor("unit/mask/which_gt"))
    expected = reference.bits("unit/mask/targets_packed", 28)
    assert torch.equal(targets, expected)
    loss = mask_loss(reference.tensor("unit/mask/logits_of_class"), expected).double()
    torch.testing.assert_close(loss[None], reference.tensor("unit/mask/loss"), rtol=1e-6, atol=0)


def test_the_published_pasting(shared_dir: Path) -> None:
    reference = Reference(shared_dir)
    pasted = paste_masks(reference.tensor("unit/paste/prob"), reference.tensor("unit/paste/boxes"), (240, 320))
    assert (pasted != reference.bits("unit/paste/out_packed", 320)).double().mean() < 1e-5
