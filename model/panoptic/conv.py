"""A convolution that owns the norm behind it, so that its parameters are `x.weight` and `x.norm.*`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Conv2d):
    """Convolution without bias that keeps the size at stride 1, norm, and ReLU if asked for: (N, C, h, w)."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, *, norm: nn.Module, stride: int = 1, relu: bool = False
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = norm
        self.relu = relu
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and not norm.training and not torch.is_grad_enabled():
            x = self._folded(x, norm)
        else:
            x = norm(super().forward(x))
        return F.relu_(x) if self.relu else x

    def _folded(self, x: Tensor, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
        """With fixed statistics a batch norm is a factor and a shift: in the weights they cost no pass over the map."""
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * factor
        return F.conv2d(x, self.weight * factor[:, None, None, None], shift, self.stride, self.padding)
