"""ResNet (arXiv 1512.03385) with bottleneck blocks whose stride is in the 3x3 convolution; no layer is frozen.

Parameter names are those of detectron2: `stem.conv1.*`, `res2.0.conv1.*`, `res2.0.shortcut.*`, ...
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.panoptic.conv import ConvNorm

EXPANSION = 4  # channels out of a block, over those of its 3x3 convolution


class Stem(nn.Module):
    """(N, 3, h, w) -> (N, width, h / 4, w / 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width, 7, stride=2, norm=nn.BatchNorm2d(width), relu=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, channels_in: int, width: int, *, stride: int) -> None:
        super().__init__()
        out = EXPANSION * width
        self.shortcut = (
            ConvNorm(channels_in, out, 1, stride=stride, norm=nn.BatchNorm2d(out)) if channels_in != out else None
        )
        self.conv1 = ConvNorm(channels_in, width, 1, norm=nn.BatchNorm2d(width), relu=True)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, norm=nn.BatchNorm2d(width), relu=True)
        self.conv3 = ConvNorm(width, out, 1, norm=nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.conv2(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ResNet(nn.Module):
    """(N, 3, h, w) -> res2 .. res5 with 4, 8, 16 and 32 times `width` channels at strides 4, 8, 16 and 32.

    h and w are multiples of 32. `depths` are the blocks of each stage; (3, 4, 6, 3) is ResNet-50.
    """

    def __init__(self, *, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.stem = Stem(width)
        self.channels = [EXPANSION * width * 2**i for i in range(len(depths))]
        channels_in = width
        for i, (depth, channels) in enumerate(zip(depths, self.channels, strict=True)):
            blocks = [
                Bottleneck(
                    channels_in if block == 0 else channels,
                    channels // EXPANSION,
                    stride=2 if block == 0 and i > 0 else 1,
                )
                for block in range(depth)
            ]
            self.add_module(f"res{i + 2}", nn.Sequential(*blocks))
            channels_in = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for i in range(len(self.channels)):
            x = self.get_submodule(f"res{i + 2}")(x)
            maps.append(x)
        return maps
