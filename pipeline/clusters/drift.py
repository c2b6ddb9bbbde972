"""How far masks that came after a fit lie from its centroids, beside those that it was made of.

Measured as the k-means measures: mean squared distance to the nearest centroid, of spherical fits 2 (1 - cosine). A
sample of parts stands for all; one part is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.clusters.embeddings import read_embeddings
from pipeline.engine.stage import spread
from pipeline.store import storage
from workers.kmeans import assign

SAMPLED_PARTS = 16  # of each kind, evenly spread: some thousand masks, whose mean is known to a few per cent


@dataclass(frozen=True, slots=True)
class Distances:
    """Of `masks` masks in `parts` parts; `mean` squared distance to the nearest centroid."""

    masks: int
    parts: int
    mean: float


@dataclass(frozen=True, slots=True)
class Drift:
    """`newer` masks, that the fit was not made of, beside those that it was made of; `older` is None where none of
    those is there any more."""

    newer: Distances
    older: Distances | None

    @property
    def ratio(self) -> float | None:
        """How many times as far the newer ones lie; None where there is nothing to compare with, or no distance."""
        return None if self.older is None or self.older.mean == 0 else self.newer.mean / self.older.mean

    def __str__(self) -> str:
        newer = f"the {self.newer.masks} masks looked at that came since lie"
        if self.older is None or self.ratio is None:
            return f"{newer} {self.newer.mean:.3g} from their nearest centroids (mean squared distance)"
        return (
            f"{newer} {self.ratio:.2f} times as far from their nearest centroids as {self.older.masks} that it was "
            f"made of (mean squared distance {self.newer.mean:.3g} against {self.older.mean:.3g})"
        )


def measure_drift(
    older: Sequence[str], newer: Sequence[str], centroids_KD: np.ndarray, *, spherical: bool
) -> Drift | None:
    """The embeddings of some `newer` parts (URIs) against centroids (K, D) float32 -> their drift, beside some `older`
    ones; None when there is no mask in them, or no centroid is other than zeros (a fit without a mask).

    ValueError names a part that cannot be read, or whose embeddings have another width than the centroids.
    """
    if not centroids_KD.any():
        return None
    found, known = (_distances(parts, centroids_KD, spherical) for parts in (newer, older))
    return None if found is None else Drift(found, known)


def _distances(parts: Sequence[str], centroids_KD: np.ndarray, spherical: bool) -> Distances | None:
    chosen = [parts[i] for i in spread(len(parts), SAMPLED_PARTS)]
    masks, total = 0, 0.0
    for part in chosen:
        rows_ND = read_embeddings(part)
        if rows_ND.shape[1] != centroids_KD.shape[1]:
            raise ValueError(
                f"{storage.redact(part)}: embeddings of {rows_ND.shape[1]} values, the centroids have "
                f"{centroids_KD.shape[1]}; delete the part and run again"
            )
        _, distances = assign(rows_ND, centroids_KD, spherical=spherical, threads=1)
        masks, total = masks + len(distances), total + float(distances.sum(dtype=np.float64))
    return Distances(masks, len(chosen), total / masks) if masks else None
