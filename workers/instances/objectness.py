"""How much a mask of patches looks like an object: unlike what is around it and what lies along the photo's border, and
not cut off by that border. These are three factors of the score of merge trees, for MaskCut (docs/masks.md).

Shapes: B photos, N = h * w patches, C channels, M masks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RING = 2  # patches around a mask that it is compared with
CUT_OFF = 4  # how fast the score falls with the share of the outline that is the photo's border
HALF = 0.3  # product of the factors at which the score is 0.5, as of a usual mask of MaskCut in a photo


@torch.inference_mode()
def objectness(features_BNC: Tensor, masks_BMhw: Tensor) -> Tensor:
    """(B, N, C) patch features, (B, M, h, w) bool -> (B, M) float32 in [0, 1); 0 for an empty mask and for the whole
    photo."""
    rows_BNC = F.normalize(features_BNC.float(), dim=2)
    masks_BMHW = masks_BMhw.float()
    held_BMHW = F.max_pool2d(masks_BMHW.flatten(0, 1)[:, None], 2 * RING + 1, stride=1, padding=RING)
    ring_BMHW = held_BMHW.view_as(masks_BMHW) - masks_BMHW
    border_HW = masks_BMHW.new_ones(masks_BMHW.shape[2:])
    border_HW[1:-1, 1:-1] = 0
    inside, around = (maps.flatten(2) @ rows_BNC for maps in (masks_BMHW, ring_BMHW))
    along_B1C = border_HW.flatten()[None] @ rows_BNC
    contrast_BM = (1 - F.cosine_similarity(inside, around, dim=2)) * ring_BMHW.flatten(2).any(2)
    unlike_BM = 1 - F.cosine_similarity(inside, along_B1C, dim=2)
    outline_BM = sum(masks_BMHW.diff(dim=dim).abs().sum((2, 3)) for dim in (2, 3))
    cut_off_BM = (masks_BMHW * border_HW).sum((2, 3))
    product_BM = contrast_BM * unlike_BM * torch.exp(-CUT_OFF * cut_off_BM / (cut_off_BM + outline_BM).clamp_min(1))
    product_BM = product_BM.clamp_min(0) * masks_BMHW.flatten(2).any(2)
    return product_BM / (product_BM + HALF)
