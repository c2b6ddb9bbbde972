"""Features of boxes from the level of the pyramid that fits their size (arXiv 1612.03144, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from model.panoptic.boxes import box_area

CANONICAL_SIZE = 224  # a box of this side, in pixels, is pooled
CANONICAL_LEVEL = 4  # from this level; half the side, one level finer
BAG_ENTRIES = 1 << 22  # weighted pixels summed at a time: 50 MB of indices and weights


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
        pooled[index] = roi_align(level_map.float(), rois[index], size, spatial_scale=0.5**level)
    return pooled


def roi_align(features: Tensor, rois: Tensor, size: int, *, spatial_scale: float) -> Tensor:
    """(R, C, size, size) of (N, C, h, w) float32 maps and (R, 5) float32 rois: image, x0, y0, x1, y1.

    `torchvision.ops.roi_align` with `sampling_ratio=0, aligned=True`, which computes it on GPUs. On a CPU that takes a
    sample of a channel at a time in one thread; here a bin is a weighted sum over the pixels near it, of all channels.
    """
    if features.device.type != "cpu":
        return torchvision.ops.roi_align(features, rois, size, spatial_scale, sampling_ratio=0, aligned=True)
    pixels = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    extents = (rois[:, 3:] - rois[:, 1:3]) * (spatial_scale / size)  # of a bin, in pixels of the map
    _, alike = extents.clamp(min=1).log2().ceil().unique(dim=0, return_inverse=True)
    order = alike.argsort(stable=True)
    groups = order.split(alike.bincount().tolist())  # so that a long box does not widen the bags of all others
    pooled = [_align(pixels, features.shape, rois[group], size, spatial_scale) for group in groups if len(group)]
    empty = pixels.new_zeros(0, size, size, features.shape[1])
    return torch.cat([empty, *pooled])[order.argsort()].permute(0, 3, 1, 2)


def _align(pixels: Tensor, shape: Sequence[int], rois: Tensor, size: int, scale: float) -> Tensor:
    """(R, size, size, C) of rois whose bins are of about the same size, from (N h w, C) pixels."""
    height, width = shape[2:]
    x0, y0, x1, y1 = (rois[:, 1:] * scale - 0.5).unbind(1)
    rows, row_weights = _bins(y0, y1, size, height)
    columns, column_weights = _bins(x0, x1, size, width)
    rows = rows + height * rois[:, 0].long()[:, None, None]
    a_roi = size**2 * row_weights.shape[-1] * column_weights.shape[-1]
    parts = torch.arange(len(rois)).split(max(1, BAG_ENTRIES // a_roi))
    return torch.cat([_sum_bags(pixels, rows[p] * width, columns[p], row_weights[p], column_weights[p]) for p in parts])


def _sum_bags(pixels: Tensor, rows: Tensor, columns: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    """(R, size, size, C): the weights of a bin are the products of those of its rows and of its columns."""
    bags = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    summed = F.embedding_bag(
        bags.int().flatten(0, 2).flatten(1), pixels, mode="sum", per_sample_weights=weights.flatten(0, 2).flatten(1)
    )
    return summed.view(*bags.shape[:3], pixels.shape[1])


def _bins(start: Tensor, end: Tensor, size: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the pixels that each bin of each roi takes part of, and how much: two (R, size, L).

    A bin has as many samples as it has pixels, rounded up, and a sample is shared by the two pixels beside it. Those
    more than a pixel outside count as zero.
    """
    bin_size = ((end - start) / size)[:, None, None]
    samples = bin_size.ceil().clamp(min=0)
    number = torch.arange(max(1, int(samples.max())))
    at = (
        start[:, None, None] + torch.arange(size)[:, None] * bin_size + (number + 0.5) * bin_size / samples.clamp(min=1)
    )
    used = (number < samples) & (at >= -1) & (at <= pixels)
    at = at.clamp(0, pixels - 1)
    before = at.floor().long()
    first = torch.where(used, before, pixels - 1).amin(2, keepdim=True)
    offset = torch.where(used, before - first, 0)
    weight = used / samples.clamp(min=1)
    after = weight * (at - before)
    weights = at.new_zeros(*first.shape[:2], int(offset.max()) + 2)
    weights.scatter_add_(2, offset, weight - after).scatter_add_(2, offset + 1, after)
    return (first + torch.arange(weights.shape[2])).clamp(max=pixels - 1), weights
