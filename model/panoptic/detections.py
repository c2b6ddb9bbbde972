"""From class probabilities and boxes to the detections of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from model.panoptic.boxes import clip_boxes


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
) -> Detections:
    """Every class of a box that scores above `score_threshold`, without those near a better one of the same class.

    With `class_agnostic` a box has its likeliest class alone, with the probability of any, and is left out near a
    better one of whatever class.

    Args:
        boxes: (n, 4) float32 in pixels, one for all classes; rows that are not finite are left out.
        probs: (n, K + 1) float32, the last for background.
        size: (height, width) of the image, to which boxes are clipped.
    """
    finite = boxes.isfinite().all(1) & probs.isfinite().all(1)
    objects = probs[:, :-1]
    if class_agnostic:
        likeliest = F.one_hot(objects.argmax(1), objects.shape[1])
        objects = likeliest * objects.sum(1, keepdim=True)
    row, classes = ((objects > score_threshold) & finite[:, None]).nonzero().unbind(1)
    scores, boxes = objects[row, classes], clip_boxes(boxes[row], size)
    rivals = torch.zeros_like(classes) if class_agnostic else classes
    keep = batched_nms(boxes, scores, rivals, nms_threshold)[:limit]
    return Detections(boxes[keep], scores[keep], classes[keep], row[keep])
