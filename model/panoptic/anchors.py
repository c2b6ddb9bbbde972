"""The boxes that the region proposal network starts from: three shapes around every cell of every level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(size: float, ratios: Sequence[float]) -> Tensor:
    """(len(ratios), 4) float32 boxes around the origin with an area of `size` squared and height / width = ratio."""
    shapes = [(size / ratio**0.5, size * ratio**0.5) for ratio in ratios]
    return torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes], dtype=torch.float32)


def grid_anchors(cell_A4: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """(rows * columns * A, 4): the boxes of a cell at (column * stride, row * stride), the shape changing fastest.

    The centre of the first cell is the image's corner, without an offset of half a cell.
    """
    rows, columns = (torch.arange(0, n * stride, stride, dtype=cell_A4.dtype, device=cell_A4.device) for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    corners = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (corners + cell_A4).reshape(-1, 4)
