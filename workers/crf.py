"""Dense CRF of Krähenbühl and Koltun (NeurIPS 2011): fits a soft segmentation to the edges of its photo.

Mean field with two kernels, both permutohedral lattices: a Gaussian over position and a bilateral over position and
colour. They depend on the image alone, so one pair serves all masks of an image, and all photos of a batch, of whatever
sizes: pixels of two photos do not hear of each other. Left out: learnt compatibilities (the model is Potts) and
anisotropic kernels.

Names end in their shape: C classes, H x W pixels, N masks, P pixels of all photos that are worked on together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from workers.permutohedral import Lattice, build_lattice
from workers.photo_pixels import Photos, batches, stack_photos


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


Image = NDArray[np.uint8] | Tensor  # (h, w, 3) uint8, any channel order
Probs = NDArray[np.floating] | Tensor  # (C, h, w) floating
Masks = NDArray[np.bool_] | Tensor  # (n, h, w) bool
LogOdds = Callable[[Photos, Tensor, CrfParams], Tensor]
CUTLER = CrfParams()
STEGO = CrfParams(gaussian_sxy=1.0, gaussian_compat=3.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0)


class Kernels:
    """The pairwise kernels of some photos: both lattices, normalised and weighted."""

    def __init__(self, photos: Photos, params: CrfParams) -> None:
        features_5P = photos.features()
        self.lattices = []
        if params.gaussian_compat:
            deviations = [params.gaussian_sxy] * 2
            self.lattices.append(kernel(features_5P[:2], deviations, params.gaussian_compat, photos))
        if params.bilateral_compat:
            self.lattices.append(bilateral_kernel(features_5P, params, photos))

    def messages(self, q_PC: Tensor) -> Tensor:
        """(P, C) float32 marginals -> (P, C) float32, what each label hears from itself: sum of w n K (n Q)."""
        total_PC = torch.zeros_like(q_PC)
        for lattice in self.lattices:
            total_PC += lattice.filter(q_PC)
        return total_PC


def dense_crf(image_hw3_uint8: Image, probs_chw: Probs, params: CrfParams) -> Tensor:
    """Marginals of the dense CRF over C classes.

    `image_hw3_uint8`: (h, w, 3) uint8; `probs_chw`: (C, h, w) floating, probabilities in [0, 1], C at least 2.
    Returns (C, h, w) float32 on the device of `probs_chw`; the classes of a pixel sum to 1.
    Each iteration is Q = softmax(-U + sum over kernels of w n K (n Q)), all pixels at once, U = -log(clip(p, 1e-5, 1)),
    n = 1 / sqrt(K 1) (equation 4 and algorithm 1, Potts model). Raises ValueError for other shapes, dtypes or values.
    """
    return dense_crf_of([image_hw3_uint8], [probs_chw], params)[0]


@torch.no_grad()
def dense_crf_of(images: Sequence[Image], probs_of_each: Sequence[Probs], params: CrfParams) -> list[Tensor]:
    """`dense_crf` of several photos of any sizes, as many at a time as `batches` says; one number of classes, one
    device. The same marginals as of each alone."""
    return in_batches(images, probs_of_each, params, _marginals)


def in_batches(
    images: Sequence[Image],
    probs_of_each: Sequence[Probs],
    params: CrfParams,
    marginals: Callable[[Photos, Tensor, CrfParams], Tensor],
) -> list[Tensor]:
    """The (C, h, w) marginals of each photo, by a function of photos and (P, C) float32 probabilities.

    ValueError as of `dense_crf`, and for unlike numbers of classes.
    """
    pairs = [_check_shapes(image, probs) for image, probs in zip(images, probs_of_each, strict=True)]
    if len({len(probs) for _, probs in pairs}) > 1:
        raise ValueError(f"all photos need the same classes, not {sorted({len(probs) for _, probs in pairs})} of them")
    found: dict[int, Tensor] = {}
    sizes = [(image.shape[0], image.shape[1]) for image, _ in pairs]
    for numbers in batches(sizes, [len(probs) for _, probs in pairs], pairs[0][1].device if pairs else "cpu"):
        probs_PC = torch.cat([pairs[number][1].flatten(1).t() for number in numbers])
        _check_range(probs_PC)
        photos = stack_photos([pairs[number][0] for number in numbers], probs_PC.device)
        q_PC = marginals(photos, probs_PC.float(), params)
        found |= zip(numbers, (q_HWC.permute(2, 0, 1) for q_HWC in photos.of_each(q_PC)), strict=True)
    return [found[number] for number in range(len(pairs))]


def _marginals(photos: Photos, probs_PC: Tensor, params: CrfParams) -> Tensor:
    kernels = Kernels(photos, params)
    log_probs_PC = probs_PC.clamp(1e-5, 1).log_()
    q_PC = log_probs_PC.softmax(1)
    for _ in range(params.iterations):
        q_PC = (log_probs_PC + kernels.messages(q_PC)).softmax(1)
    return q_PC


def refine_masks(
    image_hw3_uint8: Image,
    masks_nhw: Masks,
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
    return refine_masks_of([image_hw3_uint8], [masks_nhw], params, device=device, log_odds=log_odds)[0]


def refine_masks_of(
    images: Sequence[Image],
    masks_of_each: Sequence[Masks],
    params: CrfParams,
    *,
    device: torch.device | str,
    log_odds: LogOdds | None = None,
) -> list[tuple[NDArray[np.bool_], NDArray[np.float32]]]:
    """`refine_masks` of several photos of any sizes, as many at a time as `batches` says.

    The same masks as of each alone: `foregrounds_of`, which is the device's share, and `finish_masks`, the CPU's.
    """
    found = foregrounds_of(images, masks_of_each, params, device=device, log_odds=log_odds)
    return [finish_masks(*pair) for pair in zip(found, masks_of_each, strict=True)]


@torch.no_grad()
def foregrounds_of(
    images: Sequence[Image],
    masks_of_each: Sequence[Masks],
    params: CrfParams,
    *,
    device: torch.device | str,
    log_odds: LogOdds | None = None,
) -> list[NDArray[np.bool_]]:
    """(n, h, w) bool of each photo: its masks after the CRF, holes and all, by one transfer each way for a batch.

    Arguments and errors as of `refine_masks_of`.
    """
    pairs = [_check_masks(image, masks) for image, masks in zip(images, masks_of_each, strict=True)]
    found = {number: np.zeros(masks.shape, bool) for number, (_, masks) in enumerate(pairs) if not len(masks)}
    some = [number for number in range(len(pairs)) if number not in found]
    sizes = [(pairs[number][0].shape[0], pairs[number][0].shape[1]) for number in some]
    for batch in batches(sizes, [len(pairs[number][1]) for number in some], device):
        numbers = [some[place] for place in batch]
        chosen = [pairs[number] for number in numbers]
        found |= zip(numbers, _foregrounds(chosen, params, device, log_odds or exact_log_odds), strict=True)
    return [found[number] for number in range(len(pairs))]


def _foregrounds(
    pairs: list[tuple[Tensor, Tensor]], params: CrfParams, device: torch.device | str, log_odds: LogOdds
) -> list[NDArray[np.bool_]]:
    photos = stack_photos([image for image, _ in pairs], device)
    most = max(len(masks) for _, masks in pairs)
    coarse_PN = torch.cat([F.pad(masks.flatten(1).t(), (0, most - len(masks))) for _, masks in pairs]).to(device)
    found_PN = (log_odds(photos, coarse_PN, params) > 0).cpu()
    each = zip(photos.of_each(found_PN), pairs, strict=True)
    return [found_HWN[..., : len(masks)].permute(2, 0, 1).contiguous().numpy() for found_HWN, (_, masks) in each]


def finish_masks(foreground_nhw: NDArray[np.bool_], masks_nhw: Masks) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """What the CRF made of an image's masks, and these: (n, h, w) bool -> what `refine_masks` returns."""
    filled_nhw = np.zeros_like(foreground_nhw)
    for filled_hw, mask_hw in zip(filled_nhw, foreground_nhw, strict=True):
        filled_hw[:] = fill_holes(mask_hw)
    return filled_nhw, _iou(filled_nhw, _tensor(masks_nhw).cpu().numpy())


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


def exact_log_odds(photos: Photos, masks_PN: Tensor, params: CrfParams) -> Tensor:
    """(P, N) bool, on the photos' device -> (P, N) float32, log of foreground over background marginal.

    The unary is the softmax of (1 - m, m), log odds of 1 or -1. Of two labels only the difference matters, and messages
    are linear: one channel q1 - q0 = tanh(log odds / 2) a mask, and n masks are n channels of one filter.
    """
    kernels = Kernels(photos, params)
    unary_PN = masks_PN.float().mul_(2).sub_(1)
    log_odds_PN = unary_PN
    for _ in range(params.iterations):
        log_odds_PN = unary_PN + kernels.messages(torch.tanh(log_odds_PN / 2))
    return log_odds_PN


def bilateral_kernel(features_5P: Tensor, params: CrfParams, photos: Photos) -> Lattice:
    """The kernel over position and colour, weighted."""
    deviations = [params.bilateral_sxy] * 2 + [params.bilateral_srgb] * 3
    return kernel(features_5P, deviations, params.bilateral_compat, photos)


def kernel(features_dP: Tensor, deviations: list[float], compat: float, photos: Photos) -> Lattice:
    """The kernel over some features of the photos' pixels, normalised, times its weight."""
    # A tensor divides exactly; a Python number becomes a product with its reciprocal on CUDA.
    scaled_dP = features_dP / features_dP.new_tensor(deviations)[:, None]
    return build_lattice(scaled_dP, photos.counts).normalised(compat)


def _check_shapes(image_hw3: Image, probs_chw: Probs) -> tuple[Tensor, Tensor]:
    probs_CHW = _tensor(probs_chw)
    if probs_CHW.ndim != 3 or len(probs_CHW) < 2 or not probs_CHW.is_floating_point() or not probs_CHW.numel():
        raise ValueError(
            f"probs must be (C, h, w) floating with C >= 2 and not empty, "
            f"not {tuple(probs_CHW.shape)} {probs_CHW.dtype}"
        )
    _check_size("probs", probs_CHW, image_hw3)
    return _image(image_hw3), probs_CHW


def _check_range(probs: Tensor) -> None:
    low, high = torch.stack(torch.aminmax(probs)).tolist()
    if not (low >= 0 and high <= 1.001):
        raise ValueError(f"probs must lie in [0, 1], not [{low:g}, {high:g}]: apply a softmax to logits first")


def _check_masks(image_hw3: Image, masks_nhw: Masks) -> tuple[Tensor, Tensor]:
    masks_NHW = _tensor(masks_nhw)
    if masks_NHW.ndim != 3 or masks_NHW.dtype != torch.bool:
        raise ValueError(f"masks must be (n, h, w) bool, not {tuple(masks_NHW.shape)} {masks_NHW.dtype}")
    _check_size("masks", masks_NHW, image_hw3)
    return _image(image_hw3), masks_NHW


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
