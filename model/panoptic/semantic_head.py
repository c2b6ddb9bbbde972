"""The semantic branch of Panoptic FPN (arXiv 1901.02446, figure 3): one map from p2 .. p5, and its loss.

Parameter names are those of detectron2: `p2.0.*`, ..., `p5.4.*`, `predictor.*`. Class 0 is "things".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.panoptic.conv import ConvNorm
from model.panoptic.probes import LinearProbe
from model.panoptic.targets import IGNORED
from model.ranks import ALONE, Ranks

GROUPS = 32
COARSEST = 5  # level, of stride 32


class SemanticHead(nn.Module):
    """Maps from level `finest` to p5 (N, C, h, w) -> (N, classes, h', w') logits at the stride of the finest, 4 for p2.

    Every level is brought to that stride by convolutions, each but the finest's followed by bilinear doubling. With
    `tokens`, the channels of those of a transformer, `predictor` tells things from stuff alone, and a linear probe of
    the tokens tells which stuff: the logits are those of the two's product.
    """

    def __init__(
        self,
        channels_in: int,
        num_classes: int,
        *,
        channels: int = 128,
        finest: int = 2,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.stride = range(finest, COARSEST + 1), 2**finest
        for level in self.levels:
            layers: list[nn.Module] = []
            for i in range(max(1, level - finest)):
                norm = nn.GroupNorm(GROUPS, channels)
                layers.append(ConvNorm(channels if i else channels_in, channels, 3, norm=norm, relu=True))
                if level > finest:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.add_module(f"p{level}", nn.Sequential(*layers))
        self.predictor = nn.Conv2d(channels, num_classes if tokens is None else 2, 1)
        nn.init.kaiming_normal_(self.predictor.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, self.predictor.bias))
        self.probe = None if tokens is None else LinearProbe(tokens, num_classes - 1)

    def forward(self, features: Sequence[Tensor], tokens: Tensor | None = None) -> Tensor:
        total: Tensor | None = None
        for level, level_map in zip(self.levels, features, strict=False):
            x = self.get_submodule(f"p{level}")(level_map)
            total = x if total is None else total + x
        assert total is not None
        logits = self.predictor(total)
        if self.probe is None:
            return logits
        if tokens is None:
            raise ValueError("a probe needs the tokens of the frozen transformer")
        stuff = self.probe(tokens.movedim(1, 3)).movedim(3, 1).float()
        stuff = F.interpolate(stuff, logits.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([logits[:, :1], logits[:, 1:] + stuff.log_softmax(1)], dim=1)


def semantic_loss(logits: Tensor, targets: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean cross-entropy, in float32, over the pixels that are not ignored; 0 when all are, where detectron2 has NaN.

    Args:
        logits: (N, classes, h, w) at a stride of s pixels, upsampled bilinearly here.
        targets: (N, s h, s w) uint8 or int64 classes, 255 = ignored.
        ranks: the processes that share the batch; the mean over them is that over all pixels.
    """
    full = F.interpolate(logits.float(), targets.shape[1:], mode="bilinear", align_corners=False)
    targets = targets.long()
    total = F.cross_entropy(full, targets, ignore_index=IGNORED, reduction="sum")
    return total / ranks.share((targets != IGNORED).sum(), total)


@torch.no_grad()
def semantic_argmax(
    logits: Tensor,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    stride: int = 4,
    max_values: int = 2**24,
) -> Tensor:
    """(H, W) uint8: the best class, the lowest of equals, of logits resized to `output_size` (bilinear).

    Classes are resized a few at a time, so that at most about `max_values` floats (or one class) exist at once.

    Args:
        logits: (classes, h, w) of one padded image, a value for every `stride` pixels of a side.
        image_size: its (height, width) before padding.
    """
    step = max(1, max_values // max(output_size[0] * output_size[1], logits[0].numel() * stride**2))
    best, label = None, None
    for start in range(0, len(logits), step):
        value, index = resize_logits(logits[start : start + step], image_size, output_size, stride=stride).max(0)
        index = (index + start).to(torch.uint8)
        if best is None or label is None:
            best, label = value, index
        else:
            label = torch.where(value > best, index, label)
            best = torch.maximum(value, best)
    assert label is not None
    return label


def resize_logits(
    logits: Tensor, image_size: tuple[int, int], output_size: tuple[int, int], *, stride: int = 4
) -> Tensor:
    """(classes, h, w) logits of a padded image at `stride` -> (classes, H, W) float32, of the image without padding."""
    height, width = image_size
    full = F.interpolate(logits[None].float(), scale_factor=stride, mode="bilinear", align_corners=False)
    full = full[..., :height, :width]
    if output_size != image_size:
        full = F.interpolate(full, size=output_size, mode="bilinear", align_corners=False)
    return full[0]
