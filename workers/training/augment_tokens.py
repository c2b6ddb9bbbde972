"""Augmentation of a photo whose frozen tokens are known: these are mirrored, or cut to a part that is enlarged.

The tokens of a mirrored or enlarged photo are not quite the mirrored or enlarged tokens; but these cost nothing, and
the transformer as much as several steps. Pure functions of a sample, its tokens and a generator, from which every call
of `augment_tokens` draws six numbers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from workers.merge import VOID_LABEL
from workers.training.augment import flip, nearest
from workers.training.samples import Sample, mask_boxes

PART = (0.5, 1.0)  # sides of the part that is cut out, as a share of the photo's
FILLED = (0.7, 1.0)  # of the photo's sides that the enlarged part has
LEAST_PATCHES = 4  # a side, of a part
LEAST_PIXELS = 16  # of an instance in the part


def augment_tokens(
    sample: Sample,
    tokens: Tensor,
    rng: np.random.Generator,
    *,
    stride: int,
    flip_probability: float = 0.5,
    crop_probability: float = 0.0,
) -> tuple[Sample, Tensor]:
    """A sample and the (D, h', w') tokens of its padded frame, of patches of `stride` pixels, both augmented alike."""
    mirrored, cropped, *chance = rng.random(6)
    if mirrored < flip_probability:
        sample, tokens = flip(_padded(sample, tokens.shape[2] * stride)), tokens.flip(2)
    if cropped < crop_probability:
        sample, tokens = _crop(sample, tokens, chance, stride)
    return sample, tokens


def _padded(sample: Sample, width: int) -> Sample:
    """The sample of that width, with nothing and void on the right."""
    wider = ((0, 0), (0, width - sample.size[1]))
    return replace(
        sample,
        image=np.pad(sample.image, (*wider, (0, 0))),
        masks=np.pad(sample.masks, ((0, 0), *wider)),
        semantic=np.pad(sample.semantic, wider, constant_values=VOID_LABEL),
    )


def _crop(sample: Sample, tokens: Tensor, chance: list[float], stride: int) -> tuple[Sample, Tensor]:
    """A part of whole patches, at about the old size; the sample itself where a side has too few of them."""
    grid = [side // stride for side in sample.size]
    if min(grid) < LEAST_PATCHES:
        return sample, tokens
    share, filled = (low + (high - low) * c for (low, high), c in zip((PART, FILLED), chance, strict=False))
    part = [max(LEAST_PATCHES, int(side * share)) for side in grid]
    top, left = (int(c * (side - n + 1)) for side, n, c in zip(grid, part, chance[2:], strict=True))
    new = [min(side, max(LEAST_PATCHES, round(n * filled / share))) for side, n in zip(grid, part, strict=True)]
    rows, columns = (
        start * stride + nearest(n * stride, size * stride)
        for start, n, size in zip((top, left), part, new, strict=True)
    )
    masks = sample.masks.take(rows, axis=1).take(columns, axis=2)
    kept = masks.sum(axis=(1, 2)) >= LEAST_PIXELS
    cut = tokens[None, :, top : top + part[0], left : left + part[1]].float()
    enlarged = F.interpolate(cut, new, mode="bilinear")[0].to(tokens.dtype)
    return Sample(
        image_id=sample.image_id,
        image=sample.image.take(rows, axis=0).take(columns, axis=1),
        boxes=mask_boxes(masks[kept]),
        classes=sample.classes[kept],
        masks=masks[kept],
        semantic=sample.semantic.take(rows, axis=0).take(columns, axis=1),
        scores=None if sample.scores is None else sample.scores[kept],
    ), enlarged
