"""STEGO in one worker: teacher features of a photo, neighbours among photos, and class maps from a fitted head.

Teacher features are those of a centre crop of 224 pixels; the published program resizes with the nearest pixel, here
Lanczos is used, which does not alias. Class maps cover the whole photo: its aspect is kept, the code is averaged with
that of the mirrored photo, and log-probabilities, never class ids, are resized.

Shapes: B images, (h, w) patches, C feature channels, D code channels, S classes, (H, W) pixels of the original.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.backbone import Backbone
from model.enlarge import argmax_at_size
from model.stego import ALPHA, ClusterProbe, StegoHead
from workers.crf import CrfParams, dense_crf
from workers.decode import Pixels, resize_keep_aspect
from workers.embeddings import to_images
from workers.images import LoadedImage, table_of_images
from workers.phases import Phases
from workers.records import FEATURES_SCHEMA, SEMANTICS_SCHEMA, Status

Crops = Literal["centre", "five"]

TEACHER_SIZE = 224  # pixels
NEIGHBOUR_ROWS = 2048  # queries at a time, so that memory does not grow with the square of the photos


@dataclass(frozen=True, slots=True)
class TeacherParams:
    """What decides the teacher's features besides its weights: pixels a side, and one centre crop or five halves."""

    image_size: int = TEACHER_SIZE
    crops: Crops = "centre"


class TeacherWorker:
    """Holds the backbone; `process` is a pure function of the images."""

    def __init__(self, backbone: Backbone, params: TeacherParams, *, device: str, batch_size: int = 1) -> None:
        self._backbone = backbone
        self._crops = params.crops
        self._grid = max(1, round(params.image_size / backbone.patch_size))
        self._device = device
        self._batch_size = batch_size

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of FEATURES_SCHEMA, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(images, self._batch_size, lambda batch: self._rows(batch, phases), FEATURES_SCHEMA)

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> list[dict[str, Any]]:
        with phases("resize"):
            side = self._grid * self._backbone.patch_size
            views = [teacher_views(image.pixels, side, self._crops) for image in batch if image.pixels is not None]
        with phases("backbone"):
            found = iter(self._features(views))
        rows = []
        for image in batch:
            feats = None if image.pixels is None else next(found)
            stored = {} if feats is None else {"shape": feats.shape, "features": feats.astype("<f2").tobytes()}
            rows.append(_row(image) | stored)
        return rows

    def _features(self, views: list[Pixels]) -> list[NDArray[np.float32]]:
        """(crops, C, h, w) of each image, all images in one forward pass."""
        if not views:
            return []
        tokens_NPC = self._backbone.tokens(to_images(np.concatenate(views), self._device))
        feats = tokens_NPC.mT.unflatten(2, (self._grid, self._grid)).cpu().numpy()
        return np.split(feats, len(views))


def teacher_views(pixels: Pixels, size: int, crops: Crops) -> Pixels:
    """(H, W, 3) uint8 -> (1 or 5, size, size, 3) uint8: the largest centred square, resized, of the photo or of crops.

    The five crops (appendix A.3) are half as high and half as wide as the photo: its corners, row by row, and centre.
    """
    height, width = pixels.shape[:2]
    if crops == "centre":
        return _square(pixels, (0, 0, width, height), size)[None]
    half_h, half_w = max(1, height // 2), max(1, width // 2)
    right, bottom = width - half_w, height - half_h
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return np.stack([_square(pixels, (x, y, x + half_w, y + half_h), size) for x, y in corners])


def _square(pixels: Pixels, box: tuple[int, int, int, int], size: int) -> Pixels:
    x1, y1, x2, y2 = box
    side = min(x2 - x1, y2 - y1)
    left, top = x1 + (x2 - x1 - side) / 2, y1 + (y2 - y1 - side) / 2
    square = (left, top, left + side, top + side)
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS, box=square))


def with_rows_left_out(features: pa.Table, image_ids: Sequence[str], rows: Sequence[int]) -> pa.Table:
    """A table of FEATURES_SCHEMA of the photos `rows` of a shard -> of all its photos, the others `not_sampled`."""
    kept = set(rows)
    others = [row for row in range(len(image_ids)) if row not in kept]
    blank = [{"image_id": image_ids[row], "status": str(Status.NOT_SAMPLED)} for row in others]
    whole = pa.concat_tables([features, pa.Table.from_pylist(blank, schema=FEATURES_SCHEMA)])
    return whole.take(np.argsort([*rows, *others]))


def read_features(row: Mapping[str, Any]) -> NDArray[np.float16]:
    """A row of FEATURES_SCHEMA with an image -> (crops, C, h, w) float16. ValueError when the sizes do not agree."""
    shape = tuple(row["shape"])
    if len(row["features"]) != 2 * math.prod(shape):
        raise ValueError(f"{row['image_id']}: {len(row['features'])} bytes of features are not {shape} in float16")
    return np.frombuffer(row["features"], "<f2").reshape(shape)


def descriptor(feats_nChw: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, C, h, w) -> (n, C) float32: the mean patch feature, of unit norm, or zero where it has no direction."""
    mean_nC = feats_nChw.mean((2, 3), dtype=np.float32)
    return mean_nC / np.maximum(np.linalg.norm(mean_nC, axis=1, keepdims=True), 1e-10)


def nearest_neighbours(descriptors_NC: NDArray[np.float32], count: int, *, threads: int) -> NDArray[np.int32]:
    """(N, C) unit rows -> (N, count) int32: the most similar other rows, nearest first; exact, by blocks of queries.

    A row is told from its copies by its number, so that of two equal photos each is the other's neighbour.
    ValueError for fewer than count + 1 rows.
    """
    total = len(descriptors_NC)
    if total < count + 1:
        raise ValueError(f"{count} neighbours need at least {count + 1} rows, got {total}")
    faiss.omp_set_num_threads(threads)
    rows = np.ascontiguousarray(descriptors_NC, np.float32)
    found = np.empty((total, count), np.int32)
    for start in range(0, total, NEIGHBOUR_ROWS):
        queries = rows[start : start + NEIGHBOUR_ROWS]
        # By distance, not by inner product: at unit norm the order is the same, and ties go to the lowest number.
        ids = faiss.knn(queries, rows, count + 1, metric=faiss.METRIC_L2)[1]
        other = ids != np.arange(start, start + len(queries))[:, None]
        other[other.all(axis=1), -1] = False  # the row itself was not found, behind so many copies
        found[start : start + len(queries)] = ids[other].reshape(-1, count)
    return found


@dataclass(frozen=True, slots=True)
class ClassMapParams:
    """What decides a class map besides the fitted head. The CRF sees the photo at the size that the backbone sees."""

    image_size: int = 448  # pixels of the short side; made a multiple of the patch
    flip: bool = True  # average the code with that of the mirrored photo
    alpha: float = ALPHA
    crf: CrfParams | None = None


class StegoWorker:
    """Holds the backbone and the fitted head and probe; `process` is a pure function of the images."""

    def __init__(
        self,
        backbone: Backbone,
        head: StegoHead,
        probe: ClusterProbe,
        params: ClassMapParams,
        *,
        device: str,
        batch_size: int = 1,
    ) -> None:
        if head.dim_in != backbone.dim:
            raise ValueError(f"the head takes {head.dim_in} channels, the backbone gives {backbone.dim}: fit it again")
        self._backbone = backbone
        self._head = head.eval().to(device)
        self._probe = probe.to(device)
        self._params = params
        self._device = device
        self._batch_size = batch_size

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
                rows.append(_row(image) | {"labels": None if labels_HW is None else encode_labels(labels_HW)})
        return rows

    @torch.inference_mode()
    def _maps(self, photos: list[Pixels], phases: Phases) -> Iterator[NDArray[np.uint8]]:
        """The class map of each photo; photos of one shape that follow each other share a forward pass."""
        with phases("resize"):
            patch = self._backbone.patch_size
            resized = [resize_keep_aspect(photo, self._params.image_size, patch) for photo in photos]
        pairs = zip(photos, resized, strict=True)
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[1].shape):
            same = list(group)
            log_probs_BShw = self.log_probs(np.stack([small for _, small in same]), phases)
            for (photo, small), log_probs_Shw in zip(same, log_probs_BShw, strict=True):
                if self._params.crf is not None:
                    with phases("crf"):
                        log_probs_Shw = _refined(small, log_probs_Shw, self._params.crf)
                with phases("upsample"):
                    yield argmax_at_size(log_probs_Shw, photo.shape[:2]).cpu().numpy()

    @torch.inference_mode()
    def log_probs(self, resized_BHW3: Pixels, phases: Phases) -> Tensor:
        """(B, H, W, 3) uint8, sides multiples of the patch -> (B, S, h, w) log-probabilities of the classes."""
        with phases("backbone"):
            images = to_images(resized_BHW3, self._device)
            views = [images, images.flip(3)] if self._params.flip else [images]
            tokens = [self._backbone.tokens(view) for view in views]
        with phases("head"):
            grid = [side // self._backbone.patch_size for side in images.shape[2:]]
            codes = [self._head(view.mT.unflatten(2, grid)) for view in tokens]
            code = (codes[0] + codes[1].flip(3)) / 2 if self._params.flip else codes[0]
            return self._probe.log_probs(code, self._params.alpha)


def _refined(image_HW3: Pixels, log_probs_Shw: Tensor, params: CrfParams) -> Tensor:
    """(S, h, w) -> (S, H, W) log-probabilities after the CRF on an image of H x W pixels.

    At the size that the backbone sees, as published; at that of a large photo S maps would not fit in memory.
    """
    if len(log_probs_Shw) < 2:
        return log_probs_Shw
    size = image_HW3.shape[:2]
    upsampled = F.interpolate(log_probs_Shw[None], size=size, mode="bilinear", align_corners=False)[0]
    return dense_crf(image_HW3, upsampled.softmax(0), params).clamp_min(1e-10).log()


def encode_labels(labels_HW: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 class map -> grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(labels_HW).save(stream, format="PNG")
    return stream.getvalue()


def _row(image: LoadedImage) -> dict[str, Any]:
    return {"image_id": image.image_id, "status": str(image.status), "error": image.error}
