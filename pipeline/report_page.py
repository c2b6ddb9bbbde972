"""What the page of a report says: the numbers, charts and pictures of a run, gathered for the template."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass

import numpy as np

from pipeline import __version__, charts, overlay, storage
from pipeline import report_rows as rows
from pipeline.config import Config
from pipeline.receipts import read_receipts
from pipeline.report_pictures import Crop, Drawer, Picture
from pipeline.sources import Index
from pipeline.stages import ARTIFACT, Stage, is_fitted
from pipeline.status import StageStatus, stage_status
from workers.decode import DecodeLimits
from workers.records import READABLE

CROPS = 12  # instances shown of a cluster
FAILED_LISTED = 50  # shards
STATUS_COLORS = {"ok": "#2f9e6e", "no_masks": "#a9b4c0"}
PROBLEM_COLORS = ("#d9480f", "#c2255c", "#9c36b5", "#e8890c", "#862e2e")


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the report finds it: `done` are the finished shards of each shard stage."""

    uri: str
    config: Config
    index: Index
    stages: dict[str, Stage]
    done: dict[str, set[int]]
    fitted: bool


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


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a stacked bar: `share` in [0, 1] of the whole."""

    name: str
    value: float
    share: float
    color: str


@dataclass(frozen=True, slots=True)
class FailedShard:
    stage: str
    shard: int
    error: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows."""

    version: str
    run: Run
    name: str
    uri: str
    source: str
    config: str
    stages: list[StageStatus]
    counts: rows.RowCounts
    statuses: list[Slice]
    phases: dict[str, list[Slice]]
    charts: list[charts.Chart]
    photos: list[Picture]
    categories: dict[int, str]
    clusters: Clusters | None
    failed: list[FailedShard]
    missing: list[str]

    @property
    def failed_total(self) -> int:
        return sum(len(stage.failed) for stage in self.stages)


def describe(run: Run, *, max_photos: int, max_clusters: int) -> Page:
    """Everything the page shows. Reads parts, receipts and the artifact, and fetches the photos it shows."""
    statuses = [stage_status(run.uri, stage) for stage in run.stages.values()]
    counts = rows.count_rows(run.stages["instances"], run.done["instances"], statuses[0])
    places = rows.sample_images(run.index, run.done["instances"], max_photos)
    fit = _Fit.read(run) if run.fitted else None
    members = _members(run, fit, max_clusters)
    drawer = Drawer(run.index, run.stages["instances"], run.stages["panoptic"], run.done["panoptic"], _limits(run))
    wanted = [member for found in members.by_category.values() for member in found] if members else []
    photos, crops = drawer.draw(places, wanted)
    panoptic = sorted(run.done["panoptic"])
    names = rows.category_names(run.stages["panoptic"], panoptic[0]) if panoptic else {}
    return Page(
        version=__version__,
        run=run,
        name=storage.redact(run.uri).rstrip("/").rsplit("/", 1)[-1],
        uri=storage.redact(run.uri),
        source=storage.redact(run.config.source.uri),
        config=storage.redact(run.config.to_yaml()),
        stages=statuses,
        counts=counts,
        statuses=_status_slices(counts),
        phases={stage.stage: _phase_slices(stage) for stage in statuses if stage.seconds},
        charts=_row_charts(counts),
        photos=photos,
        categories=names,
        clusters=_clusters(run, fit, members, crops, names, max_clusters) if fit else None,
        failed=_failed_shards(run, statuses),
        missing=_missing(run),
    )


def _limits(run: Run) -> DecodeLimits:
    return DecodeLimits(max_pixels=run.config.decode.max_pixels, min_side=run.config.decode.min_side)


@dataclass(frozen=True, slots=True)
class _Fit:
    """The clusters artifact."""

    sizes: np.ndarray
    inertia: list[float]
    iterations: int
    spherical: bool
    centroids_KD: np.ndarray

    @staticmethod
    def read(run: Run) -> _Fit:
        folder = run.stages["clusters"].folder
        record = json.loads(storage.read_bytes(storage.join(folder, ARTIFACT)))
        centroids = np.load(io.BytesIO(storage.read_bytes(storage.join(folder, "centroids.npy"))), allow_pickle=False)
        return _Fit(
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


def _members(run: Run, fit: _Fit | None, max_clusters: int) -> rows.Members | None:
    if fit is None or not run.done["panoptic"]:
        return None
    categories = [cluster + 1 for cluster in fit.largest(max_clusters)]  # clusters count from 0, categories from 1
    return rows.find_members(run.stages["panoptic"], run.done["panoptic"], categories, CROPS)


def _clusters(
    run: Run,
    fit: _Fit,
    members: rows.Members | None,
    crops: dict[rows.Member, Crop],
    names: dict[int, str],
    max_clusters: int,
) -> Clusters:
    similarities = np.full(len(fit.sizes), np.nan)
    if fit.spherical and max_clusters:
        similarities = rows.mean_similarities(run.stages["instances"], run.done["instances"], fit.centroids_KD)
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
    compared = min(rows.SIMILARITY_PARTS, len(run.done["instances"]))
    return Clusters(len(fit.sizes), fit.iterations, fit.sizes, largest, _fit_charts(fit), members, compared)


def _fit_charts(fit: _Fit) -> list[charts.Chart]:
    heights, edges = charts.integer_bins(fit.sizes)
    size_chart = charts.bar_chart(
        "Cluster sizes", heights, edges, x_label="instances in a cluster", y_label="clusters", centred=_unit(edges)
    )
    inertia = charts.line_chart("Inertia of k-means", fit.inertia, x_label="iteration", y_label="inertia")
    return [inertia, size_chart]


def _row_charts(counts: rows.RowCounts) -> list[charts.Chart]:
    if not counts.instances:
        return []
    numbers = np.arange(len(counts.per_image) + 1)
    return [
        charts.bar_chart(
            "Instances in an image",
            counts.per_image,
            numbers.tolist(),
            x_label="instances",
            y_label="images",
            centred=True,
        ),
        charts.bar_chart(
            "Size of instances",
            counts.shares,
            np.linspace(0, 1, rows.SHARE_BINS + 1).tolist(),
            x_label="share of the image's area",
            y_label="instances",
        ),
    ]


def _unit(edges: list[int]) -> bool:
    return edges[1] - edges[0] == 1


def _status_slices(counts: rows.RowCounts) -> list[Slice]:
    total = max(1, sum(counts.rows.values()))
    problems = itertools.cycle(PROBLEM_COLORS)
    return [
        Slice(status, count, count / total, STATUS_COLORS[status] if status in READABLE else next(problems))
        for status, count in counts.rows.items()
    ]


def _phase_slices(stage: StageStatus) -> list[Slice]:
    total = sum(stage.seconds.values()) or 1.0
    return [
        Slice(phase, seconds, seconds / total, overlay.css(overlay.oklch(0.66, 0.12, 0.7 + 0.618034 * i)))
        for i, (phase, seconds) in enumerate(stage.seconds.items())
    ]


def _failed_shards(run: Run, statuses: list[StageStatus]) -> list[FailedShard]:
    """The first failed shards with the last line of their tracebacks."""
    failed = []
    for stage in statuses:
        if stage.failed:
            errors = {r.shard: r.error or "" for r in read_receipts(run.uri, stage.stage, stage.fingerprint)}
            for shard in stage.failed:
                failed.append(FailedShard(stage.stage, shard, errors[shard].strip().rsplit("\n", 1)[-1]))
    return failed[:FAILED_LISTED]


def _missing(run: Run) -> list[str]:
    """What a reader must know first: the stages that are not complete."""
    texts = []
    for name, stage in run.stages.items():
        shards = run.done.get(name)
        if shards is None:
            texts += [] if is_fitted(stage) else [name]
        elif len(shards) < run.index.shards:
            there = f" ({len(shards):,} of {run.index.shards:,} shards are there)" if shards else ""
            texts.append(f"{name}{there}")
    return texts
