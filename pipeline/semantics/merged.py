"""Stuff classes as merged clusters: more clusters than classes by k-means over actors, then the nearest are merged.

One k-means cluster a class splits what is common and large, and lumps what is rare; several a class, merged by average
linkage, follow the shape of the classes. While they are fitted, rows lie in `rows/` of the artifact folder and the
k-means in `kmeans/`; a fit that is started again goes on from what is there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.clusters.artifact import KMeansResult, KMeansSettings
from pipeline.clusters.kmeans import IterationReport, fit_kmeans
from pipeline.store import storage
from workers.semantics.patches import merge_clusters

ROWS, KMEANS = "rows", "kmeans"


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What defines the classes, apart from the rows. `overclustering`: clusters for each class, before the merge."""

    classes: int
    overclustering: int
    seed: int

    def clusters(self, most: int) -> int:
        """How many there are before the merge, where the rows allow `most`."""
        return max(self.classes, min(self.classes * self.overclustering, most))


def fit_merged(
    rows: Sequence[str],
    out: str,
    settings: MergeSettings,
    most: int,
    *,
    actors: dict[str, Any],
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> tuple[KMeansResult, NDArray[np.int64]]:
    """Cluster the `embedding` rows of tables (URIs), at most `most` clusters -> the k-means, and (K,) the class 0..S-1
    of each cluster. `actors`: the arguments of `fit_kmeans` that say where its actors run. Errors as of `fit_kmeans`.
    """
    found = fit_kmeans(
        rows,
        storage.join(out, KMEANS),
        KMeansSettings(k=settings.clusters(most), seed=settings.seed),
        **actors,
        on_iteration=on_iteration,
    )
    return found, merge_clusters(found.centroids, found.sizes, settings.classes)


def write_rows(target: str, rows_Nd: NDArray[np.floating]) -> None:
    """(N, d) as a table that `fit_merged` reads, in float16."""
    values = pa.array(rows_Nd.astype(np.float16).reshape(-1), pa.float16())
    vectors = pa.FixedSizeListArray.from_arrays(values, rows_Nd.shape[1])
    column = pa.ListArray.from_arrays(pa.array([0, len(rows_Nd)], pa.int32()), vectors)
    stream = io.BytesIO()
    pq.write_table(pa.table({"embedding": column}), stream)
    storage.write_bytes(target, stream.getvalue())


def remove_rows(out: str) -> None:
    """What only the fit needed."""
    for folder in (ROWS, KMEANS):
        storage.remove_folder(storage.join(out, folder))


def too_few(parts: int, different: int, rows: int, classes: int, what: str) -> ValueError:
    """The error for fewer different rows than classes."""
    return ValueError(
        f"semantics.classes is {classes}, but the {parts} {what} parts hold {different} different {what} "
        f"({rows} in all): lower semantics.classes, or give the source more images"
    )
