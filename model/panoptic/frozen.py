"""A frozen transformer in front of the panoptic network: its patch tokens, laid out as a map over the frame.

The network's frame is the resized photo, padded to multiples of 32 pixels. The transformer sees it at another size, so
that one of its patches stands for `stride` pixels of the frame: any patch size fits a pyramid of strides 4 to 64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone.base import IMAGENET_MEAN, Backbone
from model.panoptic.resize import padded_size


class FrozenPatches:
    """Photos -> patch tokens. It is no module, so that no parameter of it is trained, averaged, shared or saved."""

    def __init__(self, backbone: Backbone, *, stride: int) -> None:
        self.dim, self.stride = backbone.dim, stride
        self._backbone = backbone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a copy of the network, such as that of averaged weights, shares what never changes."""
        return self

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """(3, h, w) RGB in 0..255 of each image -> (D, H / stride, W / stride) float32 tokens after the last norm.

        H and W are h and w rounded up to multiples of 32, the rest filled with ImageNet's mean colour. An image's
        tokens depend on no other image.
        """
        places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for place, image in enumerate(images):
            places[padded_size((image.shape[1], image.shape[2]))].append(place)
        found: dict[int, Tensor] = {}
        for size, alike in places.items():
            found.update(zip(alike, self._tokens([images[place] for place in alike], size), strict=True))
        return [found[place] for place in range(len(images))]

    def _tokens(self, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(N, D, rows, columns) of images that are padded to one size."""
        frames = images[0].new_zeros(len(images), 3, *size, dtype=torch.float32)
        frames += torch.tensor(IMAGENET_MEAN, device=frames.device)[:, None, None]
        for frame, image in zip(frames, images, strict=True):
            frame[:, : image.shape[1], : image.shape[2]] = image / 255
        rows, columns = (side // self.stride for side in size)
        patch = self._backbone.patch_size
        seen = F.interpolate(frames, (rows * patch, columns * patch), mode="bilinear", antialias=True)
        with torch.autocast(frames.device.type, enabled=False):  # of the step, on which cached tokens must not depend
            tokens = self._backbone.tokens(seen)
        return tokens.clone().mT.unflatten(2, (rows, columns))  # a clone takes part in a backward pass


def stack_maps(maps: Sequence[Tensor], least: tuple[int, int]) -> Tensor:
    """(D, h, w) maps of any sizes -> (N, D, h', w') float32, padded with 0 right and below to the largest, at least
    `least`."""
    rows, columns = (max(low, *(m.shape[side] for m in maps)) for side, low in zip((1, 2), least, strict=True))
    return torch.stack([F.pad(m.float(), (0, columns - m.shape[2], 0, rows - m.shape[1])) for m in maps])
