"""What the box heads learn of each proposal: its class and its true box, and whether a missed object excuses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.panoptic.boxes import box_iou, match_boxes
from model.panoptic.sampling import Choose, sample_labels
from model.panoptic.targets import Target


@dataclass(frozen=True, slots=True)
class LabelledBoxes:
    """Boxes of one image beside the truth, n of each.

    boxes: (n, 4) float32; classes: (n,) int64 in 0..K, K = background; index: (n,) int64 of the true instance, and
    true_boxes: (n, 4) its box, both meaningless for background. scores: (n,) float32 in [0, 1], how surely an object is
    one, or None: all are.
    """

    boxes: Tensor
    classes: Tensor
    index: Tensor
    true_boxes: Tensor
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, chosen: Tensor) -> LabelledBoxes:
        scores = None if self.scores is None else self.scores[chosen]
        return LabelledBoxes(
            self.boxes[chosen], self.classes[chosen], self.index[chosen], self.true_boxes[chosen], scores
        )


def label_boxes(boxes: Tensor, target: Target, *, iou: float, num_things: int) -> LabelledBoxes:
    """Each box gets the class of the true box it overlaps most, if by an IoU of at least `iou`, else background."""
    matches = match_boxes(box_iou(target.boxes, boxes), low=iou, high=iou)
    if len(target.boxes) == 0:
        classes = torch.full((len(boxes),), num_things, device=boxes.device)
        return LabelledBoxes(boxes, classes, matches.index, torch.zeros_like(boxes))
    classes = target.classes[matches.index].masked_fill(matches.labels == 0, num_things)
    scores = None if target.scores is None else target.scores[matches.index]
    return LabelledBoxes(boxes, classes, matches.index, target.boxes[matches.index], scores)


def sample_boxes(
    labelled: LabelledBoxes,
    *,
    num_things: int,
    count: int,
    positive_fraction: float,
    choose: Choose,
    generator: torch.Generator | None,
) -> LabelledBoxes:
    """At most `count` boxes, objects first, of which objects are at most `positive_fraction` of `count`."""
    labels = (labelled.classes < num_things).to(torch.int8)
    chosen = sample_labels(labels, count=count, positive_fraction=positive_fraction, choose=choose, generator=generator)
    return labelled[torch.cat(chosen)]


def droploss_weights(decoded: Tensor, true_boxes: Tensor, threshold: float) -> Tensor:
    """(n,) float32, 1 or 0: DropLoss (CutLER, arXiv 2301.11320, section 3.2) ignores what may be a missed object.

    A predicted box counts if its IoU with some box of the image's own labels exceeds `threshold`. In an image without
    labels all count.

    Args:
        decoded: (n, 4) boxes as the stage predicts them from its proposals.
        true_boxes: (m, 4) boxes of the image's labels.
    """
    if len(true_boxes) == 0:
        return decoded.new_ones(len(decoded))
    return (box_iou(decoded, true_boxes).amax(1) > threshold).float()
