"""From scores on a coarse grid to the class of every pixel of a photo, whatever its size.

Shapes: S classes, (h, w) cells of the grid, (H, W) pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BAND_PIXELS = 1 << 22  # of one class scored at a time: 16 MiB in float32


def argmax_at_size(scores_Shw: Tensor, size: tuple[int, int], *, band_pixels: int = BAND_PIXELS) -> Tensor:
    """(S, h, w) float, S <= 256 -> (H, W) uint8 on its device: the best class of each pixel, scores resized bilinearly.

    Equal to the argmax of `interpolate(..., align_corners=False)`, ties to the lowest class, without its S maps of
    H x W: rows come in bands of `band_pixels` (at least one row), and each class is compared with the best so far.
    """
    height, width = size
    left, right, weight_W = _between(scores_Shw, 2, width, range(width))
    wide_ShW = torch.lerp(scores_Shw[:, :, left], scores_Shw[:, :, right], weight_W)
    labels_HW = torch.empty(size, dtype=torch.uint8, device=scores_Shw.device)
    rows = max(1, band_pixels // width)
    for top in range(0, height, rows):
        band = range(top, min(top + rows, height))
        labels_HW[band.start : band.stop] = _best(wide_ShW, height, band)
    return labels_HW


def _best(wide_ShW: Tensor, height: int, band: range) -> Tensor:
    """(S, h, W) scores -> (band, W) uint8 class of the rows `band` of `height`."""
    above, below, weight = _between(wide_ShW, 1, height, band)
    best = wide_ShW.new_full((len(band), wide_ShW.shape[2]), -torch.inf)
    labels = torch.zeros(best.shape, dtype=torch.uint8, device=wide_ShW.device)
    for number, scores_hW in enumerate(wide_ShW):
        scores = torch.lerp(scores_hW[above], scores_hW[below], weight[:, None])
        labels.masked_fill_(scores > best, number)
        torch.maximum(best, scores, out=best)
    return labels


def _between(scores: Tensor, dim: int, size: int, pixels: range) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells of `dim` that each of the pixels of a side of `size` lies between, and the weight of the second."""
    cells = scores.shape[dim]
    centres = torch.arange(pixels.start, pixels.stop, dtype=scores.dtype, device=scores.device) + 0.5
    place = (centres * (cells / size) - 0.5).clamp(0, cells - 1)
    first = place.long()
    return first, (first + 1).clamp_max(cells - 1), place - first
