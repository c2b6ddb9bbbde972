"""The clusters of a run as the report shows them: the fit, and instances of the largest."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np

from pipeline.clusters.drift import Drift
from pipeline.engine.done import FitChanges
from pipeline.engine.stage import ARTIFACT
from pipeline.report import charts, rows
from pipeline.report.pictures import Crop
from pipeline.stages.base import Run
from pipeline.stages.clusters import drift_of
from pipeline.store import storage
from workers import overlay

CROPS = 12  # instances shown of a cluster


@dataclass(frozen=True, slots=True)
class Cluster:
    """One of the largest clusters. `similarity` is the mean cosine to its centroid, None when it was not measured."""

    category: int
    name: str
    color: str
    size: int
    similarity: float | None
    crops: list[Crop]


@dataclass(frozen=True, slots=True)
class Clusters:
    """The fit and, of the largest clusters, instances."""

    k: int
    iterations: int
    sizes: np.ndarray
    largest: list[Cluster]
    charts: list[charts.Chart]
    members: rows.Members | None  # None until there are panoptic parts
    similarity_parts: int  # instances parts whose embeddings were compared with the centroids
    changes: FitChanges  # in the parts that the fit was made of
    drift: Drift | None  # None where no mask came since the fit


@dataclass(frozen=True, slots=True)
class ClusterFit:
    """The clusters artifact."""

    sizes: np.ndarray
    inertia: list[float]
    iterations: int
    spherical: bool
    centroids_KD: np.ndarray

    @staticmethod
    def read(run: Run) -> ClusterFit:
        folder = run.stages["clusters"].folder
        record = json.loads(storage.read_bytes(storage.join(folder, ARTIFACT)))
        centroids = np.load(io.BytesIO(storage.read_bytes(storage.join(folder, "centroids.npy"))), allow_pickle=False)
        return ClusterFit(
            np.array(record["sizes"], np.int64),
            [float(value) for value in record["inertia"]],
            int(record["iterations"]),
            bool(record["spherical"]),
            centroids,
        )

    def largest(self, count: int) -> list[int]:
        """Clusters with members, the largest first, of equal ones the first."""
        order = np.argsort(-self.sizes, kind="stable")[:count].tolist()
        return [cluster for cluster in order if self.sizes[cluster] > 0]


def find_members(run: Run, fit: ClusterFit | None, max_clusters: int) -> rows.Members | None:
    """Instances of the largest clusters; None when there is no fit or no panoptic part."""
    if fit is None or not run.done["panoptic"]:
        return None
    categories = [cluster + 1 for cluster in fit.largest(max_clusters)]  # clusters count from 0, categories from 1
    return rows.find_members(run.stages["panoptic"], run.done["panoptic"], categories, CROPS)


def describe_clusters(
    run: Run,
    fit: ClusterFit,
    members: rows.Members | None,
    crops: dict[rows.Member, Crop],
    names: dict[int, str],
    max_clusters: int,
) -> Clusters:
    similarities = np.full(len(fit.sizes), np.nan)
    if fit.spherical and max_clusters:
        similarities = rows.mean_similarities(run.things, run.done[run.things.name], fit.centroids_KD)
    largest = [
        Cluster(
            category=cluster + 1,
            name=names.get(cluster + 1, f"class {cluster + 1}"),
            color=overlay.css(overlay.category_color(cluster + 1)),
            size=int(fit.sizes[cluster]),
            similarity=None if np.isnan(similarities[cluster]) else float(similarities[cluster]),
            crops=[crops[member] for member in members.by_category[cluster + 1]] if members else [],
        )
        for cluster in fit.largest(max_clusters)
    ]
    stage = run.stages["clusters"]
    changes = run.look.changes(stage)
    return Clusters(
        k=len(fit.sizes),
        iterations=fit.iterations,
        sizes=fit.sizes,
        largest=largest,
        charts=_fit_charts(fit),
        members=members,
        similarity_parts=min(rows.SIMILARITY_PARTS, len(run.done[run.things.name])),
        changes=changes,
        drift=drift_of(run, stage, changes),
    )


def _fit_charts(fit: ClusterFit) -> list[charts.Chart]:
    heights, edges = charts.integer_bins(fit.sizes)
    singles = edges[1] - edges[0] == 1
    return [
        charts.line_chart("Inertia of k-means", fit.inertia, x_label="iteration", y_label="inertia"),
        charts.bar_chart(
            "Cluster sizes", heights, edges, x_label="instances in a cluster", y_label="clusters", centred=singles
        ),
    ]
