"""Photos of one batch through a backbone: those of a shape share a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from model.backbone import Backbone
from workers.decode import Pixels
from workers.embeddings import to_images
from workers.images import LoadedImage
from workers.overlap import Job
from workers.phases import Phases


class Pass(NamedTuple):
    """Photos of one resized shape: `pixels` (h, w, 3) uint8 each, their patch grid, and outputs of the backbone."""

    images: list[LoadedImage]
    pixels: list[Pixels]
    grid: tuple[int, int]
    outputs: dict[str, Tensor]


def resize_all(images: Sequence[LoadedImage], resize: Callable[[Pixels], Pixels], phases: Phases) -> Job[list[Pixels]]:
    """Readable photos as the backbone sees them, by the CPU."""
    return (yield [phases.named("resize", resize, image.pixels) for image in images])


def forward_passes(
    backbone: Backbone,
    images: Sequence[LoadedImage],
    resized: Sequence[Pixels],
    wanted: Sequence[str],
    device: str,
    phases: Phases,
) -> Iterator[Pass]:
    """Readable photos, in order, in runs of the same resized shape."""
    patch = backbone.patch_size
    for (height, width), run in groupby(zip(images, resized, strict=True), key=lambda pair: pair[1].shape[:2]):
        same = list(run)
        pixels = [small for _, small in same]
        with phases("backbone"):
            outputs = backbone.features(to_images(np.stack(pixels), device), wanted)
        yield Pass([image for image, _ in same], pixels, (height // patch, width // patch), outputs)
