"""STEGO in one worker: teacher features of a photo, neighbours among photos, and class maps from a fitted head.

Teacher features are those of a centre crop of 224 pixels; the published program resizes with the nearest pixel, here
Lanczos is used, which does not alias. Class maps cover the whole photo (`workers.semantics.class_maps`), and the code
is averaged with that of the mirrored photo.

Shapes: B images, (h, w) patches, C feature channels, D code channels, S classes, (H, W) pixels of the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.stego import ALPHA, ClusterProbe, StegoHead
from workers.crf import CrfParams
from workers.decode import Pixels
from workers.embeddings import to_images
from workers.images import LoadedImage, table_of_images
from workers.overlap import Flow
from workers.phases import Phases
from workers.records import FEATURES_SCHEMA
from workers.semantics.class_maps import ClassMapWorker, plain_row
from workers.semantics.teacher import Teacher

Crops = Literal["centre", "five"]

TEACHER_SIZE = 224  # pixels
NEIGHBOUR_ROWS = 2048  # queries at a time, so that memory does not grow with the square of the photos


@dataclass(frozen=True, slots=True)
class TeacherParams:
    """What decides the teacher's features besides its weights: pixels a side, and one centre crop or five halves."""

    image_size: int = TEACHER_SIZE
    crops: Crops = "centre"


class TeacherWorker:
    """Holds the teacher; `process` is a pure function of the images."""

    def __init__(self, teacher: Teacher, params: TeacherParams, *, device: str, batch_size: int = 1) -> None:
        self._teacher = teacher
        self._crops = params.crops
        self._grid = max(1, round(params.image_size / teacher.patch_size))
        self._device = device
        self._batch_size = batch_size

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of FEATURES_SCHEMA, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(
            images, self._batch_size, lambda batch: self._rows(batch, phases), phases, FEATURES_SCHEMA
        )

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> list[dict[str, Any]]:
        with phases("resize"):
            side = self._grid * self._teacher.patch_size
            views = [teacher_views(image.pixels, side, self._crops) for image in batch if image.pixels is not None]
        with phases("backbone"):
            found = iter(self._features(views))
        rows = []
        for image in batch:
            feats = None if image.pixels is None else next(found)
            stored = {} if feats is None else {"shape": feats.shape, "features": feats.astype("<f2").tobytes()}
            rows.append(plain_row(image) | stored)
        return rows

    def _features(self, views: list[Pixels]) -> list[NDArray[np.float32]]:
        """(crops, C, h, w) of each image, all images in one forward pass."""
        if not views:
            return []
        tokens_NPC = self._teacher.tokens(to_images(np.concatenate(views), self._device))
        feats = tokens_NPC.mT.unflatten(2, (self._grid, self._grid)).cpu().numpy()
        return np.split(feats, len(views))


def teacher_views(pixels: Pixels, size: int, crops: Crops) -> Pixels:
    """(H, W, 3) uint8 -> (1 or 5, size, size, 3) uint8: the squares of `teacher_squares`, resized."""
    photo = Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    squares = teacher_squares(height, width, crops)
    boxes = [(left, top, left + side, top + side) for left, top, side in squares]
    return np.stack([np.array(photo.resize((size, size), Image.Resampling.LANCZOS, box=box)) for box in boxes])


def teacher_squares(height: int, width: int, crops: Crops) -> list[tuple[float, float, int]]:
    """(left, top, side) in pixels of the 1 or 5 squares that are looked at: the largest centred ones of the photo or of
    its crops.

    The five crops (appendix A.3) are half as high and half as wide as the photo: its corners, row by row, and centre.
    """
    if crops == "centre":
        return [_square(0, 0, width, height)]
    half_h, half_w = max(1, height // 2), max(1, width // 2)
    right, bottom = width - half_w, height - half_h
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return [_square(x, y, half_w, half_h) for x, y in corners]


def _square(x: int, y: int, width: int, height: int) -> tuple[float, float, int]:
    side = min(width, height)
    return x + (width - side) / 2, y + (height - side) / 2, side


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
    """What decides a class map besides the fitted head."""

    image_size: int = 448  # pixels of the short side; made a multiple of the patch
    flip: bool = True  # average the code with that of the mirrored photo
    alpha: float = ALPHA
    crf: CrfParams | None = None


class StegoWorker(ClassMapWorker):
    """Holds the teacher and the fitted head and probe."""

    def __init__(
        self,
        teacher: Teacher,
        head: StegoHead,
        probe: ClusterProbe,
        params: ClassMapParams,
        *,
        device: str,
        batch_size: int = 1,
        flow: Flow | None = None,
    ) -> None:
        if head.dim_in != teacher.dim:
            raise ValueError(f"the head takes {head.dim_in} channels, the backbone gives {teacher.dim}: fit it again")
        super().__init__(
            teacher, image_size=params.image_size, crf=params.crf, device=device, batch_size=batch_size, flow=flow
        )
        self._head = head.eval().to(device)
        self._probe = probe.to(device)
        self._params = params

    @torch.inference_mode()
    def log_probs(self, resized_BHW3: Pixels, phases: Phases) -> Tensor:
        """(B, H, W, 3) uint8, sides multiples of the patch -> (B, S, h, w) log-probabilities of the classes."""
        with phases("backbone"):
            images = to_images(resized_BHW3, self._device)
            views = [images, images.flip(3)] if self._params.flip else [images]
            tokens = [self._teacher.tokens(view) for view in views]
        with phases("head"):
            grid = [side // self._teacher.patch_size for side in images.shape[2:]]
            codes = [self._head(view.mT.unflatten(2, grid)) for view in tokens]
            code = (codes[0] + codes[1].flip(3)) / 2 if self._params.flip else codes[0]
            return self._probe.log_probs(code, self._params.alpha)
