"""The averaged model as teacher of the one that learns: what it sees surely in a photo joins the photo's labels.

Labels without people miss most objects. A round of self-training adds them once the training is over, a teacher while
it goes on (CUPS, arXiv 2504.01955, its last stage): it sees the photo as it is learnt, cropped and mirrored, so that no
mask has to be kept or brought to that form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.panoptic.boxes import boxes_of_masks
from model.panoptic.network import Prediction
from model.panoptic.targets import THINGS, Target


@dataclass(frozen=True, slots=True)
class TeacherParams:
    """What of the teacher's predictions is learnt. ValueError for values out of range.

    From `start`, a share of all steps, on: those with a score of at least `threshold` whose mask IoU with every label,
    and with every surer one that joins, is at most `max_iou`; of each photo the surest `most`. With `soft` each is
    wanted to be an object with the probability that its score says.
    """

    start: float = 0.5
    threshold: float = 0.5
    max_iou: float = 0.5
    most: int = 30  # as a round of self-training
    soft: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"train.teacher.threshold must be in [0, 1], got {self.threshold}")
        for name in ("start", "max_iou"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.teacher.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.most < 1:
            raise ValueError(f"train.teacher.most must be at least 1, got {self.most}")


def taught(target: Target, seen: Prediction, params: TeacherParams) -> tuple[Target, int]:
    """The target with what the teacher sees and it lacks, and how many instances these are.

    `seen` is a prediction of the target's size. What joins lies over the stuff of the semantic map. Without any the
    target stays as it is, but for `soft`, which gives all of a batch scores: 1 for a label.
    """
    if params.soft and target.scores is None:
        target = replace(target, scores=torch.ones_like(target.boxes[:, 0]))
    sure = ((seen.scores >= params.threshold) & seen.masks.flatten(1).any(1)).nonzero()[:, 0]
    labels = target.masks.to(seen.masks.device)
    rows = sure[_apart(seen.masks[sure], labels, params.max_iou)[: params.most]]
    if len(rows) == 0:
        return target, 0
    masks = seen.masks[rows]
    boxes = boxes_of_masks(masks)
    scores = target.scores
    if scores is not None:
        scores = _appended(scores, seen.scores[rows] if params.soft else torch.ones_like(boxes[:, 0]))
    return (
        Target(
            _appended(target.boxes, boxes),
            _appended(target.classes, seen.classes[rows]),
            _appended(target.masks, masks),
            target.semantic.masked_fill(masks.any(0).to(target.semantic.device), THINGS),
            scores,
        ),
        len(rows),
    )


def _apart(masks_nhw: Tensor, labels_mhw: Tensor, max_iou: float) -> Tensor:
    """(k,) int64 rows of the masks, best first, none of them empty, whose IoU with each label and each better one of
    them is at most `max_iou`."""
    count = len(masks_nhw)
    pixels = torch.cat([masks_nhw, labels_mhw]).flatten(1).float()
    common, area = pixels[:count] @ pixels.t(), pixels.sum(1)
    ious = common / (area[:count, None] + area - common)
    new = (ious[:, count:] <= max_iou).all(1).nonzero()[:, 0].tolist()
    among = ious[:, :count].tolist()
    kept: list[int] = []
    for row in new:
        if all(among[row][better] <= max_iou for better in kept):
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64, device=masks_nhw.device)


def _appended(values: Tensor, more: Tensor) -> Tensor:
    return torch.cat([values, more.to(values)])
