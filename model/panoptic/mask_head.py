"""The mask branch (arXiv 1703.06870): a 28 x 28 mask a box and class, its targets, its loss, and pasting.

Parameter names are those of detectron2: `mask_fcn1.*` .. `mask_fcn4.*`, `deconv.*`, `predictor.*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from model.ranks import ALONE, Ranks

MASK_SIZE = 28
POOL_SIZE = 14
CONVS = 4


class MaskHead(nn.Module):
    """Pooled features (n, C, 14, 14) and classes (n,) int64 -> (n, 28, 28) logits, float32, of each box's own class."""

    def __init__(self, channels_in: int, num_classes: int, *, channels: int = 256) -> None:
        super().__init__()
        for i in range(CONVS):
            self.add_module(f"mask_fcn{i + 1}", nn.Conv2d(channels if i else channels_in, channels, 3, padding=1))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for layer in self.children():
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, pooled: Tensor, classes: Tensor) -> Tensor:
        x = pooled.contiguous(memory_format=torch.channels_last)
        for i in range(CONVS):
            x = F.relu_(self.get_submodule(f"mask_fcn{i + 1}")(x))
        x = F.relu_(self.deconv(x))
        # The other classes' channels enter neither the loss nor a result, so only one of K is computed.
        weight, bias = self.predictor.weight.flatten(1)[classes], cast(Tensor, self.predictor.bias)[classes]
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        logits = torch.bmm(pixels, weight[..., None]).unflatten(1, x.shape[2:]).squeeze(-1)
        return logits.float() + bias[:, None, None]


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    """(n, 28, 28) bool: what lies in each of n boxes of the true mask that `index` names.

    Args:
        masks: (m, h, w) bool; boxes: (n, 4) float32; index: (n,) int64 in 0..m-1.
    """
    if len(boxes) == 0:
        return torch.zeros(0, MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=boxes.device)
    used, position = index.unique(return_inverse=True)
    rois = torch.cat([position[:, None].to(boxes.dtype), boxes], dim=1)
    cropped = roi_align(masks[used][:, None].float(), rois, MASK_SIZE, sampling_ratio=0, aligned=True)
    return cropped.squeeze(1) >= 0.5


def mask_loss(logits: Tensor, targets: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean binary cross-entropy of (n, 28, 28) logits and bool targets; 0, with a gradient of 0, when n is 0.

    Where `ranks` share the batch, the mean over processes is that over all their masks.
    """
    total = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
    return total / ranks.share(logits.numel(), logits)


def mask_certainty(probs: Tensor) -> Tensor:
    """(n,) mean of those of (n, s, s) probabilities that are at least 0.5, 0 where none is: "maskness" of SOLO (arXiv
    1912.04488), which says how sure a mask is of its own pixels."""
    inside = probs >= 0.5
    return (probs * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


@torch.no_grad()
def paste_masks(probs: Tensor, boxes: Tensor, size: tuple[int, int], *, max_pixels: int = 2**25) -> Tensor:
    """(n, H, W) bool masks: the probability, bilinear between the centres of the mask's cells and 0 beyond, is >= 0.5.

    On a GPU as many masks as have `max_pixels` together are pasted at once; on a CPU one at a time, inside its box.

    Args:
        probs: (n, s, s) float in [0, 1]; boxes: (n, 4) in pixels of the (H, W) image, not empty, may leave it.
    """
    masks = torch.zeros(len(probs), *size, dtype=torch.bool, device=probs.device)
    for place, values in _pasted(probs, _windows(boxes, size, max_pixels), boxes):
        masks[place] = values >= 0.5
    return masks


@torch.no_grad()
def paste_probs(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, H, W) float32: the probabilities that `paste_masks` compares with 0.5, up to half a cell beyond the box."""
    maps = torch.zeros(len(probs), *size, device=probs.device)
    half = (boxes[:, 2:] - boxes[:, :2]) / (2 * probs.shape[2])
    reached = torch.cat([boxes[:, :2] - half, boxes[:, 2:] + half], 1)
    for place, values in _pasted(probs, _windows(reached, size, 2**25), boxes):
        maps[place] = values
    return maps


def _pasted(
    probs: Tensor, windows: Iterable[tuple[slice, range, range]], boxes: Tensor
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Places in (n, H, W) maps, and the probabilities there."""
    with torch.autocast(probs.device.type, enabled=False):
        for part, rows, columns in windows:
            across = _bilinear_weights(boxes[part, 0], boxes[part, 2], probs.shape[2], columns)
            down = _bilinear_weights(boxes[part, 1], boxes[part, 3], probs.shape[1], rows)
            values = down @ probs[part].float() @ across.transpose(1, 2)
            yield (part, slice(rows.start, rows.stop), slice(columns.start, columns.stop)), values


def _windows(boxes: Tensor, size: tuple[int, int], max_pixels: int) -> Iterator[tuple[slice, range, range]]:
    """Parts of the masks, and the rows and columns outside of which they are empty."""
    height, width = size
    if boxes.device.type != "cpu":
        step = max(1, max_pixels // (height * width))
        for start in range(0, len(boxes), step):
            yield slice(start, start + step), range(height), range(width)
        return
    # A sample beyond the box is at most half of the border cell's value, so below the threshold unless that is 1.
    low, high = (boxes[:, :2].floor() - 1).long().tolist(), (boxes[:, 2:].ceil() + 1).long().tolist()
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
        yield slice(i, i + 1), range(max(0, y0), max(0, min(height, y1))), range(max(0, x0), max(0, min(width, x1)))


def _bilinear_weights(low: Tensor, high: Tensor, cells: int, pixels: Sequence[int]) -> Tensor:
    """(n, len(pixels), cells): what every cell of a line from `low` to `high` contributes at a pixel's centre.

    Bilinear interpolation in two dimensions is the product of such weights, hats of one cell to either side.
    """
    centres = torch.arange(pixels[0], pixels[-1] + 1, device=low.device) + 0.5 if pixels else low.new_zeros(0)
    position = (centres - low[:, None]) / (high - low)[:, None] * cells - 0.5
    return (1 - (position[..., None] - torch.arange(cells, device=low.device)).abs()).clamp_(min=0)
