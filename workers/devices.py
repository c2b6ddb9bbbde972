"""What decides how the same thing is computed on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def many_threads(where: Tensor | torch.device | str) -> bool:
    """Whether a device, or that of a tensor, does thousands of things at a time: few large steps in an order that is
    fixed beforehand are then cheaper than little work that the host steers, which would wait for the device."""
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    return device.type != "cpu"
