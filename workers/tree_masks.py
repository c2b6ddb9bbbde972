"""Masks of the objects of a photo from merge trees of its superpixels: any number, nested, each with a score.

1. Superpixels of a small raster: their outlines are the photo's, so that masks need no refinement.
2. A merge tree of them for each of a few layers of a frozen transformer: patch features beside a little colour. Every
   inner node of a tree is a candidate.
3. The score is a product of hand-set factors; nothing is learnt from labels (docs/masks.md tells what each is worth).
4. Matrix suppression ranks them (SOLOv2, arXiv 2003.10152, section 3.4), masks that repeat a better one fall, and what
   is left knows the smallest mask that holds it.

Bottom-up merging and levels are the idea of UnSAM (arXiv 2406.20081) and UniAP (2508.06995), unlikeness to what lies on
the photo's border that of ProMerge (2409.18961). Deterministic on a CPU.

Shapes: H x W pixels of the raster, N = h * w patches, S superpixels, K nodes, C channels, M masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.superpixels import RegionGraph, patch_weights, raster_size, region_graph, superpixels, to_lab
from workers.merge_tree import Tree, merge_tree

RING = 2  # superpixels around a mask that it is compared with
COVERED = 0.9  # share of a mask that another must hold to be its parent
HALF = 0.005  # product of the factors at which a score is 0.5
DRAWN_PIXELS = 20_000_000  # of masks that exist at full size at a time
LEAST = 1e-9  # unlikeness of two equal vectors


@dataclass(frozen=True, slots=True)
class TreeParams:
    """Settings; the defaults are those that docs/masks.md measures."""

    raster_side: int = 320  # pixels of the longer side of the raster
    cell: int = 6  # pixels of the raster between the seeds of superpixels
    channels: int = 64  # principal components of the features that are merged
    colour: float = 0.017  # weight of Lab colour beside features of unit variance
    min_area: float = 8e-4  # share of the photo
    max_area: float = 0.95
    candidates: int = 500  # nodes of a tree that are looked at closely
    decay: float = 2.0  # of the score of a mask that overlaps a better one
    max_iou: float = 0.7  # with a better mask, above which a mask falls
    max_masks: int = 100


@dataclass(frozen=True, slots=True)
class TreeMasks:
    """The masks of one photo as unions of superpixels, best first."""

    labels: Tensor  # (H, W) int64, superpixel of each pixel of the raster
    size: Tensor  # (S,) pixels
    weights: Tensor  # (S, N) float32, what a superpixel sees of each patch
    members: Tensor  # (M, S) bool
    scores: Tensor  # (M,) float32 in (0, 1), descending
    parents: Tensor  # (M,) int64, the smallest mask that holds this one; -1 where none does
    levels: Tensor  # (M,) int64, how many hold it, one in the other

    def mean(self, features_NC: Tensor) -> Tensor:
        """(M, C) float32 mean of patch features inside each mask."""
        share = self.members.float() * self.size
        return (share / share.sum(1, keepdim=True)) @ (self.weights @ features_NC.float())


@torch.inference_mode()
def find_tree_masks(
    photo_hw3: np.ndarray,
    trees: Sequence[Tensor],
    tokens_NC: Tensor,
    cls_C: Tensor | None,
    grid: tuple[int, int],
    params: TreeParams = TreeParams(),
) -> TreeMasks:
    """(h, w, 3) uint8 RGB and patch features of a (h, w) grid of the whole photo -> its masks.

    `trees`: (N, C) features, one merge tree each; the first also measures the contrast to what is around. `tokens_NC`
    and `cls_C`, of one layer, measure unlikeness to the border and likeness to the whole; without CLS the latter is
    left out. Bounded by `max_masks`; none in a photo of a single superpixel. ValueError: a feature is not finite.
    """
    if not all(bool(torch.isfinite(features).all()) for features in (*trees, tokens_NC)):
        raise ValueError("features hold NaN or infinite values")
    lab_3HW = _lab_raster(photo_hw3, params.raster_side, params.cell).to(tokens_NC.device)
    labels_HW = superpixels(lab_3HW, params.cell)
    graph = region_graph(labels_HW, lab_3HW)
    weights_SN = patch_weights(labels_HW, len(graph.size), grid)
    if len(graph.size) < 2:
        return _select(labels_HW, weights_SN, graph, *_no_candidates(graph), params)
    members, scores = _candidates(trees, tokens_NC, cls_C, weights_SN, graph, params)
    around = weights_SN @ _principal(F.normalize(trees[0].float(), dim=1), params.channels)
    scores = torch.nan_to_num(scores * _ring_contrast(members, around, graph), 0.0, 0.0, 0.0)
    return _select(labels_HW, weights_SN, graph, members, scores, params)


def draw(masks: TreeMasks, height: int, width: int) -> Iterator[np.ndarray]:
    """The (height, width) bool masks at the photo's size, one after the other, with smooth outlines. A mask is empty
    where the photo is far smaller than the raster."""
    at_a_time = max(1, DRAWN_PIXELS // (height * width))
    for members in masks.members.split(at_a_time):
        coarse = members[:, masks.labels].float()[:, None]
        yield from (F.interpolate(coarse, size=(height, width), mode="bilinear")[:, 0] > 0.5).cpu().numpy()


def _lab_raster(photo_hw3: np.ndarray, side: int, cell: int) -> Tensor:
    """(h, w, 3) uint8 RGB -> (3, H, W) float32 CIE Lab of the raster."""
    rows, columns = raster_size(photo_hw3.shape[0], photo_hw3.shape[1], side, cell)
    small = Image.fromarray(photo_hw3).resize((columns, rows), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return to_lab(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255)


def _candidates(
    trees: Sequence[Tensor],
    tokens_NC: Tensor,
    cls_C: Tensor | None,
    weights_SN: Tensor,
    graph: RegionGraph,
    params: TreeParams,
) -> tuple[Tensor, Tensor]:
    """Members (n, S) and scores (n,), but for the contrast, of the best nodes of all trees."""
    salient = F.normalize(tokens_NC.float(), dim=1)
    pooled = weights_SN @ _principal(salient, params.channels)
    like_whole = (
        torch.ones_like(graph.size) if cls_C is None else weights_SN @ (salient @ F.normalize(cls_C.float(), dim=0))
    )
    attributes = torch.cat(
        [torch.stack([graph.size, graph.border, like_whole * graph.size], 1), pooled * graph.size[:, None]], 1
    )
    edges = torch.stack([graph.length, graph.length * graph.step], 1)
    border = F.normalize(graph.border @ pooled, dim=0)
    members, scores = [], []
    for features in trees:
        joint = torch.cat(
            [weights_SN @ _principal(_standard(features), params.channels), params.colour * graph.colour], 1
        )
        tree = merge_tree(joint, graph.size, graph.pairs, edges, attributes)
        score = _objectness(tree, int(graph.size.sum()), border)
        nodes = _worth_a_look(tree, score, graph, params)
        members.append(tree.members(nodes))
        scores.append(score[nodes])
    score = torch.cat(scores)
    best = score.argsort(descending=True, stable=True)[: params.candidates]
    return torch.cat(members)[best], score[best]


def _objectness(tree: Tree, pixels: int, border_C: Tensor) -> Tensor:
    """(K,) product of every factor but the contrast to the ring."""
    area, rim, like_whole = tree.sums[:, 0], tree.sums[:, 1], tree.sums[:, 2] / tree.sums[:, 0]
    mean = tree.sums[:, 3:] / area[:, None]
    firm = mean.norm(dim=1).clamp(max=1)
    outline, step = tree.outline.unbind(1)
    share = area / pixels
    growth = torch.where(tree.parent < 0, 0.5, 1 - area / area[tree.parent.clamp_min(0)])
    score = (
        (share * (1 - share)).clamp_min(0).sqrt()  # neither a speck nor the whole photo
        * (1 - firm + firm * _unlikeness(mean, border_C[None]))  # 1 - mean cosine with what lies along the border
        * torch.exp(-2 * rim / (rim + outline).clamp_min(1))  # not cut off by the photo's border
        * growth  # the next merge would add much
        * (step / outline.clamp_min(1)).sqrt()  # an edge of colour along the outline
        * (area.sqrt() / outline.clamp_min(1))  # compact
        * like_whole.clamp_min(1e-4)  # what the photo is of
    )
    return torch.nan_to_num(score, 0.0, 0.0, 0.0)


def _worth_a_look(tree: Tree, score_K: Tensor, graph: RegionGraph, params: TreeParams) -> Tensor:
    """The best nodes of a tree by score, of a size that an object can have; of any where none has."""
    share = tree.sums[:, 0] / graph.size.sum()
    good = (share >= params.min_area) & (share <= params.max_area) & (score_K > 0)
    nodes = torch.nonzero(good if bool(good.any()) else score_K > 0)[:, 0]
    return nodes[score_K[nodes].argsort(descending=True, stable=True)[: params.candidates]]


def _ring_contrast(members_MS: Tensor, features_SC: Tensor, graph: RegionGraph) -> Tensor:
    """(M,) 1 - cosine of the mean feature inside and in a ring of superpixels around; 0 where there is no ring."""
    both = torch.cat([graph.pairs, graph.pairs.flip(0)], 1)
    count = len(graph.size)
    touch = torch.sparse_coo_tensor(
        both, graph.size.new_ones(both.shape[1]), (count, count), check_invariants=False
    ).coalesce()
    inside = members_MS.float()
    wide = inside.t()
    for _ in range(RING):
        wide = ((torch.sparse.mm(touch, wide) + wide) > 0).float()
    ring = wide.t() - inside
    mass = features_SC * graph.size[:, None]
    return torch.where(ring.any(1), _unlikeness(inside @ mass, ring @ mass), 0.0)


def _select(
    labels_HW: Tensor, weights_SN: Tensor, graph: RegionGraph, members: Tensor, scores: Tensor, params: TreeParams
) -> TreeMasks:
    """Rank, suppress and nest the candidates."""
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > 0]
    members, scores = members[order], scores[order]
    common = _common(members, graph.size)
    iou = common / (common.diagonal()[:, None] + common.diagonal()[None] - common).clamp_min(1)
    scores = scores * _decay(iou, params.decay)
    kept = _suppress(iou, scores, params)
    parents, levels = _nesting(common[kept][:, kept])
    return TreeMasks(
        labels_HW, graph.size, weights_SN, members[kept], scores[kept] / (scores[kept] + HALF), parents, levels
    )


def _decay(iou_MM: Tensor, strength: float) -> Tensor:
    """(M,) factor of each mask's score, by its overlaps with better ones and by theirs with better ones still."""
    if not len(iou_MM):
        return iou_MM.new_ones(0)
    lower = iou_MM.tril(-1)
    worst = lower.amax(1)
    factor = torch.exp(-strength * (lower.square() - worst[None].square())).tril(-1) + torch.ones_like(lower).triu()
    return factor.amin(1).clamp(max=1)


def _suppress(iou_MM: Tensor, scores_M: Tensor, params: TreeParams) -> Tensor:
    """Indices, best first, of the masks that repeat no better one, up to `max_masks`."""
    order = scores_M.argsort(descending=True, stable=True)
    clash = (iou_MM[order][:, order] > params.max_iou).cpu().numpy()
    alive, kept = np.ones(len(order), bool), list[int]()
    for row in range(len(order)):
        if alive[row] and len(kept) < params.max_masks:
            kept.append(row)
            alive &= ~clash[row]
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def _nesting(common_MM: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection -> `parents` and `levels`: the smallest larger mask that holds most of each."""
    area = common_MM.diagonal()
    if not len(area):
        return area.long(), area.long()
    holds = (common_MM / area[:, None].clamp_min(1) >= COVERED) & (area[None] > area[:, None])
    best, parents = torch.where(holds, area[None], torch.inf).min(1)
    parents = torch.where(best.isfinite(), parents, -1)
    levels, up = torch.zeros_like(parents), parents
    while bool((up >= 0).any()):
        levels += (up >= 0).long()
        up = torch.where(up >= 0, parents[up.clamp_min(0)], -1)
    return parents, levels


def _common(members_MS: Tensor, size_S: Tensor) -> Tensor:
    """(M, M) pixels that two masks share; their own areas on the diagonal."""
    inside = members_MS.float()
    return (inside * size_S) @ inside.t()


def _standard(features_NC: Tensor) -> Tensor:
    """Unit rows, less their mean, of total variance 1: the scale and the common direction of a layer do not matter."""
    rows = F.normalize(features_NC.float(), dim=1)
    rows = rows - rows.mean(0)
    return rows / rows.square().sum(1).mean().sqrt().clamp_min(1e-6)


def _principal(rows_NC: Tensor, channels: int) -> Tensor:
    """(N, <= channels) the rows in their strongest directions: inner products survive as far as these carry them."""
    directions = torch.linalg.eigh(rows_NC.t() @ rows_NC)[1]
    return rows_NC @ directions[:, -min(channels, rows_NC.shape[1]) :]


def _unlikeness(first: Tensor, second: Tensor) -> Tensor:
    """(M,) 1 - cosine of rows, exact too where they are nearly alike."""
    gap = F.normalize(first, dim=1) - F.normalize(second, dim=1)
    return (gap.square().sum(1) / 2).clamp_min(LEAST)


def _no_candidates(graph: RegionGraph) -> tuple[Tensor, Tensor]:
    count = len(graph.size)
    return torch.zeros(0, count, dtype=torch.bool, device=graph.size.device), graph.size.new_zeros(0)
