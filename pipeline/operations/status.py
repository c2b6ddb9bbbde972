"""`status` and `plan`: what is done, told by the parts; how fast and how big, told by the receipts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline.config import Config
from pipeline.engine.log import stdout_console
from pipeline.engine.pace import Pace
from pipeline.engine.receipts import list_receipts
from pipeline.engine.status import StageStatus, stage_status
from pipeline.errors import ConfigError
from pipeline.operations.preflight import foreseen
from pipeline.operations.source import Listing, describe_listing
from pipeline.stages.base import Run
from pipeline.stages.run import find_run
from pipeline.stages.table import faults
from pipeline.store import storage

PLAN_PATIENCE_S = 20.0  # that `plan` waits for the listing of the source
AT_A_TIME = 8  # stages that are looked at


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
    faults: list[str] = field(default_factory=list)  # what is bound to fail of what is left to do
    listing: str = ""  # how the source differs from its index, in words
    left_out: dict[str, int] = field(default_factory=dict)  # files of the source that were not taken, by the reason


def run_status(config: Config) -> RunStatus:
    """Reads listings and receipts only. ConfigError when the run folder cannot be read."""
    with storage.failures_as(ConfigError, config.run.uri, "give access to run.uri, or ask again when it answers"):
        run = find_run(config)
        return _not_begun(config) if run is None else status_of(run)


def planned(config: Config) -> RunStatus:
    """As `run_status`; of a run that has begun also how the source differs from its index, where its listing takes no
    more than a moment, of another what is bound to fail, for which its source is looked at."""
    with storage.failures_as(ConfigError, config.run.uri, "give access to run.uri, or ask again when it answers"):
        run = find_run(config)
        if run is None:
            return replace(_not_begun(config), faults=foreseen(config))
        listing = Listing(config, run.index)
        return replace(status_of(run), listing=describe_listing(listing.wait(PLAN_PATIENCE_S)))


def status_of(run: Run) -> RunStatus:
    """As `run_status`, of a run that is resolved. Errors as the store gives them."""
    config, listed = run.config, list_receipts(run.uri)
    with ThreadPoolExecutor(AT_A_TIME) as pool:  # a bucket is asked for all stages at once
        look = run.look
        stages = list(
            pool.map(
                lambda stage: stage_status(run.uri, stage, look.sizes(stage), config.workers, listed),
                run.stages.values(),
            )
        )
    left = [run.definitions[stage.stage] for stage in stages if stage.done < stage.shards]
    found = faults(left, config, run.index)
    index = run.index
    return replace(
        _not_begun(config),
        images=index.images,
        shards=index.shards,
        stages=stages,
        faults=found,
        left_out=index.ignored.reasons(),
    )


def _not_begun(config: Config) -> RunStatus:
    size = config.workers.size
    run, source = storage.redact(config.run.uri), storage.redact(config.source.uri)
    return RunStatus(run, source, None, None, size.min, [], size.max)


def print_status(status: RunStatus) -> None:
    console = stdout_console()
    if status.images is None:
        console.print(f"{status.run}: nothing done yet; {status.source} is not indexed", soft_wrap=True)
        return
    console.print(
        f"{status.run}: {status.images} images in {status.shards} shards from {status.source}", soft_wrap=True
    )
    _print_left_out(status)
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


def _print_left_out(status: RunStatus) -> None:
    for reason, count in status.left_out.items():
        stdout_console().print(f"left out: {count} {reason}", markup=False, highlight=False, soft_wrap=True)


def _state(fit: StageStatus) -> str:
    if fit.done:
        return "fitted" if fit.fit_seconds is None else f"fitted in {fit.fit_seconds:.0f} s"
    return "to fit" if fit.progress is None else f"step {fit.progress['step']:.0f} of {fit.progress['steps']:.0f}"


def plan_of(status: RunStatus) -> dict[str, Any]:
    """What is left of each stage, with seconds and bytes where a rate was measured, as plain data."""
    steps = [asdict(_step(stage, status)) for stage in status.stages]
    plan = {"run": status.run, "source": status.source, "images": status.images, "steps": steps}
    return plan | {"faults": status.faults, "listing": status.listing, "left_out": status.left_out}


def print_plan(status: RunStatus) -> None:
    steps = [_step(stage, status) for stage in status.stages]
    console = stdout_console()
    if status.images is None:
        console.print(f"index {status.source}, then every stage; nothing is measured yet", soft_wrap=True)
        _print_faults(status.faults, console)
        return
    _print_left_out(status)
    elastic = f" (up to {status.most_workers})" if status.most_workers > status.workers else ""
    table = Table("stage", "to do", "images", "time", "size", "pace set by", title=f"{status.workers} workers{elastic}")
    for stage, step in zip(status.stages, steps, strict=True):
        fit = stage.kind == "fit"
        table.add_row(
            step.stage,
            _state(stage) if fit else f"{step.pending} of {step.shards}",
            "" if fit else str(step.images),
            "not measured" if step.seconds is None else f"{step.seconds:.0f} s",
            "" if fit else "not measured" if step.bytes is None else f"{step.bytes / 2**20:.1f} MiB",
            "" if step.pace is None else step.pace.text,
        )
    console.print(table)
    if status.listing:
        console.print(status.listing, markup=False, soft_wrap=True)
    _print_faults(status.faults, console)


def _print_faults(faults: list[str], console: Console) -> None:
    for fault in faults:
        console.print(f"bound to fail: {fault}", markup=False, soft_wrap=True)


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
    pace: Pace | None = None


def _step(stage: StageStatus, status: RunStatus) -> PlanStep:
    pending = stage.shards - stage.done
    if stage.kind == "fit":
        return PlanStep(stage.stage, pending, stage.shards, 0, stage.fit_seconds if pending else 0.0, None)
    images = round((stage.images or 0) * pending / max(stage.shards, 1))
    rate, size = stage.images_per_worker_second, stage.bytes_per_image
    seconds = 0.0 if not pending else images / (rate * status.workers) if rate else None
    return PlanStep(stage.stage, pending, stage.shards, images, seconds, images * size if size else None, stage.pace)
