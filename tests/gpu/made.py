"""Made inputs of whatever size, for the tests of a GPU and `benchmarks/gpu.py`: no file, no download."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.panoptic.targets import Target
from workers import devices


@contextlib.contextmanager
def as_a_gpu(device: str) -> Iterator[None]:
    """All is done as on a GPU, also where the device is the CPU, so that this can be tried without one."""
    before = devices.many_threads
    devices.many_threads = lambda where: torch.device(device) == torch.device("cpu") or before(where)
    try:
        yield
    finally:
        devices.many_threads = before


def full_float32() -> contextlib.AbstractContextManager[None]:
    """Convolutions on a GPU do not round their inputs to 10 bits (TF32), which is their default."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def photos(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """(count, height, width, 3): waves of light over a few discs of one colour each, with grain."""
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[:height, :width] / max(height, width)
        waves = sum(np.sin(x * rng.uniform(2, 25) + y * rng.uniform(2, 25) + rng.uniform(0, 6)) for _ in range(5))
        photo = 110 + 15 * waves[..., None] + rng.normal(0, 4, (height, width, 3))
        for mask in discs(number, height, width):
            photo[mask] = photo[mask] * 0.2 + rng.integers(20, 235, 3)
        made.append(np.clip(photo, 0, 255).astype(np.uint8))
    return np.stack(made)


def discs(number: int, height: int, width: int, patch: int = 1) -> NDArray[np.bool_]:
    """(2, height, width) the discs of a photo, in steps of a patch."""
    rng = np.random.default_rng([number, 1])
    y, x = (np.mgrid[:height, :width] // patch * patch + patch // 2) / min(height, width)
    centres = rng.uniform(0.25, 0.75, (2, 2)) * (height, width) / min(height, width)
    radii = rng.uniform(0.12, 0.25, 2)
    return np.stack([(y - cy) ** 2 + (x - cx) ** 2 < r * r for (cy, cx), r in zip(centres, radii, strict=True)])


def colour_features(photos_BHW3: NDArray[np.uint8], patch: int) -> Tensor:
    """(B, h*w, 6) features of patches: colours about the photo's mean, and how rough they are."""
    pixels = torch.from_numpy(photos_BHW3).permute(0, 3, 1, 2).float()
    means = F.avg_pool2d(pixels, patch)
    rough = F.avg_pool2d((pixels - F.interpolate(means, scale_factor=patch)).abs(), patch)
    return torch.cat([means - means.mean((2, 3), keepdim=True), rough / 4], 1).flatten(2).mT.contiguous()


def class_probs(photos_BHW3: NDArray[np.uint8], classes: int, patch: int, device: str = "cpu") -> Tensor:
    """(B, C, H, W) float32 probabilities of classes that are colours, of patches, made smooth."""
    pixels = torch.from_numpy(photos_BHW3).to(device).permute(0, 3, 1, 2).float()
    colours = F.avg_pool2d(pixels, patch)
    centres = torch.rand(classes, 3, generator=torch.Generator().manual_seed(0)).to(device) * 160 + 48
    logits = -(colours[:, None] - centres[None, :, :, None, None]).pow(2).sum(2) / 2500
    return F.interpolate(logits, size=pixels.shape[2:], mode="bilinear", align_corners=False).softmax(1)


def target(number: int, height: int, width: int, things: int, stuff: int) -> Target:
    """The discs as things, over bands of stuff."""
    masks = torch.from_numpy(discs(number, height, width))
    spans = [[mask.any(axis).nonzero().flatten() for axis in (0, 1)] for mask in masks]
    boxes = [[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in spans]
    bands = (torch.arange(height)[:, None] * stuff // height + 1).expand(height, width)
    semantic = torch.where(masks.any(0), 0, bands).to(torch.uint8)
    classes = torch.arange(len(masks)) % things
    return Target(torch.tensor(boxes, dtype=torch.float32), classes, masks, semantic)
