"""RoIAlign on a CPU against torchvision's, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.panoptic import roi_align as module
from model.panoptic.roi_align import assign_levels, pool_boxes, roi_align


def maps(height: int = 20, width: int = 30) -> Tensor:
    return torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


def reference(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    return torchvision.ops.roi_align(features, rois, size, scale, sampling_ratio=0, aligned=True)


def assert_equal(features: Tensor, rois: Tensor, size: int, scale: float = 0.25) -> None:
    found, expected = roi_align(features, rois, size, spatial_scale=scale), reference(features, rois, size, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    slopes = [torch.autograd.grad((each * weight).sum(), features)[0] for each in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 119, 79],  # all of the photo
        [10.3, 20.7, 15.1, 22.2],  # less than a feature pixel a bin
        [-30, -20, 40, 30],  # beyond the edges
        [100, 60, 400, 300],
        [500, 500, 600, 600],  # outside
        [50, 40, 50, 60],  # without width
        [0, 0, 120, 3],
    ],
)
def test_boxes_of_every_kind_have_torchvisions_features_and_gradients(box: list[float], size: int) -> None:
    assert_equal(maps(), torch.tensor([[0, *box], [1, *box]], dtype=torch.float32), size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-50, 170, width=32)] * 4), min_size=1, max_size=6), st.integers(1, 9))
def test_any_boxes_have_torchvisions_features(boxes: list[tuple[float, ...]], size: int) -> None:
    rois = torch.tensor(
        [[n % 2, *map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])] for n, box in enumerate(boxes)]
    )
    found = roi_align(maps(), rois, size, spatial_scale=0.25)
    torch.testing.assert_close(found, reference(maps(), rois, size, 0.25), rtol=0, atol=1e-4)


def test_maps_of_one_pixel_and_no_boxes() -> None:
    assert_equal(maps(1, 1), torch.tensor([[0, 0, 0, 4.0, 4.0]]), 7)
    assert roi_align(maps(), torch.zeros(0, 5), 7, spatial_scale=0.25).shape == (0, 8, 7, 7)


def test_many_boxes_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)) * 60
    rois = torch.cat([torch.arange(40)[:, None] % 2, corners, corners + 30], dim=1)
    whole = roi_align(maps(), rois, 7, spatial_scale=0.25)
    monkeypatch.setattr(module, "BAG_ENTRIES", 5000)
    torch.testing.assert_close(roi_align(maps(), rois, 7, spatial_scale=0.25), whole, rtol=0, atol=0)


def test_a_box_is_pooled_from_the_level_of_its_size() -> None:
    boxes = torch.tensor([[0, 0, 20, 20], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 2000, 2000], [5, 5, 5, 5.0]])
    assert assign_levels(boxes, finest=2, coarsest=5).tolist() == [2, 3, 4, 5, 2]
    levels = [torch.full((1, 4, 512 // 2**level, 512 // 2**level), float(level)) for level in range(2, 6)]
    pooled = pool_boxes(levels, [boxes[:3]], 7)
    assert pooled.mean(dim=(1, 2, 3)).tolist() == pytest.approx([2, 3, 4], abs=1e-5)
