"""The classes of a fit of STEGO: whether it has lost them, and merged clusters of the code in place of the probe.

A loss whose shifts lie too low for the features pulls all codes together, and the probe gives every patch to one class
or a few. Such a fit is refused: labels without classes are worse than none, and its loss looks better than others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.stego import ClusterProbe, MergedProbe, StegoHead
from pipeline.semantics.stego_job import StegoSettings
from workers.kmeans import assign, spherical_kmeans
from workers.semantics.patches import merge_clusters

EARLY = (100, 200)  # steps after which a collapse shows; before, a healthy fit may use few classes
LEAST_USED = 1 / 3  # of the classes, by a batch at these steps
LEAST_EFFECTIVE = 1 / 3  # of the classes, at the end
ROWS_A_CLUSTER = 8  # patches; with fewer, clusters are single patches


def effective_classes(sizes_S: Sequence[int] | NDArray[np.integer]) -> float:
    """exp of the entropy of the classes' shares: S when all are equal, 1 when one has everything; 0 of nothing."""
    sizes = np.asarray(sizes_S, np.float64)
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def lost_early(history: Sequence[Mapping[str, float]], classes: int) -> bool:
    """Whether the last entry of the history is one at which a collapse shows, and shows one."""
    last = history[-1] if history else None
    return last is not None and last["step"] in EARLY and last["classes_used"] < LEAST_USED * classes


def lost_at_end(sizes_S: Sequence[int], settings: StegoSettings) -> bool:
    """Whether patches are so unevenly spread over the classes that most are lost; of a fit too short to tell, never."""
    few = effective_classes(sizes_S) < LEAST_EFFECTIVE * len(sizes_S)
    return settings.steps >= EARLY[0] and few


@torch.no_grad()
def probe_sizes(head: StegoHead, probe: ClusterProbe, rows_NC: NDArray[np.float32]) -> list[int]:
    """How many patches the probe gives to each class. The head must be in eval mode."""
    labels = probe.cosines(_code(head, rows_NC)).argmax(1)
    return torch.bincount(labels.flatten(), minlength=len(probe.clusters)).tolist()


def cluster_code(head: StegoHead, rows_NC: NDArray[np.float32], settings: StegoSettings) -> MergedProbe:
    """Spherical k-means of the code of these patches, merged to the classes. The head must be in eval mode."""
    with torch.no_grad():
        code_ND = _code(head, rows_NC)[0, ..., 0].T.cpu().numpy()
    clusters = max(settings.classes, min(settings.classes * settings.overclustering, len(code_ND) // ROWS_A_CLUSTER))
    centroids_KD = spherical_kmeans(code_ND, clusters, settings.seed)
    sizes_K = np.bincount(assign(code_ND, centroids_KD, spherical=True, threads=1)[0], minlength=clusters)
    merged_K = merge_clusters(centroids_KD, sizes_K, settings.classes)
    return MergedProbe(torch.from_numpy(centroids_KD), torch.from_numpy(merged_K))


def _code(head: StegoHead, rows_NC: NDArray[np.float32]) -> torch.Tensor:
    """(1, D, N, 1)."""
    weight = head.linear.weight
    return head(torch.from_numpy(rows_NC.T.copy()).to(weight.device)[None, ..., None])
