"""Segments of a photo and the mean feature of each, from one pass of the teacher: DatUS2 on conditioned features.

Against the published way (`workers.semantics.datus`): the photo keeps its aspect, the closest pairs of its patches are
joined, and a segment is embedded by the mean of its patches, not by a crop that goes through the backbone.

Shapes: N = h * w patches, d channels of the teacher, n segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from workers.conditioning import unit_rows
from workers.decode import Pixels, resize_keep_aspect
from workers.embeddings import to_images
from workers.images import LoadedImage, table_of_images
from workers.phases import Phases
from workers.records import segments_schema
from workers.semantics.datus import segments_row
from workers.semantics.louvain import SegmentFinder, closest_graph
from workers.semantics.teacher import Teacher


class PatchSegmentWorker:
    """Holds the teacher; `process` is a pure function of the images. `processes` share those of a batch that have the
    same shape, and change no row."""

    def __init__(
        self, teacher: Teacher, *, image_size: int, device: str, batch_size: int = 1, processes: int = 1
    ) -> None:
        """`image_size`: pixels of the short side, made a multiple of the patch."""
        self._teacher = teacher
        self._image_size = image_size
        self._device = device
        self._batch_size = batch_size
        self._find = SegmentFinder(processes, closest_graph)

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `segments_schema`, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        schema = segments_schema(self._teacher.dim)
        return table_of_images(images, self._batch_size, lambda batch: self._rows(batch, phases), phases, schema)

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Iterator[dict[str, Any]]:
        with phases("resize"):
            patch = self._teacher.patch_size
            resized = [
                resize_keep_aspect(image.pixels, self._image_size, patch) for image in batch if image.pixels is not None
            ]
        found = iter([each for _, same in groupby(resized, np.shape) for each in self._segments(list(same), phases)])
        for image in batch:
            yield segments_row(image, *((None, None) if image.pixels is None else next(found)))

    def _segments(self, photos: list[Pixels], phases: Phases) -> list[tuple[np.ndarray, np.ndarray]]:
        """Photos of one shape -> (h, w) segments and (n, d) float16 embeddings of each."""
        height, width = (side // self._teacher.patch_size for side in photos[0].shape[:2])
        with phases("backbone"):
            tokens_BNd = self._teacher.tokens(to_images(np.stack(photos), self._device)).cpu().numpy()
        with phases("segments"):
            maps = self._find(tokens_BNd, (height, width))
        with phases("embedding"):
            return [(segments, segment_means(rows, segments)) for rows, segments in zip(tokens_BNd, maps, strict=True)]


def segment_means(rows_Nd: np.ndarray, segments_hw: np.ndarray) -> np.ndarray:
    """(N, d) rows and (h, w) segments 0..n-1, -1 for none -> (n, d) float16: the mean row of each, of unit norm."""
    segments_N = segments_hw.ravel()
    means = [rows_Nd[segments_N == segment].mean(0) for segment in range(segments_N.max() + 1)]
    return unit_rows(np.reshape(means, (-1, rows_Nd.shape[1]))).astype(np.float16)
