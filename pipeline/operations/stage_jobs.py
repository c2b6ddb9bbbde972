"""What `run` and `work` begin a stage with: the run resolved, its inputs there, and what an actor needs to know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.config import Config
from pipeline.engine.done import pending_shards
from pipeline.engine.stage import Stage, index_folder
from pipeline.errors import ConfigError, StageFailed
from pipeline.sources.index import Index
from pipeline.stages.base import Run, ShardStage
from pipeline.stages.latest import LATEST, write_latest
from pipeline.stages.run import resolve_run
from pipeline.store import storage
from workers.records import SCHEMA_VERSION

if TYPE_CHECKING:
    from pipeline.engine.shards import StageJob


def resolved(config: Config, index: Index) -> Run:
    """The run of a config over its index. ConfigError: weights or a file that cannot be read."""
    errors: tuple[type[Exception], ...] = (*storage.store_errors(config.run.uri), ValueError)
    try:
        return resolve_run(config, index)
    except errors as error:
        raise ConfigError(str(error)) from error


def require_inputs(stage: Stage) -> None:
    """StageFailed unless all that the stage reads is done."""
    for used in stage.reads:
        missing = len(pending_shards(used))
        if missing:
            lacking = "which is not fitted" if used.kind == "fit" else f"{missing} shards of which are missing"
            raise StageFailed(
                f"{stage.name} needs the stage {used.name}, {lacking}; do it first: u2label run does all "
                "stages in their order"
            )


def note_latest(run: Run) -> None:
    """Write down that this is the last run of its folder. StageFailed: the store does not take it."""
    uri = storage.join(run.uri, LATEST)
    try:
        write_latest(run.config, {name: stage.fingerprint for name, stage in run.stages.items()}, run.teacher or "")
    except storage.store_errors(uri) as error:
        raise StageFailed(
            f"cannot write {storage.redact(f'{uri}: {error}')}; make room or mend the store, then run the same command "
            "again"
        ) from error


def job_of(definition: ShardStage, stage: Stage, run: Run) -> StageJob:
    """What the actors of a stage are told."""
    from pipeline.engine.shards import StageJob

    return StageJob(
        stage,
        _pinned(run),
        index_folder(run.config),
        run.stages,
        _metadata(definition, stage, run),
        run.teacher or "",
        definition.schema(run.config),
    )


def _pinned(run: Run) -> Config:
    """The config with the checksum of the weights that this process read: another node must not have another file."""
    _, is_file, checksum = (run.teacher or "").partition(" sha256:")
    if not is_file:
        return run.config
    return run.config.model_copy(update={"backbone": run.config.backbone.model_copy(update={"sha256": checksum})})


def _metadata(definition: ShardStage, stage: Stage, run: Run) -> dict[str, str]:
    """Key-value metadata of every part: enough to know what made it."""
    entries: dict[str, Any] = {
        "stage": stage.name,
        "fingerprint": stage.fingerprint,
        "schema_version": str(SCHEMA_VERSION),
        "software_version": __version__,
        "config": run.config.model_dump_json(exclude={"workers"}),
    }
    if definition.holds_labels:
        entries["categories"] = json.dumps(definition.categories(run))
    return entries
