"""One stage as it stands: its parts, and what the receipts of their workers say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config.workers import WorkersConfig
from pipeline.engine.done import Look
from pipeline.engine.fit_progress import read_progress
from pipeline.engine.pace import Pace, pace_of
from pipeline.engine.receipts import READERS, Receipt, add_up, read_receipts
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.store import storage


@dataclass(frozen=True)
class StageStatus:
    """One stage as it stands. Rows, instances and pixels are those of the parts. Rates are of the receipts of done
    shards; of the stage's last run with other settings before there are any; None before that."""

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
    pace: Pace | None = None  # what sets it, where the receipts tell


def receipts_of_parts(run_uri: str, stage: Stage, listed: Sequence[str] | None = None) -> list[Receipt]:
    """A receipt of each finished shard: the one that its worker gave, else one that the part itself tells, without
    seconds: the driver that should have written it down was killed. `listed` as of `read_receipts`."""
    told = {r.shard: r for r in read_receipts(run_uri, stage.name, stage.fingerprint, listed=listed) if r.ok}
    return _of_parts(stage, told, Look([stage]).sizes(stage, strict=False))


def _of_parts(stage: Stage, told: Mapping[int, Receipt], sizes: Mapping[int, int]) -> list[Receipt]:
    """A receipt that tells of another number of bytes is of a part that was there before."""
    known = {shard: told[shard] for shard, size in sizes.items() if shard in told and told[shard].bytes in (0, size)}
    unknown = [shard for shard in sizes if shard not in known]
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda shard: _receipt_of_part(stage, shard, sizes[shard], told.get(shard)), unknown)
        known |= zip(unknown, read, strict=True)
    return [known[shard] for shard in sorted(known)]


def _receipt_of_part(stage: Stage, shard: int, size: int, earlier: Receipt | None) -> Receipt:
    """As the part tells; of one that is damaged, as an `earlier` receipt does."""
    import pyarrow as pa  # which few looks at a run need

    from pipeline.engine.shards import read_columns
    from workers.counts import COLUMNS, count

    try:
        counts = count(read_columns(stage.part(shard), COLUMNS))
    except pa.ArrowInvalid as error:
        if earlier is not None:
            return earlier
        shown = storage.redact(stage.part(shard))
        raise ConfigError(f"{shown} cannot be read: {error}; delete it, and run the same command again") from error
    return Receipt(stage.name, stage.fingerprint, shard, ok=True, wall_s=0.0, bytes=size, **counts)


def stage_status(
    run_uri: str,
    stage: Stage,
    sizes: Mapping[int, int],
    workers: WorkersConfig,
    listed: Sequence[str] | None = None,
) -> StageStatus:
    """One stage of the run folder, from the `sizes` of what is done (see `Look`) and its receipts; `listed` as of
    `read_receipts`.

    ConfigError: a part without a receipt that cannot be read.
    """
    receipts = read_receipts(run_uri, stage.name, stage.fingerprint, listed=listed)
    told = {receipt.shard: receipt for receipt in receipts if receipt.ok}
    done = sizes.keys()
    fit, shards = stage.kind == "fit", 1 if stage.kind == "fit" else stage.shards
    good = [told[shard] for shard in done & told.keys()] if fit else _of_parts(stage, told, sizes)
    measured = [receipt for receipt in good if receipt.wall_s] or [
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
        pace=pace_of(measured, workers),
    )
