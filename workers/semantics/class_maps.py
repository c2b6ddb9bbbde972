"""Class maps of whole photos from scores on the patch grid: what STEGO and the clusters of patches have in common.

A photo keeps its aspect; photos of one shape that follow each other share a forward pass; log-probabilities, never
class ids, are resized. The CRF sees the photo at the size that the backbone sees, as published: at that of a large
photo S maps would not fit in memory.

Shapes: B images, (h, w) patches, S classes, (H, W) pixels of the original.
"""

from __future__ import annotations

import functools
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
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
from workers import devices
from workers.crf import STEGO, CrfParams, dense_crf_of
from workers.decode import Pixels, resize_keep_aspect
from workers.fast_crf import fast_crf_of
from workers.images import LoadedImage, Row, table_of_jobs
from workers.overlap import Flow, Job
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA
from workers.semantics.teacher import Teacher


def crf_of(wanted: bool | str) -> CrfParams | None:
    """What `semantics.crf` asks for: STEGO's, as published or fast, or none."""
    return replace(STEGO, fast=wanted == "fast") if wanted else None


class ClassMapWorker(ABC):
    """Holds the teacher; `process` is a pure function of the images. Subclasses say what the classes' scores are."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        image_size: int,
        crf: CrfParams | None,
        device: str,
        batch_size: int = 1,
        flow: Flow | None = None,
    ) -> None:
        """`image_size`: pixels of the short side, made a multiple of the patch."""
        self._teacher = teacher
        self._image_size = image_size
        self._crf = crf
        self._device = device
        self._batch_size = batch_size
        self._flow = flow

    @abstractmethod
    def log_probs(self, resized_BHW3: Pixels, phases: Phases) -> Tensor:
        """(B, H, W, 3) uint8, sides multiples of the patch -> (B, S, h, w) log-probabilities of the classes."""

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of SEMANTICS_SCHEMA, one row each, labels 0..S-1.

        At most `batch_size` images are held at a time, and as many again for each batch that `flow` has under way.
        RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_jobs(
            images, self._batch_size, lambda batch: self._rows(batch, phases), phases, SEMANTICS_SCHEMA, self._flow
        )

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Job[list[Row]]:
        photos = [image.pixels for image in batch if image.pixels is not None]
        resized = yield [phases.named("resize", self._resize, photo) for photo in photos]
        scores = self._scores(resized, phases)
        crf = self._crf
        if crf is not None and devices.many_threads(self._device):
            with phases("crf"):
                scores, crf = _refined(resized, scores, crf), None
        calls = [(*each, crf) for each in zip(photos, resized, scores, strict=True)]
        pngs = iter((yield [functools.partial(self._label_png, *call, phases) for call in calls]))
        return [plain_row(image) | {"labels": None if image.pixels is None else next(pngs)} for image in batch]

    def _resize(self, photo: Pixels) -> Pixels:
        return resize_keep_aspect(photo, self._image_size, self._teacher.patch_size)

    def _scores(self, resized: Sequence[Pixels], phases: Phases) -> list[Tensor]:
        """(S, h, w) log-probabilities of each photo; those of one shape that follow each other share a pass."""
        groups = [np.stack(list(same)) for _, same in itertools.groupby(resized, np.shape)]
        with torch.inference_mode():
            return [scores for photos in groups for scores in self.log_probs(photos, phases)]

    @torch.inference_mode()
    def _label_png(
        self, photo: Pixels, resized: Pixels, log_probs_Shw: Tensor, crf: CrfParams | None, phases: Phases
    ) -> bytes:
        if crf is not None:
            with phases("crf"):
                (log_probs_Shw,) = _refined([resized], [log_probs_Shw], crf)
        with phases("upsample"):
            labels_HW = argmax_at_size(log_probs_Shw, photo.shape[:2]).cpu().numpy()
        with phases("encode"):
            return encode_labels(labels_HW)


@torch.inference_mode()
def _refined(images: Sequence[Pixels], log_probs: Sequence[Tensor], params: CrfParams) -> list[Tensor]:
    """(S, h, w) of each image of H x W pixels -> (S, H, W) log-probabilities after the CRF."""
    if not images or len(log_probs[0]) < 2:
        return list(log_probs)
    probs = [
        F.interpolate(each[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0].softmax(0)
        for image, each in zip(images, log_probs, strict=True)
    ]
    refine = fast_crf_of if params.fast and len(probs[0]) > 2 else dense_crf_of
    return [each.clamp_min(1e-10).log() for each in refine(images, probs, params)]


def encode_labels(labels_HW: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 class map -> grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(labels_HW).save(stream, format="PNG")
    return stream.getvalue()


def plain_row(image: LoadedImage) -> dict[str, Any]:
    """What every table says of a photo."""
    return {"image_id": image.image_id, "status": str(image.status), "error": image.error}
