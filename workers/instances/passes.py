"""Photos of one batch through a backbone: those of a shape share a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from model.backbone import Backbone
from workers.embeddings import to_images
from workers.images import LoadedImage
from workers.phases import Phases


class Pass(NamedTuple):
    """Photos of one resized shape: `pixels` (h, w, 3) uint8 each, their patch grid, and outputs of the backbone."""

    images: list[LoadedImage]
    pixels: list[np.ndarray]
    grid: tuple[int, int]
    outputs: dict[str, Tensor]


def forward_passes(
    backbone: Backbone,
    images: Sequence[LoadedImage],
    resize: Callable[[np.ndarray], np.ndarray],
    wanted: Sequence[str],
    device: str,
    phases: Phases,
) -> Iterator[Pass]:
    """Readable photos, in order, in runs of the same resized shape."""
    with phases("resize"):
        resized = [resize(image.pixels) for image in images if image.pixels is not None]
    patch = backbone.patch_size
    for (height, width), run in groupby(zip(images, resized, strict=True), key=lambda pair: pair[1].shape[:2]):
        same = list(run)
        pixels = [small for _, small in same]
        with phases("backbone"):
            outputs = backbone.features(to_images(np.stack(pixels), device), wanted)
        yield Pass([image for image, _ in same], pixels, (height // patch, width // patch), outputs)
