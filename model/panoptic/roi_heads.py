"""Three box heads in cascade (arXiv 1712.00726) and the mask head behind them, with their losses.

Parameter names are those of detectron2: `box_head.0.fc1.*`, `box_predictor.0.cls_score.*`, `mask_head.*`, ...
Boxes are regressed once for all classes; lists over images follow the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.panoptic.box_labels import LabelledBoxes, droploss_weights, label_boxes, sample_boxes
from model.panoptic.boxes import BoxCoder, clip_boxes, is_usable
from model.panoptic.detections import Detections, detect
from model.panoptic.mask_head import POOL_SIZE, MaskHead, mask_loss, mask_targets
from model.panoptic.probes import LinearProbe, TokenSums
from model.panoptic.roi_align import pool_boxes
from model.panoptic.sampling import Choose, Generators, each_generator, random_choice
from model.panoptic.targets import Target
from model.ranks import ALONE, Ranks

BOX_SIZE = 7
CODE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class BoxHead(nn.Module):
    """Pooled features (n, C, 7, 7) -> (n, dim)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * BOX_SIZE**2, dim)
        self.fc2 = nn.Linear(dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu_(self.fc2(F.relu_(self.fc1(pooled.flatten(1)))))


class BoxPredictor(nn.Module):
    """(n, dim) -> (n, K + 1) class logits, background last, and (n, 4) deltas, float32.

    With a probe of `probed` channels, `cls_score` tells an object, its first row, from background alone, and the probe
    of a box's mean token, (n, probed), tells which: the logits are those of the two's product.
    """

    def __init__(self, dim: int, num_things: int, probed: int | None = None) -> None:
        super().__init__()
        self.cls_score = nn.Linear(dim, num_things + 1 if probed is None else 2)
        self.bbox_pred = nn.Linear(dim, 4)
        self.probe = None if probed is None else LinearProbe(probed, num_things)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.cls_score(x).float()
        if self.probe is not None:
            if tokens is None:
                raise ValueError("a probe needs the mean token of every box")
            logits = torch.cat([logits[:, :1] + self.probe(tokens).float().log_softmax(1), logits[:, 1:]], dim=1)
        return logits, self.bbox_pred(x).float()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def box_losses(
    logits: Tensor,
    deltas: Tensor,
    labelled: Sequence[LabelledBoxes],
    coder: BoxCoder,
    weights: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes (see `soft_entropies`) and L1 of the objects' deltas, both sums over the batch
    divided by all its boxes.

    Args:
        logits: (n, K + 1) float32, rows in the order of `labelled`; deltas: (n, 4) float32.
        weights: (n,) of the cross-entropies, by which the divisor does not change; None for 1.
        ranks: the processes that share the batch; the divisor is that of the whole batch.
    """
    classes = torch.cat([image.classes for image in labelled])
    entropies = soft_entropies(logits, labelled)
    entropy = entropies.sum() if weights is None else (entropies * weights).sum()
    objects = (classes < logits.shape[1] - 1).nonzero().flatten()
    boxes = torch.cat([image.boxes for image in labelled])[objects]
    wanted = coder.encode(boxes, torch.cat([image.true_boxes for image in labelled])[objects])
    distance = F.l1_loss(deltas[objects], wanted, reduction="sum")
    count = ranks.share(len(classes), logits)
    return entropy / count, distance / count


def soft_entropies(logits: Tensor, labelled: Sequence[LabelledBoxes]) -> Tensor:
    """(n,) cross-entropies. An object with a score is wanted to be of its class with that probability, and background
    otherwise: what a label is not sure of, the model need not be. (CuVLER, arXiv 2403.07700, weighs the loss of a mask
    with its score instead.)"""
    classes = torch.cat([image.classes for image in labelled])
    entropies = F.cross_entropy(logits, classes, reduction="none")
    if all(image.scores is None for image in labelled):
        return entropies
    sure = torch.cat([_ones(image) if image.scores is None else image.scores for image in labelled])
    nothing = F.cross_entropy(logits, torch.full_like(classes, logits.shape[1] - 1), reduction="none")
    return torch.where(classes < logits.shape[1] - 1, sure * entropies + (1 - sure) * nothing, entropies)


def _ones(image: LabelledBoxes) -> Tensor:
    return torch.ones(len(image), device=image.boxes.device)


class CascadeRoIHeads(nn.Module):
    """Proposals on the levels from `finest` to p5 -> losses, or detections and their masks.

    The stages call a box an object from the three `label_ious`. Each starts from the boxes of the stage before, and
    sends a third of its gradient into the features. With `tokens`, the channels and the stride of those of a
    transformer, linear probes of a box's mean token tell the classes in each stage.
    """

    def __init__(
        self,
        channels: int,
        num_things: int,
        *,
        dim: int = 1024,
        mask_channels: int = 256,
        label_ious: Sequence[float] = (0.5, 0.6, 0.7),
        sampled: int = 512,
        positive_fraction: float = 0.25,
        droploss_threshold: float | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        class_agnostic: bool = False,
        class_agnostic_masks: bool = False,
        soft_nms: bool = False,
        finest: int = 2,
        choose: Choose = random_choice,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if len(label_ious) != len(CODE_WEIGHTS):
            raise ValueError(f"label_ious must be {len(CODE_WEIGHTS)} thresholds, one a stage, got {label_ious}")
        self.box_head = nn.ModuleList(BoxHead(channels, dim) for _ in CODE_WEIGHTS)
        channels_probed, self.token_stride = tokens or (None, 0)
        self.probed = tokens is not None
        self.box_predictor = nn.ModuleList(BoxPredictor(dim, num_things, channels_probed) for _ in CODE_WEIGHTS)
        self.mask_head = MaskHead(channels, 1 if class_agnostic_masks else num_things, channels=mask_channels)
        self.class_agnostic_masks = class_agnostic_masks
        self.coders = [BoxCoder(weights) for weights in CODE_WEIGHTS]
        self.num_things, self.label_ious = num_things, list(label_ious)
        self.sampled, self.positive_fraction, self.choose = sampled, positive_fraction, choose
        self.droploss_threshold, self.finest = droploss_threshold, finest
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.detections_per_image, self.class_agnostic = detections_per_image, class_agnostic
        self.soft_nms = soft_nms

    def losses(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        generators: Generators = None,
        ranks: Ranks = ALONE,
        *,
        tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss_cls_stage0`, `loss_box_reg_stage0`, ..., `loss_mask`.

        Args:
            features: (N, C, h, w) maps from level `finest` to p5.
            proposals: (n, 4) boxes of each image; the true boxes join them here.
            generators: of the random choice of each image's proposals; None draws from torch's global generator.
            ranks: the processes that share the batch.
            tokens: (N, D, h, w) of the frozen transformer, for the probes.
        """
        chances, sums = each_generator(generators, len(targets)), self._token_sums(tokens)
        labelled = [self.sample(*image) for image in zip(proposals, targets, chances, strict=True)]
        losses = {"loss_mask": self._mask_loss(features, labelled, targets, ranks)}
        for k, coder in enumerate(self.coders):
            boxes = [image.boxes for image in labelled]
            logits, deltas = self.stage(k, features, boxes, sums)
            refined = coder.decode(torch.cat(boxes), deltas.detach()).split([len(image) for image in boxes])
            weights = self._class_weights(refined, targets)
            classification, localisation = box_losses(logits, deltas, labelled, coder, weights, ranks)
            losses |= {f"loss_cls_stage{k}": classification, f"loss_box_reg_stage{k}": localisation}
            if k + 1 < len(self.coders):
                labelled = [
                    self._relabel(image, size, target, self.label_ious[k + 1])
                    for image, size, target in zip(refined, image_sizes, targets, strict=True)
                ]
        return losses

    @torch.no_grad()
    def sample(self, proposals: Tensor, target: Target, generator: torch.Generator | None = None) -> LabelledBoxes:
        """The proposals and true boxes of one image that enter the losses, labelled for the first stage."""
        boxes = torch.cat([proposals, target.boxes])
        return sample_boxes(
            label_boxes(boxes, target, iou=self.label_ious[0], num_things=self.num_things),
            num_things=self.num_things,
            count=self.sampled,
            positive_fraction=self.positive_fraction,
            choose=self.choose,
            generator=generator,
        )

    def _token_sums(self, tokens: Tensor | None) -> TokenSums | None:
        """Where there are probes. ValueError: they have no tokens."""
        if not self.probed:
            return None
        if tokens is None:
            raise ValueError("probes need the tokens of the frozen transformer")
        return TokenSums(tokens, stride=self.token_stride)

    def stage(
        self, k: int, features: Sequence[Tensor], boxes: Sequence[Tensor], tokens: TokenSums | None = None
    ) -> tuple[Tensor, Tensor]:
        """(n, K + 1) logits and (n, 4) deltas of stage k for the boxes of all images."""
        pooled = _ScaleGradient.apply(pool_boxes(features, boxes, BOX_SIZE, finest=self.finest), 1 / len(self.coders))
        return self.box_predictor[k](self.box_head[k](pooled), None if tokens is None else tokens.means(boxes))

    def cascade(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        proposals: Sequence[Tensor],
        tokens: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image the last stage's (n, 4) boxes, not clipped, and the stages' mean (n, K + 1) probabilities."""
        boxes, counts = list(proposals), [len(image) for image in proposals]
        sums = self._token_sums(tokens)
        probs = features[0].new_zeros((sum(counts), self.num_things + 1), dtype=torch.float32)
        for k, coder in enumerate(self.coders):
            if k > 0:
                boxes = [clip_boxes(image, size) for image, size in zip(boxes, image_sizes, strict=True)]
            logits, deltas = self.stage(k, features, boxes, sums)
            probs = probs + logits.softmax(1)
            boxes = list(coder.decode(torch.cat(boxes), deltas).split(counts))
        return boxes, list((probs / len(self.coders)).split(counts))

    @torch.no_grad()
    def detect(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        proposals: Sequence[Tensor],
        *,
        tokens: Tensor | None = None,
    ) -> list[Detections]:
        """The detections of each image; `tokens` as in `losses`."""
        boxes, probs = self.cascade(features, image_sizes, proposals, tokens)
        return [
            detect(
                *image,
                score_threshold=self.score_threshold,
                nms_threshold=self.nms_threshold,
                limit=self.detections_per_image,
                class_agnostic=self.class_agnostic,
                soft_nms=self.soft_nms,
            )
            for image in zip(boxes, probs, image_sizes, strict=True)
        ]

    def mask_logits(self, features: Sequence[Tensor], boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
        """(boxes of all images, 28, 28) float32, of each box's own class unless masks are the same for all."""
        chosen = torch.cat(list(classes))
        if self.class_agnostic_masks:
            chosen = torch.zeros_like(chosen)
        return self.mask_head(pool_boxes(features, boxes, POOL_SIZE, finest=self.finest), chosen)

    def _mask_loss(
        self, features: Sequence[Tensor], labelled: Sequence[LabelledBoxes], targets: Sequence[Target], ranks: Ranks
    ) -> Tensor:
        objects = [image[image.classes < self.num_things] for image in labelled]
        truth = torch.cat(
            [mask_targets(t.masks, image.boxes, image.index) for image, t in zip(objects, targets, strict=True)]
        )
        logits = self.mask_logits(features, [image.boxes for image in objects], [image.classes for image in objects])
        return mask_loss(logits, truth, ranks)

    def _relabel(self, boxes: Tensor, size: tuple[int, int], target: Target, iou: float) -> LabelledBoxes:
        """The boxes of a stage as the next one starts from them: clipped, without empty ones, labelled, all kept."""
        boxes = clip_boxes(boxes, size)
        return label_boxes(boxes[is_usable(boxes)], target, iou=iou, num_things=self.num_things)

    def _class_weights(self, refined: Sequence[Tensor], targets: Sequence[Target]) -> Tensor | None:
        if self.droploss_threshold is None:
            return None
        return torch.cat(
            [
                droploss_weights(boxes, target.boxes, self.droploss_threshold)
                for boxes, target in zip(refined, targets, strict=True)
            ]
        )
