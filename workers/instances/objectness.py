"""How much a mask of patches looks like an object: unlike what is around it and what lies along the photo's border, and
not cut off by that border. These are three factors of the score of merge trees, for MaskCut (docs/masks.md).

Shapes: N = h * w patches, C channels, M masks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

RING = 2  # patches around a mask that it is compared with
CUT_OFF = 4  # how fast the score falls with the share of the outline that is the photo's border
HALF = 0.3  # product of the factors at which the score is 0.5, as of a usual mask of MaskCut in a photo


@torch.inference_mode()
def objectness(features_NC: Tensor, masks_mhw: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(N, C) patch features, (M, h, w) bool -> (M,) float32 in [0, 1); 0 for an empty mask and for the whole photo."""
    rows_NC = F.normalize(features_NC.float(), dim=1)
    masks_MHW = torch.from_numpy(masks_mhw).to(rows_NC.device).float()
    ring_MHW = F.max_pool2d(masks_MHW[:, None], 2 * RING + 1, stride=1, padding=RING)[:, 0] - masks_MHW
    border_HW = torch.ones_like(masks_MHW[:1])
    border_HW[:, 1:-1, 1:-1] = 0
    inside, around, along = (maps.flatten(1) @ rows_NC for maps in (masks_MHW, ring_MHW, border_HW))
    contrast_M = (1 - F.cosine_similarity(inside, around)) * ring_MHW.any(2).any(1)
    unlike_M = 1 - F.cosine_similarity(inside, along)
    outline_M = sum(masks_MHW.diff(dim=dim).abs().sum((1, 2)) for dim in (1, 2))
    cut_off_M = (masks_MHW * border_HW).sum((1, 2))
    product_M = contrast_M * unlike_M * torch.exp(-CUT_OFF * cut_off_M / (cut_off_M + outline_M).clamp_min(1))
    product_M = product_M.clamp_min(0) * masks_MHW.any(2).any(1)
    scores: NDArray[np.float32] = (product_M / (product_M + HALF)).cpu().numpy()
    return scores
