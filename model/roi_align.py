"""Features of boxes from the level of the pyramid that fits their size (arXiv 1612.03144, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.boxes import box_area

CANONICAL_SIZE = 224  # a box of this side, in pixels, is pooled
CANONICAL_LEVEL = 4  # from this level; half the side, one level finer


def assign_levels(boxes: Tensor, *, finest: int, coarsest: int) -> Tensor:
    """(n,) int64 levels in finest..coarsest for (n, 4) boxes."""
    # The small number keeps an empty box from the logarithm of zero, and is part of the published rule.
    octaves = torch.log2(box_area(boxes).sqrt() / CANONICAL_SIZE + 1e-8)
    return (CANONICAL_LEVEL + octaves).floor().clamp(finest, coarsest).long()


def pool_boxes(features: Sequence[Tensor], boxes: Sequence[Tensor], size: int, *, finest: int = 2) -> Tensor:
    """RoIAlign (arXiv 1703.06870) of every box from one level: (boxes of all images, C, size, size) float32.

    Samples are as many as a bin has feature pixels, and lie half a pixel from where the first version had them.

    Args:
        features: one (N, C, h, w) map a level, the first of stride 2 ** finest, each of twice the stride before.
        boxes: (n, 4) float32 boxes in pixels of each of the N images.
    """
    rois = torch.cat([torch.cat([image.new_full((len(image), 1), i), image], dim=1) for i, image in enumerate(boxes)])
    levels = assign_levels(rois[:, 1:], finest=finest, coarsest=finest + len(features) - 1)
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], size, size), dtype=torch.float32)
    for level, level_map in enumerate(features, start=finest):
        index = (levels == level).nonzero().flatten()
        pooled[index] = roi_align(
            level_map.float(), rois[index], size, spatial_scale=0.5**level, sampling_ratio=0, aligned=True
        )
    return pooled
