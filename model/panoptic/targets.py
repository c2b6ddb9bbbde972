"""What the panoptic model is trained on: the true instances and the semantic map of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

THINGS = 0  # the class of a semantic map that all instances share
IGNORED = 255  # in one: no class, enters no loss


@dataclass(frozen=True, slots=True)
class Target:
    """The truth of one image of height h and width w. ValueError: the shapes or dtypes do not fit each other.

    boxes: (n, 4) float32 x0, y0, x1, y1 in pixels; classes: (n,) int64 in 0..K-1; masks: (n, h, w) bool;
    semantic: (h, w) uint8 or int64, 0 = things, 1..S = stuff, 255 = ignored; scores: (n,) float32 in [0, 1], how surely
    each is an object, or None: all are.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor
    semantic: Tensor
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        n, (h, w) = len(self.classes), self.semantic.shape
        wanted = {
            "boxes": (self.boxes, (n, 4), (torch.float32,)),
            "classes": (self.classes, (n,), (torch.int64,)),
            "masks": (self.masks, (n, h, w), (torch.bool,)),
            "semantic": (self.semantic, (h, w), (torch.uint8, torch.int64)),
        }
        if self.scores is not None:
            wanted["scores"] = (self.scores, (n,), (torch.float32,))
        for name, (value, shape, dtypes) in wanted.items():
            if tuple(value.shape) != shape or value.dtype not in dtypes:
                raise ValueError(
                    f"Target.{name} must be {shape} {dtypes[0]} beside {n} classes and a semantic map of {(h, w)}, "
                    f"got {tuple(value.shape)} {value.dtype}"
                )

    def to(self, device: torch.device | str) -> Target:
        values = (self.boxes, self.classes, self.masks, self.semantic)
        boxes, classes, masks, semantic = (value.to(device, non_blocking=True) for value in values)
        scores = None if self.scores is None else self.scores.to(device, non_blocking=True)
        return Target(boxes, classes, masks, semantic, scores)


def check_targets(
    targets: Sequence[Target], image_sizes: Sequence[tuple[int, int]], *, num_things: int, num_stuff: int
) -> None:
    """ValueError, with the position in the batch, for a target that cannot belong to its image or to this model."""
    if len(targets) != len(image_sizes):
        raise ValueError(f"{len(image_sizes)} images, but {len(targets)} targets")
    for i, (target, size) in enumerate(zip(targets, image_sizes, strict=True)):
        if tuple(target.semantic.shape) != size:
            raise ValueError(f"targets[{i}] is {tuple(target.semantic.shape)} pixels, its image {size}")
    # One answer for the whole batch, because on a GPU every question waits for the device.
    flaws = torch.stack([_flaws(target, num_things, num_stuff) for target in targets]).tolist()
    names = (
        f"classes outside 0..{num_things - 1}",
        f"semantic ids outside 0..{num_stuff} and {IGNORED}",
        "empty boxes",
    )
    for i, image_flaws in enumerate(flaws):
        found = [name for name, flaw in zip(names, image_flaws, strict=True) if flaw]
        if found:
            raise ValueError(f"targets[{i}] has {' and '.join(found)}: drop them, or fit num_things and num_stuff")


def _flaws(target: Target, num_things: int, num_stuff: int) -> Tensor:
    """(3,) bool: a class, a semantic id, a box that must not be."""
    semantic = target.semantic
    return torch.stack(
        [
            ((target.classes < 0) | (target.classes >= num_things)).any(),
            ((semantic > num_stuff) & (semantic != IGNORED)).any() | (semantic < 0).any(),
            ~(target.boxes[:, 2:] > target.boxes[:, :2]).all(),
        ]
    )
