"""STEGO (arXiv 2203.08414): a small head on frozen patch features, the loss that trains it, and the cluster probe.

The loss asks that where the features of two patches are similar, their codes be similar, and else not. The probe then
clusters the codes by cosine. No human label enters anywhere: the published linear probe, which is trained on labels,
is left out on purpose, as are the terms that are off in every published configuration (reconstruction, augmentation).

Shapes: B images, (h, w) patches, C feature channels, D code channels, S classes, P points an image, R repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.stego_terms import LossTerms

EPS = 1e-10  # least norm that a feature is divided by
ALPHA = 2.0  # sharpness of the probe's softmax when it gives probabilities


class Correspondence(NamedTuple):
    """The three unweighted losses (scalars), and the cosines of codes behind them, without gradient.

    `intra_cosines` and `inter_cosines` are (B, P, P), `negative_cosines` (R, B, P, P), in [-1, 1].
    """

    intra: Tensor
    inter: Tensor
    negative: Tensor
    intra_cosines: Tensor
    inter_cosines: Tensor
    negative_cosines: Tensor

    def total(self, terms: LossTerms) -> Tensor:
        return terms.intra_weight * self.intra + terms.inter_weight * self.inter + terms.negative_weight * self.negative


class PatchLinear(nn.Linear):
    """The same linear map at every patch: (B, C, N) -> (B, D, N). A weight may be put in for each image (B, D, C)."""

    def forward(self, maps_BCN: Tensor) -> Tensor:
        return self.weight @ maps_BCN + self.bias[..., None]


class StegoHead(nn.Module):
    """A linear and a nonlinear 1 x 1 branch, added (appendix A.1): (B, C, h, w) features -> (B, D, h, w) code.

    In training each branch sees the features with its own random channels dropped, whole maps at a time. The teacher's
    features are dropped too, with a third mask (`drop_channels`).
    """

    def __init__(self, dim_in: int, dim_out: int = 70, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.dim_in, self.dim_out, self.dropout = dim_in, dim_out, dropout
        self.linear = PatchLinear(dim_in, dim_out)
        self.nonlinear = nn.Sequential(PatchLinear(dim_in, dim_in), nn.ReLU(), PatchLinear(dim_in, dim_out))

    @torch.no_grad()
    def start_near(self, axes_CA: Tensor) -> None:
        """Begin close to a projection of the features onto A <= D axes: the nonlinear branch starts at a tenth."""
        self.linear.weight.zero_()
        self.linear.weight[: axes_CA.shape[1]] = axes_CA.T
        last = self.nonlinear[-1]
        assert isinstance(last, PatchLinear)
        last.weight.mul_(0.1)
        for layer in (self.linear, last):
            layer.bias.zero_()

    def forward(self, feats: Tensor, masks_3BC: Tensor | None = None) -> Tensor:
        """`masks_3BC` as `draw_masks` gives them, of which two are used; drawn here when training without any."""
        if masks_3BC is None and self.training:
            masks_3BC = self.draw_masks(len(feats)).to(feats.device)
        first, second = (feats, feats) if masks_3BC is None else (drop_channels(feats, mask) for mask in masks_3BC[:2])
        code_BDN = self.linear(first.flatten(2)) + self.nonlinear(second.flatten(2))
        return code_BDN.unflatten(2, feats.shape[2:])

    def draw_masks(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(3, B, C) float32, 0 or 1 / (1 - dropout): of the linear branch, the nonlinear branch and the teacher."""
        kept = torch.rand(3, batch, self.dim_in, generator=generator) >= self.dropout
        return kept / (1 - self.dropout)


def drop_channels(feats: Tensor, mask_BC: Tensor) -> Tensor:
    """(B, C, h, w) features times one factor a channel."""
    return feats * mask_BC[:, :, None, None]


class ClusterProbe(nn.Module):
    """S directions in code space, fitted by gradient descent on the cosine: spherical mini-batch k-means.

    Codes are detached: the probe never shapes them.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(classes, dim))

    def forward(self, code: Tensor, alpha: float | None = None) -> tuple[Tensor, Tensor]:
        """(B, D, h, w) code -> loss, and (B, S, h, w) assignment: one-hot, or with `alpha` the softmax of alpha s.

        The loss is -mean over positions of sum over classes of assignment times cosine s.
        """
        cosines = self.cosines(code)
        if alpha is None:
            assignment = F.one_hot(cosines.argmax(1), cosines.shape[1]).movedim(-1, 1).to(cosines.dtype)
        else:
            assignment = (alpha * cosines).softmax(1)
        return -(assignment * cosines).sum(1).mean(), assignment

    def log_probs(self, code: Tensor, alpha: float = ALPHA) -> Tensor:
        """(B, D, h, w) code -> (B, S, h, w) log of the class probabilities."""
        return (alpha * self.cosines(code)).log_softmax(1)

    def cosines(self, code: Tensor) -> Tensor:
        """(B, D, h, w) code -> (B, S, h, w), in [-1, 1]."""
        unit_BDN = F.normalize(code.detach(), dim=1).flatten(2)
        return (F.normalize(self.clusters, dim=-1) @ unit_BDN).unflatten(2, code.shape[2:])


class MergedProbe(ClusterProbe):
    """K directions in code space, one or more a class: a class is as near as the nearest of its own."""

    classes: Tensor

    def __init__(self, clusters_KD: Tensor, classes_K: Tensor) -> None:
        """`classes_K`: int64, each of 0..S-1 at least once."""
        super().__init__(clusters_KD.shape[1], len(clusters_KD))
        order = classes_K.argsort(stable=True)
        with torch.no_grad():
            self.clusters.copy_(clusters_KD[order])
        self.register_buffer("classes", classes_K[order])
        self._sizes = classes_K.bincount().tolist()

    def cosines(self, code: Tensor) -> Tensor:
        """(B, D, h, w) code -> (B, S, h, w), in [-1, 1]."""
        return torch.stack([each.amax(1) for each in super().cosines(code).split(self._sizes, 1)], 1)


def correspondence_loss(
    feats: Tensor,
    feats_pos: Tensor,
    code: Tensor,
    code_pos: Tensor,
    *,
    coords1: Tensor,
    coords2: Tensor,
    neg_perms: Tensor,
    terms: LossTerms,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilise: bool = False,
    pool: tuple[Tensor, Tensor] | None = None,
    batch_mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Correspondence:
    """The three correspondence losses (equation 4 and section 3.3), before they are weighted.

    `feats`, `feats_pos` (B, C, h, w) of images and of a neighbour of each; `code`, `code_pos` (B, D, h, w). No gradient
    flows to features. `coords1`, `coords2` (B, m, n, 2) in [-1, 1], x before y: the points looked up in the images, and
    in the neighbours and the negatives. `neg_perms` (R, B) rows of the negative of each image.

    Where a process holds some rows of a larger batch, `pool` is the (features, code) of the whole batch, into which
    `neg_perms` points, and `batch_mean` the mean over all processes' tensors; losses are means over the own rows.

    `pointwise` takes from each point's similarities their mean and adds that of the whole batch; `zero_clamp` stops
    pushing codes apart at a right angle; `stabilise` stops pulling them together at a cosine of 0.8.
    """
    pool_feats, pool_code = (feats, code) if pool is None else pool
    low, high = 0.0 if zero_clamp else -9999.0, 0.8 if stabilise else None

    def term(f1: Tensor, f2: Tensor, c1: Tensor, c2: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        similarity = _similarity(f1, f2, pointwise, batch_mean)
        cosines = _pairs(c1, c2)
        return -(cosines.clamp(low, high) * (similarity - shift)).mean(), cosines.detach()

    f1, c1 = _points(feats, coords1), _points(code, coords1)
    f2, c2 = _points(feats_pos, coords2), _points(code_pos, coords2)
    intra, intra_cosines = term(f1, f1, c1, c1, terms.intra_shift)
    inter, inter_cosines = term(f1, f2, c1, c2, terms.inter_shift)
    negatives = [
        term(f1, _points(negative, coords2), c1, _points(negative_code.to(code), coords2), terms.negative_shift)
        for negative, negative_code in ((pool_feats[rows], pool_code[rows]) for rows in neg_perms)
    ]
    losses, cosines = (torch.stack(values) for values in zip(*negatives, strict=True))
    return Correspondence(intra, inter, losses.mean(), intra_cosines, inter_cosines, cosines)


def teacher_similarities(
    feats: Tensor, feats_pos: Tensor, *, coords1: Tensor, coords2: Tensor, negatives: Tensor, pointwise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What the three terms of `correspondence_loss` compare with their shifts: (B, P, P) each of a whole batch.

    Arguments as there; `negatives` (B,) are the rows of one permutation.
    """
    first, second = _points(feats, coords1), _points(feats_pos, coords2)
    others = _points(feats[negatives], coords2)
    intra, inter, negative = (_similarity(first, each, pointwise, torch.mean) for each in (first, second, others))
    return intra, inter, negative


def sample_points(maps: Tensor, coords: Tensor) -> Tensor:
    """(B, C, h, w) maps at (B, m, n, 2) coordinates -> (B, C, m, n), bilinear, the border continued outwards.

    Coordinates are (x, y), -1 and 1 the centres of the first and last patch. The published code swaps the two point
    axes first, which no mean over points can tell.
    """
    return F.grid_sample(maps, coords, mode="bilinear", padding_mode="border", align_corners=True)


def _points(maps: Tensor, coords: Tensor) -> Tensor:
    """As `sample_points`, with unit norm over channels and the points in one row: (B, C, P)."""
    return F.normalize(sample_points(maps, coords).flatten(2), dim=1, eps=EPS)


@torch.no_grad()
def _similarity(
    first_BCP: Tensor, second_BCP: Tensor, pointwise: bool, batch_mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """Cosines (B, P, P) of features, centred if `pointwise`: less each point's mean, plus that of the batch."""
    similarity = _pairs(first_BCP, second_BCP)
    if pointwise:
        similarity += batch_mean(similarity) - similarity.mean(2, keepdim=True)
    return similarity


def _pairs(first_BCP: Tensor, second_BCP: Tensor) -> Tensor:
    """Cosines (B, P, P) of every point of the first with every point of the second."""
    return first_BCP.mT @ second_BCP


def derangement(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) int64 permutation without a fixed point, all equally likely. ValueError for fewer than 2.

    The published code adds one at the fixed points of a permutation instead, which repeats some images and, alone in
    its batch, makes an image its own negative.
    """
    if batch < 2:
        raise ValueError(f"negatives need a batch of at least 2 images, got {batch}")
    places = torch.arange(batch)
    while True:  # succeeds with probability 1/e or better
        permutation = torch.randperm(batch, generator=generator)
        if not (permutation == places).any():
            return permutation
