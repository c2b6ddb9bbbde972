"""The pixels of several photos as one list: what treats each pixel alike need not know of photos.

Shapes: P pixels of all photos, row by row, one photo after the other; C channels; B photos of one size, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from workers import devices

LATTICE = 150  # values a pixel that building its lattices needs beside the maps
MAPS = 8  # of the channels that are held at a time
MOST_VALUES = 2**29  # that are held at a time on a device, 2 GiB of float32


@dataclass(frozen=True, slots=True)
class Photos:
    """Colours of all pixels, (P, 3) uint8, and the photos' sizes (height, width)."""

    colours_P3: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def counts(self) -> list[int]:
        """Pixels of each photo."""
        return [height * width for height, width in self.sizes]

    def features(self) -> Tensor:
        """(5, P) float32: x, y, and the three colours."""
        features_5P = torch.empty(5, len(self.colours_P3), device=self.colours_P3.device)
        maps = zip(self.maps(features_5P[0]), self.maps(features_5P[1]), strict=True)
        for x_BHW, y_BHW in maps:
            x_BHW[:] = torch.arange(x_BHW.shape[2], device=x_BHW.device)
            y_BHW[:] = torch.arange(y_BHW.shape[1], device=y_BHW.device)[:, None]
        features_5P[2:] = self.colours_P3.t()
        return features_5P

    def maps(self, values: Tensor) -> Iterator[Tensor]:
        """(P, ...) -> (B, H, W, ...) views, one for each run of photos of the same size."""
        for (start, end), (photos, height, width) in self._runs():
            yield values[start:end].view(photos, height, width, *values.shape[1:])

    def of_each(self, values: Tensor) -> list[Tensor]:
        """(P, ...) -> (H, W, ...) views, one for each photo."""
        parts = values.split(self.counts)
        return [part.view(*size, *part.shape[1:]) for part, size in zip(parts, self.sizes, strict=True)]

    def _runs(self) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
        start = 0
        for (height, width), same in groupby(self.sizes):
            photos = len(list(same))
            end = start + photos * height * width
            yield (start, end), (photos, height, width)
            start = end


def stack_photos(images: Sequence[Tensor], device: torch.device | str) -> Photos:
    """(h, w, 3) uint8 photos, all on one device."""
    colours_P3 = torch.cat([image.reshape(-1, 3) for image in images]).to(device)
    return Photos(colours_P3, tuple((image.shape[0], image.shape[1]) for image in images))


def batches(sizes: Sequence[tuple[int, int]], channels: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """Numbers of the photos that are worked on together, those of one size beside each other.

    As many as `MOST_VALUES` admits, and one at least; one at a time on a CPU, whose caches a photo fills.
    """
    most = MOST_VALUES if devices.many_threads(device) else 0
    found: list[list[int]] = []
    held = most
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        height, width = sizes[number]
        values = height * width * (LATTICE + MAPS * channels[number])
        if held + values > most:
            found.append([])
            held = 0
        found[-1].append(number)
        held += values
    return found
