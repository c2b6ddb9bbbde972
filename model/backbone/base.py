"""What every feature extractor offers, and the statistics that ImageNet models are given their images with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(Protocol):
    """What every extractor offers. Images are (B, 3, H, W) RGB in [0, 1] with sides that are multiples of the patch."""

    patch_size: int
    dim: int

    def keys(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D) float32."""
        ...

    def cls(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        ...

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D) float32."""
        ...
