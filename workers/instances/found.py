"""What a generator finds in one photo: masks with boxes, scores and embeddings, and how they nest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from workers.images import LoadedImage
from workers.masks import Box, encode_rle, mask_box
from workers.overlap import Job
from workers.phases import Phases


@dataclass(slots=True)
class Found:
    """Parallel lists, one entry a mask, at the original size. `parent`: number of the smallest mask that holds this
    one, -1 where none does; `level`: how many do, one in the other; both are empty for masks that are disjoint by
    construction."""

    rle: list[str] = field(default_factory=list)
    bbox: list[Box] = field(default_factory=list)
    area: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    embedding: list[np.ndarray] = field(default_factory=list)  # (D,) float16, unit norm before rounding
    level: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)

    def columns(self, nested: bool) -> dict[str, list[Any]]:
        """The list columns of the photo's row."""
        shared = {name: getattr(self, name) for name in ("rle", "bbox", "area", "score", "embedding")}
        return shared | ({"level": self.level, "parent": self.parent} if nested else {})


class MaskGenerator(Protocol):
    """Finds the masks of readable photos. `nested`: they have levels and parents."""

    nested: bool
    dim: int  # of an embedding

    def find(self, images: Sequence[LoadedImage], phases: Phases) -> Job[list[Found]]:
        """A job that returns one entry a photo, in order."""
        ...


def encode_masks(masks: Iterable[np.ndarray]) -> tuple[list[str], list[Box], list[int]]:
    """(h, w) bool masks, one after the other -> `rle`, `bbox` and `area`."""
    encoded = [(encode_rle(mask), mask_box(mask), int(mask.sum())) for mask in masks]
    return [rle for rle, _, _ in encoded], [box for _, box, _ in encoded], [area for _, _, area in encoded]
