"""The panoptic stage of one worker: instances, their nearest centroids and a class map -> panoptic pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from workers.kmeans import assign, embedding_rows
from workers.masks import decode_rle, encode_panoptic_png
from workers.merge import merge_panoptic
from workers.records import PANOPTIC_SCHEMA, READABLE, ImageRecord, Status

NO_LABEL: dict[str, Any] = {"panoptic": None, "segments": [], "hidden_instances": 0}


class PanopticWorker:
    """Holds the centroids. Things are categories 1..K by nearest centroid, stuff K+1..K+S."""

    def __init__(
        self, centroids_KD: np.ndarray, *, spherical: bool, num_stuff: int, max_cover: float, threads: int
    ) -> None:
        self._centroids_KD = centroids_KD
        self._spherical = spherical
        self._num_stuff = num_stuff
        self._max_cover = max_cover
        self._threads = threads

    def process(
        self,
        records: Sequence[ImageRecord],
        instances: pa.Table,
        semantics_nhw: Sequence[np.ndarray | None] | None,
        reasons_n: Sequence[tuple[str, str | None]] | None = None,
    ) -> pa.Table:
        """Part k of the index, of the instances and of the class maps (None: no stuff) -> table of PANOPTIC_SCHEMA.

        A readable photo without a map has the status and the error of the map's row (`reasons_n`); one that was
        replaced between the stages, so that map and masks do not fit, becomes a row `changed`.

        ValueError when the parts do not speak of the same images in the same order.
        """
        rows = instances.drop_columns("embedding").to_pylist()
        if [record.image_id for record in records] != [row["image_id"] for row in rows]:
            raise ValueError("the parts of the index and of the instances hold different images; delete the part")
        maps = [None] * len(rows) if semantics_nhw is None else semantics_nhw
        reasons = [None] * len(rows) if reasons_n is None else reasons_n
        categories = nearest_categories(
            instances["embedding"], self._centroids_KD, spherical=self._spherical, threads=self._threads
        )
        bounds = np.cumsum([0, *(len(row["rle"]) for row in rows)])
        labels_n = [categories[start:end] for start, end in pairwise(bounds)]
        merged = [
            self._row(record, row, labels, semantic, reason)
            for record, row, labels, semantic, reason in zip(records, rows, labels_n, maps, reasons, strict=True)
        ]
        return pa.Table.from_pylist(merged, schema=PANOPTIC_SCHEMA)

    def _row(
        self,
        record: ImageRecord,
        row: dict[str, Any],
        categories_n: np.ndarray,
        semantic_hw: np.ndarray | None,
        reason: tuple[str, str | None] | None,
    ) -> dict[str, Any]:
        common = {key: row[key] for key in ("image_id", "height", "width", "status", "error")} | {"uri": record.uri}
        if row["status"] not in READABLE:
            return common | NO_LABEL
        height, width = row["height"], row["width"]
        if semantic_hw is None and reason is not None:
            return common | {"status": reason[0], "error": reason[1]} | NO_LABEL
        if semantic_hw is not None and semantic_hw.shape != (height, width):
            said = _replaced((height, width), semantic_hw.shape)
            return common | {"status": str(Status.CHANGED), "error": said} | NO_LABEL
        masks = [decode_rle(counts, height, width) for counts in row["rle"]]
        labels = merge_panoptic(
            np.stack(masks) if masks else np.zeros((0, height, width), bool),
            categories_n,
            semantic_hw,
            num_things=len(self._centroids_KD),
            num_stuff=self._num_stuff,
            scores_n=row["score"],
            max_cover=self._max_cover,
        )
        status = str(Status.OK) if labels.segments else row["status"]  # stuff alone is a label too
        return common | {
            "status": status,
            "panoptic": encode_panoptic_png(labels.ids),
            "segments": [asdict(segment) for segment in labels.segments],
            "hidden_instances": labels.hidden,
        }


def _replaced(first: tuple[int, ...], second: tuple[int, ...]) -> str:
    """Sizes are (height, width)."""
    return (
        f"the photo was replaced between the stages: {first[1]} x {first[0]} pixels when its masks were found, "
        f"{second[1]} x {second[0]} when its class map was made; u2label run --extend or --retry changed does it again"
    )


def nearest_categories(
    embeddings: pa.ChunkedArray, centroids_KD: np.ndarray, *, spherical: bool, threads: int
) -> np.ndarray:
    """The column `embedding` of a whole instances part -> (N,) int64 categories of its masks in order, 1..K by nearest
    centroid: the labels that k-means itself counted, because it too takes a part at once and as many `threads`.

    ValueError when the embeddings and the centroids (K, D) differ in dimension.
    """
    labels, _ = assign(embedding_rows(embeddings), centroids_KD, spherical=spherical, threads=threads)
    return labels.astype(np.int64) + 1  # cluster ids start at 0, category ids at 1
