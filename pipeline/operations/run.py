"""`u2label run`: take each stage from what is done to all done, and say what failed.

Running the same command again is the recovery: shards whose part is there are not touched.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.engine.done import FitChanges, Look, begin_fit, pending_shards
from pipeline.engine.lease import run_lease
from pipeline.engine.log import say
from pipeline.engine.progress import StageProgress
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import Stage, index_folder
from pipeline.engine.status import receipts_of_parts
from pipeline.errors import ConfigError, StageFailed
from pipeline.operations.preflight import check_all
from pipeline.operations.retry import remove_parts
from pipeline.operations.source import Listing, open_source
from pipeline.operations.stage_jobs import job_of, note_latest, require_inputs, resolved
from pipeline.stages.base import Definition, FitStage, Run, ShardStage
from pipeline.stages.table import define_stages, faults
from pipeline.store import storage

WATCHED = 64  # shards, the first of a stage, after each of which it is asked whether its rows are worth going on


@dataclass
class RunSummary:
    """What a run did: shards (or artifacts) computed by stage, and the run as it stands."""

    run: Run
    computed: dict[str, int] = field(default_factory=dict)

    @property
    def stages(self) -> dict[str, Stage]:
        return self.run.stages


def run(
    config: Config,
    *,
    stages: Collection[str] | None = None,
    address: str | None = None,
    max_failed_fraction: float = 1.0,
    reindex: bool = False,
    extend: bool = False,
    prune: bool = False,
    refit: bool = False,
    retry: Collection[str] = (),
    wait_s: float = 0,
) -> RunSummary:
    """Do everything that is pending of the named stages. ConfigError before work, StageFailed when shards failed.

    `reindex`, `extend`, `prune`: see `open_source`. `refit`: also the fits of which a part has changed or come since.
    `retry`: also the shards with rows of these statuses. `wait_s`: how long a cluster may take to get the nodes.
    """
    defined = define_stages(config)
    unknown = sorted(set(stages or ()) - set(defined))
    if unknown:
        raise ConfigError(f"--stages: {', '.join(unknown)} is unknown; the stages are {', '.join(defined)}")
    check_all(config)
    again = storage.failures_as(StageFailed, config.run.uri, "when it answers, run the same command again")
    with again, run_lease(config.run.uri), ExitStack() as connection:
        for folder in (config.run.uri, storage.join(config.run.uri, "receipts"), index_folder(config)):
            storage.remove_litter(folder)  # the lease says that nobody is writing
        index, is_new = open_source(config, reindex=reindex, extend=extend, prune=prune)
        listing = None if is_new else Listing(config, index)
        summary = RunSummary(resolved(config, index))
        this = summary.run
        if listing:
            listing.tell()
        remove_parts(this, retry)
        _foresee(this, stages)
        for name, stage in this.stages.items():
            if stages is not None and name not in stages:
                continue
            pending = _pending(this.definitions[name], stage, this, refit)
            say(_opening(stage, len(pending)), stage=name, fingerprint=stage.fingerprint)
            if pending:
                require_inputs(stage)
                _connect(connection, this, address, wait_s)
                note_latest(this)
                storage.remove_litter(stage.folder)
                _do(this.definitions[name], stage, pending, this, max_failed_fraction)
            storage.remove_litter(stage.folder)  # of workers that were killed while they wrote
            _require_content(this.definitions[name], stage, this)
            summary.computed[name] = len(pending)
        note_latest(this)
        if listing:
            listing.tell(last=True)
    return summary


def _pending(definition: Definition, stage: Stage, run: Run, refit: bool) -> list[int]:
    """The shards of a stage that are to be done; of a fit that stands though its inputs have changed it says so."""
    look = Look([stage])
    pending = look.pending(stage)
    if not isinstance(definition, FitStage):
        return pending
    changes = look.changes(stage)
    if pending or (changes.any and (refit or definition.came_to_nothing(stage))):
        return [0]
    if changes.any:
        _tell_kept(definition, stage, run, changes)
    return []


def _tell_kept(definition: FitStage, stage: Stage, run: Run, changes: FitChanges) -> None:
    try:
        drift = definition.drift(run, stage, changes)
    except ValueError as error:  # a part that somebody damaged
        raise StageFailed(f"{stage.name}: {storage.redact(str(error))}") from error
    say(
        f"{stage.name}: kept, though of the {changes.known} parts that it was made of {changes.changed} are others "
        f"now, and {changes.added} came since{drift and f'; {drift}'}; --refit makes it again"
    )


def _foresee(run: Run, stages: Collection[str] | None) -> None:
    """ConfigError, before any work, for what is bound to fail of the stages that are asked for and not done."""
    asked = [run.definitions[name] for name in run.stages if stages is None or name in stages]
    found = [fault for stage in asked for fault in faults([stage], run.config, run.index) if _is_pending(stage, run)]
    if found:
        raise ConfigError("\n".join(found))


def _is_pending(stage: Definition, run: Run) -> bool:
    return bool(pending_shards(run.stages[stage.full_name]))


def _require_content(definition: Definition, stage: Stage, run: Run) -> None:
    """StageFailed when the rows of a finished stage are, as a whole, nothing to go on with."""
    if isinstance(definition, ShardStage) and definition.watched:
        said = definition.complaint(run.config, receipts_of_parts(run.uri, stage), final=True)
        if said is not None:
            raise StageFailed(f"{stage.name}: {said}")


def _connect(connection: ExitStack, run: Run, address: str | None, wait_s: float) -> None:
    """Start or join Ray when a stage needs it, so that a run with nothing to do is quick; once is enough."""
    from pipeline.engine.cluster import connect

    trains = any(isinstance(stage, FitStage) and stage.trains for stage in run.definitions.values())
    connection.enter_context(connect(run.config.workers, address, trains=trains, wait_s=wait_s))


def _opening(stage: Stage, pending: int) -> str:
    where = f"{stage.name} {stage.fingerprint}"
    if not pending:
        return f"{where}: done"
    if stage.kind == "fit":
        return f"{where}: to fit"
    return f"{where}: {pending} of {stage.shards} shards to do"


def _do(definition: Definition, stage: Stage, pending: list[int], run: Run, max_failed_fraction: float) -> None:
    match definition:
        case FitStage():
            _fit(definition, stage, run)
        case ShardStage():
            _run_shards(definition, stage, pending, run, max_failed_fraction)


def _run_shards(definition: ShardStage, stage: Stage, pending: list[int], run: Run, max_failed_fraction: float) -> None:
    from ray.exceptions import RayError

    from pipeline.engine.metrics import StageMetrics
    from pipeline.engine.pool import run_shards

    log = ReceiptLog(run.uri, stage.name, stage.fingerprint)
    failures: list[Receipt] = []
    done_now: list[Receipt] = []  # the first ones, which can tell that all would come to nothing
    watched = WATCHED if definition.watched else 0
    try:
        done = stage.shards - len(pending)
        metrics = StageMetrics(storage.redact(run.uri), stage.name, done=done, pending=len(pending))
        receipts = run_shards(definition.actor(), job_of(definition, stage, run), pending, run.config.workers)
        with StageProgress(stage.name, len(pending)) as progress, closing(receipts):
            for receipt in receipts:
                log.append(receipt)
                progress.add(receipt)
                metrics.add(receipt)
                if not receipt.ok:
                    failures.append(receipt)
                elif len(done_now) <= watched:
                    done_now.append(receipt)
                if len(failures) > max_failed_fraction * len(pending):
                    raise StageFailed(f"{stage.name}: stopped early, {len(failures)} shards failed", failures)
                said = definition.complaint(run.config, done_now, final=False) if len(done_now) <= watched else None
                if said is not None:
                    raise StageFailed(f"{stage.name}: stopped early, {said}", failures)
    except RayError as error:  # a worker that cannot start, a cluster that went away
        raise StageFailed(f"{stage.name}: Ray gave up: {storage.redact(str(error))}", failures) from error
    finally:
        log.flush()
    missing = pending_shards(stage)
    if missing:
        raise StageFailed(f"{stage.name}: {len(missing)} of {stage.shards} shards are not done", failures)


def _fit(definition: FitStage, stage: Stage, run: Run) -> None:
    from ray.exceptions import RayError

    failures: tuple[type[Exception], ...] = (ValueError, RuntimeError, RayError, *storage.store_errors(run.uri))
    started = time.perf_counter()
    try:
        if begin_fit(stage):
            say(f"{stage.name}: from the start, as what was there is of other inputs", stage=stage.name)
        said = definition.fit(run, stage)
    except failures as error:  # too little to fit to, workers that die again and again, a disk that is full
        message = storage.redact(str(error))
        _log_fit(stage, run.uri, time.perf_counter() - started, message)
        raise StageFailed(f"{stage.name}: {message}") from error
    _log_fit(stage, run.uri, time.perf_counter() - started, None)
    say(f"{stage.name}: {said}", stage=stage.name)


def _log_fit(stage: Stage, run_uri: str, seconds: float, error: str | None) -> None:
    """The receipt of a fit: its time is that of the attempt that ended it, without those that were killed."""
    log = ReceiptLog(run_uri, stage.name, stage.fingerprint)
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
