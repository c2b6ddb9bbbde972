"""The instances stage of one worker: decoded images in, one row of masks and embeddings each out.

ViT keys -> MaskCut -> dense CRF -> masks at the original size -> one embedding a mask (CutLER, arXiv 2301.11320;
U2Seg, arXiv 2312.17243). A bad image passes through as a row with its status.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from model.backbone import Backbone
from workers.crf import CrfParams, refine_masks
from workers.decode import resize_keep_aspect, resize_square
from workers.embeddings import embed_crops, masked_crop, to_images
from workers.images import LoadedImage, table_of_images
from workers.maskcut import maskcut
from workers.masks import encode_rle, mask_box, resize_mask
from workers.phases import Phases
from workers.records import Status, instances_schema


@dataclass(frozen=True, slots=True)
class InstanceParams:
    """Everything besides the weights that decides the rows."""

    image_size: int
    resize: Literal["square", "keep_aspect"]
    tau: float
    max_masks: int
    crf: CrfParams
    min_iou: float
    crop_size: int


class InstanceWorker:
    """Holds the backbone; `process` is a pure function of the images."""

    def __init__(
        self, backbone: Backbone, params: InstanceParams, *, device: str, batch_size: int = 1, crop_batch: int = 16
    ) -> None:
        self._backbone = backbone
        self._params = params
        self._device = device
        self._batch_size = batch_size
        self._crop_batch = crop_batch

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `instances_schema`, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(
            images, self._batch_size, lambda batch: self._rows(batch, phases), instances_schema(self._backbone.dim)
        )

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> list[dict[str, Any]]:
        readable = [image for image in batch if image.pixels is not None]
        masks = dict(zip((image.image_id for image in readable), self._masks(readable, phases), strict=True))
        with phases("embedding"):
            embeddings = self._embeddings(readable, [masks[image.image_id][0] for image in readable])
        rows = []
        for image in batch:
            if image.pixels is None:
                rows.append(_row(image, image.status, image.error))
            else:
                found, scores = masks[image.image_id]
                status = Status.OK if len(found) else Status.NO_MASKS
                rows.append(_row(image, status, None, found, scores, embeddings[image.image_id]))
        return rows

    def _masks(self, images: list[LoadedImage], phases: Phases) -> Iterator[tuple[list[np.ndarray], list[float]]]:
        """Final masks at the original size, and their scores, of each image."""
        with phases("resize"):
            resized = [self._resize(image.pixels) for image in images if image.pixels is not None]
        patch = self._backbone.patch_size
        pairs = zip(images, resized, strict=True)
        for size, group in groupby(pairs, key=lambda pair: pair[1].shape[:2]):  # one forward pass an image shape
            same = list(group)
            with phases("backbone"):
                keys = self._backbone.keys(to_images(np.stack([pixels for _, pixels in same]), self._device))
            with phases("maskcut"):
                grid = (size[0] // patch, size[1] // patch)
                cuts = maskcut(keys, grid, tau=self._params.tau, max_masks=self._params.max_masks)
            for (image, pixels), cut in zip(same, cuts, strict=True):
                with phases("crf"):
                    yield self._refine(image, pixels, cut.masks)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        patch, size = self._backbone.patch_size, self._params.image_size
        if self._params.resize == "square":
            return resize_square(pixels, max(1, round(size / patch)) * patch)
        return resize_keep_aspect(pixels, size, patch)

    def _refine(
        self, image: LoadedImage, resized_hw3: np.ndarray, coarse_nhw: np.ndarray
    ) -> tuple[list[np.ndarray], list[float]]:
        """Coarse patch masks (n, h, w) -> masks at the original size and their scores; those the CRF rejects fall."""
        assert image.pixels is not None
        patch = self._backbone.patch_size
        coarse = coarse_nhw[coarse_nhw.any((1, 2))].repeat(patch, 1).repeat(patch, 2)
        refined, ious = refine_masks(resized_hw3, coarse, self._params.crf, device=self._device)
        height, width = image.pixels.shape[:2]
        kept = [
            (resize_mask(mask, height, width), float(iou))
            for mask, iou in zip(refined, ious, strict=True)
            if iou >= self._params.min_iou
        ]
        kept = [(mask, iou) for mask, iou in kept if mask.any()]
        return [mask for mask, _ in kept], [iou for _, iou in kept]

    def _embeddings(self, images: list[LoadedImage], masks: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
        """(n, D) float16 embeddings by image_id; the crops of all images share their forward passes."""
        crops = [
            masked_crop(image.pixels, mask, self._params.crop_size)
            for image, found in zip(images, masks, strict=True)
            for mask in found
            if image.pixels is not None
        ]
        vectors = embed_crops(self._backbone, crops, batch_size=self._crop_batch, device=self._device)
        ends = np.cumsum([len(found) for found in masks])
        parts = np.split(vectors.astype(np.float16), ends[:-1]) if masks else []
        return {image.image_id: part for image, part in zip(images, parts, strict=True)}


def _row(
    image: LoadedImage,
    status: Status,
    error: str | None,
    masks: list[np.ndarray] | None = None,
    scores: list[float] | None = None,
    embeddings: np.ndarray | None = None,
) -> dict[str, Any]:
    masks = masks or []
    size = (None, None) if image.pixels is None else image.pixels.shape[:2]
    return {
        "image_id": image.image_id,
        "height": size[0],
        "width": size[1],
        "status": str(status),
        "error": error,
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [mask_box(mask) for mask in masks],
        "area": [int(mask.sum()) for mask in masks],
        "score": scores or [],
        "embedding": [] if embeddings is None else list(embeddings),
    }
