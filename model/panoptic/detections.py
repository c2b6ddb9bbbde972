"""From class probabilities and boxes to the detections of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from model.panoptic.boxes import box_iou, clip_boxes


class Detections(NamedTuple):
    """Best first: `boxes` (n, 4) float32 inside the image, `scores` (n,), `classes` (n,) int64 in 0..K-1, and `row`
    (n,) int64 of the box each was made from."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    row: Tensor


def detect(
    boxes: Tensor,
    probs: Tensor,
    size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    limit: int,
    class_agnostic: bool = False,
    soft_nms: bool = False,
) -> Detections:
    """Every class of a box that scores above `score_threshold`, without those near a better one of the same class.

    With `class_agnostic` a box has its likeliest class alone, with the probability of any, and is left out near a
    better one of whatever class. With `soft_nms` the score of what is left falls by the largest IoU with a better one,
    so that `nms_threshold` can be high (linear Soft-NMS, arXiv 1704.04503, and all at once as in SOLOv2, 2003.10152).

    Args:
        boxes: (n, 4) float32 in pixels, one for all classes; rows that are not finite are left out.
        probs: (n, K + 1) float32, the last for background.
        size: (height, width) of the image, to which boxes are clipped.
    """
    finite = boxes.isfinite().all(1) & probs.isfinite().all(1)
    objects = probs[:, :-1]
    if class_agnostic:
        likeliest = F.one_hot(objects.argmax(1), objects.shape[1])
        objects = likeliest * objects.sum(1, keepdim=True).clamp(max=1)  # what is rounded may be above
    row, classes = ((objects > score_threshold) & finite[:, None]).nonzero().unbind(1)
    scores, boxes = objects[row, classes], clip_boxes(boxes[row], size)
    rivals = torch.zeros_like(classes) if class_agnostic else classes
    keep = batched_nms(boxes, scores, rivals, nms_threshold)
    if soft_nms:
        falling = scores[keep] * (1 - _overlap_with_better(boxes[keep], rivals[keep]))
        scores = scores.index_put((keep,), falling)
        keep = keep[falling.argsort(descending=True, stable=True)]
    keep = keep[:limit]
    return Detections(boxes[keep], scores[keep], classes[keep], row[keep])


def _overlap_with_better(boxes: Tensor, classes: Tensor) -> Tensor:
    """(n,) largest IoU of each of (n, 4) boxes, best first, with one before it of the same class; 0 without one."""
    overlaps = box_iou(boxes, boxes) * (classes[:, None] == classes)
    return overlaps.tril(-1).amax(1) if len(boxes) else overlaps.new_zeros(0)
