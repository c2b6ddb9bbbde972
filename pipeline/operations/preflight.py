"""Checks before any work: a mistake that can be seen now must not cost an hour of a cluster.

Each raises ConfigError with the key, the value and the remedy.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from model.backbone.names import OFFICIAL_URLS
from model.backbone.weights import resolve_weights
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sources.choice import choice_of
from pipeline.sources.index import check_source, scan
from pipeline.stages.base import Definition
from pipeline.stages.table import define_stages, faults
from pipeline.store import child, storage
from pipeline.store.retries import BRIEF
from pipeline.store.weights import local_weights

MISFIT = 2  # exit status of `python -m model.backbone`
AT_FIRST = 16  # photos that are listed, then as many again


def check_all(config: Config, *, computes: bool = False) -> None:
    """What each stage can see, weights, run folder and source, in the order of what they cost. `computes`: this process
    will need torch itself."""
    for stage in define_stages(config).values():
        stage.check(config, None)
    check_backbone(config, computes=computes)
    check_run_folder(config.run.uri)
    try:
        _check_source(config)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _check_source(config: Config) -> None:
    source, choice = config.source, choice_of(config)
    check_source(source.uri, source.format, image_column=source.image_column, anonymous=source.anonymous, choice=choice)


def foreseen(config: Config) -> list[str]:
    """What is bound to fail of a run that has not begun, a line each. Nothing is written and no weights are fetched; of
    the source so much is listed as is needed to know that it has photos enough."""
    found = []
    if not _is_fetched(config):
        try:
            check_backbone(config)
        except ConfigError as error:
            found.append(str(error))
    stages = list(define_stages(config).values())
    try:
        _check_source(config)
        return found + faults(stages, config, _look(config, stages))
    except (OSError, ValueError) as error:
        return [storage.redact(str(error)), *found, *faults(stages, config, None)]


@dataclass(frozen=True)
class _Look:
    images: int


def _look(config: Config, stages: Sequence[Definition]) -> _Look:
    """As many photos of the source as no stage finds too few, else all that it has."""
    source, images = config.source, 0
    records = scan(
        source.uri,
        source.format,
        image_column=source.image_column,
        threads=1,
        anonymous=source.anonymous,
        choice=replace(choice_of(config), label_maps=True),  # whether a picture is one is seen by reading many
    )
    records = islice(records, source.limit)
    whatever_their_number = len(faults(stages, config, None))
    while len(faults(stages, config, _Look(images))) > whatever_their_number:
        more = sum(1 for _ in islice(records, max(images, AT_FIRST)))
        if not more:
            break
        images += more
    return _Look(images)


def _is_fetched(config: Config) -> bool:
    """Whether a run fetches its weights, unless it has done so before."""
    weights = config.backbone.weights
    return storage.is_remote(weights) or (weights == "official" and config.backbone.name in OFFICIAL_URLS)


def check_backbone(config: Config, *, computes: bool = False) -> None:
    backbone = config.backbone
    try:
        weights = resolve_weights(backbone.name, local_weights(backbone.weights), sha256=backbone.sha256)
        if weights.path is not None and computes:
            from model.backbone.build import check_file

            check_file(backbone.name, weights.path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if weights.path is not None and not computes:
        _check_apart(backbone.name, weights.path)


def _check_apart(name: str, weights: Path) -> None:
    """ConfigError unless the file fits the backbone. Another process loads torch for that: it would stay here."""
    with child.start("model.backbone", name, str(weights), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said, trace = process.communicate()
    if process.returncode == MISFIT:
        raise ConfigError(said.strip())
    if process.returncode:
        raise ConfigError(
            f"backbone.weights: the process that looked at {weights} ended with {process.returncode} (-9: killed, "
            f"often for want of memory): {trace.strip()[-2000:]}"
        )


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
