"""One stage as it stands, from its listing and its receipts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.engine.done import Look
from pipeline.engine.fit_progress import read_progress
from pipeline.engine.receipts import Receipt, add_up, read_receipts
from pipeline.engine.stage import Stage
from pipeline.store import storage


@dataclass(frozen=True)
class StageStatus:
    """One stage as it stands. Rates are of the receipts of done shards; of the stage's last run with other settings
    before there are any; None before that."""

    stage: str
    kind: str
    fingerprint: str
    folder: str
    done: int
    shards: int  # 1 for a fit stage
    rows: dict[str, int]  # by status
    instances: int
    pixels: dict[str, int]  # of things, of stuff, void: of the panoptic stage
    failed: list[int]  # shards whose last attempt failed
    seconds: dict[str, float]  # by phase, over all workers
    images_per_worker_second: float | None
    bytes_per_image: float | None
    images: int | None = None  # that the stage looks at; None for fits
    fit_seconds: float | None = None  # of a fit: its last attempt, else the last one with other settings
    progress: dict[str, float] | None = None  # of an unfinished fit that trains: step, steps and losses


def receipts_of_parts(run_uri: str, stage: Stage) -> list[Receipt]:
    """A receipt of each finished shard: the one that its worker gave, else one that the part itself tells."""
    told = {r.shard: r for r in read_receipts(run_uri, stage.name, stage.fingerprint) if r.ok}
    return [told.get(shard) or _receipt_of_part(stage, shard) for shard in sorted(Look([stage]).usable(stage))]


def _receipt_of_part(stage: Stage, shard: int) -> Receipt:
    from pipeline.engine.shards import read_columns  # loads pyarrow.parquet, which few looks at a run need

    rows = Counter(read_columns(stage.part(shard), ["status"])["status"].to_pylist())
    return Receipt(stage.name, stage.fingerprint, shard, ok=True, wall_s=0.0, rows=dict(rows))


def stage_status(run_uri: str, stage: Stage, done: Collection[int], listed: Sequence[str] | None = None) -> StageStatus:
    """One stage of the run folder, from what of it is done and its receipts; `listed` as of `read_receipts`."""
    receipts = read_receipts(run_uri, stage.name, stage.fingerprint, listed=listed)
    shards = 1 if stage.kind == "fit" else stage.shards
    good = [receipt for receipt in receipts if receipt.ok and receipt.shard in done]
    measured = good or [
        r for r in read_receipts(run_uri, stage.name, listed=listed) if r.ok
    ]  # else with other settings
    images, wall = sum(r.images for r in measured), sum(r.wall_s for r in measured)
    return StageStatus(
        stage=stage.name,
        kind=stage.kind,
        fingerprint=stage.fingerprint,
        folder=storage.redact(stage.folder),
        done=len(done),
        shards=shards,
        rows=add_up(r.rows for r in good),
        instances=sum(r.instances for r in good),
        pixels=add_up(r.pixels for r in good),
        failed=[r.shard for r in receipts if not r.ok and r.shard not in done],
        seconds=add_up(r.seconds for r in good),
        images_per_worker_second=images / wall if images and wall else None,
        bytes_per_image=sum(r.bytes for r in measured) / images if images else None,
        images=stage.images,
        fit_seconds=wall if stage.kind == "fit" and measured else None,
        progress=read_progress(stage.folder) if stage.kind == "fit" and not done else None,
    )
