"""Clusters against the classes of a truth: purity, normalised mutual information, and what both are by chance.

Both grow with the number of clusters and shrink with that of the items, whatever the clusters mean, so they say little
without what a random assignment to clusters of the same sizes has.

N items, K clusters and C classes that occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHUFFLES = 20


@dataclass(frozen=True, slots=True)
class ClusterQuality:
    """Both measures in [0, 1], and their mean over random assignments. NaN without an item."""

    items: int
    clusters: int  # that hold one of them
    classes: int
    purity: float
    purity_by_chance: float
    nmi: float
    nmi_by_chance: float


def cluster_quality(
    clusters_N: ArrayLike, classes_N: ArrayLike, *, shuffles: int = SHUFFLES, seed: int = 0
) -> ClusterQuality:
    """The quality of (N,) integer clusters given the (N,) integer classes of the same items.

    Chance is the mean over `shuffles` random permutations of the classes. ValueError when the shapes differ.
    """
    clusters, classes = np.asarray(clusters_N, np.int64), np.asarray(classes_N, np.int64)
    counts = joint_counts(clusters, classes)
    if not len(clusters):
        nan = float("nan")
        return ClusterQuality(0, 0, 0, nan, nan, nan, nan)
    rng = np.random.default_rng(seed)
    random = [joint_counts(clusters, rng.permutation(classes)) for _ in range(shuffles)]
    return ClusterQuality(
        items=len(clusters),
        clusters=counts.shape[0],
        classes=counts.shape[1],
        purity=purity(counts),
        purity_by_chance=float(np.mean([purity(one) for one in random])),
        nmi=normalized_mutual_information(counts),
        nmi_by_chance=float(np.mean([normalized_mutual_information(one) for one in random])),
    )


def joint_counts(clusters_N: NDArray[np.int64], classes_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """(K, C) int64 items of each cluster and class, by ascending ids. ValueError when the shapes differ."""
    if clusters_N.shape != classes_N.shape or clusters_N.ndim != 1:
        raise ValueError(f"clusters and classes of the same items, got {clusters_N.shape} and {classes_N.shape}")
    (rows, row_of), (columns, column_of) = (np.unique(ids, return_inverse=True) for ids in (clusters_N, classes_N))
    counts = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(counts, (row_of, column_of), 1)
    return counts


def purity(counts_KC: NDArray[np.int64]) -> float:
    """The share of items that have the commonest class of their cluster. `counts_KC` holds at least one item."""
    return float(counts_KC.max(axis=1).sum() / counts_KC.sum())


def normalized_mutual_information(counts_KC: NDArray[np.int64]) -> float:
    """Mutual information over the arithmetic mean of both entropies; 1 where there is one cluster and one class."""
    joint = counts_KC / counts_KC.sum()
    cluster_K, class_C = joint.sum(axis=1), joint.sum(axis=0)
    entropies = _entropy(cluster_K) + _entropy(class_C)
    # Rounding may leave the difference a little below 0.
    information = max(0.0, entropies - _entropy(joint))
    return 2 * information / entropies if entropies > 0 else 1.0


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
