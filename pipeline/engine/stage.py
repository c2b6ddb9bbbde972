"""A stage of a run as the engine knows it: its folder, its parts, and what of it is done.

`<run>/<stage>/<fingerprint>/` holds the parts of a shard stage or the artifact of a fit stage; what is there and whole
is the record of what is done. What a stage does, and what its fingerprint covers, is said in `pipeline.stages`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import Config
from pipeline.store import storage

ARTIFACT = "artifact.json"  # written last: an artifact folder that has it is complete
PART = re.compile(r"part-(\d{5,})\.parquet")
PAGE = 1000  # parts that a bucket lists in one answer

Kind = Literal["shard", "fit"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one run. A `shard` stage has a part per shard, a `fit` stage one artifact."""

    name: str
    kind: Kind
    fingerprint: str
    folder: str
    shards: int
    inputs: tuple[str, ...] = ()  # the stages it reads
    images: int | None = None  # photos that all its shards together look at; None where that is not known

    def part(self, shard: int) -> str:
        return storage.join(self.folder, part_name(shard))

    def parts(self) -> list[str]:
        return [self.part(shard) for shard in range(self.shards)]


def part_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def done_shards(stage: Stage) -> set[int]:
    """The shards whose part is there and whole. A local part that was cut short does not count."""
    return set(part_sizes(stage))


def part_sizes(stage: Stage) -> dict[int, int]:
    """The bytes of each part that is there and whole, by shard."""
    cuts = [part_name(shard) for shard in range(PAGE - 1, stage.shards - 1, PAGE)]
    return {
        int(found[1]): size
        for name, size in storage.list_folder(stage.folder, cuts=cuts).items()
        if (found := PART.fullmatch(name)) and _whole(storage.join(stage.folder, name), size)
    }


def is_fitted(stage: Stage) -> bool:
    return storage.exists(storage.join(stage.folder, ARTIFACT))


def pending_shards(stage: Stage) -> list[int]:
    """What is left to do; a fit is one shard, number 0."""
    if stage.kind == "fit":
        return [] if is_fitted(stage) else [0]
    done = done_shards(stage)
    return [shard for shard in range(stage.shards) if shard not in done]


def index_folder(config: Config) -> str:
    """Where the index of the config's source lies, by the source section alone."""
    source = config.source.model_dump(exclude=None if config.source.anonymous else {"anonymous"})
    return storage.join(config.run.uri, "index", digest(source))


def digest(content: Any) -> str:
    """12 hexadecimal digits that tell this plain data from any other."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _whole(uri: str, size: int) -> bool:
    """An object is put whole or not at all; a local file may have lost its end with the power."""
    return size > 8 and (storage.is_remote(uri) or storage.read_bytes(uri, size - 4, 4) == b"PAR1")
