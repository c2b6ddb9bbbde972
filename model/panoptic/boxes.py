"""Boxes: their code relative to other boxes, clipping, intersection over union, and matching to the true ones.

Boxes are (n, 4) float32 x0, y0, x1, y1 in pixels; sizes are (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

LARGEST_GROWTH = math.log(1000 / 16)  # of a side in one decoding: a wild delta must not overflow the exponential


class BoxCoder:
    """Boxes as deltas from reference boxes (arXiv 1311.2524, appendix C), times `weights` for x, y, width, height."""

    def __init__(self, weights: tuple[float, float, float, float]) -> None:
        self.weights = weights

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """(n, 4) deltas that lead from each of `references`, which must not be empty, to its box."""
        centre, size = _centre_size(references)
        box_centre, box_size = _centre_size(boxes)
        weights = references.new_tensor(self.weights)
        return torch.cat([(box_centre - centre) / size, torch.log(box_size / size)], dim=1) * weights

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """(n, 4) boxes, not clipped, float32 whatever the deltas' dtype."""
        centre, size = _centre_size(references.float())
        shift, growth = (deltas.float() / centre.new_tensor(self.weights)).split(2, dim=1)
        box_centre = shift * size + centre
        half = 0.5 * growth.clamp(max=LARGEST_GROWTH).exp() * size
        return torch.cat([box_centre - half, box_centre + half], dim=1)


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size


def box_area(boxes: Tensor) -> Tensor:
    """(n,) square pixels; negative where only one pair of corners is reversed."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(n, h, w) bool, none empty -> (n, 4) the smallest box around each; x1 and y1 are those after its last pixels."""
    boxes = masks_to_boxes(masks)
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The parts of the boxes inside an image of `size`; boxes outside become empty."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def scale_boxes(boxes: Tensor, size: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Boxes in an image of `size` as they lie in it resized to `new`."""
    return boxes * boxes.new_tensor([new[1] / size[1], new[0] / size[0]] * 2)


def is_usable(boxes: Tensor) -> Tensor:
    """(n,) bool: finite, and neither side is empty."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """(m, 4) and (n, 4) -> (m, n) intersection over union in [0, 1]; 0 where the boxes do not meet."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    sides = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - low).clamp_(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = box_area(a)[:, None] + box_area(b)[None] - shared
    return torch.where(shared > 0, shared / union, torch.zeros_like(shared))


@dataclass(frozen=True, slots=True)
class Matches:
    """`index` (n,) int64 of the true box that each box overlaps most, `labels` (n,) int8: 1 object, 0 background,
    -1 neither. Without any true box both are 0."""

    index: Tensor
    labels: Tensor


def match_boxes(iou_GN: Tensor, *, low: float, high: float, keep_best: bool = False) -> Matches:
    """Objects are boxes with IoU >= `high` to some true box, background those below `low` to all of them.

    With `keep_best` the boxes that overlap a true box most, all that tie, are objects as well, however little they
    overlap (arXiv 1506.01497, section 3.1.2); they stay matched to the true box that they themselves overlap most.
    A true box that no box meets makes no objects.

    Args:
        iou_GN: (true boxes, boxes) intersection over union.
    """
    true_boxes, boxes = iou_GN.shape
    if true_boxes == 0:
        index = torch.zeros(boxes, dtype=torch.int64, device=iou_GN.device)
        return Matches(index, index.to(torch.int8))
    best, index = iou_GN.max(0)
    labels = torch.full((boxes,), -1, dtype=torch.int8, device=iou_GN.device)
    labels[best < low] = 0
    labels[best >= high] = 1
    if keep_best and boxes:
        best_of_true = iou_GN.max(1, keepdim=True).values
        labels[((iou_GN == best_of_true) & (best_of_true > 0)).any(0)] = 1
    return Matches(index, labels)
