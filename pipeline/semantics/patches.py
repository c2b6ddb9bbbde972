"""Fits to a sample's patch features: their conditioning, and stuff classes by k-means over actors and a merge of its
clusters.

Each writes one artifact folder, `artifact.json` last as the mark that it is complete: `conditioning.npz`, or
`codebook.npz` (conditioning, centroids, the class of each).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.clusters.artifact import KMeansResult
from pipeline.clusters.kmeans import IterationReport
from pipeline.engine.shards import read_columns
from pipeline.engine.stage import ARTIFACT, digest, part_name
from pipeline.semantics.merged import ROWS, MergeSettings, fit_merged, remove_rows, too_few, write_rows
from pipeline.store import storage
from workers.conditioning import Conditioning, Moments, signal_over_nuisance
from workers.kmeans import embedding_rows
from workers.semantics.patches import Codebook

CODEBOOK = "codebook.npz"
CONDITIONING = "conditioning.npz"
ROWS_A_CLUSTER = 8  # patches; with fewer, clusters are single patches


def fit_conditioning(parts: Sequence[str], out: str, components: int) -> Conditioning:
    """The directions in which patches of these parts (URIs) vary most against neighbours and other views."""
    patches, across, views = _moments(parts)
    conditioning = signal_over_nuisance(patches, [across, views], components)
    data = conditioning.to_bytes()
    storage.write_bytes(storage.join(out, CONDITIONING), data)
    record = {"patches": patches.count, "components": conditioning.directions.shape[1], "content": digest(data.hex())}
    storage.write_bytes(storage.join(out, ARTIFACT), json.dumps(record).encode())
    return conditioning


def read_conditioning(out: str) -> Conditioning:
    """The conditioning in the artifact folder of a fit."""
    return Conditioning.from_bytes(storage.read_bytes(storage.join(out, CONDITIONING)))


def fit_patches(
    parts: Sequence[str],
    conditioning: Conditioning,
    out: str,
    settings: MergeSettings,
    *,
    actors: dict[str, Any],
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> dict[str, Any]:
    """Fit to patches parts (URIs) and write the artifact folder `out` (URI); returns its record.

    `actors`: the arguments of `fit_kmeans` that say where its actors run. ValueError names `semantics.classes` when
    there are too few different patches; errors else as of `fit_kmeans`.
    """
    patches = _count(parts)
    _require_different(parts, patches, settings.classes)
    folder = storage.join(out, ROWS)
    rows = [_condition(part, storage.join(folder, part_name(i)), conditioning) for i, part in enumerate(parts)]
    most = patches // ROWS_A_CLUSTER
    found, classes = fit_merged(rows, out, settings, most, actors=actors, on_iteration=on_iteration)
    record = _write(out, settings, Codebook(conditioning, found.centroids, classes), found)
    remove_rows(out)
    return record


def load_codebook(out: str) -> Codebook:
    """The codebook in a complete artifact folder."""
    with np.load(io.BytesIO(storage.read_bytes(storage.join(out, CODEBOOK))), allow_pickle=False) as saved:
        return Codebook(Conditioning(saved["mean"], saved["directions"]), saved["centroids"], saved["classes"])


def _moments(parts: Sequence[str]) -> tuple[Moments, Moments, Moments]:
    """Of patches, of differences of neighbours, and of views."""
    found: list[Moments] = []
    for part in parts:
        table = read_columns(part, ["embedding", "across", "views"])
        columns = [embedding_rows(table[name]) for name in table.column_names]
        found = found or [Moments(rows.shape[1]) for rows in columns]
        for moments, rows in zip(found, columns, strict=True):
            moments.add(rows)
    patches, across, views = found
    return patches, across, views


def _count(parts: Sequence[str]) -> int:
    return sum(len(read_columns(part, ["embedding"])["embedding"].combine_chunks().flatten()) for part in parts)


def count_different(parts: Sequence[str], most: int) -> int:
    """Different patches in patches parts (URIs), counted up to `most`: most often the first photo has so many."""
    different = set[bytes]()
    for part in parts:
        rows = embedding_rows(read_columns(part, ["embedding"])["embedding"])
        different.update(row.tobytes() for row in np.unique(rows[:4096], axis=0))
        if len(different) >= most:
            return most
    return len(different)


def _require_different(parts: Sequence[str], patches: int, classes: int) -> None:
    different = count_different(parts, classes)
    if different < classes:
        raise too_few(len(parts), different, patches, classes, "patches")


def _condition(part: str, target: str, conditioning: Conditioning) -> str:
    """Write the conditioned patches of a part, if they are not there yet; the URI of where they are."""
    if not storage.exists(target):
        write_rows(target, conditioning(embedding_rows(read_columns(part, ["embedding"])["embedding"])))
    return target


def _write(out: str, settings: MergeSettings, book: Codebook, found: KMeansResult) -> dict[str, Any]:
    stream = io.BytesIO()
    np.savez(
        stream,
        mean=book.conditioning.mean,
        directions=book.conditioning.directions,
        centroids=book.centroids,
        classes=book.classes,
    )
    storage.write_bytes(storage.join(out, CODEBOOK), stream.getvalue())
    sizes = np.bincount(book.classes, weights=found.sizes, minlength=settings.classes).astype(int).tolist()
    record = {
        "method": "kmeans",
        "classes": settings.classes,
        "clusters": len(book.centroids),
        "components": book.conditioning.directions.shape[1],
        "iterations": found.iterations,
        "inertia": found.inertia,
        "sizes": sizes,
        "software": f"u2label {version('u2label')}",
    }
    storage.write_bytes(storage.join(out, ARTIFACT), json.dumps(record, indent=1).encode())
    return record
