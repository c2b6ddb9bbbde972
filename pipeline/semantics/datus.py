"""The fit of DatUS2 (arXiv 2401.12820): classes are spherical k-means clusters of the segments' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.clusters.artifact import KMeansResult, KMeansSettings
from pipeline.clusters.kmeans import IterationReport, fit_kmeans
from pipeline.clusters.shards import read_embeddings
from pipeline.engine.stage import ARTIFACT
from pipeline.store import storage


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
    raise ValueError(
        f"semantics.classes is {classes}, but the {len(parts)} segments parts hold {len(different)} different segments "
        f"({segments} in all): lower semantics.classes, or give the source more images"
    )
