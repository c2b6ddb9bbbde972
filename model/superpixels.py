"""Superpixels of a photo and who touches whom: the small regions whose outlines are the photo's own edges.

SLIC (Achanta et al., TPAMI 2012) on a raster of the photo: k-means of Lab colour and place, each pixel between the
seeds of the nine cells around it. On torch, but for the connected parts (scipy). Deterministic on a CPU.

Shapes: H x W pixels of the raster, h x w patches, S superpixels, E pairs that touch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

Taps = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # (n,) int64 and (n,) weights, twice

FAR = 1e6  # of a seed beyond the raster, so that no pixel joins it
RGB_TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]  # sRGB, D65


@dataclass(frozen=True, slots=True)
class RegionGraph:
    """The superpixels of a raster, and the pairs of them that touch."""

    size: Tensor  # (S,) pixels
    border: Tensor  # (S,) pixels on the photo's border, those of a corner twice
    colour: Tensor  # (S, 3) mean Lab
    pairs: Tensor  # (2, E) int64, first < second
    length: Tensor  # (E,) pixels of the common edge
    step: Tensor  # (E,) mean distance of Lab colour across it


def raster_size(height: int, width: int, side: int, cell: int) -> tuple[int, int]:
    """Rows and columns of the raster of a photo: multiples of `cell`, two at least, the longer side about `side`."""
    scale = side / max(height, width)
    return max(2, round(height * scale / cell)) * cell, max(2, round(width * scale / cell)) * cell


def to_lab(rgb_3HW: Tensor) -> Tensor:
    """(3, H, W) float32 sRGB in [0, 1] -> CIE Lab under D65."""
    linear = torch.where(rgb_3HW > 0.04045, ((rgb_3HW + 0.055) / 1.055) ** 2.4, rgb_3HW / 12.92)
    matrix = linear.new_tensor(RGB_TO_XYZ)
    xyz = (matrix / matrix.sum(1, keepdim=True)) @ linear.flatten(1)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]).view_as(rgb_3HW)


def superpixels(lab_3HW: Tensor, cell: int, *, compactness: float = 10.0, iterations: int = 5) -> Tensor:
    """(3, H, W) Lab, H and W multiples of `cell` -> (H, W) int64, superpixel 0..S-1 of each pixel, 4-connected.

    `cell`: pixels between seeds; `compactness`: weight of place against colour.
    """
    _, height, width = lab_3HW.shape
    rows, columns = height // cell, width // cell
    pixels = torch.cat([lab_3HW, _places(lab_3HW, compactness / cell)])
    cells = pixels.view(5, rows, cell, columns, cell).permute(0, 2, 4, 1, 3)
    cells = cells.reshape(5, cell * cell, rows * columns)  # a pixel of every cell is a line: fast to compare
    seeds = cells.mean(1).view(5, rows, columns)
    flat = torch.cat([pixels, torch.ones_like(pixels[:1])]).flatten(1).t().contiguous()
    labels = _nearest_seed(cells, seeds)
    for _ in range(iterations - 1):
        sums = flat.new_zeros(rows * columns, 6).index_add_(0, labels.flatten(), flat)
        means = torch.where(sums[:, 5:] > 0, sums[:, :5] / sums[:, 5:].clamp_min(1), seeds.flatten(1).t())
        seeds = means.t().reshape(5, rows, columns)
        labels = _nearest_seed(cells, seeds)
    connected = _connect(labels.cpu().numpy(), least=max(1, cell * cell // 4))
    return torch.from_numpy(connected).to(lab_3HW.device)


def region_graph(labels_HW: Tensor, lab_3HW: Tensor) -> RegionGraph:
    """Sizes, colours and neighbours of superpixels 0..S-1."""
    count = int(labels_HW.max()) + 1
    values = torch.cat([torch.ones_like(lab_3HW[:1]), lab_3HW]).flatten(1).t().contiguous()
    sums = values.new_zeros(count, 4).index_add_(0, labels_HW.flatten(), values)
    rim = torch.cat([labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]])
    pairs, length, step = _edges(labels_HW, lab_3HW, count)
    return RegionGraph(
        size=sums[:, 0],
        border=torch.bincount(rim, minlength=count).to(values.dtype),
        colour=sums[:, 1:] / sums[:, :1],
        pairs=pairs,
        length=length,
        step=step,
    )


def patch_weights(labels_HW: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """(H, W) superpixels -> (S, h*w) float32, rows of sum 1: how much of each patch a superpixel sees, bilinearly."""
    (height, width), (h, w) = labels_HW.shape, grid
    device = labels_HW.device
    weights = torch.zeros(count * h * w, device=device)
    for row, row_weight in taps(height, h, device):
        for column, column_weight in taps(width, w, device):
            target = labels_HW * (h * w) + (row * w)[:, None] + column[None]
            weights.index_add_(0, target.flatten(), (row_weight[:, None] * column_weight[None]).flatten())
    weights = weights.view(count, h * w)
    return weights / weights.sum(1, keepdim=True)


def _places(raster_3HW: Tensor, weight: float) -> Tensor:
    """(2, H, W) row and column of each pixel, times `weight`."""
    height, width = raster_3HW.shape[1:]
    rows, columns = (torch.arange(n, device=raster_3HW.device, dtype=raster_3HW.dtype) for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")) * weight


def _nearest_seed(cells: Tensor, seeds: Tensor) -> Tensor:
    """(5, cell*cell, rows*columns) pixels and (5, rows, columns) seeds -> (H, W) int64, the nearest of the nine seeds
    around each pixel's cell."""
    _, rows, columns = seeds.shape
    cell = math.isqrt(cells.shape[1])
    numbers = torch.arange(rows * columns, device=seeds.device).view(rows, columns)
    around, names = F.pad(seeds, (1, 1, 1, 1), value=FAR), F.pad(numbers, (1, 1, 1, 1))
    windows = [(slice(y, y + rows), slice(x, x + columns)) for y in range(3) for x in range(3)]
    best = torch.full_like(cells[0], torch.inf)
    which = torch.zeros_like(best, dtype=torch.uint8)
    for number, window in enumerate(windows):
        distance = torch.zeros_like(best)
        for values, seed in zip(cells, around[:, *window].flatten(1), strict=True):
            gap = values - seed
            distance.addcmul_(gap, gap)
        which.masked_fill_(distance < best, number)
        best = torch.minimum(best, distance)
    labels = torch.stack([names[window].flatten() for window in windows]).gather(0, which.long())
    return labels.view(cell, cell, rows, columns).permute(2, 0, 3, 1).reshape(rows * cell, columns * cell)


def _connect(labels_HW: np.ndarray, least: int) -> np.ndarray:
    """Labels -> numbers of their 4-connected parts; pixels of parts of fewer than `least` join the nearest other."""
    parts = _connected_parts(labels_HW)
    small = (np.bincount(parts.ravel()) < least)[parts]
    if small.any() and not small.all():
        near = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
        parts = _connected_parts(parts[near[0], near[1]])
    return parts.astype(np.int64)


def _connected_parts(labels_HW: np.ndarray) -> np.ndarray:
    """Numbers of the parts: on a raster of twice the size, with walls between pixels of different labels."""
    height, width = labels_HW.shape
    open_ = np.zeros((2 * height - 1, 2 * width - 1), bool)
    open_[::2, ::2] = True
    open_[::2, 1::2] = labels_HW[:, :-1] == labels_HW[:, 1:]
    open_[1::2, ::2] = labels_HW[:-1] == labels_HW[1:]
    numbers: np.ndarray = ndimage.label(open_)[0][::2, ::2] - 1
    return numbers


def _edges(labels_HW: Tensor, lab_3HW: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`pairs`, `length` and `step` of the region graph."""
    first = torch.cat([labels_HW[:, :-1].flatten(), labels_HW[:-1].flatten()])
    second = torch.cat([labels_HW[:, 1:].flatten(), labels_HW[1:].flatten()])
    gaps = (lab_3HW[:, :, 1:] - lab_3HW[:, :, :-1], lab_3HW[:, 1:] - lab_3HW[:, :-1])
    step = torch.cat([gap.square().sum(0).flatten() for gap in gaps]).sqrt()
    apart = first != second
    first, second, step = first[apart], second[apart], step[apart]
    key = torch.minimum(first, second) * count + torch.maximum(first, second)
    unique, inverse, length = torch.unique(key, return_inverse=True, return_counts=True)
    length = length.to(lab_3HW.dtype)
    mean_step = torch.zeros_like(length).index_add_(0, inverse, step) / length
    return torch.stack([unique // count, unique % count]), length, mean_step


def taps(pixels: int, cells: int, device: torch.device) -> Taps:
    """The two cells that each pixel of a line lies between, the lower ones first, and their weights."""
    place = ((torch.arange(pixels, device=device) + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    low = place.long()
    share = place - low
    return (low, 1 - share), ((low + 1).clamp(max=cells - 1), share)
