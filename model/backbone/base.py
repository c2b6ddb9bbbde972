"""What every feature extractor offers, and the statistics that ImageNet models are given their images with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(Protocol):
    """What every extractor offers. Images are (B, 3, H, W) RGB in [0, 1] with sides that are multiples of the patch.

    `keys`, `cls`, `tokens` and `blocks` each run a forward pass; who needs several of them asks `features` once.
    """

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

    def blocks(self, images: Tensor, numbers: Sequence[int], *, norm: bool) -> list[Tensor]:
        """(B, 3, H, W) -> the patch tokens (B, h*w, D) float32 after each of these blocks, in one forward pass.

        Blocks are counted from 0, or from the end with negative numbers; `norm` passes their outputs through the final
        norm. ValueError for a block that there is not.
        """
        ...

    def features(self, images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the wanted outputs by their names, all float32, in one forward pass.

        Names as in `model.backbone.outputs`: keys, cls, tokens, block:<n>, block:<n>:norm. What comes after the last
        wanted one is not computed. ValueError for any other name, or a block that there is not.
        """
        ...
