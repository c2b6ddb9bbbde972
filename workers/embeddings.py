"""One embedding per instance: the CLS token of its crop, background filled in (U2Seg, arXiv 2312.17243, section 3.1).

The published crops were never released; ours are the tight box of the mask, everything outside the mask set to the
ImageNet mean colour (zero after normalisation), padded to a square so that no aspect is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from model.backbone import IMAGENET_MEAN, Backbone
from workers.masks import mask_box

FILL = tuple(round(255 * channel) for channel in IMAGENET_MEAN)


def masked_crop(image_hw3: np.ndarray, mask_hw: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 and a non-empty (H, W) bool mask -> (size, size, 3) uint8 crop of the instance alone."""
    x1, y1, x2, y2 = (int(edge) for edge in mask_box(mask_hw))
    height, width = y2 - y1, x2 - x1
    side = max(height, width)
    square = np.full((side, side, 3), FILL, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    inside = mask_hw[y1:y2, x1:x2]
    square[top : top + height, left : left + width][inside] = image_hw3[y1:y2, x1:x2][inside]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


@torch.inference_mode()
def embed_crops(backbone: Backbone, crops: Sequence[np.ndarray], *, batch_size: int, device: str) -> np.ndarray:
    """n crops (S, S, 3) uint8 -> (n, D) float32 with unit norm, `batch_size` crops a forward pass."""
    batches = [np.stack(crops[start : start + batch_size]) for start in range(0, len(crops), batch_size)]
    if not batches:
        return np.zeros((0, backbone.dim), np.float32)
    vectors = [F.normalize(backbone.cls(to_images(batch, device)), dim=-1) for batch in batches]
    found: np.ndarray = torch.cat(vectors).cpu().numpy()
    return found


def to_images(batch_bhw3: np.ndarray, device: str, *, pinned: bool = False) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1] on the device.

    `pinned`: by memory that a CUDA device reads by itself, so that the host need not wait for it. RuntimeError where
    there is no such device.
    """
    pixels = torch.from_numpy(batch_bhw3)
    there = pixels.pin_memory().to(device, non_blocking=True) if pinned else pixels.to(device)
    return there.permute(0, 3, 1, 2).float() / 255
