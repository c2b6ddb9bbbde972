"""Region proposal network (arXiv 1506.01497) on a feature pyramid, with its two losses.

Parameter names are those of detectron2: `rpn_head.conv.*`, `rpn_head.objectness_logits.*`, `rpn_head.anchor_deltas.*`.
Lists over levels go from fine to coarse, lists over images follow the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from model.panoptic.anchors import cell_anchors, grid_anchors
from model.panoptic.boxes import BoxCoder, Matches, box_iou, clip_boxes, is_usable, match_boxes
from model.panoptic.sampling import Choose, Generators, each_generator, random_choice, sample_labels
from model.panoptic.targets import Target


class Proposals(NamedTuple):
    """Of one image, best first: `boxes` (n, 4) float32, clipped and not empty, and objectness `logits` (n,)."""

    boxes: Tensor
    logits: Tensor


class RPNHead(nn.Module):
    """One 3x3 convolution and two 1x1 ones, shared by the levels."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for conv in (self.conv, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level (N, h * w * A) logits and (N, h * w * A, 4) deltas, float32, in the order of `grid_anchors`."""
        logits, deltas = [], []
        for level in features:
            hidden = F.relu_(self.conv(level))
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.anchor_deltas(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)).float())
        return logits, deltas


class RPN(nn.Module):
    """Feature maps -> proposals and, when there are targets, the losses `loss_rpn_cls` and `loss_rpn_loc`.

    Pairs of numbers of proposals are (with targets, without). Label thresholds are (background below, object from).
    """

    def __init__(
        self,
        channels: int,
        *,
        strides: Sequence[int],
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        label_ious: tuple[float, float] = (0.3, 0.7),
        sampled: int = 256,
        positive_fraction: float = 0.5,
        pre_nms: tuple[int, int] = (2000, 1000),
        post_nms: tuple[int, int] = (4000, 1000),
        nms_threshold: float = 0.65,
        choose: Choose = random_choice,
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"one anchor size a level: {len(strides)} strides, but {len(sizes)} sizes")
        self.rpn_head = RPNHead(channels, len(ratios))
        self.cell_anchors: Tensor
        cells = torch.stack([cell_anchors(size, ratios) for size in sizes])
        self.register_buffer("cell_anchors", cells, persistent=False)
        self.strides, self.label_ious = list(strides), label_ious
        self.sampled, self.positive_fraction, self.choose = sampled, positive_fraction, choose
        self.pre_nms, self.post_nms, self.nms_threshold = pre_nms, post_nms, nms_threshold
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
        generators: Generators = None,
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals of each image, without gradient, and the losses of the batch.

        Args:
            features: one (N, channels, h, w) map a level.
            image_sizes: (height, width) of each image before padding.
            generators: of the random choice of each image's anchors; None draws from torch's global generator.
        """
        logits, deltas = self.rpn_head(features)
        anchors = self.anchors(features)
        training = targets is not None
        proposals = self._propose(logits, deltas, anchors, image_sizes, training)
        if targets is None:
            return proposals, {}
        return proposals, self._losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), targets, generators
        )

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One (h * w * A, 4) tensor a level."""
        return [
            grid_anchors(cell, (level.shape[2], level.shape[3]), stride)
            for cell, level, stride in zip(self.cell_anchors, features, self.strides, strict=True)
        ]

    def match(self, anchors: Tensor, target: Target) -> Matches:
        """Which anchors are objects; the best of every true box are, whatever their overlap."""
        low, high = self.label_ious
        return match_boxes(box_iou(target.boxes, anchors), low=low, high=high, keep_best=True)

    @torch.no_grad()
    def _propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        training: bool,
    ) -> list[Proposals]:
        most = self.pre_nms[0] if training else self.pre_nms[1]
        boxes, scores, levels = [], [], []
        for i, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
            best, index = level_logits.topk(min(most, level_logits.shape[1]), dim=1)
            kept = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = self.coder.decode(level_anchors[index.flatten()], kept.flatten(0, 1))
            boxes.append(decoded.unflatten(0, index.shape))
            scores.append(best)
            levels.append(torch.full_like(index[0], i))
        level_of = torch.cat(levels)
        per_image = zip(torch.cat(boxes, 1), torch.cat(scores, 1), image_sizes, strict=True)
        return [self._suppress(*image, level_of, training) for image in per_image]

    def _suppress(
        self, boxes: Tensor, logits: Tensor, size: tuple[int, int], levels: Tensor, training: bool
    ) -> Proposals:
        """The best boxes of one image that do not overlap a better one of their own level too much."""
        boxes = clip_boxes(boxes, size)
        usable = is_usable(boxes) & logits.isfinite()
        boxes, logits, levels = boxes[usable], logits[usable], levels[usable]
        keep = batched_nms(boxes, logits, levels, self.nms_threshold)
        keep = keep[: self.post_nms[0] if training else self.post_nms[1]]
        return Proposals(boxes[keep], logits[keep])

    def _losses(
        self,
        logits_NR: Tensor,
        deltas_NR4: Tensor,
        anchors_R4: Tensor,
        targets: Sequence[Target],
        generators: Generators,
    ) -> dict[str, Tensor]:
        """Sums over the sampled anchors, divided by how many there are when every image fills its sample."""
        classification, localisation = logits_NR.new_zeros(()), logits_NR.new_zeros(())
        chances = each_generator(generators, len(targets))
        for logits, deltas, target, generator in zip(logits_NR, deltas_NR4, targets, chances, strict=True):
            with torch.no_grad():
                matches = self.match(anchors_R4, target)
                positive, negative = sample_labels(
                    matches.labels,
                    count=self.sampled,
                    positive_fraction=self.positive_fraction,
                    choose=self.choose,
                    generator=generator,
                )
                wanted = self.coder.encode(anchors_R4[positive], target.boxes[matches.index[positive]])
            classes, distance = anchor_losses(logits, deltas, positive, negative, wanted)
            classification, localisation = classification + classes, localisation + distance
        count = self.sampled * len(targets)
        return {"loss_rpn_cls": classification / count, "loss_rpn_loc": localisation / count}


def anchor_losses(
    logits: Tensor, deltas: Tensor, positive: Tensor, negative: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over one image: binary cross-entropy of the sampled anchors, L1 distance of the objects' deltas.

    Args:
        logits: (R,) and deltas: (R, 4) of all anchors; positive, negative: indices of the sampled ones.
        wanted: (len(positive), 4) deltas that lead from the objects' anchors to their true boxes.
    """
    # The cross-entropy of a logit x is softplus(-x) for an object and softplus(x) for background.
    classification = F.softplus(-logits[positive]).sum() + F.softplus(logits[negative]).sum()
    return classification, F.l1_loss(deltas[positive], wanted, reduction="sum")
