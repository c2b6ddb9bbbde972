"""Where stuff methods take their patch features from: a backbone's tokens, or its features conditioned.

Shapes: B images, N = h * w patches, C channels of the backbone, d conditioned.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone import Backbone
from workers.conditioning import Conditioning


class Teacher(Protocol):
    """What gives tokens. Every `Backbone` does."""

    patch_size: int
    dim: int

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1], sides multiples of the patch -> (B, N, dim) float32."""
        ...


class ConditionedTeacher:
    """A backbone whose tokens are conditioned patch features: of unit norm, and zeros for a patch like the mean."""

    def __init__(self, backbone: Backbone, output: str, conditioning: Conditioning, *, device: str) -> None:
        """`output`: as `Backbone.features` names it. ValueError: a conditioning of another backbone."""
        channels, self.dim = conditioning.directions.shape
        if channels != backbone.dim:
            raise ValueError(
                f"the conditioning was fitted to {channels} channels, the backbone gives {backbone.dim}: fit it again"
            )
        self.patch_size = backbone.patch_size
        self._backbone, self._output = backbone, output
        self._mean = torch.from_numpy(conditioning.mean).to(device)
        self._directions = torch.from_numpy(conditioning.directions).to(device)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, d)."""
        rows_BNC = self._backbone.features(images, (self._output,))[self._output]
        return F.normalize((rows_BNC - self._mean) @ self._directions, dim=-1)
