"""The dense CRF for labels, in about a fifth of its time: the same label on 99.5 % of a photo's pixels or more.

Against `workers.crf`, which equals the published programs:

- A class that has next to no pixel is not filtered alone. All such classes share one channel, and hear of themselves as
  much as a class of the photo's average among them would.
- The message of the bilateral kernel, the costly one, changes slowly from one iteration to the next: it is filtered in
  some iterations, and in between extrapolated from the last that were (`Thrift`). What a pixel hears from itself is not
  slow, and follows the pixel.
- The Gaussian over position is a convolution.
- Of two classes, the log odds are found on half the grid and enlarged, as coarse masks have outlines without detail and
  the Gaussian blurs them: the same label on 99.5 %. Of many classes it would change 3 %, and is not done.

Shapes as in `workers.crf`; K channels, of kept classes and the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from workers.crf import CrfParams, check_arguments, image_features
from workers.permutohedral import Lattice, build_lattice

LEAST_SHARE = 1e-3  # of the pixels, that a class wins before the CRF: with less it has no channel of its own
REACH = 2  # standard deviations of the Gaussian that are summed over
FEW = 4  # channels, up to which a table of half precision gains nothing
CHUNK = 8192  # pixels that are worked on at a time, in a cache
MOST_COMPAT = 60  # sum of the kernels' weights, for exp not to overflow


@dataclass(frozen=True, slots=True)
class Thrift:
    """How filtering of the bilateral kernel is saved."""

    own: float  # of its weight: what a pixel hears from itself
    order: int  # messages that are extrapolated from
    filtered: Callable[[int], set[int]]  # of so many iterations, those in which it is filtered


# Six of ten iterations: the first two, the last but one, every other between. The same label on 99.7 % of the pixels.
MANY = Thrift(0.6, 3, lambda iterations: {0, 1, iterations - 2, *range(3, iterations - 1, 2)})
# Four of ten, at gaps that double, and later every other. Log odds of half the grid go an even way: a line through two
# messages is enough. 99.5 %.
TWO = Thrift(0.2, 2, lambda iterations: {0, 1, 3, 7, *range(10, iterations, 2)})


@torch.no_grad()
def fast_crf(
    image_hw3_uint8: NDArray[np.uint8] | Tensor, probs_chw: NDArray[np.floating] | Tensor, params: CrfParams
) -> Tensor:
    """(C, h, w) float32 marginals, arguments and errors as of `dense_crf`; for three classes or more.

    ValueError also for kernels that weigh more than 60 together.
    """
    image_HW3, probs_CHW = check_arguments(image_hw3_uint8, probs_chw)
    if params.gaussian_compat + params.bilateral_compat > MOST_COMPAT:
        raise ValueError(f"kernels that weigh more than {MOST_COMPAT} together need the exact CRF")
    kept = _kept(probs_CHW)
    probs_CP = probs_CHW.float().clamp(min=1e-5).flatten(1)
    rest_P, own_P = _rest(probs_CP, kept)
    p_PK = torch.stack([*(probs_CP[c] for c in kept), rest_P], 1)
    q_PK = _mean_field(image_HW3.to(p_PK.device), p_PK, own_P, params)
    result_CP = probs_CP.mul_(q_PK[:, -1] / rest_P)
    for channel, c in enumerate(kept):
        result_CP[c] = q_PK[:, channel]
    return result_CP.view(probs_CHW.shape)


@torch.no_grad()
def fast_log_odds(image_HW3: Tensor, masks_NHW: Tensor, params: CrfParams) -> Tensor:
    """(h, w, 3) uint8, (n, h, w) bool on one device -> (n, h, w) float32, log of foreground over background marginal.

    As `exact_log_odds`.
    """
    height, width = image_HW3.shape[:2]
    image_3hw, unary_Nhw = (
        F.avg_pool2d(maps[None], 2, ceil_mode=True, count_include_pad=False)[0]
        for maps in (image_HW3.permute(2, 0, 1).float(), masks_NHW.float().mul(2).sub(1))
    )
    halved = replace(params, gaussian_sxy=params.gaussian_sxy / 2, bilateral_sxy=params.bilateral_sxy / 2)
    unary_hwN = unary_Nhw.permute(1, 2, 0).contiguous()
    size = unary_hwN.shape
    gaussian = _Gaussian((size[0], size[1], size[2]), halved, unary_hwN.device)
    bilateral = _Bilateral(image_3hw.permute(1, 2, 0).round().to(torch.uint8), halved, TWO)
    log_odds_hwN = unary_hwN
    for step in range(params.iterations):
        q_hwN = log_odds_hwN.sigmoid().mul_(2).sub_(1)
        log_odds_hwN = gaussian(q_hwN).add_(unary_hwN)
        fresh, terms = bilateral.terms(step, q_hwN.flatten(0, 1))
        for weight, message_PN in terms:
            log_odds_hwN.add_(message_PN.view(size), alpha=weight)
        (terms[0][1].view(size) if fresh else log_odds_hwN).add_(
            q_hwN, alpha=-bilateral.own if fresh else bilateral.own
        )
    large_1Nhw = F.interpolate(log_odds_hwN.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear")
    return large_1Nhw[0, :, :height, :width]


def _kept(probs_CHW: Tensor) -> list[int]:
    """The classes that have a channel of their own, by every fourth pixel of every fourth row."""
    winners = probs_CHW[:, (probs_CHW.shape[1] - 1) % 4 // 2 :: 4, (probs_CHW.shape[2] - 1) % 4 // 2 :: 4].argmax(0)
    counts_C = winners.flatten().bincount(minlength=len(probs_CHW))
    return (counts_C > LEAST_SHARE * counts_C.sum()).nonzero().squeeze(1).tolist()


def _rest(probs_CP: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """(P,) probability of the classes that are not kept, all together, and the share of it that one of them has."""
    total_P, squares_P = torch.full_like(probs_CP[0], 1e-9), torch.zeros_like(probs_CP[0])
    for c in set(range(len(probs_CP))).difference(kept):
        total_P += probs_CP[c]
        squares_P.addcmul_(probs_CP[c], probs_CP[c])
    return total_P, squares_P / (total_P * total_P)


def _mean_field(image_HW3: Tensor, p_PK: Tensor, own_P: Tensor, params: CrfParams) -> Tensor:
    """(P, K) marginals after the iterations. `own_P`: what of the last channel's message is for one of its classes.

    What is done pixel by pixel is done for some pixels at a time, which stay in a cache.
    """
    size, channels = image_HW3.shape[:2], p_PK.shape[1]
    bits = 1 / math.log(2)  # exp2 takes a third of exp's time
    compats = {name: bits * getattr(params, name) for name in ("gaussian_compat", "bilateral_compat")}
    params = replace(params, **compats)
    gaussian, bilateral = _Gaussian((*size, channels), params, p_PK.device), _Bilateral(image_HW3, params, MANY)
    ones_K = p_PK.new_ones(channels)
    q_PK = p_PK / (p_PK @ ones_K)[:, None]
    for step in range(params.iterations):
        heard_PK = gaussian(q_PK.view(*size, channels)).view(q_PK.shape)
        fresh, terms = bilateral.terms(step, q_PK)
        maps = (p_PK, own_P, q_PK, heard_PK, *(term for _, term in terms))
        for p, own, q, heard, *parts in zip(*(each.split(CHUNK) for each in maps), strict=True):
            for (weight, _), part in zip(terms, parts, strict=True):
                heard.add_(part, alpha=weight)
            (parts[0] if fresh else heard).add_(q, alpha=-bilateral.own if fresh else bilateral.own)
            heard[:, -1] *= own
            heard.exp2_().mul_(p)
            torch.div(heard, (heard @ ones_K)[:, None], out=q)
    return q_PK


class _Gaussian:
    """w n K n of the kernel over position as a convolution; n makes up for the border."""

    def __init__(self, size: tuple[int, int, int], params: CrfParams, device: torch.device) -> None:
        """`size`: rows, columns and channels of the maps."""
        height, width, self._channels = size
        self._reach = max(1, math.ceil(REACH * params.gaussian_sxy))
        weights = torch.exp(-0.5 * (torch.arange(-self._reach, self._reach + 1) / params.gaussian_sxy) ** 2)
        weights /= weights.sum()
        kernel = params.gaussian_compat * torch.outer(weights, weights)
        self._kernel = kernel.expand(self._channels, 1, -1, -1).contiguous().to(device)
        self._borders = [self._border(length, weights) for length in (height, width)]

    def __call__(self, q_HWK: Tensor) -> Tensor:
        """(H, W, K) -> (H, W, K)."""
        # Not permute and then [None]: of that, the convolution does not see that channels come last.
        channels_last = q_HWK[None].permute(0, 3, 1, 2)
        heard = F.conv2d(channels_last, self._kernel, padding=self._reach, groups=self._channels)
        heard_HWK = heard.permute(0, 2, 3, 1)[0].contiguous()
        for dim, border in enumerate(self._borders):
            for place, factor in border:
                heard_HWK.select(dim, place).mul_(factor)
        return heard_HWK

    def _border(self, length: int, weights: Tensor) -> list[tuple[int, float]]:
        """Places near the ends, and what makes their sum as large as in the middle."""
        sums = F.conv1d(torch.ones(1, 1, length), weights[None, None], padding=self._reach)[0, 0].tolist()
        return [(place, 1 / found) for place, found in enumerate(sums) if found < 1 - 1e-6]


class _Bilateral:
    """w n K n of the kernel over position and colour: filtered in some iterations, extrapolated in the others."""

    def __init__(self, image_HW3: Tensor, params: CrfParams, thrift: Thrift) -> None:
        self.own = thrift.own * params.bilateral_compat
        self._filtered, self._order = thrift.filtered(params.iterations), thrift.order
        self._last: list[tuple[int, Tensor]] = []  # iterations, and their messages less `own` times the marginals
        self._lattice: Lattice | None = None
        if params.bilateral_compat:
            features_5P = image_features(image_HW3)
            deviations = [params.bilateral_sxy] * 2 + [params.bilateral_srgb] * 3
            scaled_5P = features_5P / features_5P.new_tensor(deviations)[:, None]
            self._lattice = build_lattice(scaled_5P).normalised(params.bilateral_compat)

    def terms(self, step: int, q_PK: Tensor) -> tuple[bool, list[tuple[float, Tensor]]]:
        """Whether it is filtered in this iteration, and weights and (P, K) maps; to be asked for all in their order.

        Filtered, the one map is the message, and the caller takes `own` times the marginals off it in place when it has
        been heard; else the sum of the maps and `own` times the marginals is the message.
        """
        if self._lattice is None:
            return False, []
        if step in self._filtered:
            message_PK = self._lattice.filter(q_PK, torch.float32 if q_PK.shape[1] <= FEW else torch.float16)
            self._last = [*self._last, (step, message_PK)][-self._order :]
            return True, [(1.0, message_PK)]
        places, maps = zip(*self._last, strict=True)
        return False, list(zip(_lagrange(places, step), maps, strict=True))


def _lagrange(places: Sequence[int], wanted: int) -> list[float]:
    """The weights of values at these places for the polynomial through them at another."""
    return [math.prod((wanted - other) / (place - other) for other in places if other != place) for place in places]
