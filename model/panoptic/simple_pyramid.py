"""Simple feature pyramid (ViTDet, arXiv 2203.16527, section 3): maps p2 .. p6, or p3 .. p6, from the last map of a
transformer alone.

Its norms are over the channels of a pixel, so that a batch of one on a CPU learns like any other.
"""

from __future__ import annotations

import math

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from model.panoptic.conv import ConvNorm

COARSEST = 5  # level of stride 32; p6 is every second pixel of p5
PATCH_STRIDES = (8, 16)  # that the patches may have


class SimplePyramid(nn.Module):
    """(N, dim, h, w) tokens of patches at `stride` -> maps from level `finest`, 2 or 3, up to 6, finest first: each
    (N, channels, h * stride / s, w * stride / s) with s = 2 ** level.

    ValueError for a stride that is not one of PATCH_STRIDES.
    """

    def __init__(self, dim: int, *, stride: int, channels: int = 256, finest: int = 2) -> None:
        super().__init__()
        if stride not in PATCH_STRIDES:
            raise ValueError(f"patch_stride must be one of {PATCH_STRIDES}, got {stride}")
        self.levels = range(finest, COARSEST + 1)
        for level in self.levels:
            scale, width = _scale(dim, stride, 2**level)
            self.add_module(f"scale{level}", scale)
            lateral = ConvNorm(width, channels, 1, norm=LayerNorm2d(channels))
            output = ConvNorm(channels, channels, 3, norm=LayerNorm2d(channels))
            self.add_module(f"output{level}", nn.Sequential(lateral, output))
        self.strides = [2**level for level in range(finest, COARSEST + 2)]

    def forward(self, tokens: Tensor) -> list[Tensor]:
        maps = [self.get_submodule(f"output{i}")(self.get_submodule(f"scale{i}")(tokens)) for i in self.levels]
        return [*maps, maps[-1][:, :, ::2, ::2]]


def _scale(dim: int, stride: int, wanted: int) -> tuple[nn.Module, int]:
    """What brings a map of `dim` channels from one stride to another, and how many channels then are left."""
    if wanted >= stride:
        return nn.MaxPool2d(wanted // stride) if wanted > stride else nn.Identity(), dim
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(stride // wanted))):
        if layers:
            layers += [LayerNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2))
        dim //= 2
    return nn.Sequential(*layers), dim
