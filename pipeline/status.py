"""`status` and `plan`: what is done, told by the parts; how fast and how big, told by the receipts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Column, Table

from pipeline import storage
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.fit_progress import read_progress
from pipeline.log import stdout_console
from pipeline.receipts import add_up, list_receipts, read_receipts
from pipeline.sources import open_index
from pipeline.stages import Stage, done_shards, index_folder, is_fitted, resolve_stages

AT_A_TIME = 8  # stages that are looked at


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


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands. `images` and `shards` are None before the source was indexed."""

    run: str
    source: str
    images: int | None
    shards: int | None
    workers: int  # the least that a stage has, with which times are reckoned
    stages: list[StageStatus]
    most_workers: int  # the most


def run_status(config: Config) -> RunStatus:
    """Reads listings and receipts only. ConfigError when the run folder cannot be read."""
    with storage.failures_as(ConfigError, config.run.uri, "give access to run.uri, or ask again when it answers"):
        return _run_status(config)


def _run_status(config: Config) -> RunStatus:
    run, source, size = storage.redact(config.run.uri), storage.redact(config.source.uri), config.workers.size
    errors: tuple[type[Exception], ...] = (*storage.store_errors(config.run.uri), ValueError)
    try:
        index = open_index(index_folder(config))
    except FileNotFoundError:
        return RunStatus(run, source, None, None, size.min, [], size.max)
    except errors as error:
        raise ConfigError(f"run.uri: cannot read {run}: {storage.redact(str(error))}") from error
    try:
        table = resolve_stages(config, index, download=False)
    except errors as error:
        raise ConfigError(str(error)) from error
    listed = list_receipts(config.run.uri)
    with ThreadPoolExecutor(AT_A_TIME) as pool:  # a bucket is asked for all stages at once
        stages = list(pool.map(lambda stage: stage_status(config.run.uri, stage, listed), table.values()))
    return RunStatus(run, source, index.images, index.shards, size.min, stages, size.max)


def stage_status(run_uri: str, stage: Stage, listed: Sequence[str] | None = None) -> StageStatus:
    """One stage of the run folder, from its listing and its receipts; `listed` as of `read_receipts`."""
    receipts = read_receipts(run_uri, stage.name, stage.fingerprint, listed=listed)
    if stage.kind == "fit":
        done, shards = {0} if is_fitted(stage) else set(), 1
    else:
        done, shards = done_shards(stage), stage.shards
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


def print_status(status: RunStatus) -> None:
    console = stdout_console()
    if status.images is None:
        console.print(f"{status.run}: nothing done yet; {status.source} is not indexed", soft_wrap=True)
        return
    console.print(
        f"{status.run}: {status.images} images in {status.shards} shards from {status.source}", soft_wrap=True
    )
    columns = ("stage", "fingerprint", "done", "rows", "instances", "images/s a worker", "failed shards")
    table = Table(*(Column(name, no_wrap=name in {"stage", "fingerprint"}) for name in columns))
    for stage in status.stages:
        rate = stage.images_per_worker_second
        table.add_row(
            stage.stage,
            stage.fingerprint,
            _state(stage) if stage.kind == "fit" else f"{stage.done}/{stage.shards}",
            ", ".join(f"{count} {name}" for name, count in stage.rows.items()),
            str(stage.instances) if stage.instances else "",
            f"{rate:.2f}" if rate else "",
            ", ".join("the fit" if stage.kind == "fit" else str(shard) for shard in stage.failed[:8]),
        )
    console.print(table)
    for stage in status.stages:
        total = sum(stage.pixels.values())
        if total:
            shares = ", ".join(f"{100 * count / total:.1f} % {kind}" for kind, count in stage.pixels.items())
            console.print(f"pixels of {stage.stage}: {shares}")


def _state(fit: StageStatus) -> str:
    if fit.done:
        return "fitted" if fit.fit_seconds is None else f"fitted in {fit.fit_seconds:.0f} s"
    return "to fit" if fit.progress is None else f"step {fit.progress['step']:.0f} of {fit.progress['steps']:.0f}"


def plan_of(status: RunStatus) -> dict[str, Any]:
    """What is left of each stage, with seconds and bytes where a rate was measured, as plain data."""
    steps = [asdict(_step(stage, status)) for stage in status.stages]
    return {"run": status.run, "source": status.source, "images": status.images, "steps": steps}


def print_plan(status: RunStatus) -> None:
    steps = [_step(stage, status) for stage in status.stages]
    console = stdout_console()
    if status.images is None:
        console.print(f"index {status.source}, then every stage; nothing is measured yet", soft_wrap=True)
        return
    elastic = f" (up to {status.most_workers})" if status.most_workers > status.workers else ""
    table = Table("stage", "to do", "images", "time", "size", title=f"{status.workers} workers{elastic}")
    for stage, step in zip(status.stages, steps, strict=True):
        fit = stage.kind == "fit"
        table.add_row(
            step.stage,
            _state(stage) if fit else f"{step.pending} of {step.shards}",
            "" if fit else str(step.images),
            "not measured" if step.seconds is None else f"{step.seconds:.0f} s",
            "" if fit else "not measured" if step.bytes is None else f"{step.bytes / 2**20:.1f} MiB",
        )
    console.print(table)


@dataclass(frozen=True)
class PlanStep:
    """What is left of one stage. `seconds` with all workers and `bytes` are None before a rate was measured; a fit is
    taken to last as long as the last time."""

    stage: str
    pending: int
    shards: int
    images: int
    seconds: float | None
    bytes: float | None


def _step(stage: StageStatus, status: RunStatus) -> PlanStep:
    pending = stage.shards - stage.done
    if stage.kind == "fit":
        return PlanStep(stage.stage, pending, stage.shards, 0, stage.fit_seconds if pending else 0.0, None)
    images = round((stage.images or 0) * pending / max(stage.shards, 1))
    rate, size = stage.images_per_worker_second, stage.bytes_per_image
    seconds = 0.0 if not pending else images / (rate * status.workers) if rate else None
    return PlanStep(stage.stage, pending, stage.shards, images, seconds, images * size if size else None)
