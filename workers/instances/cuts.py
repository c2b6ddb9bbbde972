"""Masks by iterated normalised cuts: ViT features -> MaskCut -> dense CRF -> one embedding a mask (CutLER, arXiv
2301.11320; U2Seg, arXiv 2312.17243)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.backbone import Backbone
from workers import devices
from workers.crf import CrfParams, exact_log_odds, finish_masks, foregrounds_of, refine_masks
from workers.decode import Pixels, resize_keep_aspect, resize_square
from workers.embeddings import embed_crops, masked_crop
from workers.fast_crf import fast_log_odds
from workers.images import LoadedImage
from workers.instances.found import Found, encode_masks
from workers.instances.objectness import objectness
from workers.instances.passes import forward_passes, resize_all
from workers.maskcut import maskcut
from workers.masks import resize_mask
from workers.ncut import COSINE_BINS, sample_cosines
from workers.overlap import Job
from workers.phases import Phases

Cut = tuple[LoadedImage, Pixels, np.ndarray, np.ndarray]  # as `MaskCuts._cuts` has them
Refined = tuple[np.ndarray, np.ndarray]  # masks (n, h, w), and how much the CRF kept of each
Masks = tuple[list[np.ndarray], list[float]]  # final ones at the original size, and their scores


@dataclass(frozen=True, slots=True)
class CutParams:
    """Everything besides the weights that decides the masks."""

    image_size: int
    resize: Literal["square", "keep_aspect"]
    features: str  # which output of the backbone is cut
    tau: float
    max_masks: int
    crf: CrfParams
    min_iou: float
    crop_size: int
    score: Literal["objectness", "crf_iou"] = "objectness"


class MaskCuts:
    """Up to `max_masks` disjoint masks a photo, each with its objectness, or by how little the CRF changed it."""

    nested = False

    def __init__(self, backbone: Backbone, params: CutParams, *, device: str, crop_batch: int = 16) -> None:
        self.dim = backbone.dim
        self._backbone = backbone
        self._params = params
        self._device = device
        self._crop_batch = crop_batch

    def find(self, images: Sequence[LoadedImage], phases: Phases) -> Job[list[Found]]:
        resized = yield from resize_all(images, self._resize, phases)
        cuts = list(self._cuts(images, resized, phases))
        with phases("crf"):
            refinements = self._refinements(cuts)
        pairs = zip(cuts, refinements, strict=True)
        refined: list[Masks] = yield [phases.named("crf", self._refine, *pair) for pair in pairs]
        crops = yield [phases.named("embedding", self._crops, *pair) for pair in zip(images, refined, strict=True)]
        with phases("embedding"):
            embeddings = self._embeddings(crops)
        masks = zip(refined, embeddings, strict=True)
        return (yield [phases.named("encode", _found, *kept, vectors) for kept, vectors in masks])

    def _cuts(self, images: Sequence[LoadedImage], resized: Sequence[Pixels], phases: Phases) -> Iterator[Cut]:
        """Each image with its resized pixels, its coarse masks (n, h, w), and their objectness (n,)."""
        params = self._params
        passes = forward_passes(self._backbone, images, resized, (params.features,), self._device, phases)
        for same, pixels, grid, outputs in passes:
            beside = functools.partial(_scores_and_graph, grid=grid, tau=params.tau)
            with phases("maskcut"):
                features = outputs[params.features]
                cuts = maskcut(features, grid, tau=params.tau, max_masks=params.max_masks, beside=beside)
            _count_graphs([cut.beside[params.max_masks :] for cut in cuts], phases)
            found = [cut.masks.any((1, 2)) for cut in cuts]
            masks = [cut.masks[some] for cut, some in zip(cuts, found, strict=True)]
            scores = [cut.beside[: params.max_masks][some] for cut, some in zip(cuts, found, strict=True)]
            yield from zip(same, pixels, masks, scores, strict=True)

    def _resize(self, pixels: Pixels) -> Pixels:
        patch, size = self._backbone.patch_size, self._params.image_size
        if self._params.resize == "square":
            return resize_square(pixels, max(1, round(size / patch)) * patch)
        return resize_keep_aspect(pixels, size, patch)

    def _refinements(self, cuts: Sequence[Cut]) -> list[Callable[[], Refined]]:
        """Of each image the call that gives its coarse masks after the CRF, which on a GPU is done here, of all."""
        patch, crf, device = self._backbone.patch_size, self._params.crf, self._device
        log_odds = fast_log_odds if crf.fast else exact_log_odds
        pixels = [resized for _, resized, _, _ in cuts]
        coarse = [masks.repeat(patch, 1).repeat(patch, 2) for _, _, masks, _ in cuts]
        if devices.many_threads(device):
            found = foregrounds_of(pixels, coarse, crf, device=device, log_odds=log_odds)
            return [functools.partial(finish_masks, *pair) for pair in zip(found, coarse, strict=True)]
        refine = functools.partial(refine_masks, params=crf, device=device, log_odds=log_odds)
        return [functools.partial(refine, *pair) for pair in zip(pixels, coarse, strict=True)]

    def _refine(self, cut: Cut, refine: Callable[[], Refined]) -> Masks:
        """An image's coarse masks -> masks at the original size and their scores; those the CRF rejects fall."""
        image, _, _, likeness = cut
        assert image.pixels is not None
        refined, ious = refine()
        scores = likeness if self._params.score == "objectness" else ious
        height, width = image.pixels.shape[:2]
        kept = [
            (resize_mask(mask, height, width), float(score))
            for mask, iou, score in zip(refined, ious, scores, strict=True)
            if iou >= self._params.min_iou
        ]
        kept = [(mask, score) for mask, score in kept if mask.any()]
        return [mask for mask, _ in kept], [score for _, score in kept]

    def _crops(self, image: LoadedImage, found: Masks) -> list[Pixels]:
        assert image.pixels is not None
        return [masked_crop(image.pixels, mask, self._params.crop_size) for mask in found[0]]

    def _embeddings(self, crops: Sequence[list[Pixels]]) -> list[np.ndarray]:
        """(n, D) float16 embeddings of each image; the crops of all images share their forward passes."""
        every = [crop for found in crops for crop in found]
        vectors = embed_crops(self._backbone, every, batch_size=self._crop_batch, device=self._device)
        ends = np.cumsum([len(found) for found in crops])
        return np.split(vectors.astype(np.float16), ends[:-1]) if crops else []


def _found(masks: list[np.ndarray], scores: list[float], vectors: np.ndarray) -> Found:
    return Found(*encode_masks(masks), scores, list(vectors))


def _scores_and_graph(features_BND: Tensor, masks_BMN: Tensor, *, grid: tuple[int, int], tau: float) -> Tensor:
    """(B, M + 1 + COSINE_BINS): the objectness of each mask, the share of patches that the graph joins, and how often
    each similarity is there."""
    cosines_BP = sample_cosines(features_BND)
    places_BP = ((cosines_BP + 1) * (COSINE_BINS / 2)).long().clamp(0, COSINE_BINS - 1)
    counts_BK = cosines_BP.new_zeros(len(cosines_BP), COSINE_BINS)
    counts_BK.scatter_add_(1, places_BP, torch.ones_like(cosines_BP))
    joined_B1 = (cosines_BP > tau).sum(1, keepdim=True) / max(1, cosines_BP.shape[1])
    return torch.cat([objectness(features_BND, masks_BMN.unflatten(2, grid)), joined_B1, counts_BK], 1)


def _count_graphs(rows: Sequence[np.ndarray], phases: Phases) -> None:
    """Note the similarities of patches, and how many graphs can be cut at all, are complete, or have no edge."""
    joined, counts = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows])
    phases.count("cosines", counts.sum(0).astype(int).tolist())
    complete, empty = int((joined == 1).sum()), int((joined == 0).sum())
    phases.count("graphs", [len(joined) - complete - empty, complete, empty])
