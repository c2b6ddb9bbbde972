"""MaskCut of a batch without a word to the host: all that `workers.maskcut` decides photo by photo, on a device.

Every decision is made for all photos at once, and how much is done does not depend on what is found.

Shapes: B images, S stages, N = h * w patches row by row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.ncut import second_eigenvector_unasked

MAX_OVERLAP = 0.5  # a later mask with a larger IoU with the one before is rejected
MIN_AREA = 0.01  # a later mask of at most this share of the patches is rejected


class BatchCut(NamedTuple):
    """One stage of a batch: as `workers.maskcut.Cut`, and the residual of its eigenvector."""

    eigenvector_BN: Tensor  # float64
    side_BN: Tensor  # bool
    seed_B: Tensor  # int64
    reversed_B: Tensor  # bool
    component_BN: Tensor  # bool
    accepted_B: Tensor  # bool
    mask_BN: Tensor  # bool
    residual_B: Tensor  # float64, 0 where nothing was solved

    def where(self, chosen_B: Tensor, other: BatchCut) -> BatchCut:
        """Of each image, this cut where it is chosen, else the other."""
        pairs = zip(self, other, strict=True)
        return BatchCut(*(torch.where(chosen_B.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def batch_cuts(edges_BNN: Tensor, grid: tuple[int, int], max_masks: int, steps: int) -> list[BatchCut]:
    """All stages, by `steps` products of Lanczos each. N at least 2."""
    cuttable_B = cuttable(edges_BNN)
    painted_BN = torch.zeros(edges_BNN.shape[:2], dtype=torch.bool, device=edges_BNN.device)
    last = _no_cut(painted_BN)
    cuts: list[BatchCut] = []
    for _ in range(max_masks):
        solved_B = cuttable_B & ~painted_BN.all(1)
        if cuts:
            solved_B &= last.mask_BN.any(1)  # else the graph is that of the stage before: so is the component
        free_BN = (~painted_BN).float()
        vector_BN, residual_B = second_eigenvector_unasked(edges_BNN, free_BN, steps=steps)
        cut = _cut_from_vector(vector_BN, residual_B, grid).where(solved_B, last._replace(residual_B=residual_B * 0))
        last = _accept(cut, last if cuts else None, painted_BN)
        painted_BN = painted_BN | last.mask_BN
        cuts.append(last)
    return cuts


def cuttable(edges_BNN: Tensor) -> Tensor:
    """(B,) False for a graph whose eigenvectors are arbitrary: complete, or without an edge between two patches."""
    edges_B = edges_BNN.sum((1, 2), dtype=torch.float64)
    loops_B = edges_BNN.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    return (edges_B < edges_BNN.shape[-1] ** 2) & (edges_B > loops_B)


def bipartitions(vector_BN: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`workers.maskcut.bipartition` of each image: sides (B, N), seeds (B,), and whether the sides were exchanged."""
    side_BN = vector_BN > vector_BN.mean(1, keepdim=True)
    corners = [side_BN.unflatten(1, grid)[:, row, column] for row in (0, -1) for column in (0, -1)]
    peak_B1 = vector_BN.abs().argmax(1, keepdim=True)
    exchanged_B = (torch.stack(corners).sum(0) >= 3) | ~side_BN.gather(1, peak_B1)[:, 0]
    towards_BN = torch.where(exchanged_B[:, None], -vector_BN, vector_BN)
    return side_BN ^ exchanged_B[:, None], towards_BN.argmax(1), exchanged_B


def seed_components(side_BN: Tensor, seed_B: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N) bool: the 4-connected component of each side that holds its seed.

    Trees of patches grow together: each hooks itself to the neighbour of lowest number, until none has another
    neighbour. A tree that could not in one round can in the next, so that two rounds at least halve their number.
    """
    patches = side_BN.shape[1]
    outside = patches  # the number of what is on no side, itself a tree
    numbers_BN = torch.where(side_BN, torch.arange(patches, device=side_BN.device), outside)
    parents_BM = F.pad(numbers_BN, (0, 1), value=outside)
    trees = patches
    while trees > 1:
        for _ in range(2):
            parents_BM = _hooked(parents_BM, side_BN, grid)
            for _ in range(math.ceil(math.log2(trees)) + 1):
                parents_BM = parents_BM.gather(1, parents_BM)
        trees //= 2
    roots_BN = parents_BM[:, :-1]
    return side_BN & (roots_BN == roots_BN.gather(1, seed_B[:, None]))


def _hooked(parents_BM: Tensor, side_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every root's parent becomes the least root beside its tree, if that is less. All parents are roots before."""
    roots_BN, outside = parents_BM[:, :-1], parents_BM.shape[1] - 1
    around = F.pad(roots_BN.unflatten(1, grid), (1, 1, 1, 1), value=outside)
    rows, columns = around[:, :, 1:-1], around[:, 1:-1]
    beside = torch.minimum(torch.minimum(rows[:, :-2], rows[:, 2:]), torch.minimum(columns[..., :-2], columns[..., 2:]))
    least_BN = torch.where(side_BN, beside.flatten(1), outside)
    return parents_BM.scatter_reduce(1, roots_BN, least_BN, "amin")


def _no_cut(nothing_BN: Tensor) -> BatchCut:
    nothing_B = nothing_BN[:, 0]
    zeros = nothing_BN.double(), nothing_BN, nothing_B.long(), nothing_B, nothing_BN, nothing_B, nothing_BN
    return BatchCut(*zeros, nothing_B.double())


def _cut_from_vector(vector_BN: Tensor, residual_B: Tensor, grid: tuple[int, int]) -> BatchCut:
    side_BN, seed_B, reversed_B = bipartitions(vector_BN, grid)
    component_BN = seed_components(side_BN, seed_B, grid)
    return BatchCut(vector_BN, side_BN, seed_B, reversed_B, component_BN, reversed_B, component_BN, residual_B)


def _accept(cut: BatchCut, last: BatchCut | None, painted_BN: Tensor) -> BatchCut:
    """Reject components that are small or repeat the mask just before."""
    component_BN = cut.component_BN
    accepted_B = component_BN.any(1)
    if last is not None:
        before_BN = last.component_BN & last.accepted_B[:, None]
        common_B, union_B = (component_BN & before_BN).sum(1), (component_BN | before_BN).sum(1)
        area_B = component_BN.sum(1).double() / component_BN.shape[1]
        accepted_B = (common_B.double() <= MAX_OVERLAP * union_B) & (area_B > MIN_AREA)
    return cut._replace(accepted_B=accepted_B, mask_BN=component_BN & accepted_B[:, None] & ~painted_BN)
