"""`u2label work`: a share of a stage's shards in this process, without Ray, for job arrays of SLURM and the like.

The parts are the only coordination: every process does the shards of its own number, `run` later finds them done and
does the rest, with the fits, and with the shards of photos that killed their process here, which only it can blame.
"""

from __future__ import annotations

import logging
import random
import re
from dataclasses import dataclass
from time import sleep
from typing import Self

from pipeline.config import Config
from pipeline.engine.done import pending_shards
from pipeline.engine.lease import run_lease
from pipeline.engine.log import say
from pipeline.engine.progress import StageProgress
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import index_folder
from pipeline.errors import ConfigError, LeaseHeld, StageFailed
from pipeline.operations.preflight import check_all
from pipeline.operations.source import open_source
from pipeline.operations.stage_jobs import job_of, note_latest, require_inputs, resolved
from pipeline.sources.index import Index, open_index
from pipeline.stages.base import ShardStage
from pipeline.stages.table import define_stages
from pipeline.store import storage

POLL_S = 2.0  # between looks for an index that another process makes


@dataclass(frozen=True, slots=True)
class Slice:
    """Number `number` of `of` shares, from 1: the shards whose number leaves `number - 1` when divided by `of`."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Such as 3/16. ConfigError for anything else."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise ConfigError(
                f"--slice {text!r}: give the number of a share and how many there are, from 1/16 to 16/16"
            )
        return cls(number, of)

    def __contains__(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, slots=True)
class Share:
    """What a process did: of the shards of a stage those that are its own, done now or before."""

    stage: str
    fingerprint: str
    slice: str
    shards: int  # of the stage
    own: int
    computed: int


def work(config: Config, stage: str, share: Slice = Slice()) -> Share:
    """Do what is pending of a share of a stage's shards, one after the other.

    ConfigError: no such stage, or a fit, which no share can be done of. StageFailed: its inputs are not done, or shards
    have failed; the others of the share are done.
    """
    definition = define_stages(config).get(stage)
    if not isinstance(definition, ShardStage):
        raise ConfigError(_no_shards(config, stage))
    check_all(config, computes=True)
    this = resolved(config, _index(config))
    place = this.stages[stage]
    own = [shard for shard in range(place.shards) if shard in share]
    pending = [shard for shard in pending_shards(place) if shard in share]
    say(f"{stage} {place.fingerprint}, share {share}: {len(pending)} of {len(own)} shards to do", stage=stage)
    failures: list[Receipt] = []
    if pending:
        require_inputs(place)
        definition.check(this.config, this.index)
        note_latest(this)
        log = ReceiptLog(this.uri, stage, place.fingerprint)
        actor = definition.actor()(job_of(definition, place, this))
        try:
            with StageProgress(stage, len(pending)) as progress:
                for shard in pending:
                    receipt = actor.run(shard)
                    log.append(receipt)
                    progress.add(receipt)
                    if not receipt.ok:
                        failures.append(receipt)
        finally:
            log.flush()
    if failures:
        raise StageFailed(f"{stage}: {len(failures)} of {len(pending)} shards of share {share} failed", failures)
    return Share(stage, place.fingerprint, str(share), place.shards, len(own), len(pending))


def _no_shards(config: Config, stage: str) -> str:
    with_shards = [name for name, one in define_stages(config).items() if isinstance(one, ShardStage)]
    if stage in define_stages(config):
        return f"--stage: {stage} is fitted to all parts at once: u2label run does it, with --stages {stage} it alone"
    return f"--stage: {stage} is unknown; the stages with shards are {', '.join(with_shards)}"


def _index(config: Config) -> Index:
    """The index of the source, which the first of many processes makes while the others wait for it."""
    errors: tuple[type[Exception], ...] = (*storage.store_errors(config.run.uri), ValueError)
    said = False
    while True:
        try:
            return open_index(index_folder(config))
        except FileNotFoundError:
            pass
        except errors as error:
            raise ConfigError(
                f"run.uri: cannot read {storage.redact(config.run.uri)}: {storage.redact(str(error))}"
            ) from error
        try:
            with run_lease(config.run.uri):
                return open_source(config)[0]
        except LeaseHeld:
            if not said:
                say("index: another process lists the source; waiting for it", level=logging.INFO)
            said = True
            sleep(POLL_S * random.uniform(0.5, 1.5))
