"""The artifact of a k-means: `centroids.npy`, and `artifact.json`, which is written last.

It says what the fit was of and how it went: sizes of the clusters, the inertia of each iteration, the seed rows.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from pipeline.engine.stage import ARTIFACT
from pipeline.store import storage

CENTROIDS = "centroids.npy"
CHECKPOINT = "checkpoint.npz"


@dataclass(frozen=True, slots=True)
class KMeansSettings:
    """What defines the result, apart from the rows. ValueError for values out of range."""

    k: int
    seed: int = 0
    spherical: bool = True  # rows and centroids of unit norm, so that the nearest is the most similar by cosine
    max_iterations: int = 100
    tolerance: float = 1e-4  # relative drop of the inertia at which the iteration stops
    init_subset_per_cluster: int = 256  # k-means++ sees at most this times k rows
    seed_rows: tuple[int, ...] | None = None  # row numbers to start from, instead of k-means++

    def __post_init__(self) -> None:
        least = {"k": 1, "seed": 0, "max_iterations": 1, "tolerance": 0, "init_subset_per_cluster": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"clusters.{name} must be at least {bound}, got {getattr(self, name)}")
        if self.seed_rows is not None and len(set(self.seed_rows)) != self.k:
            raise ValueError(f"seed_rows must be clusters.k = {self.k} different rows, got {len(set(self.seed_rows))}")


@dataclass(frozen=True, slots=True)
class KMeansResult:
    """`centroids` (K, D) float32, `sizes` (K,) int64 rows a cluster, `inertia` the sum of squared distances at each
    iteration and, last, that of the final centroids (of copies that count as one, their mean); `repaired` empty
    clusters moved at each iteration; `seed_rows` (K,) int64 numbers of the rows that were the first centroids."""

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: tuple[float, ...]
    repaired: tuple[int, ...]
    seed_rows: np.ndarray

    @property
    def iterations(self) -> int:
        return len(self.repaired)


def load_kmeans(out: str) -> KMeansResult:
    """The result in a complete artifact folder. FileNotFoundError when it is not there or not complete."""
    record = json.loads(storage.read_bytes(storage.join(out, ARTIFACT)))
    return KMeansResult(
        read_centroids(out),
        np.array(record["sizes"], np.int64),
        tuple(record["inertia"]),
        tuple(record["repaired"]),
        np.array(record["seed_rows"], np.int64),
    )


def read_centroids(out: str) -> np.ndarray:
    """(K, D) float32 of a complete artifact folder."""
    centroids: np.ndarray = np.load(io.BytesIO(storage.read_bytes(storage.join(out, CENTROIDS))), allow_pickle=False)
    return centroids


def write_empty(out: str, settings: KMeansSettings, dim: int) -> None:
    """The artifact of a source without a single mask: centroids of zeros, which nothing is assigned to."""
    none = np.zeros(0, np.int64)
    centroids = np.zeros((settings.k, dim), np.float32)
    write_artifact(out, settings, KMeansResult(centroids, np.zeros(settings.k, np.int64), (0.0,), (), none))


def write_artifact(out: str, settings: KMeansSettings, result: KMeansResult, *, different: int | None = None) -> None:
    """`different`: how many masks there were where copies counted as one; None: each counted."""
    buffer = io.BytesIO()
    np.save(buffer, result.centroids, allow_pickle=False)
    record = {
        "k": settings.k,
        "dim": result.centroids.shape[1],
        "seed": settings.seed,
        "spherical": settings.spherical,
        "iterations": result.iterations,
        "inertia": result.inertia,
        "repaired": result.repaired,
        "sizes": result.sizes.tolist(),
        "seed_rows": result.seed_rows.tolist(),
        "software": f"u2label {version('u2label')}",
        **({} if different is None else {"different": different}),
    }
    storage.write_bytes(storage.join(out, CENTROIDS), buffer.getvalue())
    storage.write_bytes(storage.join(out, ARTIFACT), json.dumps(record, indent=1).encode())
    storage.remove(storage.join(out, CHECKPOINT))
