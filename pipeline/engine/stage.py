"""A stage of a run as the engine knows it: its folder, its parts, its inputs.

`<run>/<stage>/<fingerprint>/` holds the parts of a shard stage or the artifact of a fit stage; what is there, whole and
made of its inputs as they are is the record of what is done (`pipeline.engine.done`). What a stage does, and what its
fingerprint covers, is said in `pipeline.stages`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import Config
from pipeline.sources.index import Index
from pipeline.store import storage

ARTIFACT = "artifact.json"  # written last: an artifact folder that has it is complete
PART = re.compile(r"part-(\d{5,})\.parquet")
FIRST_KEYS = frozenset({"uri", "format", "shard_size", "image_column"})  # of the section `source`

Kind = Literal["shard", "fit"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one run. A `shard` stage has a part per shard, a `fit` stage one artifact."""

    name: str
    kind: Kind
    fingerprint: str
    folder: str
    shards: int
    reads: tuple[Stage, ...] = ()
    images: int | None = None  # photos that all its shards together look at; None where that is not known
    index: Index | None = field(default=None, compare=False, repr=False)  # of the photos; None: they are not looked at

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the stages it reads."""
        return tuple(used.name for used in self.reads)

    def part(self, shard: int) -> str:
        return storage.join(self.folder, part_name(shard))

    def parts(self) -> list[str]:
        return [self.part(shard) for shard in range(self.shards)]

    def with_inputs(self) -> Iterator[Stage]:
        """All that it is made of, in the order of their making, and itself; some may come again."""
        for used in self.reads:
            yield from used.with_inputs()
        yield self


def part_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` different positions in 0..count - 1, evenly spaced: the middles of equal stretches."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def index_folder(config: Config) -> str:
    """Where the index of the config's source lies, by the source section alone: by the keys of version 0.1, and those
    of later ones that say something."""
    source = config.source
    later = [(name, field.default) for name, field in type(source).model_fields.items() if name not in FIRST_KEYS]
    unsaid = {name for name, default in later if getattr(source, name) == default} | {"on_missing"}
    return storage.join(config.run.uri, "index", digest(source.model_dump(mode="json", exclude=unsaid)))


def digest(content: Any) -> str:
    """12 hexadecimal digits that tell this plain data from any other."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
