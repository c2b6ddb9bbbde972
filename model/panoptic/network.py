"""Panoptic Cascade Mask R-CNN as U2Seg (arXiv 2312.17243) configures it: a pyramid, and instances and stuff from it.

The names in the state dict are detectron2's, so its checkpoints fit as they are. In place of its ResNet-50 a frozen
transformer can stand, which is no part of the state dict. Left out on purpose: resizing of images (see `test_size`),
augmentation, and test-time augmentation, which the published evaluation does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone.base import Backbone
from model.panoptic.boxes import clip_boxes, is_usable, scale_boxes
from model.panoptic.combine import CombineSettings, PanopticMap, combine_panoptic
from model.panoptic.detections import Detections
from model.panoptic.fpn import FPN
from model.panoptic.frozen import FrozenPatches, stack_maps
from model.panoptic.mask_head import mask_certainty, paste_masks
from model.panoptic.outlines import outlined_masks
from model.panoptic.resize import DIVISOR, padded_size, test_size
from model.panoptic.resnet import ResNet
from model.panoptic.roi_heads import CascadeRoIHeads
from model.panoptic.rpn import RPN
from model.panoptic.sampling import Choose, Generators, random_choice
from model.panoptic.semantic_head import SemanticHead, semantic_argmax, semantic_loss
from model.panoptic.simple_pyramid import SimplePyramid
from model.panoptic.targets import IGNORED, Target, check_targets
from model.ranks import ALONE, Ranks

__all__ = ["PanopticCascadeRCNN", "Prediction", "Target", "test_size"]

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
SMALLEST_TRAINED = 64  # pixels a side: the batch statistics of one pixel of the coarsest map do not exist
MOST_STUFF = IGNORED - 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model sees in one image, at the size that was asked for.

    boxes: (n, 4) float32 x0, y0, x1, y1 in pixels; scores: (n,) float32, descending; classes: (n,) int64 in 0..K-1;
    masks: (n, H, W) bool; semantic: (H, W) uint8, 0 = things, 1..S = stuff; num_things: K.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor
    semantic: Tensor
    num_things: int
    settings: CombineSettings = field(default_factory=CombineSettings)

    def panoptic(self, settings: CombineSettings | None = None) -> PanopticMap:
        """The id map (H, W) int32 and its segments, combined as the model was told unless `settings` are given."""
        return combine_panoptic(
            self.masks,
            self.scores,
            self.classes,
            self.semantic,
            num_things=self.num_things,
            settings=settings or self.settings,
        )

    def to(self, device: torch.device | str) -> Prediction:
        names = ("boxes", "scores", "classes", "masks", "semantic")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What the network is beside its numbers of classes; the defaults are U2Seg's."""

    backbone: Literal["resnet50", "vit"] = "resnet50"  # vit: a frozen transformer, which is given beside the settings
    patch_stride: int = 16  # pixels of the frame that a patch of it stands for; 8 or 16
    finest_stride: int = 4  # pixels of the frame that one of the pyramid's finest map stands for; 4 or, behind a vit, 8
    depths: Sequence[int] = (3, 4, 6, 3)  # blocks of the ResNet's stages
    width: int = 64  # channels of its first stage
    channels: int = 256  # of the pyramid
    box_dim: int = 1024  # of the box heads
    mask_channels: int = 256
    semantic_channels: int = 128
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512)  # pixels a side, of each map of the pyramid
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0)  # height / width
    rpn_ious: tuple[float, float] = (0.3, 0.7)  # an anchor below the first is background, from the second an object
    rpn_sampled: int = 256  # anchors an image in the loss
    rpn_positive: float = 0.5  # the largest fraction of objects among them
    rpn_pre_nms: tuple[int, int] = (2000, 1000)  # proposals a level before suppression, in training and test
    rpn_post_nms: tuple[int, int] = (4000, 1000)  # and an image after it
    rpn_nms: float = 0.65  # IoU above which a proposal is suppressed
    roi_ious: Sequence[float] = (0.5, 0.6, 0.7)  # from which a proposal is an object, in each stage
    roi_sampled: int = 512  # proposals an image in the losses
    roi_positive: float = 0.25
    droploss_threshold: float | None = None  # IoU up to which a box is not punished for its class (DropLoss); None: 0
    score_threshold: float = 0.05  # of the detections
    nms_threshold: float = 0.5  # IoU with a better detection above which one is left out
    soft_nms: bool = False  # below it, a score falls by the IoU with the best of the better ones
    mask_scores: bool = False  # a score is times the mean probability of the mask's pixels
    photo_outlines: bool = False  # masks, whose cells are of patches, get the outlines of the photo
    linear_probes: bool = False  # classes are told by a frozen transformer's tokens: see `LinearProbe`
    detections_per_image: int = 100
    class_agnostic: bool = False  # one detection a box, of its likeliest class, scored as an object of any
    class_agnostic_masks: bool = False  # a box has one mask, whatever its class
    semantic_weight: float = 0.5  # of the semantic loss
    combine_overlap: float = 0.5  # these three: see `CombineSettings`
    combine_stuff_area: int = 4096
    combine_confidence: float = 0.5

    def proposals(self, strides: Sequence[int], choose: Choose) -> RPN:
        return RPN(
            self.channels,
            strides=strides,
            sizes=self.anchor_sizes,
            ratios=self.anchor_ratios,
            label_ious=self.rpn_ious,
            sampled=self.rpn_sampled,
            positive_fraction=self.rpn_positive,
            pre_nms=self.rpn_pre_nms,
            post_nms=self.rpn_post_nms,
            nms_threshold=self.rpn_nms,
            choose=choose,
        )

    @property
    def finest(self) -> int:
        """Level of the pyramid's finest map. ValueError: it has none of that stride."""
        levels = {4: 2, 8: 3} if self.backbone == "vit" else {4: 2}
        if self.finest_stride not in levels:
            raise ValueError(f"finest_stride must be one of {[*levels]} for {self.backbone}, got {self.finest_stride}")
        return levels[self.finest_stride]

    def heads(self, num_things: int, choose: Choose, frozen: FrozenPatches | None) -> CascadeRoIHeads:
        return CascadeRoIHeads(
            self.channels,
            num_things,
            dim=self.box_dim,
            mask_channels=self.mask_channels,
            label_ious=self.roi_ious,
            sampled=self.roi_sampled,
            positive_fraction=self.roi_positive,
            droploss_threshold=self.droploss_threshold,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            detections_per_image=self.detections_per_image,
            class_agnostic=self.class_agnostic,
            class_agnostic_masks=self.class_agnostic_masks,
            soft_nms=self.soft_nms,
            finest=self.finest,
            choose=choose,
            tokens=(frozen.dim, frozen.stride) if self.linear_probes and frozen is not None else None,
        )

    def stuff(self, num_stuff: int, frozen: FrozenPatches | None) -> SemanticHead:
        return SemanticHead(
            self.channels,
            num_stuff + 1,
            channels=self.semantic_channels,
            finest=self.finest,
            tokens=frozen.dim if self.linear_probes and frozen is not None and num_stuff else None,
        )

    def pyramid(self, frozen: FrozenPatches | None) -> FPN | SimplePyramid:
        """ValueError: a transformer is missing, or there is one beside a ResNet."""
        if (self.backbone == "vit") != (frozen is not None):
            raise ValueError(f"backbone {self.backbone!r} needs {'a' if frozen is None else 'no'} frozen transformer")
        if frozen is None:
            return FPN(ResNet(depths=self.depths, width=self.width), channels=self.channels)
        return SimplePyramid(frozen.dim, stride=frozen.stride, channels=self.channels, finest=self.finest)


class PanopticCascadeRCNN(nn.Module):
    """Images -> losses (`forward`) or instances, stuff and their panoptic map (`predict`).

    Args:
        num_things: K, clusters of instances. num_stuff: S, stuff classes; the semantic head has S + 1 channels.
        choose: how the samples of the losses are drawn.
        frozen: the transformer in front, on the device of the model, if the setting `backbone` is `vit`.
        settings: the fields of `NetworkSettings`; TypeError for another name.
    """

    def __init__(
        self,
        num_things: int,
        num_stuff: int,
        *,
        choose: Choose = random_choice,
        frozen: Backbone | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_things < 1 or not 0 <= num_stuff <= MOST_STUFF:
            raise ValueError(f"need num_things >= 1 and num_stuff in 0..{MOST_STUFF}, got {num_things}, {num_stuff}")
        chosen = NetworkSettings(**settings)
        self.num_things, self.num_stuff, self.semantic_weight = num_things, num_stuff, chosen.semantic_weight
        self.mask_scores = chosen.mask_scores
        for of_vit in ("photo_outlines", "linear_probes"):
            if getattr(chosen, of_vit) and frozen is None:
                raise ValueError(f"{of_vit} needs the tokens of a vit: leave it out with another backbone")
        self.photo_outlines = chosen.photo_outlines
        self.combine = CombineSettings(chosen.combine_overlap, chosen.combine_stuff_area, chosen.combine_confidence)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)
        self.frozen = None if frozen is None else FrozenPatches(frozen, stride=chosen.patch_stride)
        self.backbone = chosen.pyramid(self.frozen)
        self.proposal_generator = chosen.proposals(self.backbone.strides, choose)
        self.roi_heads = chosen.heads(num_things, choose, self.frozen)
        self.sem_seg_head = chosen.stuff(num_stuff, self.frozen)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        *,
        generators: Generators = None,
        ranks: Ranks = ALONE,
        tokens: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The ten terms of the loss, weights included: scalars to be added, named as in detectron2.

        All parameters take part in every batch: a term without instances, or whose pixels are all ignored, is 0 and
        has a gradient of 0. Works in evaluation mode too, and then has fixed statistics.

        Args:
            images: (3, h, w) RGB in 0..255 of each image, uint8 or float, of any sizes.
            targets: of the same sizes, on any device.
            generators: of the random choice of each image's anchors and proposals; None draws from torch's global one.
            ranks: the processes that share the batch, with equally many images each. The mean of their losses, and of
                their gradients, is that of one process with all images, after `share_statistics`.
            tokens: what `frozen` gives of each image, where that is known.

        Raises:
            ValueError: a target is not of its image's size, or has a class that the model does not have.
        """
        sizes = image_sizes(images)
        check_targets(targets, sizes, num_things=self.num_things, num_stuff=self.num_stuff)
        targets = [target.to(self.pixel_mean.device) for target in targets]
        features, told = self._features_and_tokens(images, SMALLEST_TRAINED, ranks, tokens)
        proposals, losses = self.proposal_generator(features, sizes, targets, generators)
        logits = self.sem_seg_head(features, told)
        maps = pad_semantic(targets, [self.sem_seg_head.stride * side for side in logits.shape[2:]])
        losses["loss_sem_seg"] = self.semantic_weight * semantic_loss(logits, maps, ranks)
        boxes = [image.boxes for image in proposals]
        pooled_from = for_boxes(features)
        return losses | self.roi_heads.losses(pooled_from, sizes, boxes, targets, generators, ranks, tokens=told)

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[Tensor],
        *,
        output_sizes: Sequence[tuple[int, int]] | None = None,
        tokens: Sequence[Tensor] | None = None,
    ) -> list[Prediction]:
        """What the model sees in each image; combine it with `Prediction.panoptic`.

        Args:
            images: (3, h, w) RGB in 0..255 of each image, uint8 or float, of any sizes; resized by the caller.
            output_sizes: (height, width) of the results, such as those before resizing; None for the images' own.
            tokens: what `frozen` gives of each image, where that is known.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.training:
            raise RuntimeError("predict needs the statistics of training, not of a batch: call model.eval() first")
        sizes = image_sizes(images)
        images = [image.to(self.pixel_mean.device) for image in images]
        if tokens is None and self.frozen is not None:
            tokens = self.frozen(images)
        if tokens is not None:
            tokens = [seen.to(self.pixel_mean.device) for seen in tokens]
        features, told = self._features_and_tokens(images, DIVISOR, ALONE, tokens)
        logits = self.sem_seg_head(features, told)
        proposals, _ = self.proposal_generator(features, sizes)
        pooled_from = for_boxes(features)
        detections = self.roi_heads.detect(pooled_from, sizes, [image.boxes for image in proposals], tokens=told)
        masks = self._mask_probs(pooled_from, detections)
        outputs = sizes if output_sizes is None else output_sizes
        return [
            self._finish(*image, None if tokens is None else tokens[place])
            for place, image in enumerate(zip(detections, masks, logits, images, outputs, strict=True))
        ]

    def features(self, images: Sequence[Tensor], *, ranks: Ranks = ALONE) -> list[Tensor]:
        """The maps of the pyramid, finest first, of the images, all padded to one frame; arguments as in `forward`."""
        return self._features_and_tokens(images, SMALLEST_TRAINED if self.training else DIVISOR, ranks, None)[0]

    def _features_and_tokens(
        self, images: Sequence[Tensor], smallest: int, ranks: Ranks, tokens: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The maps of the pyramid in a frame of at least `smallest` pixels a side, and the transformer's map of tokens
        (N, D, h, w), if there is one."""
        if self.frozen is None:
            return self.backbone(self.prepare(images, smallest=smallest, ranks=ranks)), None
        maps = self.frozen([image.to(self.pixel_mean.device) for image in images]) if tokens is None else tokens
        height, width = self._frame(image_sizes(images), smallest, ranks)
        stacked = stack_maps(maps, (height // self.frozen.stride, width // self.frozen.stride))
        return self.backbone(stacked), stacked

    def _frame(self, sizes: Sequence[tuple[int, int]], smallest: int, ranks: Ranks) -> list[int]:
        """Height and width of what holds all images that `ranks` share: what is padded enters statistics too."""
        largest = [max(smallest, *sides) for sides in zip(*map(padded_size, sizes), strict=True)]
        return ranks.largest(torch.tensor(largest, device=self.pixel_mean.device)).tolist()

    def prepare(self, images: Sequence[Tensor], *, smallest: int = DIVISOR, ranks: Ranks = ALONE) -> Tensor:
        """(N, 3, h, w) float32: normalised, then padded with 0 right and below to the largest, rounded up to 32."""
        sizes = image_sizes(images)
        height, width = self._frame(sizes, smallest, ranks)
        batch = self.pixel_mean.new_zeros(len(images), 3, height, width)
        # Convolutions are faster on maps with channels last. But a CPU then adds up batch statistics one by one in
        # float32, so far from exactly that the losses of a training step move in their second digit.
        if batch.is_cuda or not (self.training or torch.is_grad_enabled()):
            batch = batch.contiguous(memory_format=torch.channels_last)
        for place, image, (h, w) in zip(batch, images, sizes, strict=True):
            place[:, :h, :w] = (image.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        return batch

    def _mask_probs(self, features: Sequence[Tensor], detections: Sequence[Detections]) -> list[Tensor]:
        boxes, classes = [image.boxes for image in detections], [image.classes for image in detections]
        return list(self.roi_heads.mask_logits(features, boxes, classes).sigmoid().split([len(b) for b in boxes]))

    def _finish(
        self,
        found: Detections,
        mask_probs: Tensor,
        logits: Tensor,
        image: Tensor,
        output: tuple[int, int],
        tokens: Tensor | None,
    ) -> Prediction:
        """Bring the results of one image to its output size."""
        if self.mask_scores:
            scores, order = (found.scores * mask_certainty(mask_probs)).sort(descending=True, stable=True)
            found = Detections(*(values[order] for values in found))._replace(scores=scores)
            mask_probs = mask_probs[order]
        size = (image.shape[1], image.shape[2])
        boxes = clip_boxes(scale_boxes(found.boxes, size, output), output)
        kept = is_usable(boxes)
        if self.frozen is not None and tokens is not None and self.photo_outlines:
            seen = found.boxes[kept], image, tokens
            masks = outlined_masks(mask_probs[kept], *seen, stride=self.frozen.stride, output=output)
        else:
            masks = paste_masks(mask_probs[kept], boxes[kept], output)
        return Prediction(
            boxes[kept],
            found.scores[kept],
            found.classes[kept],
            masks,
            semantic_argmax(logits, size, output, stride=self.sem_seg_head.stride),
            self.num_things,
            self.combine,
        )


def image_sizes(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each image. ValueError: there is none, or one is not (3, h, w) with pixels."""
    if not images:
        raise ValueError("a batch needs at least one image")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"images[{i}] must be (3, h, w), got {tuple(image.shape)}")
    return [(image.shape[1], image.shape[2]) for image in images]


def for_boxes(features: Sequence[Tensor]) -> list[Tensor]:
    """The maps that boxes are pooled from, in the precision and layout that pooling would otherwise copy each time."""
    return [level.float().contiguous() for level in features[:-1]]


def pad_semantic(targets: Sequence[Target], size: Sequence[int]) -> Tensor:
    """(N, height, width) uint8 semantic maps, 255 right of and below each image."""
    height, width = size
    return torch.stack(
        [
            F.pad(t.semantic.byte(), (0, width - t.semantic.shape[1], 0, height - t.semantic.shape[0]), value=IGNORED)
            for t in targets
        ]
    )
