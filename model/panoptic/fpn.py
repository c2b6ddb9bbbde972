"""Feature pyramid (arXiv 1612.03144) on a bottom-up network: maps p2 .. p6 of equal channels at strides 4 .. 64.

Parameter names are those of detectron2: `fpn_lateral2.*`, `fpn_output2.*`, ..., `bottom_up.*`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.panoptic.conv import ConvNorm
from model.panoptic.resnet import ResNet

FINEST = 2  # number of the finest level: its stride is 2 ** 2


class FPN(nn.Module):
    """(N, 3, h, w), sides multiples of 32 -> [p2, p3, p4, p5, p6], each (N, channels, h / stride, w / stride).

    Laterals and outputs are followed by a norm and by no activation; p6 is every second pixel of p5.
    """

    def __init__(self, bottom_up: ResNet, *, channels: int = 256) -> None:
        super().__init__()
        for level, channels_in in enumerate(bottom_up.channels, start=FINEST):
            lateral = ConvNorm(channels_in, channels, 1, norm=nn.BatchNorm2d(channels))
            output = ConvNorm(channels, channels, 3, norm=nn.BatchNorm2d(channels))
            for conv in (lateral, output):
                nn.init.kaiming_uniform_(conv.weight, a=1)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        self.bottom_up = bottom_up
        self.strides = [2**level for level in range(FINEST, FINEST + len(bottom_up.channels) + 1)]

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        coarser: Tensor | None = None
        for level, bottom_up in reversed(list(enumerate(self.bottom_up(images), start=FINEST))):
            merged = self.get_submodule(f"fpn_lateral{level}")(bottom_up)
            if coarser is not None:
                merged += F.interpolate(coarser, scale_factor=2, mode="nearest")
            outputs.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
            coarser = merged
        # A max pool of kernel 1 and stride 2 keeps every second pixel, and a slice does the same with its gradient.
        return [*outputs, outputs[-1][:, :, ::2, ::2]]
