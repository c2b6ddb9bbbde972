"""Class maps of whole photos from scores on the patch grid: what STEGO and the clusters of patches have in common.

A photo keeps its aspect; photos of one shape that follow each other share a forward pass; log-probabilities, never
class ids, are resized. The CRF sees the photo at the size that the backbone sees, as published: at that of a large
photo S maps would not fit in memory.

Shapes: B images, (h, w) patches, S classes, (H, W) pixels of the original.
"""

from __future__ import annotations

import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.enlarge import argmax_at_size
from workers.crf import STEGO, CrfParams, dense_crf
from workers.decode import Pixels, resize_keep_aspect
from workers.fast_crf import fast_crf
from workers.images import LoadedImage, table_of_images
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA
from workers.semantics.teacher import Teacher


def crf_of(wanted: bool | str) -> CrfParams | None:
    """What `semantics.crf` asks for: STEGO's, as published or fast, or none."""
    return replace(STEGO, fast=wanted == "fast") if wanted else None


class ClassMapWorker(ABC):
    """Holds the teacher; `process` is a pure function of the images. Subclasses say what the classes' scores are."""

    def __init__(
        self, teacher: Teacher, *, image_size: int, crf: CrfParams | None, device: str, batch_size: int = 1
    ) -> None:
        """`image_size`: pixels of the short side, made a multiple of the patch."""
        self._teacher = teacher
        self._image_size = image_size
        self._crf = crf
        self._device = device
        self._batch_size = batch_size

    @abstractmethod
    def log_probs(self, resized_BHW3: Pixels, phases: Phases) -> Tensor:
        """(B, H, W, 3) uint8, sides multiples of the patch -> (B, S, h, w) log-probabilities of the classes."""

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of SEMANTICS_SCHEMA, one row each, labels 0..S-1.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(images, self._batch_size, lambda batch: self._rows(batch, phases), SEMANTICS_SCHEMA)

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> list[dict[str, Any]]:
        maps = self._maps([image.pixels for image in batch if image.pixels is not None], phases)
        rows = []
        for image in batch:
            labels_HW = None if image.pixels is None else next(maps)
            with phases("encode"):
                png = None if labels_HW is None else encode_labels(labels_HW)
            rows.append(plain_row(image) | {"labels": png})
        return rows

    @torch.inference_mode()
    def _maps(self, photos: list[Pixels], phases: Phases) -> Iterator[NDArray[np.uint8]]:
        """The class map of each photo."""
        with phases("resize"):
            patch = self._teacher.patch_size
            resized = [resize_keep_aspect(photo, self._image_size, patch) for photo in photos]
        pairs = zip(photos, resized, strict=True)
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[1].shape):
            same = list(group)
            log_probs_BShw = self.log_probs(np.stack([small for _, small in same]), phases)
            for (photo, small), log_probs_Shw in zip(same, log_probs_BShw, strict=True):
                if self._crf is not None:
                    with phases("crf"):
                        log_probs_Shw = _refined(small, log_probs_Shw, self._crf)
                with phases("upsample"):
                    yield argmax_at_size(log_probs_Shw, photo.shape[:2]).cpu().numpy()


def _refined(image_HW3: Pixels, log_probs_Shw: Tensor, params: CrfParams) -> Tensor:
    """(S, h, w) -> (S, H, W) log-probabilities after the CRF on an image of H x W pixels."""
    if len(log_probs_Shw) < 2:
        return log_probs_Shw
    size = image_HW3.shape[:2]
    upsampled = F.interpolate(log_probs_Shw[None], size=size, mode="bilinear", align_corners=False)[0]
    refine = fast_crf if params.fast and len(log_probs_Shw) > 2 else dense_crf
    return refine(image_HW3, upsampled.softmax(0), params).clamp_min(1e-10).log()


def encode_labels(labels_HW: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 class map -> grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(labels_HW).save(stream, format="PNG")
    return stream.getvalue()


def plain_row(image: LoadedImage) -> dict[str, Any]:
    """What every table says of a photo."""
    return {"image_id": image.image_id, "status": str(image.status), "error": image.error}
