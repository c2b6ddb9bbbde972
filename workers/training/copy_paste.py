"""Copy-paste of instances between the images of a batch (CutLER, arXiv 2301.11320, section 3.3 and its train_loop.py).

Three faults of the published program are not repeated: the source of an image is never the image itself (a random cycle
through the batch instead of its reverse), a pasted mask without a pixel is dropped, and boxes always come from the
masks. What is pasted is "things" in the semantic map.

The semantic-aware variant is U2Seg's idea (arXiv 2312.17243, not released): an image gets crops of its own clusters,
from a bank of earlier images. Every crop then has its own ratio and place.

Shapes: (h, w) pixels of a target, n its instances, q instances to paste.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from model.panoptic.targets import THINGS
from workers.masks import BoolArray
from workers.training.samples import Sample, mask_boxes

TOUCHED = 1e-4  # share of a pixel from which a resized mask has it; published as "not 0", which rounding decides


@dataclass(frozen=True, slots=True)
class CopyPaste:
    """How instances are pasted; CutLER's self-training has the ratio (0.5, 1). ValueError outside the ranges."""

    rate: float = 1.0  # probability that an image receives anything
    ratio: tuple[float, float] = (0.3, 1.0)  # range of the pasted size, as a share of the target's sides
    max_cover: float = 0.5  # an instance that would hide this share of an existing one is not pasted
    semantic_aware: float = 0.5  # probability of crops from the bank, where a bank is given

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0 < low <= high <= 1:
            raise ValueError(f"copy_paste.ratio: need 0 < low <= high <= 1, got {self.ratio}")
        if not 0 < self.max_cover <= 1:
            raise ValueError(f"copy_paste.max_cover must be in (0, 1], got {self.max_cover}")
        for name in ("rate", "semantic_aware"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"copy_paste.{name} must be in [0, 1], got {getattr(self, name)}")


class Crop(NamedTuple):
    """One instance cut out by its box: `image` (a, b, 3) uint8, `mask` (a, b) bool, and the (h, w) it was cut from."""

    image_id: str
    label: int
    image: NDArray[np.uint8]
    mask: BoolArray
    source_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.mask.nbytes


def crops_of(sample: Sample) -> list[Crop]:
    """Copies of its instances."""
    crops = []
    boxes = mask_boxes(sample.masks).astype(int).tolist()
    for (x0, y0, x1, y1), label, mask in zip(boxes, sample.classes.tolist(), sample.masks, strict=True):
        image, cut = sample.image[y0:y1, x0:x1].copy(), np.array(mask[y0:y1, x0:x1])
        crops.append(Crop(sample.image_id, label, image, cut, sample.size))
    return crops


class InstanceBank:
    """The latest crops of every class: at most `per_class` of each and `max_bytes` in all; the oldest go first."""

    def __init__(self, *, per_class: int = 64, max_bytes: int = 1 << 28) -> None:
        if per_class < 1 or max_bytes < 1:
            raise ValueError(f"a bank needs room: per_class {per_class}, max_bytes {max_bytes}")
        self._per_class = per_class
        self._max_bytes = max_bytes
        self._crops: dict[int, Crop] = {}  # by serial number, oldest first
        self._serials: dict[int, deque[int]] = {}  # by class, oldest first
        self._next = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._crops)

    def of_class(self, label: int, *, other_than: str) -> list[Crop]:
        """The crops of a class, oldest first, without those of the image `other_than`."""
        crops = (self._crops[serial] for serial in self._serials.get(label, ()))
        return [crop for crop in crops if crop.image_id != other_than]

    def add(self, crops: Iterable[Crop]) -> None:
        """As the latest ones, in their order."""
        for crop in crops:
            self._insert(crop)

    def _insert(self, crop: Crop) -> None:
        if crop.nbytes > self._max_bytes:
            return
        serials = self._serials.setdefault(crop.label, deque())
        if len(serials) == self._per_class:
            self._drop(serials[0])
        serials.append(self._next)
        self._crops[self._next] = crop
        self._next += 1
        self.nbytes += crop.nbytes
        while self.nbytes > self._max_bytes:
            self._drop(next(iter(self._crops)))

    def _drop(self, serial: int) -> None:
        crop = self._crops.pop(serial)
        self._serials[crop.label].popleft()
        self.nbytes -= crop.nbytes


def copy_paste(
    samples: Sequence[Sample], rng: np.random.Generator, params: CopyPaste, bank: InstanceBank | None = None
) -> list[Sample]:
    """The batch with instances pasted into each image; sources are the images as they came.

    With a `bank`, an image is filled from it with probability `params.semantic_aware` if it has crops of the image's
    classes, else from the next image of a random cycle through the batch. A batch of one has no other image and only
    the bank to draw from. Neither the given samples nor the bank are changed.
    """
    cycle = rng.permutation(len(samples))
    source_of = dict(zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True))
    pasted = []
    for index, target in enumerate(samples):
        source = samples[source_of[index]] if source_of[index] != index else None
        pasted.append(_filled(target, source, bank, rng, params) if rng.random() < params.rate else target)
    return pasted


def paste(
    target: Sample, image: NDArray[np.uint8], masks: BoolArray, labels: Sequence[int], *, max_cover: float = 0.5
) -> Sample:
    """`target` with the instances `masks` (q, h, w) bool of `image` (h, w, 3) uint8 pasted over it, edges hard.

    A mask that is empty, or covers at least `max_cover` of an instance of the target, is left out; if none is left the
    target itself comes back. What is hidden of the target's instances is taken from their masks, those without a pixel
    are dropped, and all boxes are made anew.
    """
    kept = np.flatnonzero(masks.any(axis=(1, 2)) & (_largest_cover(masks, target.masks) < max_cover))
    if kept.size == 0:
        return target
    alpha: BoolArray = np.logical_or.reduce(masks[kept])
    existing = target.masks & ~alpha
    visible = existing.any(axis=(1, 2))
    all_masks = np.concatenate([existing[visible], masks[kept]])
    pasted = np.ones(len(kept), np.float32)  # they were worth pasting
    return replace(
        target,
        scores=None if target.scores is None else np.concatenate([target.scores[visible], pasted]),
        image=np.where(alpha[..., None], image, target.image),
        boxes=mask_boxes(all_masks),
        classes=np.concatenate([target.classes[visible], np.asarray(labels, np.int64)[kept]]),
        masks=all_masks,
        semantic=np.where(alpha, np.uint8(THINGS), target.semantic),
    )


def _filled(
    target: Sample, source: Sample | None, bank: InstanceBank | None, rng: np.random.Generator, params: CopyPaste
) -> Sample:
    if bank is not None and rng.random() < params.semantic_aware:
        crops = _same_class_crops(target, bank, rng)
        if crops:
            return _paste_crops(target, crops, rng, params)
    return target if source is None else _paste_from(target, source, rng, params)


def _paste_from(target: Sample, source: Sample, rng: np.random.Generator, params: CopyPaste) -> Sample:
    """Some instances of `source`, its image stretched to a share of the target, one share and place for all."""
    if len(source.classes) == 0:
        return target
    chosen = rng.choice(len(source.classes), size=_how_many(len(source.classes), rng), replace=False)
    size = _scaled(target.size, rng.uniform(*params.ratio))
    top, left = _place(target.size, size, rng)
    image, masks = _on_canvas(source.image, source.masks[chosen], size, (top, left), target.size)
    return paste(target, image, masks, source.classes[chosen].tolist(), max_cover=params.max_cover)


def _paste_crops(target: Sample, crops: Sequence[Crop], rng: np.random.Generator, params: CopyPaste) -> Sample:
    """One crop after the other, a later one over an earlier; each as large as if its image were pasted by a share."""
    for crop in crops:
        share = _scaled(target.size, rng.uniform(*params.ratio))
        sides = zip(crop.mask.shape, share, crop.source_size, strict=True)
        height, width = (max(1, side * new // old) for side, new, old in sides)
        corner = _place(target.size, (height, width), rng)
        image, mask = _on_canvas(crop.image, crop.mask[None], (height, width), corner, target.size)
        target = paste(target, image, mask, [crop.label], max_cover=params.max_cover)
    return target


def _same_class_crops(target: Sample, bank: InstanceBank, rng: np.random.Generator) -> list[Crop]:
    """As many crops as an image like the target would give, of the classes of randomly drawn target instances."""
    if len(target.classes) == 0:
        return []
    labels = rng.choice(target.classes, size=_how_many(len(target.classes), rng))
    candidates = [bank.of_class(int(label), other_than=target.image_id) for label in labels]
    return [crops[int(rng.integers(len(crops)))] for crops in candidates if crops]


def _how_many(count: int, rng: np.random.Generator) -> int:
    """At least one, and of several instances never all (CutLER's upper bound is exclusive)."""
    return 1 if count == 1 else int(rng.integers(1, count))


def _scaled(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return max(1, int(ratio * size[0])), max(1, int(ratio * size[1]))


def _place(outer: tuple[int, int], inner: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(outer[0] - inner[0] + 1)), int(rng.integers(outer[1] - inner[1] + 1))


def _on_canvas(
    image: NDArray[np.uint8], masks: BoolArray, size: tuple[int, int], corner: tuple[int, int], canvas: tuple[int, int]
) -> tuple[NDArray[np.uint8], BoolArray]:
    """Image and masks resized to `size`, with their top left pixel at `corner` of an empty canvas.

    Bilinear without antialiasing, as published; a mask keeps every pixel that it touches.
    """
    planes = np.concatenate([image.transpose(2, 0, 1), masks.astype(np.uint8)])
    resized = F.interpolate(torch.from_numpy(planes)[None].float(), size, mode="bilinear", align_corners=False)[0]
    window = (slice(corner[0], corner[0] + size[0]), slice(corner[1], corner[1] + size[1]))
    full_image, full_masks = np.zeros((*canvas, 3), np.uint8), np.zeros((len(masks), *canvas), bool)
    full_image[window] = resized[:3].round().byte().permute(1, 2, 0).numpy()
    full_masks[:, *window] = (resized[3:] > TOUCHED).numpy()
    return full_image, full_masks


def _largest_cover(masks: BoolArray, existing: BoolArray) -> NDArray[np.float64]:
    """(q,) largest share that each mask covers of an existing mask; 0 where there is none."""
    if len(existing) == 0:
        return np.zeros(len(masks))
    areas = existing.sum(axis=(1, 2))
    common = np.array([[np.count_nonzero(mask & other) for other in existing] for mask in masks])
    shares: NDArray[np.float64] = (common / np.maximum(areas, 1)).max(axis=1)
    return shares
