"""The photo's own outlines for masks of a network that sees patches alone.

Masks of 28 x 28 cells from the tokens of a transformer are coarse: a patch does not say where in it an object ends.
Here a mask becomes one of superpixels, whose outlines are the photo's edges, and these hear of each other as pixels do
in a dense CRF (arXiv 1210.5644): mean field, with a kernel of place, colour and token. There are about a thousand of
them, so that all pairs are one matrix, and the messages of a hundred masks one product with it.

Shapes: n masks; h x w pixels of the image that the network saw; R x C of the raster; S superpixels; D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.panoptic.boxes import scale_boxes
from model.panoptic.mask_head import paste_masks, paste_probs
from model.superpixels import Taps, raster_size, superpixels, taps, to_lab


@dataclass(frozen=True, slots=True)
class OutlineParams:
    """Measured on student networks and real photos: docs/student.md."""

    raster_side: int = 320  # pixels of the raster's longer side
    cell: int = 8  # pixels of the raster between the seeds of superpixels
    seed_iterations: int = 3  # of their k-means
    place: float = 30.0  # standard deviation of the kernel, pixels of the raster
    colour: float = 10.0  # likewise, of Lab
    token: float = 0.2  # 1 - cosine of tokens less their mean at which the kernel has fallen to 1/e
    own: float = 3.0  # log odds of a superpixel that lies wholly inside the coarse mask
    others: float = 4.0  # those when all that it hears of is inside
    iterations: int = 5
    least_iou: float = 0.3  # of coarse and fine mask, below which the coarse one stays


@torch.no_grad()
def outlined_masks(
    probs: Tensor,
    boxes: Tensor,
    image: Tensor,
    tokens: Tensor,
    *,
    stride: int,
    output: tuple[int, int],
    params: OutlineParams = OutlineParams(),
) -> Tensor:
    """(n, H, W) bool, the masks with the outlines of the image, at the size `output`.

    Args:
        probs: (n, s, s) float in [0, 1], of the cells of each box; boxes: (n, 4) float32, pixels of the image.
        image: (3, h, w) RGB in 0..255. tokens: (D, >= h / stride, >= w / stride), each of `stride` pixels of it.
        output: (height, width), of the image or of the photo that it was resized from.
    """
    with torch.autocast(probs.device.type, enabled=False):  # numbers of superpixels do not fit bfloat16
        size = (image.shape[1], image.shape[2])
        coarse = scale_boxes(boxes, size, output)
        if not len(probs):
            return paste_masks(probs, coarse, output)
        lab = _lab_raster(image, params)
        labels = superpixels(lab, params.cell, iterations=params.seed_iterations)
        raster = (labels.shape[0], labels.shape[1])
        inside = paste_probs(probs, scale_boxes(boxes, size, raster), raster)
        regions = _Regions(labels)
        shares = regions.mean(torch.cat([inside, inside >= 0.5]).flatten(1).t())  # (S, 2n)
        own = params.own * (2 * shares[:, : len(probs)] - 1)
        patch = boxes.new_tensor([stride * raster[0] / size[0], stride * raster[1] / size[1]])
        kernel = _kernel(regions, lab, tokens.float(), patch, params)
        odds = own
        for _ in range(params.iterations):
            odds = own + params.others * (kernel @ torch.tanh(odds / 2))
        kept = regions.iou(odds > 0, shares[:, len(probs) :]) > params.least_iou
        masks = torch.zeros(len(probs), *output, dtype=torch.bool, device=probs.device)
        masks[~kept] = paste_masks(probs[~kept], coarse[~kept], output)
        fine = odds[:, kept].t().index_select(1, labels.flatten()).unflatten(1, raster)
        _enlarge(fine, kept.nonzero().flatten().tolist(), masks)
        return masks


class _Regions:
    """Superpixels (R, C) as groups of pixels."""

    def __init__(self, labels: Tensor) -> None:
        self.shape = labels.shape
        self._labels = labels.flatten()
        self.size = torch.bincount(self._labels).float()

    def mean(self, values_PN: Tensor) -> Tensor:
        """(R*C, N) -> (S, N)."""
        sums = values_PN.new_zeros(len(self.size), values_PN.shape[1]).index_add_(0, self._labels, values_PN)
        return sums / self.size[:, None]

    def overall(self, values_SN: Tensor) -> Tensor:
        """(N,), the mean over all pixels."""
        return (self.size @ values_SN) / self.size.sum()

    def iou(self, chosen_SN: Tensor, shares_SN: Tensor) -> Tensor:
        """(N,) IoU of masks of whole superpixels, bool, and masks with these shares of each; 0 where both are empty."""
        common = self.size @ (chosen_SN * shares_SN)
        either = self.size @ (chosen_SN + shares_SN) - common
        return common / either.clamp(min=1)

    def places(self) -> Tensor:
        """(S, 2) row and column of the centres, pixels of the raster from its upper left corner."""
        lines = (torch.arange(side, device=self._labels.device) + 0.5 for side in self.shape)
        return self.mean(torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1))


def _kernel(regions: _Regions, lab: Tensor, tokens: Tensor, patch: Tensor, params: OutlineParams) -> Tensor:
    """(S, S), rows of sum 1: how much each superpixel hears of each other. `patch`: rows and columns of the raster that
    a token stands for."""
    places = regions.places()
    colours = regions.mean(lab.flatten(1).t())
    seen = _sampled(tokens, places / patch)
    seen = F.normalize(seen - regions.overall(seen), dim=1)
    # Half the squared distance of these is what the three kernels have in their exponents together.
    points = torch.cat(
        [
            (places - regions.overall(places)) / params.place,
            (colours - regions.overall(colours)) / params.colour,
            seen / params.token**0.5,
        ],
        dim=1,
    )
    away = points.square().sum(1) / 2
    kernel = torch.addmm(-away, points, points.t()).sub_(away[:, None]).exp_().mul_(regions.size)
    kernel.fill_diagonal_(0)
    return kernel.div_(kernel.sum(1, keepdim=True).clamp(min=1e-6))


def _sampled(tokens: Tensor, places: Tensor) -> Tensor:
    """(D, rows, columns) at (S, 2) places, in patches from the upper left corner -> (S, D), bilinear."""
    sides = places.new_tensor([tokens.shape[2], tokens.shape[1]])
    grid = places.flip(1) / sides * 2 - 1
    found = F.grid_sample(tokens[None], grid[None, None], padding_mode="border", align_corners=False)
    return found[0, :, 0].t()


def _lab_raster(image: Tensor, params: OutlineParams) -> Tensor:
    """(3, h, w) -> (3, R, C) Lab."""
    size = raster_size(image.shape[1], image.shape[2], params.raster_side, params.cell)
    return to_lab(F.interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)[0].clamp(0, 1))


def _enlarge(odds: Tensor, places: Sequence[int], masks: Tensor) -> None:
    """(k, R, C) log odds -> where they are above 0, bilinear, so that outlines are smooth, written into `masks`
    (n, H, W) bool at k `places`. Of each mask its window alone is looked at."""
    filled_rows, filled_columns = (odds > 0).any(2).cpu(), (odds > 0).any(1).cpu()
    lines = [taps(new, old, odds.device) for new, old in zip(masks.shape[1:], odds.shape[1:], strict=True)]
    row_starts, column_starts = (line[0][0].cpu() for line in lines)
    for number, place in enumerate(places):
        rows = _reached(filled_rows[number], row_starts)
        columns = _reached(filled_columns[number], column_starts)
        tall = _blended(odds[number].t(), lines[0], rows).t()
        masks[place, rows, columns] = _blended(tall, lines[1], columns) > 0


def _blended(values: Tensor, line: Taps, window: slice) -> Tensor:
    """(k, cells) -> (k, pixels of the window), each of the two cells that it lies between."""
    (low, low_share), (high, high_share) = line
    return values[:, low[window]] * low_share[window] + values[:, high[window]] * high_share[window]


def _reached(filled: Tensor, starts: Tensor) -> slice:
    """The pixels of a line, each between the cell `starts` and the next, that a filled cell is one of the two of."""
    cells = filled.nonzero().flatten()
    if not len(cells):
        return slice(0, 0)
    return slice(*torch.searchsorted(starts, torch.stack([cells[0] - 1, cells[-1] + 1])).tolist())
