"""From class probabilities and boxes to the detections of an image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
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
) -> Detections:
    """Every class of a box that scores above `score_threshold`, without those near a better one of the same class.

    Args:
        boxes: (n, 4) float32 in pixels, one for all classes; rows that are not finite are left out.
        probs: (n, K + 1) float32, the last for background.
        size: (height, width) of the image, to which boxes are clipped.
    """
    finite = boxes.isfinite().all(1) & probs.isfinite().all(1)
    row, classes = ((probs[:, :-1] > score_threshold) & finite[:, None]).nonzero().unbind(1)
    scores, boxes = probs[row, classes], clip_boxes(boxes[row], size)
    keep = batched_nms(boxes, scores, classes, nms_threshold)[:limit]
    return Detections(boxes[keep], scores[keep], classes[keep], row[keep])
