"""Linear probes: classes told straight from the tokens of a frozen transformer, beside what heads learn of a pyramid.

Classes of DINO's features lie apart by planes, so that a probe knows them after a few hundred photos (the linear
evaluation of arXiv 2304.07193), where convolutions still learn what to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProbe(nn.Linear):
    """(..., dim) tokens, brought to mean 0 and variance 1 -> (..., classes) logits: 0 before it has learnt."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(F.layer_norm(tokens, tokens.shape[-1:]))


def mean_tokens(tokens: Tensor, boxes: Sequence[Tensor], *, stride: int) -> Tensor:
    """(boxes of all images, D) float32 means of the tokens inside boxes, those on a side in parts.

    What a box has outside the map is left out, and one narrower than a patch is widened to it.

    Args:
        tokens: (N, D, h, w) map, a token for every `stride` pixels of a side.
        boxes: (n, 4) float32 x0, y0, x1, y1 in pixels of each of the N images.
    """
    return torch.cat([_means(*image, stride) for image in zip(tokens.float(), boxes, strict=True)])


def _means(tokens: Tensor, boxes: Tensor, stride: int) -> Tensor:
    """(n, D) of one image, from sums of all above and left of a corner."""
    sums = F.pad(tokens.cumsum(1).cumsum(2), (1, 0, 1, 0))
    x0, x1 = _ends(boxes[:, 0], boxes[:, 2], tokens.shape[2], stride)
    y0, y1 = _ends(boxes[:, 1], boxes[:, 3], tokens.shape[1], stride)
    inside = _at(sums, y1, x1) - _at(sums, y0, x1) - _at(sums, y1, x0) + _at(sums, y0, x0)
    return (inside / ((y1 - y0) * (x1 - x0))).T


def _ends(start: Tensor, end: Tensor, patches: int, stride: int) -> tuple[Tensor, Tensor]:
    """Along a side, in patches: at least one apart, inside the map."""
    middle, half = (start + end) / (2 * stride), ((end - start) / (2 * stride)).clamp(min=0.5)
    first = (middle - half).clamp(0, patches - 1)
    return first, torch.maximum((middle + half).clamp(max=patches), first + 1)


def _at(sums: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(D, n) values of a (D, h + 1, w + 1) map at fractional rows and columns, bilinear."""
    rows, columns = sums.shape[1] - 1, sums.shape[2] - 1
    top, left = y.long().clamp(max=rows - 1), x.long().clamp(max=columns - 1)
    down, right = y - top, x - left
    upper = sums[:, top, left] * (1 - right) + sums[:, top, left + 1] * right
    lower = sums[:, top + 1, left] * (1 - right) + sums[:, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down
