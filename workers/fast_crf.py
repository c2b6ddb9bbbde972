"""The dense CRF for labels, in about a fifth of its time: the same label on 99.5 % of a photo's pixels or more.

Against `workers.crf`, which equals the published programs:

- A class that has next to no pixel is not filtered alone. All such classes share one channel, and hear of themselves as
  much as a class of the photo's average among them would.
- The message of the bilateral kernel, the costly one, changes slowly from one iteration to the next: it is filtered in
  some iterations, and in between extrapolated from the last that were (`Thrift`). What a pixel hears from itself is not
  slow, and follows the pixel.
- The Gaussian over position is a convolution, on a GPU two products with matrices.
- Of two classes, the log odds are found on half the grid and enlarged, as coarse masks have outlines without detail and
  the Gaussian blurs them: the same label on 99.5 %. Of many classes it would change 3 %, and is not done.

Shapes as in `workers.crf`; K channels, of kept classes and the rest; B photos of one size, Q = H*W pixels each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from workers import devices
from workers.crf import CrfParams, Image, Probs, bilateral_kernel, in_batches
from workers.permutohedral import Lattice
from workers.photo_pixels import Photos

LEAST_SHARE = 1e-3  # of the pixels, that a class wins before the CRF: with less it has no channel of its own
REACH = 2  # standard deviations of the Gaussian that are summed over
FEW = 4  # channels, up to which a table of half precision gains a CPU nothing
CHUNK = 8192  # pixels that a CPU works on at a time, in a cache
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


def fast_crf(image_hw3_uint8: Image, probs_chw: Probs, params: CrfParams) -> Tensor:
    """(C, h, w) float32 marginals, arguments and errors as of `dense_crf`; for three classes or more.

    ValueError also for kernels that weigh more than 60 together.
    """
    return fast_crf_of([image_hw3_uint8], [probs_chw], params)[0]


@torch.no_grad()
def fast_crf_of(images: Sequence[Image], probs_of_each: Sequence[Probs], params: CrfParams) -> list[Tensor]:
    """`fast_crf` of several photos of any sizes, as many at a time as `batches` says; one number of classes, one
    device. The same marginals as of each alone."""
    if params.gaussian_compat + params.bilateral_compat > MOST_COMPAT:
        raise ValueError(f"kernels that weigh more than {MOST_COMPAT} together need the exact CRF")
    return in_batches(images, probs_of_each, params, _marginals)


def _marginals(photos: Photos, probs_PC: Tensor, params: CrfParams) -> Tensor:
    kept = [_kept(probs_BHWC) for probs_BHWC in photos.maps(probs_PC)]
    most = int(torch.cat(kept).sum(1).max())
    runs = [
        _Channels(probs_BHWC.flatten(1, 2).clamp(min=1e-5), kept_BC, most)
        for probs_BHWC, kept_BC in zip(photos.maps(probs_PC), kept, strict=True)
    ]
    p_PK = torch.cat([run.probs_BQK.flatten(0, 1) for run in runs])
    own_P = torch.cat([run.own_BQ.flatten() for run in runs])
    q_PK = _mean_field(photos, p_PK, own_P, params)
    classes = [run.classes(q_BHWK.flatten(1, 2)) for run, q_BHWK in zip(runs, photos.maps(q_PK), strict=True)]
    return torch.cat([q_BQC.flatten(0, 1) for q_BQC in classes])


@torch.no_grad()
def fast_log_odds(photos: Photos, masks_PN: Tensor, params: CrfParams) -> Tensor:
    """(P, N) bool, on the photos' device -> (P, N) float32, log of foreground over background marginal.

    As `exact_log_odds`.
    """
    halves, unary_PN = _halved(photos, masks_PN)
    params = replace(params, gaussian_sxy=params.gaussian_sxy / 2, bilateral_sxy=params.bilateral_sxy / 2)
    gaussian, bilateral = _Gaussian(halves, unary_PN.shape[1], params), _Bilateral(halves, params, TWO)
    log_odds_PN = unary_PN
    for step in range(params.iterations):
        q_PN = log_odds_PN.sigmoid().mul_(2).sub_(1)
        log_odds_PN = gaussian(q_PN).add_(unary_PN)
        fresh, terms = bilateral.terms(step, q_PN)
        for weight, message_PN in terms:
            log_odds_PN.add_(message_PN, alpha=weight)
        (terms[0][1] if fresh else log_odds_PN).add_(q_PN, alpha=-bilateral.own if fresh else bilateral.own)
    return _doubled(halves, log_odds_PN, photos)


def _halved(photos: Photos, masks_PN: Tensor) -> tuple[Photos, Tensor]:
    """The photos on half the grid, rounded up, and the unaries of the masks there, (P/4, N) of -1 to 1."""
    colours, unaries = ([_pooled(maps) for maps in photos.maps(each)] for each in (photos.colours_P3, masks_PN))
    colours_P3, unary_PN = (torch.cat([run.flatten(0, 2) for run in runs]) for runs in (colours, unaries))
    sizes = tuple((-(-height // 2), -(-width // 2)) for height, width in photos.sizes)
    return Photos(colours_P3.round_().to(torch.uint8), sizes), unary_PN.mul_(2).sub_(1)


def _pooled(maps_BHWC: Tensor) -> Tensor:
    maps_BCHW = maps_BHWC.permute(0, 3, 1, 2).float().contiguous()
    return F.avg_pool2d(maps_BCHW, 2, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)


def _doubled(halves: Photos, values_PN: Tensor, photos: Photos) -> Tensor:
    """Values on half the grid -> (P, N) on the photos', bilinear."""
    result_PN = values_PN.new_empty(len(photos.colours_P3), values_PN.shape[1])
    for small_BhwN, large_BHWN in zip(halves.maps(values_PN), photos.maps(result_PN), strict=True):
        doubled = F.interpolate(small_BhwN.permute(0, 3, 1, 2).contiguous(), scale_factor=2, mode="bilinear")
        large_BHWN.copy_(doubled.permute(0, 2, 3, 1)[:, : large_BHWN.shape[1], : large_BHWN.shape[2]])
    return result_PN


def _kept(probs_BHWC: Tensor) -> Tensor:
    """(B, C) bool: the classes that have a channel of their own, by every fourth pixel of every fourth row."""
    rows, columns = ((side - 1) % 4 // 2 for side in probs_BHWC.shape[1:3])
    winners_BQ = probs_BHWC[:, rows::4, columns::4].argmax(3).flatten(1)
    counts_BC = torch.zeros(len(probs_BHWC), probs_BHWC.shape[3], device=probs_BHWC.device)
    counts_BC.scatter_add_(1, winners_BQ, torch.ones_like(winners_BQ, dtype=torch.float32))
    return counts_BC > LEAST_SHARE * winners_BQ.shape[1]


class _Channels:
    """Classes of B photos of Q pixels as K channels: those that are kept, and the rest in the last.

    A photo that keeps fewer classes than another has channels that are 0 before the CRF, and so after it.
    """

    def __init__(self, probs_BQC: Tensor, kept_BC: Tensor, most: int) -> None:
        self._probs_BQC = probs_BQC
        order_Bk = kept_BC.int().argsort(stable=True, dim=1, descending=True)[:, :most]
        self._order_BQk = order_Bk[:, None].expand(-1, probs_BQC.shape[1], -1)
        self._used_B1k = kept_BC.gather(1, order_Bk)[:, None]
        rest_BC1 = (~kept_BC).to(probs_BQC.dtype)[..., None]
        self._rest_BQ1 = torch.bmm(probs_BQC, rest_BC1).add_(1e-9)
        squares_BQ1 = torch.bmm(probs_BQC.square(), rest_BC1)
        self.own_BQ = (squares_BQ1 / self._rest_BQ1.square())[..., 0]  # of the rest, what one class has
        self.probs_BQK = torch.cat([probs_BQC.gather(2, self._order_BQk) * self._used_B1k, self._rest_BQ1], 2)

    def classes(self, q_BQK: Tensor) -> Tensor:
        """(B, Q, K) marginals of the channels -> (B, Q, C) of the classes."""
        q_BQC = self._probs_BQC * (q_BQK[..., -1:] / self._rest_BQ1)
        kept_BQk = torch.where(self._used_B1k, q_BQK[..., :-1], q_BQC.gather(2, self._order_BQk))
        return q_BQC.scatter_(2, self._order_BQk, kept_BQk)


def _mean_field(photos: Photos, p_PK: Tensor, own_P: Tensor, params: CrfParams) -> Tensor:
    """(P, K) marginals after the iterations. `own_P`: what of the last channel's message is for one of its classes.

    What is done pixel by pixel is done on a CPU for some pixels at a time, which stay in a cache.
    """
    chunk = len(p_PK) if devices.many_threads(p_PK) else CHUNK
    bits = 1 / math.log(2)  # exp2 takes a third of exp's time
    compats = {name: bits * getattr(params, name) for name in ("gaussian_compat", "bilateral_compat")}
    params = replace(params, **compats)
    gaussian, bilateral = _Gaussian(photos, p_PK.shape[1], params), _Bilateral(photos, params, MANY)
    ones_K = p_PK.new_ones(p_PK.shape[1])
    q_PK = p_PK / (p_PK @ ones_K)[:, None]
    for step in range(params.iterations):
        heard_PK = gaussian(q_PK)
        fresh, terms = bilateral.terms(step, q_PK)
        maps = (p_PK, own_P, q_PK, heard_PK, *(term for _, term in terms))
        for p, own, q, heard, *parts in zip(*(each.split(chunk) for each in maps), strict=True):
            for (weight, _), part in zip(terms, parts, strict=True):
                heard.add_(part, alpha=weight)
            (parts[0] if fresh else heard).add_(q, alpha=-bilateral.own if fresh else bilateral.own)
            heard[:, -1] *= own
            heard.exp2_().mul_(p)
            torch.div(heard, (heard @ ones_K)[:, None], out=q)
    return q_PK


class _Gaussian:
    """w n K n of the kernel over position; n makes up for the border."""

    def __init__(self, photos: Photos, channels: int, params: CrfParams) -> None:
        self._photos = photos
        form = _Bands if devices.many_threads(photos.colours_P3) else _Convolution
        device = photos.colours_P3.device
        self._forms = [form(size, channels, params, device) for size, _ in groupby(photos.sizes)]

    def __call__(self, q_PK: Tensor) -> Tensor:
        """(P, K) -> (P, K)."""
        runs = zip(self._forms, self._photos.maps(q_PK), strict=True)
        heard = [form(q_BHWK).flatten(0, 2) for form, q_BHWK in runs]
        return torch.cat(heard) if len(heard) > 1 else heard[0]


def _weights(params: CrfParams, offsets: Tensor) -> Tensor:
    """Of the Gaussian at some distances in pixels; 0 beyond its reach."""
    weights = torch.exp(-0.5 * (offsets / params.gaussian_sxy) ** 2)
    return weights * (offsets.abs() <= _reach(params))


def _reach(params: CrfParams) -> int:
    return max(1, math.ceil(REACH * params.gaussian_sxy))


class _Bands:
    """Products with matrices of H x H and W x W: few large steps in full float32, as a GPU likes them."""

    def __init__(self, size: tuple[int, int], channels: int, params: CrfParams, device: torch.device) -> None:
        self._rows_HH, self._columns_WW = (self._band(length, params, device) for length in size)
        self._rows_HH *= params.gaussian_compat

    def __call__(self, q_BHWK: Tensor) -> Tensor:
        """(B, H, W, K) -> (B, H, W, K)."""
        heard_BHQ = torch.matmul(self._rows_HH, q_BHWK.flatten(2))
        return torch.matmul(self._columns_WW, heard_BHQ.view(q_BHWK.shape))

    def _band(self, length: int, params: CrfParams, device: torch.device) -> Tensor:
        places = torch.arange(length, device=device)
        band = _weights(params, places - places[:, None])
        return band / band.sum(1, keepdim=True)


class _Convolution:
    """A convolution, whose borders are made up for afterwards."""

    def __init__(self, size: tuple[int, int], channels: int, params: CrfParams, device: torch.device) -> None:
        self._reach, self._channels = _reach(params), channels
        weights = _weights(params, torch.arange(-self._reach, self._reach + 1))
        weights /= weights.sum()
        kernel = params.gaussian_compat * torch.outer(weights, weights)
        self._kernel = kernel.expand(channels, 1, -1, -1).contiguous().to(device)
        self._borders = [self._border(length, weights) for length in size]

    def __call__(self, q_BHWK: Tensor) -> Tensor:
        """(B, H, W, K) -> (B, H, W, K)."""
        heard = F.conv2d(q_BHWK.permute(0, 3, 1, 2), self._kernel, padding=self._reach, groups=self._channels)
        heard_BHWK = heard.permute(0, 2, 3, 1).contiguous()
        for dim, border in enumerate(self._borders, 1):
            for place, factor in border:
                heard_BHWK.select(dim, place).mul_(factor)
        return heard_BHWK

    def _border(self, length: int, weights: Tensor) -> list[tuple[int, float]]:
        """Places near the ends, and what makes their sum as large as in the middle."""
        sums = F.conv1d(torch.ones(1, 1, length), weights[None, None], padding=self._reach)[0, 0].tolist()
        return [(place, 1 / found) for place, found in enumerate(sums) if found < 1 - 1e-6]


class _Bilateral:
    """w n K n of the kernel over position and colour: filtered in some iterations, extrapolated in the others."""

    def __init__(self, photos: Photos, params: CrfParams, thrift: Thrift) -> None:
        self.own = thrift.own * params.bilateral_compat
        self._filtered, self._order = thrift.filtered(params.iterations), thrift.order
        self._last: list[tuple[int, Tensor]] = []  # iterations, and their messages less `own` times the marginals
        self._lattice: Lattice | None = None
        if params.bilateral_compat:
            self._lattice = bilateral_kernel(photos.features(), params, photos)

    def terms(self, step: int, q_PK: Tensor) -> tuple[bool, list[tuple[float, Tensor]]]:
        """Whether it is filtered in this iteration, and weights and (P, K) maps; to be asked for all in their order.

        Filtered, the one map is the message, and the caller takes `own` times the marginals off it in place when it has
        been heard; else the sum of the maps and `own` times the marginals is the message.
        """
        if self._lattice is None:
            return False, []
        if step in self._filtered:
            half = q_PK.shape[1] > FEW and not devices.many_threads(q_PK)
            message_PK = self._lattice.filter(q_PK, torch.float16 if half else torch.float32)
            self._last = [*self._last, (step, message_PK)][-self._order :]
            return True, [(1.0, message_PK)]
        places, maps = zip(*self._last, strict=True)
        return False, list(zip(_lagrange(places, step), maps, strict=True))


def _lagrange(places: Sequence[int], wanted: int) -> list[float]:
    """The weights of values at these places for the polynomial through them at another."""
    return [math.prod((wanted - other) / (place - other) for other in places if other != place) for place in places]
