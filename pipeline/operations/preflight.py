"""Checks before any work: a mistake that can be seen now must not cost an hour of a cluster.

Each raises ConfigError with the key, the value and the remedy.
"""

from __future__ import annotations

import uuid

from model.backbone import check_weights
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sources.choice import choice_of
from pipeline.sources.index import check_source
from pipeline.stages.table import define_stages
from pipeline.store import storage
from pipeline.store.retries import BRIEF
from pipeline.store.weights import local_weights


def check_all(config: Config) -> None:
    """What each stage can see, weights, run folder and source, in the order of what they cost."""
    for stage in define_stages(config).values():
        stage.check(config, None)
    check_backbone(config)
    check_run_folder(config.run.uri)
    source = config.source
    try:
        check_source(
            source.uri,
            source.format,
            image_column=source.image_column,
            anonymous=source.anonymous,
            choice=choice_of(config),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def check_backbone(config: Config) -> None:
    backbone = config.backbone
    try:
        check_weights(backbone.name, local_weights(backbone.weights), sha256=backbone.sha256)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def check_run_folder(run_uri: str) -> None:
    """One real write, read and delete where the parts will go."""
    probe = storage.join(run_uri, f"{storage.TEMPORARY}probe-{uuid.uuid4().hex}")
    content = uuid.uuid4().bytes
    errors: tuple[type[Exception], ...] = (*storage.store_errors(run_uri), ValueError)  # ValueError: unknown scheme
    try:
        storage.write_bytes(probe, content, retry=BRIEF)  # a mistyped endpoint is not waited for
        read = storage.read_bytes(probe)
        storage.remove(probe)
    except errors as error:
        raise ConfigError(
            f"run.uri: cannot write to {storage.redact(run_uri)}: {storage.redact(str(error))}; "
            "choose a folder or bucket that you may write to, or mend its permissions or credentials"
        ) from error
    if read != content:
        raise ConfigError(f"run.uri: {storage.redact(run_uri)} gave back other bytes than were written to it")
