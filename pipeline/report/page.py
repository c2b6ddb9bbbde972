"""What the page of a report says: the numbers, charts and pictures of a run, gathered for the template."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from pipeline import __version__
from pipeline.engine.receipts import add_histograms, read_receipts
from pipeline.engine.status import StageStatus, stage_status
from pipeline.report import charts, rows
from pipeline.report.clusters import ClusterFit, Clusters, describe_clusters, find_members
from pipeline.report.copies import Copies, describe_copies
from pipeline.report.model import Model, describe_model
from pipeline.report.naming import given_names
from pipeline.report.pictures import Drawer, Picture
from pipeline.report.semantics import Stuff, describe_stuff
from pipeline.stages.base import Run
from pipeline.store import storage
from workers import overlay
from workers.records import READABLE

FAILED_LISTED = 50  # shards
STATUS_COLORS = {"ok": "#2f9e6e", "no_masks": "#a9b4c0"}
PROBLEM_COLORS = ("#d9480f", "#c2255c", "#9c36b5", "#e8890c", "#862e2e")


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
    left_out: dict[str, int]  # files of the source by why they were not taken
    config: str
    stages: list[StageStatus]
    counts: rows.RowCounts
    statuses: list[charts.Slice]
    phases: dict[str, list[charts.Slice]]
    charts: list[charts.Chart]
    photos: list[Picture]
    categories: dict[int, str]
    stuff: Stuff | None  # None for a run without
    model: Model | None  # likewise
    clusters: Clusters | None
    copies: Copies | None  # None before there are masks
    failed: list[FailedShard]
    missing: list[str]

    @property
    def failed_total(self) -> int:
        return sum(len(stage.failed) for stage in self.stages)


def describe(run: Run, *, max_photos: int, max_clusters: int) -> Page:
    """Everything the page shows. Reads parts, receipts and the artifact, and fetches the photos it shows."""
    statuses = [
        stage_status(run.uri, stage, run.look.sizes(stage, strict=False), run.config.workers)
        for stage in run.stages.values()
    ]
    counts = rows.count_rows(run.stages["instances"], run.done["instances"], statuses[0])
    places = rows.sample_images(run.index, run.done["instances"], max_photos)
    fit = ClusterFit.read(run) if run.fitted else None
    members = find_members(run, fit, max_clusters)
    drawer = Drawer(run.index, run.things, run.stages["panoptic"], run.done["panoptic"], run.limits)
    wanted = [member for found in members.by_category.values() for member in found] if members else []
    photos, crops = drawer.draw(places, wanted)
    panoptic = sorted(run.done["panoptic"])
    names = rows.category_names(run.stages["panoptic"], panoptic[0]) | given_names(run) if panoptic else {}
    return Page(
        version=__version__,
        run=run,
        name=storage.redact(run.uri).rstrip("/").rsplit("/", 1)[-1],
        uri=storage.redact(run.uri),
        source=storage.redact(run.config.source.uri),
        left_out=run.index.ignored.reasons(),
        config=storage.redact(run.config.to_yaml()),
        stages=statuses,
        counts=counts,
        statuses=_status_slices(counts),
        phases={stage.stage: _phase_slices(stage) for stage in statuses if stage.seconds},
        charts=[*_row_charts(counts), *_similarity_chart(run)],
        photos=photos,
        categories=names,
        stuff=describe_stuff(run, statuses, names, max_photos),
        model=describe_model(run, places, photos),
        clusters=describe_clusters(run, fit, members, crops, names, max_clusters) if fit else None,
        copies=describe_copies(run),
        failed=_failed_shards(run, statuses),
        missing=_missing(run),
    )


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


def _similarity_chart(run: Run) -> list[charts.Chart]:
    """How alike the patches are that MaskCut cut, and where tau lies among them."""
    stage = run.stages["instances"]
    cosines = add_histograms(read_receipts(run.uri, stage.name, stage.fingerprint), "cosines")
    if not sum(cosines):
        return []
    tau = float(run.config.maskcut.tau)
    return [
        charts.share_chart(
            "Similarity of two patches",
            cosines,
            np.linspace(-1, 1, len(cosines) + 1).tolist(),
            x_label=f"cosine of {run.config.maskcut.features}",
            y_label="% of the pairs",
            rules={f"tau {tau:g}": tau},
        )
    ]


def _status_slices(counts: rows.RowCounts) -> list[charts.Slice]:
    total = max(1, sum(counts.rows.values()))
    problems = itertools.cycle(PROBLEM_COLORS)
    return [
        charts.Slice(status, count, count / total, STATUS_COLORS[status] if status in READABLE else next(problems))
        for status, count in counts.rows.items()
    ]


def _phase_slices(stage: StageStatus) -> list[charts.Slice]:
    total = sum(stage.seconds.values()) or 1.0
    return [
        charts.Slice(phase, seconds, seconds / total, overlay.css(overlay.oklch(0.66, 0.12, 0.7 + 0.618034 * i)))
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
            texts += [] if run.look.usable(stage) else [name]
        elif len(shards) < run.index.shards:
            there = f" ({len(shards):,} of {run.index.shards:,} shards are there)" if shards else ""
            texts.append(f"{name}{there}")
    return texts
