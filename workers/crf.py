"""Dense CRF of Krähenbühl and Koltun (NeurIPS 2011): fits a soft segmentation to the edges of its photo.

Mean field with two kernels, both permutohedral lattices: a Gaussian over position and a bilateral over position and
colour. They depend on the image alone, so one pair serves all masks of an image. Left out: learnt compatibilities
(the model is Potts) and anisotropic kernels.

Names end in their shape: C classes, H x W pixels, P = H*W, N masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from workers.permutohedral import Lattice, build_lattice


@dataclass(frozen=True, slots=True)
class CrfParams:
    """Settings of the dense CRF; the defaults are CutLER's. A kernel whose compat is 0 is left out.

    Raises ValueError, with the field and its value, for a negative count or weight or a deviation that is not positive.
    """

    iterations: int = 10
    gaussian_sxy: float = 3.0  # standard deviation, pixels
    gaussian_compat: float = 7.0  # weight of the kernel
    bilateral_sxy: float = 50.0  # standard deviation, pixels
    bilateral_srgb: float = 5.0  # standard deviation, grey levels (0-255)
    bilateral_compat: float = 10.0  # weight of the kernel
    fast: bool = False  # by `workers.fast_crf`, whose labels are not quite the same, where a caller heeds it

    def __post_init__(self) -> None:
        for name in ("iterations", "gaussian_compat", "bilateral_compat"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")


LogOdds = Callable[[Tensor, Tensor, CrfParams], Tensor]
CUTLER = CrfParams()
STEGO = CrfParams(gaussian_sxy=1.0, gaussian_compat=3.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0)


class ImageKernels:
    """The pairwise kernels of one image: both lattices, normalised and weighted."""

    def __init__(self, image_hw3: NDArray[np.uint8] | Tensor, params: CrfParams, *, device: torch.device | str) -> None:
        """`image_hw3`: (h, w, 3) uint8, any channel order. ValueError for another shape or dtype."""
        image_HW3 = _image(image_hw3)
        self.height, self.width = image_HW3.shape[:2]
        features_5P = image_features(image_HW3.to(device))
        self.lattices = []
        if params.gaussian_compat:
            deviations = [params.gaussian_sxy] * 2
            self.lattices.append(_kernel(features_5P[:2], deviations, params.gaussian_compat))
        if params.bilateral_compat:
            deviations = [params.bilateral_sxy] * 2 + [params.bilateral_srgb] * 3
            self.lattices.append(_kernel(features_5P, deviations, params.bilateral_compat))

    def messages(self, q_PC: Tensor) -> Tensor:
        """(P, C) float32 marginals -> (P, C) float32, what each label hears from itself: sum of w n K (n Q)."""
        total_PC = torch.zeros_like(q_PC)
        for lattice in self.lattices:
            total_PC += lattice.filter(q_PC)
        return total_PC


@torch.no_grad()
def dense_crf(
    image_hw3_uint8: NDArray[np.uint8] | Tensor, probs_chw: NDArray[np.floating] | Tensor, params: CrfParams
) -> Tensor:
    """Marginals of the dense CRF over C classes.

    `image_hw3_uint8`: (h, w, 3) uint8; `probs_chw`: (C, h, w) floating, probabilities in [0, 1], C at least 2.
    Returns (C, h, w) float32 on the device of `probs_chw`; the classes of a pixel sum to 1.
    Each iteration is Q = softmax(-U + sum over kernels of w n K (n Q)), all pixels at once, U = -log(clip(p, 1e-5, 1)),
    n = 1 / sqrt(K 1) (equation 4 and algorithm 1, Potts model). Raises ValueError for other shapes, dtypes or values.
    """
    image_HW3, probs_CHW = check_arguments(image_hw3_uint8, probs_chw)
    kernels = ImageKernels(image_HW3, params, device=probs_CHW.device)
    log_probs_PC = probs_CHW.float().clamp(1e-5, 1).log().flatten(1).t().contiguous()
    q_PC = log_probs_PC.softmax(1)
    for _ in range(params.iterations):
        q_PC = (log_probs_PC + kernels.messages(q_PC)).softmax(1)
    return q_PC.t().reshape(probs_CHW.shape)


@torch.no_grad()
def refine_masks(
    image_hw3_uint8: NDArray[np.uint8] | Tensor,
    masks_nhw: NDArray[np.bool_] | Tensor,
    params: CrfParams,
    *,
    device: torch.device | str,
    log_odds: LogOdds | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Each mask of one image after the CRF, its holes filled, and how much of the coarse mask that kept.

    `image_hw3_uint8`: (h, w, 3) uint8; `masks_nhw`: (n, h, w) bool, n may be 0. Each mask is refined alone. `log_odds`:
    what stands in for `exact_log_odds`.
    Returns (n, h, w) bool and (n,) float32, the IoU of refined and coarse mask in [0, 1], 0 where both are empty.
    MaskCut (arXiv 2301.11320, section 3.2) keeps a mask only if that IoU is 0.5 or more: the caller drops the others.
    Raises ValueError for other shapes or dtypes.
    """
    masks_NHW = _tensor(masks_nhw)
    if masks_NHW.ndim != 3 or masks_NHW.dtype != torch.bool:
        raise ValueError(f"masks must be (n, h, w) bool, not {tuple(masks_NHW.shape)} {masks_NHW.dtype}")
    _check_size("masks", masks_NHW, image_hw3_uint8)
    if not len(masks_NHW):
        return np.zeros(masks_NHW.shape, bool), np.zeros(0, np.float32)
    log_odds_NHW = (log_odds or exact_log_odds)(_image(image_hw3_uint8).to(device), masks_NHW.to(device), params)
    refined_NHW = np.stack([fill_holes(mask) for mask in (log_odds_NHW > 0).cpu().numpy()])
    return refined_NHW, _iou(refined_NHW, masks_NHW.cpu().numpy())


def fill_holes(mask_hw: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(h, w) bool -> (h, w) bool with the background that does not reach the image border (4-connected) filled."""
    rows, columns = (np.flatnonzero(mask_hw.any(axis)) for axis in (1, 0))
    if not len(rows):
        return mask_hw.copy()
    filled_hw = mask_hw.copy()  # around the mask all is background, up to the border
    inside = filled_hw[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside |= _without_way_out(~inside)
    return filled_hw


def _without_way_out(free_hw: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a 4-connected component of an area lies that does not reach the border."""
    components, count = ndimage.label(free_hw)
    reaches_border = np.zeros(count + 1, bool)
    for edge in (components[0], components[-1], components[:, 0], components[:, -1]):
        reaches_border[edge] = True
    reaches_border[0] = True  # which is what is not free
    return ~reaches_border[components]


def exact_log_odds(image_HW3: Tensor, masks_NHW: Tensor, params: CrfParams) -> Tensor:
    """(h, w, 3) uint8, (n, h, w) bool on one device -> (n, h, w) float32, log of foreground over background marginal.

    The unary is the softmax of (1 - m, m), log odds of 1 or -1. Of two labels only the difference matters, and messages
    are linear: one channel q1 - q0 = tanh(log odds / 2) a mask, and n masks are n channels of one filter.
    """
    kernels = ImageKernels(image_HW3, params, device=image_HW3.device)
    unary_PN = masks_NHW.flatten(1).t().float().mul(2).sub(1).contiguous()
    log_odds_PN = unary_PN
    for _ in range(params.iterations):
        log_odds_PN = unary_PN + kernels.messages(torch.tanh(log_odds_PN / 2))
    return log_odds_PN.t().reshape(masks_NHW.shape)


def check_arguments(
    image_hw3_uint8: NDArray[np.uint8] | Tensor, probs_chw: NDArray[np.floating] | Tensor
) -> tuple[Tensor, Tensor]:
    """Image and probabilities of `dense_crf` as tensors. ValueError as there."""
    probs_CHW = _tensor(probs_chw)
    if probs_CHW.ndim != 3 or len(probs_CHW) < 2 or not probs_CHW.is_floating_point() or not probs_CHW.numel():
        raise ValueError(
            f"probs must be (C, h, w) floating with C >= 2 and not empty, "
            f"not {tuple(probs_CHW.shape)} {probs_CHW.dtype}"
        )
    _check_size("probs", probs_CHW, image_hw3_uint8)
    low, high = (value.item() for value in torch.aminmax(probs_CHW))
    if not (low >= 0 and high <= 1.001):
        raise ValueError(f"probs must lie in [0, 1], not [{low:g}, {high:g}]: apply a softmax to logits first")
    return _image(image_hw3_uint8), probs_CHW


def image_features(image_HW3: Tensor) -> Tensor:
    """(h, w, 3) uint8 -> (5, h*w) float32: x, y, and the three colours."""
    height, width = image_HW3.shape[:2]
    features_5HW = torch.empty(5, height, width, device=image_HW3.device)
    features_5HW[0] = torch.arange(width, device=image_HW3.device)
    features_5HW[1] = torch.arange(height, device=image_HW3.device)[:, None]
    features_5HW[2:] = image_HW3.permute(2, 0, 1)
    return features_5HW.flatten(1)


def _kernel(features_dP: Tensor, deviations: list[float], compat: float) -> Lattice:
    # A tensor divides exactly; a Python number becomes a product with its reciprocal on CUDA.
    return build_lattice(features_dP / features_dP.new_tensor(deviations)[:, None]).normalised(compat)


def _tensor(array: NDArray[np.generic] | Tensor) -> Tensor:
    # The copy admits what torch cannot share: arrays that are read-only (Pillow's) or reversed (RGB seen as BGR).
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array, order="C"))


def _image(image_hw3: NDArray[np.uint8] | Tensor) -> Tensor:
    image_HW3 = _tensor(image_hw3)
    if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != torch.uint8 or not image_HW3.numel():
        raise ValueError(
            f"the image must be (h, w, 3) uint8 and not empty, not {tuple(image_HW3.shape)} {image_HW3.dtype}"
        )
    return image_HW3


def _check_size(name: str, maps: Tensor, image: NDArray[np.uint8] | Tensor) -> None:
    if tuple(maps.shape[1:]) != tuple(image.shape[:2]):
        raise ValueError(f"{name} are {tuple(maps.shape[1:])}, but the image is {tuple(image.shape[:2])}")


def _iou(first_NHW: NDArray[np.bool_], second_NHW: NDArray[np.bool_]) -> NDArray[np.float32]:
    intersection = np.logical_and(first_NHW, second_NHW).sum((1, 2))
    union = np.logical_or(first_NHW, second_NHW).sum((1, 2))
    return (intersection / np.maximum(union, 1)).astype(np.float32)
