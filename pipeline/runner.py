"""`u2label run`: take each stage from what is done to all done, and say what failed.

Running the same command again is the recovery: shards whose part is there are not touched.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from model.weights import resolve_weights
from pipeline import __version__, storage
from pipeline.config import Config
from pipeline.errors import ConfigError, StageFailed
from pipeline.lease import run_lease
from pipeline.log import say
from pipeline.preflight import check_all
from pipeline.progress import StageProgress
from pipeline.receipts import Receipt, ReceiptLog
from pipeline.sources import Index, build_index, open_index
from pipeline.stages import (
    LABELS,
    LATEST,
    Stage,
    base_name,
    categories,
    done_shards,
    index_folder,
    is_fitted,
    resolve_stages,
    stage_names,
    teacher_identity,
)
from pipeline.weights import local_weights
from workers.records import SCHEMA_VERSION


@dataclass
class RunSummary:
    """What a run did: shards (or artifacts) computed by stage, and the stages as they stand."""

    stages: dict[str, Stage]
    index: Index
    computed: dict[str, int] = field(default_factory=dict)


def run(
    config: Config,
    *,
    stages: Collection[str] | None = None,
    address: str | None = None,
    max_failed_fraction: float = 1.0,
    reindex: bool = False,
) -> RunSummary:
    """Do everything that is pending of the named stages. ConfigError before work, StageFailed when shards failed."""
    names = stage_names(config)
    unknown = sorted(set(stages or ()) - set(names))
    if unknown:
        raise ConfigError(f"--stages: {', '.join(unknown)} is unknown; the stages are {', '.join(names)}")
    check_all(config)
    again = storage.failures_as(StageFailed, config.run.uri, "when it answers, run the same command again")
    with again, run_lease(config.run.uri), ExitStack() as connection:
        for folder in (config.run.uri, storage.join(config.run.uri, "receipts"), index_folder(config)):
            storage.remove_litter(folder)  # the lease says that nobody is writing
        index = _index(config, reindex)
        table = _resolve(config, index)
        summary = RunSummary(table, index)
        for name in names:
            if stages is not None and name not in stages:
                continue
            stage = table[name]
            pending = _pending(stage)
            say(_opening(stage, len(pending)), stage=name, fingerprint=stage.fingerprint)
            if pending:
                _require_inputs(stage, table)
                _connect(connection, config, address)
                _write_latest(config, table)
                _run_stage(stage, pending, config, table, max_failed_fraction)
            storage.remove_litter(stage.folder)  # of workers that were killed while they wrote
            summary.computed[name] = len(pending)
        _write_latest(config, table)
    return summary


def _resolve(config: Config, index: Index) -> dict[str, Stage]:
    errors: tuple[type[Exception], ...] = (*storage.store_errors(config.run.uri), ValueError)
    try:
        return resolve_stages(config, index)
    except errors as error:
        raise ConfigError(str(error)) from error


def _index(config: Config, reindex: bool) -> Index:
    """The index of the source, made the first time (or again, when the source has changed)."""
    folder = index_folder(config)
    if not reindex:
        with contextlib.suppress(FileNotFoundError):
            return open_index(folder)
    say(f"index: listing {storage.redact(config.source.uri)}")
    source = config.source
    errors: tuple[type[Exception], ...] = (*storage.store_errors(source.uri), ValueError)
    try:
        index = build_index(
            folder,
            source.uri,
            source.format,
            shard_size=source.shard_size,
            image_column=source.image_column,
            anonymous=source.anonymous,
        )
    except errors as error:
        raise ConfigError(str(error)) from error
    say(f"index: {index.images} images in {index.shards} shards; left out: {index.ignored}")
    return index


def _connect(connection: ExitStack, config: Config, address: str | None) -> None:
    """Start or join Ray when a stage needs it, so that a run with nothing to do is quick; once is enough."""
    from pipeline.cluster import connect

    connection.enter_context(connect(config, address))


def _pending(stage: Stage) -> list[int]:
    if stage.kind == "fit":
        return [] if is_fitted(stage) else [0]
    done = done_shards(stage)
    return [shard for shard in range(stage.shards) if shard not in done]


def _opening(stage: Stage, pending: int) -> str:
    where = f"{stage.name} {stage.fingerprint}"
    if not pending:
        return f"{where}: done"
    if stage.kind == "fit":
        return f"{where}: to fit"
    return f"{where}: {pending} of {stage.shards} shards to do"


def _require_inputs(stage: Stage, table: dict[str, Stage]) -> None:
    for name in stage.inputs:
        missing = len(_pending(table[name]))
        if missing:
            lacking = "which is not fitted" if table[name].kind == "fit" else f"{missing} shards of which are missing"
            raise StageFailed(f"{stage.name} needs the stage {name}, {lacking}; run it first, or leave out --stages")


def _run_stage(
    stage: Stage, pending: list[int], config: Config, table: dict[str, Stage], max_failed_fraction: float
) -> None:
    storage.remove_litter(stage.folder)
    if stage.kind == "fit":
        _fit(stage, config, table)
    else:
        _run_shard_stage(stage, pending, config, table, max_failed_fraction)


def _run_shard_stage(
    stage: Stage, pending: list[int], config: Config, table: dict[str, Stage], max_failed_fraction: float
) -> None:
    from ray.exceptions import RayError

    from pipeline.actors import actor_for
    from pipeline.engine import run_shards
    from pipeline.metrics import StageMetrics
    from pipeline.shards import StageJob

    job = StageJob(stage, _pinned(config), index_folder(config), table, _metadata(stage, config, table))
    log = ReceiptLog(config.run.uri, stage.name, stage.fingerprint)
    failures: list[Receipt] = []
    try:
        done = stage.shards - len(pending)
        metrics = StageMetrics(storage.redact(config.run.uri), stage.name, done=done, pending=len(pending))
        receipts = run_shards(actor_for(stage.name, config), job, pending, config.workers)
        with StageProgress(stage.name, len(pending)) as progress, closing(receipts):
            for receipt in receipts:
                log.append(receipt)
                progress.add(receipt)
                metrics.add(receipt)
                failures += [] if receipt.ok else [receipt]
                if len(failures) > max_failed_fraction * len(pending):
                    raise StageFailed(f"{stage.name}: stopped early, {len(failures)} shards failed", failures)
    except RayError as error:  # a worker that cannot start, a cluster that went away
        raise StageFailed(f"{stage.name}: Ray gave up: {storage.redact(str(error))}", failures) from error
    finally:
        log.flush()
    missing = _pending(stage)
    if missing:
        raise StageFailed(f"{stage.name}: {len(missing)} of {stage.shards} shards are not done", failures)


def _fit(stage: Stage, config: Config, table: dict[str, Stage]) -> None:
    from ray.exceptions import RayError

    from pipeline.fits import FITS

    failures: tuple[type[Exception], ...] = (ValueError, RuntimeError, RayError, *storage.store_errors(config.run.uri))
    started = time.perf_counter()
    try:
        said = FITS[base_name(stage.name)](stage, config, table)
    except failures as error:  # too little to fit to, workers that die again and again, a disk that is full
        message = storage.redact(str(error))
        _log_fit(stage, config, time.perf_counter() - started, message)
        raise StageFailed(f"{stage.name}: {message}") from error
    _log_fit(stage, config, time.perf_counter() - started, None)
    say(f"{stage.name}: {said}", stage=stage.name)


def _log_fit(stage: Stage, config: Config, seconds: float, error: str | None) -> None:
    """The receipt of a fit: its time is that of the attempt that ended it, without those that were killed."""
    log = ReceiptLog(config.run.uri, stage.name, stage.fingerprint)
    receipt = Receipt(
        stage=stage.name,
        fingerprint=stage.fingerprint,
        shard=0,
        ok=error is None,
        wall_s=seconds,
        seconds={"fit": seconds},
        error=error,
        host=socket.gethostname(),
    )
    log.append(receipt)
    log.flush()


def _pinned(config: Config) -> Config:
    """The config with the checksum of the weights that this process read: another node must not have another file."""
    backbone = config.backbone
    weights = resolve_weights(backbone.name, local_weights(backbone.weights), sha256=backbone.sha256)
    if weights.path is None:
        return config
    pin = backbone.model_copy(update={"sha256": weights.identity.removeprefix("sha256:")})
    return config.model_copy(update={"backbone": pin})


def _metadata(stage: Stage, config: Config, table: dict[str, Stage]) -> dict[str, str]:
    """Key-value metadata of every part: enough to know what made it."""
    entries: dict[str, Any] = {
        "stage": stage.name,
        "fingerprint": stage.fingerprint,
        "schema_version": str(SCHEMA_VERSION),
        "software_version": __version__,
        "config": config.model_dump_json(exclude={"workers"}),
    }
    if base_name(stage.name) in LABELS:
        entries["categories"] = json.dumps(_categories(stage, config, table))
    return entries


def _categories(stage: Stage, config: Config, table: dict[str, Stage]) -> list[dict[str, Any]]:
    """Those of the run's labels; of a model's predictions, those that it was trained on, which may be human ones."""
    if base_name(stage.name) != "predictions":
        return categories(config)
    from pipeline.predict.weights import read_categories

    (trained,) = stage.inputs
    return read_categories(table[trained].folder)


def _write_latest(config: Config, table: dict[str, Stage]) -> None:
    content = {
        "config": config.model_dump(mode="json"),
        "fingerprints": {name: stage.fingerprint for name, stage in table.items()},
        "teacher": teacher_identity(config),
    }
    uri = storage.join(config.run.uri, LATEST)
    try:
        storage.write_bytes(uri, json.dumps(content, indent=2).encode())
    except storage.store_errors(uri) as error:
        raise StageFailed(
            f"cannot write {storage.redact(f'{uri}: {error}')}; make room or mend the store, then run the same command "
            "again"
        ) from error
