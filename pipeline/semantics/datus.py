"""The fits of DatUS2 (arXiv 2401.12820): classes are spherical k-means clusters of the segments' embeddings.

Of all segments, a cluster each, as published; or, where features are conditioned, merged clusters of the segments of a
sample of photos: `centroids.npy`, `classes.npy` with the class of each, and `artifact.json` last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.artifact import CENTROIDS, KMeansResult, KMeansSettings
from pipeline.clusters.embeddings import read_embeddings
from pipeline.clusters.kmeans import IterationReport, fit_kmeans
from pipeline.engine.shards import read_columns
from pipeline.engine.stage import ARTIFACT, part_name
from pipeline.semantics.merged import ROWS, MergeSettings, fit_merged, remove_rows, too_few, write_rows
from pipeline.store import storage
from workers.kmeans import assign, embedding_rows
from workers.semantics.datus import decode_segments

CLASSES = "classes.npy"
SEGMENTS_A_CLUSTER = 2


def fit_datus(
    parts: Sequence[str],
    out: str,
    *,
    classes: int,
    seed: int,
    num_actors: int,
    cpus_per_actor: float,
    device: str,
    gpus_per_actor: float = 1,
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> KMeansResult:
    """Cluster the `embedding` rows of segments parts (URIs) into `classes`; the artifact is that of `fit_kmeans`.

    Spherical, from k-means++, as the paper's ablation found most consistent. ValueError names `semantics.classes` when
    there are fewer different segments; errors else as of `fit_kmeans`.
    """
    if not storage.exists(storage.join(out, ARTIFACT)):
        _require_different(parts, classes)
    return fit_kmeans(
        parts,
        out,
        KMeansSettings(k=classes, seed=seed, spherical=True),
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        device=device,
        gpus_per_actor=gpus_per_actor,
        on_iteration=on_iteration,
    )


def _require_different(parts: Sequence[str], classes: int) -> None:
    """Read parts until `classes` different embeddings are found; most often the first part has them."""
    different, segments = set[bytes](), 0
    for part in parts:
        rows = read_embeddings(part)
        segments += len(rows)
        different.update(row.tobytes() for row in np.unique(rows, axis=0))
        if len(different) >= classes:
            return
    raise too_few(len(parts), len(different), segments, classes, "segments")


def fit_merged_segments(
    parts: Sequence[str],
    sampled: Sequence[Sequence[int]],
    out: str,
    settings: MergeSettings,
    *,
    actors: dict[str, Any],
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> dict[str, Any]:
    """Cluster the segments of the sampled rows of each segments part (URIs), and merge the clusters to classes; write
    the artifact folder `out` (URI), and return its record.

    A segment weighs as the square root of its patches. `actors`: the arguments of `fit_kmeans` that say where its
    actors run. ValueError names `semantics.classes` when there are fewer different segments; errors else as there.
    """
    found = [_segments(part, rows) for part, rows in zip(parts, sampled, strict=True) if rows]
    vectors = np.concatenate([each for each, _ in found])
    different = len(np.unique(vectors, axis=0))
    if different < settings.classes:
        raise too_few(len(parts), different, len(vectors), settings.classes, "segments")
    weighted = [
        _write_weighted(storage.join(out, ROWS, part_name(i)), vectors_nd, patches_n)
        for i, (vectors_nd, patches_n) in enumerate(found)
    ]
    most = different // SEGMENTS_A_CLUSTER
    clusters, classes = fit_merged(weighted, out, settings, most, actors=actors, on_iteration=on_iteration)
    named = classes[assign(vectors, clusters.centroids, spherical=True, threads=1)[0]]
    record = _write(out, settings, clusters, classes, np.bincount(named, minlength=settings.classes))
    remove_rows(out)
    return record


def read_classes(out: str) -> NDArray[np.int64]:
    """(K,) the class of each centroid, in the artifact folder of merged clusters."""
    classes: NDArray[np.int64] = np.load(io.BytesIO(storage.read_bytes(storage.join(out, CLASSES))), allow_pickle=False)
    return classes


def _segments(part: str, rows: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, d) embeddings of the segments of these rows of a part, and (n,) how many patches each has."""
    table = read_columns(part, ["segments", "embedding"]).take(list(rows))
    counts = [
        np.bincount(segments[segments >= 0])
        for segments in (decode_segments(data) for data in table["segments"].to_pylist() if data is not None)
    ]
    return embedding_rows(table["embedding"]), np.concatenate([np.zeros(0, np.int64), *counts])


def _write_weighted(target: str, vectors_nd: NDArray[np.float32], patches_n: NDArray[np.int64]) -> str:
    """Each row as often as it weighs, so that the k-means over actors, whose sums are of whole rows, stays exact."""
    if not storage.exists(target):
        write_rows(target, np.repeat(vectors_nd, np.rint(np.sqrt(patches_n)).astype(int), axis=0))
    return target


def _write(
    out: str,
    settings: MergeSettings,
    found: KMeansResult,
    classes_K: NDArray[np.int64],
    sizes_S: NDArray[np.int64],
) -> dict[str, Any]:
    for name, array in ((CENTROIDS, found.centroids), (CLASSES, classes_K)):
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        storage.write_bytes(storage.join(out, name), stream.getvalue())
    record = {
        "method": "datus",
        "classes": settings.classes,
        "clusters": len(found.centroids),
        "iterations": found.iterations,
        "inertia": found.inertia,
        "sizes": sizes_S.tolist(),
        "software": f"u2label {version('u2label')}",
    }
    storage.write_bytes(storage.join(out, ARTIFACT), json.dumps(record, indent=1).encode())
    return record
