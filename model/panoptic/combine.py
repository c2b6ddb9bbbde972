"""One panoptic map from detected instances and a semantic map (arXiv 1801.00868, section 6; 1901.02446, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

VOID_ID = 0


@dataclass(frozen=True, slots=True)
class CombineSettings:
    """`overlap`: an instance of which a larger fraction is taken is dropped; `stuff_area`: least pixels of a stuff
    segment; `confidence`: least score of an instance."""

    overlap: float = 0.5
    stuff_area: int = 4096
    confidence: float = 0.5


@dataclass(frozen=True, slots=True)
class PanopticSegment:
    """`category` is 1..K for things and K+1..K+S for stuff, `area` the pixels in the id map, `score` None for stuff."""

    id: int
    category: int
    is_thing: bool
    score: float | None
    area: int


class PanopticMap(NamedTuple):
    """`ids` (H, W) int32, 0 = void, and the segments, whose ids are 1, 2, ... in their order."""

    ids: Tensor
    segments: list[PanopticSegment]


def combine_panoptic(
    masks: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    *,
    num_things: int,
    settings: CombineSettings = CombineSettings(),
) -> PanopticMap:
    """Place instances by descending score where nothing lies yet, then stuff classes in ascending order.

    Args:
        masks: (n, H, W) bool; scores: (n,) float; classes: (n,) int64 in 0..num_things-1.
        semantic: (H, W) uint8, 0 = things, which makes no segment, c = stuff of category num_things + c.
    """
    ids = torch.zeros(semantic.shape, dtype=torch.int32, device=semantic.device)
    segments = _place_things(ids, masks, scores, classes, settings)
    segments += _place_stuff(ids, semantic, len(segments) + 1, num_things, settings)
    return PanopticMap(ids, segments)


def _place_things(
    ids: Tensor, masks: Tensor, scores: Tensor, classes: Tensor, settings: CombineSettings
) -> list[PanopticSegment]:
    """Write the instances into `ids`, in place."""
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= settings.confidence]
    areas = masks[order].flatten(1).sum(1).tolist()
    segments: list[PanopticSegment] = []
    for i, score, label, area in zip(
        order.tolist(), scores[order].tolist(), classes[order].tolist(), areas, strict=True
    ):
        free = masks[i] & (ids == VOID_ID)
        visible = int(free.sum())
        if area == 0 or area - visible > settings.overlap * area:
            continue
        segments.append(PanopticSegment(len(segments) + 1, label + 1, True, score, visible))
        ids[free] = len(segments)
    return segments


def _place_stuff(
    ids: Tensor, semantic: Tensor, first_id: int, num_things: int, settings: CombineSettings
) -> list[PanopticSegment]:
    """Write the stuff into what is free in `ids`, in place."""
    free = ids == VOID_ID
    areas: Sequence[int] = torch.bincount(semantic[free].long(), minlength=1).tolist()
    kept = [c for c, area in enumerate(areas) if c > 0 and area >= max(settings.stuff_area, 1)]
    segments = [PanopticSegment(first_id + i, num_things + c, False, None, areas[c]) for i, c in enumerate(kept)]
    id_of_class = torch.zeros(max(len(areas), 1), dtype=torch.int32)
    id_of_class[kept] = torch.tensor([s.id for s in segments], dtype=torch.int32)
    ids[free] = id_of_class.to(ids.device)[semantic[free].long()]
    return segments
