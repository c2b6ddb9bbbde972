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


class TokenSums:
    """Means of tokens inside boxes, from sums over all tokens above and left of each corner of a patch.

    tokens: (N, D, h, w) map, a token for every `stride` pixels of a side.
    """

    def __init__(self, tokens: Tensor, *, stride: int) -> None:
        rows = tokens.permute(0, 2, 3, 1).float()
        self._sums = F.pad(rows.cumsum(1).cumsum(2), (0, 0, 1, 0, 1, 0))  # (N, h + 1, w + 1, D)
        self._stride = stride

    def means(self, boxes: Sequence[Tensor]) -> Tensor:
        """(boxes of all images, D) float32 of (n, 4) float32 boxes x0, y0, x1, y1 in pixels of each image; a token on a
        side counts in part.

        What a box has outside the map is left out, one narrower than a patch is widened to it, and a coordinate that is
        not finite counts as 0.
        """
        return torch.cat([self._means(*image) for image in zip(self._sums, boxes, strict=True)])

    def _means(self, sums: Tensor, boxes: Tensor) -> Tensor:
        finite = boxes.nan_to_num(0, 0, 0) / self._stride
        x0, x1 = _ends(finite[:, 0], finite[:, 2], sums.shape[1] - 1)
        y0, y1 = _ends(finite[:, 1], finite[:, 3], sums.shape[0] - 1)
        inside = _at(sums, y1, x1) - _at(sums, y0, x1) - _at(sums, y1, x0) + _at(sums, y0, x0)
        return inside / ((y1 - y0) * (x1 - x0))[:, None]


def _ends(start: Tensor, end: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Along a side, in patches: at least one apart, inside the map."""
    middle, half = (start + end) / 2, ((end - start) / 2).clamp(min=0.5)
    first = (middle - half).clamp(0, patches - 1)
    return first, torch.maximum((middle + half).clamp(max=patches), first + 1)


def _at(sums: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(n, D) values of a (h + 1, w + 1, D) map at fractional rows and columns, bilinear."""
    top, left = y.long().clamp(max=sums.shape[0] - 2), x.long().clamp(max=sums.shape[1] - 2)
    down, right = (y - top)[:, None], (x - left)[:, None]
    upper = torch.lerp(sums[top, left], sums[top, left + 1], right)
    return torch.lerp(upper, torch.lerp(sums[top + 1, left], sums[top + 1, left + 1], right), down)
