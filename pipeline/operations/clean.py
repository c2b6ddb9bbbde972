"""`u2label clean`: the folders of a run that its configuration no longer names, told and, if wanted, removed.

Only what a run writes is ever considered: `<run>/<stage>/<12 hexadecimal digits>` of stages that exist, receipts of
such folders, and `<run>/index/<12 hexadecimal digits>`. Anything else in the run folder, links too, stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.engine.lease import run_lease
from pipeline.engine.log import stdout_console
from pipeline.engine.receipts import FOLDER as RECEIPTS
from pipeline.engine.receipts import NAME as RECEIPT_NAME
from pipeline.engine.stage import ARTIFACT, index_folder
from pipeline.errors import ConfigError
from pipeline.sources.index import MANIFEST
from pipeline.stages.latest import read_latest
from pipeline.stages.run import find_run
from pipeline.stages.table import is_stage
from pipeline.store import storage

INDEX = "index"
FINGERPRINT = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Stale:
    """A folder, or the receipts, of a stage with settings that no config names. `last_run`: the last run made it."""

    path: str  # in the run folder
    kind: str  # stage, receipts or index
    files: int
    bytes: int
    last_run: bool = False


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was found, and whether it is gone."""

    run: str
    removed: bool
    stale: list[Stale]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.stale)


def clean(config: Config, keep: Sequence[Config] = (), *, remove: bool = False) -> Cleaned:
    """Find what neither `config` nor a config of `keep` names, and remove it if `remove`.

    ConfigError when a config was never indexed, so that its fingerprints are not known, or is of another run folder;
    LeaseHeld when a run is at work.
    """
    run = config.run.uri
    for other in keep:
        if other.run.uri != run:
            raise ConfigError(
                f"--keep: a config of {storage.redact(other.run.uri)}, not of the run folder {storage.redact(run)}"
            )
    named = set().union(*(_named(one) for one in (config, *keep)))
    away = storage.failures_as(ConfigError, run, "give access to run.uri, or try again when it answers")
    if not remove:
        with away:
            return Cleaned(storage.redact(run), False, list(_stale(run, named)))
    with away, run_lease(run):
        stale = list(_stale(run, named))
        for entry in stale:
            _remove(run, entry)
    return Cleaned(storage.redact(run), True, stale)


def _named(config: Config) -> set[str]:
    """The folders that a config names, as paths in the run folder."""
    run = find_run(config)
    if run is None:
        raise ConfigError(
            f"{storage.redact(config.run.uri)} has no index of {storage.redact(config.source.uri)}, without which the "
            "folders of this config are not known; run it first"
        )
    folder = index_folder(config).rsplit("/", 1)[1]
    return {f"{INDEX}/{folder}"} | {f"{stage.name}/{stage.fingerprint}" for stage in run.stages.values()}


def _stale(run: str, named: set[str]) -> Iterator[Stale]:
    last = _last_run(run)
    for name in storage.list_subfolders(run):
        if name != INDEX and not is_stage(name):
            continue
        for child in storage.list_subfolders(storage.join(run, name)):
            path = f"{name}/{child}"
            if FINGERPRINT.fullmatch(child) and path not in named:
                files = [info.size for info in storage.walk(storage.join(run, path))]
                yield Stale(path, "index" if name == INDEX else "stage", len(files), sum(files), path in last)
    for name, size in storage.list_folder(storage.join(run, RECEIPTS)).items():
        found = RECEIPT_NAME.fullmatch(name)
        if found and is_stage(found["stage"]):
            path = f"{found['stage']}/{found['fingerprint']}"
            if path not in named:
                yield Stale(f"{RECEIPTS}/{name}", "receipts", 1, size, path in last)


def _last_run(run: str) -> set[str]:
    """The stage folders of the last run, which `u2label report <run folder>` shows."""
    try:
        latest = read_latest(run)
    except ConfigError:  # not what a run writes: a mark of the last run is all that is lost
        return set()
    return {f"{stage}/{fingerprint}" for stage, fingerprint in latest.fingerprints.items()} if latest else set()


def _remove(run: str, entry: Stale) -> None:
    uri = storage.join(run, entry.path)
    if entry.kind == "receipts":
        storage.remove(uri)
        return
    for mark in (ARTIFACT, MANIFEST):  # first: what is left of an interrupted removal is not taken for complete
        storage.remove(storage.join(uri, mark))
    storage.remove_folder(uri)


def print_cleaned(cleaned: Cleaned) -> None:
    from rich.table import Table

    console = stdout_console()
    folders = [entry for entry in cleaned.stale if entry.kind != "receipts"]
    if not cleaned.stale:
        console.print(f"{cleaned.run}: nothing that the config does not name", soft_wrap=True)
        return
    table = Table("folder", "files", "size", "", title=f"{cleaned.run}, not named by the config")
    for entry in folders:
        table.add_row(entry.path, str(entry.files), _size(entry.bytes), "of the last run" if entry.last_run else "")
    receipts = [entry for entry in cleaned.stale if entry.kind == "receipts"]
    if receipts:
        table.add_row(RECEIPTS, str(len(receipts)), _size(sum(entry.bytes for entry in receipts)), "")
    console.print(table)
    what = f"{len(folders)} folders and {len(receipts)} files of receipts, {_size(cleaned.bytes)}"
    console.print(f"removed {what}" if cleaned.removed else f"{what}; with --yes they are removed")


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
