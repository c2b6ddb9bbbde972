"""The two shard stages of DatUS2 in one worker (arXiv 2401.12820): photos -> segments -> a class map of each photo.

As published, `SegmentWorker` finds the segments of a photo and embeds each by the CLS token of its crop. k-means over
the embeddings of all photos gives the centroids. `DatusWorker` names each segment by its nearest centroid. Departures
from the published code: photos are RGB (it feeds BGR), a crop is padded to a square (its centre crop loses the ends of
long segments), and a map is enlarged by nearest (its bilinear resize makes class ids that are not there).

Of conditioned features `PatchSegmentWorker` makes segments and embeddings at once: no crop passes the backbone again.

Shapes: (H, W) pixels of the original, (h, w) patches of the photo squashed to a square, n segments, D channels,
S classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import scipy.ndimage
from PIL import Image

from model.backbone import Backbone
from workers.embeddings import embed_crops, to_images
from workers.images import LoadedImage, table_of_images
from workers.kmeans import assign, embedding_rows
from workers.masks import open_png
from workers.phases import Phases
from workers.records import READABLE, SEMANTICS_SCHEMA, Status, segments_schema
from workers.semantics.louvain import NOISE, SegmentFinder

VOID = 255
MAX_CLASSES = VOID  # classes are 0..254 in a map of 8 bits

FillHoles = Literal["none", "nearest"]


@dataclass(frozen=True, slots=True)
class SegmentParams:
    """Everything besides the weights that decides the rows. Sides in pixels, made multiples of the patch."""

    image_size: int = 224  # the photo is squashed to this square, as published
    crop_size: int = 224


class SegmentWorker:
    """Holds the backbone; `process` is a pure function of the images.

    `processes` share the images of a batch, so they pay from a `batch_size` of as many on, and change no row. The keys
    are taken raw, and crops are black around the segment, for every backbone, as published. Of `patch-dct` (0.6 of all
    pairs joined in street photos in spite of its constant channel) neither keys centred on the image's mean nor crops
    filled with its own background colour gave better classes. Where all dot products of a photo are positive, as in a
    photo of one colour, it is one segment.
    """

    def __init__(
        self,
        backbone: Backbone,
        params: SegmentParams,
        *,
        device: str,
        batch_size: int = 1,
        crop_batch: int = 16,
        processes: int = 1,
    ) -> None:
        self._backbone = backbone
        self._side, self._crop_side = (_multiple(n, backbone.patch_size) for n in (params.image_size, params.crop_size))
        self._device = device
        self._batch_size = batch_size
        self._crop_batch = crop_batch
        self._find = SegmentFinder(processes)

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `segments_schema`, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(
            images,
            self._batch_size,
            lambda batch: self._rows(batch, phases),
            phases,
            segments_schema(self._backbone.dim),
        )

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Iterator[dict[str, Any]]:
        with phases("resize"):
            squares = [resize_bicubic(image.pixels, self._side) for image in batch if image.pixels is not None]
        maps = self._segments(squares, phases)
        with phases("embedding"):
            found = iter(zip(maps, self._embeddings(squares, maps), strict=True))
        for image in batch:
            yield segments_row(image, *((None, None) if image.pixels is None else next(found)))

    def _segments(self, squares: list[np.ndarray], phases: Phases) -> list[np.ndarray]:
        if not squares:
            return []
        side = self._side // self._backbone.patch_size
        with phases("backbone"):
            keys_BND = self._backbone.keys(to_images(np.stack(squares), self._device)).cpu().numpy()
        with phases("segments"):
            return self._find(keys_BND, (side, side))

    def _embeddings(self, squares: list[np.ndarray], maps: list[np.ndarray]) -> list[np.ndarray]:
        """(n, D) float16 of each image; the crops of all images share their forward passes."""
        crops = [
            segment_crop(square, segments_hw == segment, self._crop_side)
            for square, segments_hw in zip(squares, maps, strict=True)
            for segment in range(segments_hw.max() + 1)
        ]
        vectors = embed_crops(self._backbone, crops, batch_size=self._crop_batch, device=self._device)
        ends = np.cumsum([segments_hw.max() + 1 for segments_hw in maps])
        return np.split(vectors.astype(np.float16), ends[:-1]) if maps else []


class DatusWorker:
    """Holds the centroids: a segment's class is that of the centroid nearest by cosine."""

    def __init__(
        self,
        centroids_KD: np.ndarray,
        classes_K: np.ndarray | None = None,
        *,
        fill_holes: FillHoles = "none",
        threads: int = 1,
    ) -> None:
        """`classes_K`: the class 0..S-1 of each centroid; by default each is one."""
        self._classes_K = np.arange(len(centroids_KD)) if classes_K is None else classes_K
        classes = int(self._classes_K.max(initial=-1)) + 1
        if not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"semantics.classes must be in 1..{MAX_CLASSES}, the artifact has {classes}")
        self._centroids_KD = centroids_KD
        self._fill_holes = fill_holes
        self._threads = threads

    def process(self, segments: pa.Table) -> pa.Table:
        """A segments part -> table of SEMANTICS_SCHEMA: class 0..S-1 or 255 for every pixel of the original.

        ValueError when the embeddings and the centroids are of different backbones.
        """
        rows = segments.to_pylist()
        classes = self._classes(segments)
        ends = np.cumsum([len(row["embedding"]) for row in rows])[:-1]
        named = [self._row(row, part) for row, part in zip(rows, np.split(classes, ends), strict=True)] if rows else []
        return pa.Table.from_pylist(named, schema=SEMANTICS_SCHEMA)

    def _classes(self, segments: pa.Table) -> np.ndarray:
        """(sum of n,) class of every segment of the part, at once: as k-means itself labelled them."""
        vectors_ND = embedding_rows(segments["embedding"])
        if vectors_ND.shape[1] != self._centroids_KD.shape[1]:
            raise ValueError(
                f"the segments have embeddings of {vectors_ND.shape[1]} values, the classes of semantics_fit "
                f"{self._centroids_KD.shape[1]}: they are of different backbones; run semantics_fit on these segments"
            )
        nearest = assign(vectors_ND, self._centroids_KD, spherical=True, threads=self._threads)[0]
        return self._classes_K[nearest]

    def _row(self, row: dict[str, Any], classes_n: np.ndarray) -> dict[str, Any]:
        common = {"image_id": row["image_id"], "status": row["status"], "error": row["error"]}
        if row["status"] not in READABLE:
            return common | {"labels": None}
        patches_hw = class_map(decode_segments(row["segments"]), classes_n, self._fill_holes)
        labels = Image.fromarray(patches_hw).resize((row["width"], row["height"]), Image.Resampling.NEAREST)
        return common | {"status": str(Status.OK), "labels": _png(labels)}


def segment_crop(square_hw3: np.ndarray, patches_hw: np.ndarray, size: int) -> np.ndarray:
    """(H, H, 3) uint8 photo and a non-empty (h, h) bool segment of its patches -> (size, size, 3) uint8 crop.

    The box around the patches, black outside them and in the margin that makes it a square, enlarged by bicubic.
    """
    patch = len(square_hw3) // len(patches_hw)
    rows, columns = np.flatnonzero(patches_hw.any(1)), np.flatnonzero(patches_hw.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = (edge.stop - edge.start for edge in box)
    side = max(height, width) * patch
    top, left = (side - height * patch) // 2, (side - width * patch) // 2
    pixels = square_hw3[tuple(slice(edge.start * patch, edge.stop * patch) for edge in box)]
    inside = patches_hw[box].repeat(patch, 0).repeat(patch, 1)
    crop = np.zeros((side, side, 3), np.uint8)
    crop[top : top + height * patch, left : left + width * patch] = pixels * inside[..., None]
    return resize_bicubic(crop, size)


def class_map(segments_hw: np.ndarray, classes_n: np.ndarray, fill_holes: FillHoles = "none") -> np.ndarray:
    """(h, w) segments with -1 for noise and the (n,) class of each -> (h, w) uint8 classes.

    Noise is 255; with `nearest` it takes the class of the nearest patch that has one, if any patch has.
    """
    classes_hw = np.append(classes_n, VOID).astype(np.uint8)[segments_hw]  # noise, -1, picks the last entry
    noise_hw = segments_hw == NOISE
    if fill_holes == "none" or noise_hw.all():
        return classes_hw
    nearest = scipy.ndimage.distance_transform_edt(noise_hw, return_distances=False, return_indices=True)
    return classes_hw[tuple(nearest)]


def encode_segments(segments_hw: np.ndarray) -> bytes:
    """(h, w) segments 0..n-1 and -1 -> PNG, noise as the largest value of 8 bits, or of 16 if n > 255."""
    kind = np.uint8 if segments_hw.max() < np.iinfo(np.uint8).max else np.uint16
    stored = np.where(segments_hw == NOISE, np.iinfo(kind).max, segments_hw).astype(kind)
    return _png(Image.fromarray(stored))


def decode_segments(data: bytes) -> np.ndarray:
    """Bytes of `encode_segments` -> (h, w) int32 with -1 for noise. OSError when they are no picture."""
    with open_png(data) as image:
        noise = np.iinfo(np.uint8).max if image.mode == "L" else np.iinfo(np.uint16).max
        stored = np.asarray(image).astype(np.int32)
    return np.where(stored == noise, NOISE, stored).astype(np.int32)


def resize_bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8; the aspect is not kept."""
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def _multiple(size: int, patch: int) -> int:
    return max(1, round(size / patch)) * patch


def segments_row(
    image: LoadedImage, segments_hw: np.ndarray | None, embeddings_nD: np.ndarray | None
) -> dict[str, Any]:
    """A row of `segments_schema`; None for an image that could not be read."""
    size = (None, None) if image.pixels is None else image.pixels.shape[:2]
    embeddings = [] if embeddings_nD is None else list(embeddings_nD)
    status = Status.NO_MASKS if image.pixels is not None and not embeddings else image.status
    return {
        "image_id": image.image_id,
        "height": size[0],
        "width": size[1],
        "status": str(status),
        "error": image.error,
        "segments": None if segments_hw is None else encode_segments(segments_hw),
        "embedding": embeddings,
    }


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
