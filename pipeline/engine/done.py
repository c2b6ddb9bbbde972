"""What of a run is done: what is there, whole, and made of its inputs as they are now.

A part says in its metadata what it was made of (`made_of`): the version of its shard of the index, an identity of each
part of the same shard and of each artifact that it read. Asking every part would cost a request each, so only those are
asked that are not younger than their inputs, by two seconds; of a run that went from its first stage to its last these
are few or none. Parts of a time when they did not say are taken to be right unless an input that says was written after
them.

A fit is a reduction over all parts of its inputs. It stands while most of them are as they were (`FitChanges`): a class
keeps its number when a photo is mended or the source grows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.engine.stage import ARTIFACT, PART, Stage, part_name
from pipeline.sources.index import Index
from pipeline.store import storage
from pipeline.store.storage import Written

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MADE_OF = "made_of"  # of a part's metadata, under the prefix of `with_metadata`
CONTENT = "content"  # likewise: a checksum of the pages, so that equal sizes and bounds do not hide another content
FIT_INPUTS = "inputs.json"  # of an artifact folder
PHOTOS = "photos"  # the shard of the index, among the inputs of a part
PAGE = 1000  # parts that a bucket lists in one answer
READERS = 32  # footers that are read at a time
TICK_S = 2.0  # a store tells its times in whole seconds, and two writers may write at once
CLOCKS_S = 900.0  # how far the clocks of driver and store may be apart: more, and S3 refuses to answer
DIGITS = 16  # of an identity


class Look:
    """Some stages, and all that they are made of, as they were at one moment: each folder is listed once."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._stages = {used.folder: used for stage in stages for used in stage.with_inputs()}
        with ThreadPoolExecutor(8) as pool:
            listings = pool.map(_listing, self._stages.values())
            self._written = dict(zip(self._stages, listings, strict=True))
        self._known: dict[tuple[str, bool], frozenset[int]] = {}

    def done(self, stage: Stage) -> frozenset[int]:
        """The shards whose part, and all that it is made of, is there and right; of a fit {0} or nothing. The rest is
        to be done."""
        return self._find(stage, strict=True)

    def usable(self, stage: Stage) -> frozenset[int]:
        """As `done`, though what it is made of may be there no more: somebody took the labels elsewhere, or made
        room."""
        return self._find(stage, strict=False)

    def sizes(self, stage: Stage, *, strict: bool = True) -> dict[int, int]:
        """The bytes of each part that is done (or, not `strict`, usable), or of the artifact, by shard."""
        found, written = self._find(stage, strict=strict), self._written[stage.folder]
        return {shard: written[_file(stage, shard)].size for shard in sorted(found)}

    def there(self, stage: Stage) -> list[int]:
        """The shards whose part is there and whole, right or not; of a fit [0] or nothing."""
        shards = range(1 if stage.kind == "fit" else stage.shards)
        return [shard for shard in shards if _file(stage, shard) in self._written[stage.folder]]

    def pending(self, stage: Stage) -> list[int]:
        """What is left to do; a fit is one shard, number 0."""
        done = self.done(stage)
        return [shard for shard in range(1 if stage.kind == "fit" else stage.shards) if shard not in done]

    def changes(self, stage: Stage) -> FitChanges:
        """What has become of the parts that a finished fit was made of."""
        artifact = self._written[stage.folder].get(ARTIFACT)
        recorded = None if artifact is None else _recorded_of_fit(stage)
        found = FitChanges()
        for used in stage.reads:
            if artifact is not None and recorded is not None and used.name in recorded:
                found += self._changes_of(used, recorded[used.name], artifact)
        return found

    def _changes_of(self, used: Stage, was: Any, artifact: Written) -> FitChanges:
        there = self.there(used)
        if used.kind == "fit":
            return FitChanges(artifacts=int(bool(there) and was != artifact_identity(used)))
        written = self._written[used.folder]
        asked = [s for s in there if s < len(was) and _is_after(written[part_name(s)], artifact)]
        changed = {shard for shard, now in _identities(used, asked).items() if now != was[shard]}
        newer = [shard for shard in there if shard >= len(was) or shard in changed]
        parts = {used.name: FitParts(sorted({*there} - {*newer}), newer)}
        return FitChanges(len(was), len(changed), added=len(newer) - len(changed), parts=parts)

    def _find(self, stage: Stage, *, strict: bool) -> frozenset[int]:
        key = (stage.folder, strict)
        if key not in self._known:
            there = [shard for shard in self.there(stage) if self._has_inputs(stage, shard, strict)]
            self._known[key] = self._right_fit(stage, there) if stage.kind == "fit" else self._right(stage, there)
        return self._known[key]

    def _has_inputs(self, stage: Stage, shard: int, strict: bool) -> bool:
        """Whether the inputs of a part are right; of a fit, those that are fits: parts may change and come."""
        for used in stage.reads:
            number = 0 if used.kind == "fit" else shard
            asked = used.kind == "fit" or stage.kind == "shard"
            if asked and (strict or self._is_there(used, shard)) and number not in self._find(used, strict=strict):
                return False
        return True

    def _is_there(self, used: Stage, shard: int) -> bool:
        return _file(used, shard) in self._written[used.folder]

    def _right_fit(self, stage: Stage, there: list[int]) -> frozenset[int]:
        return frozenset(there) if there and self.changes(stage).stands else frozenset()

    def _right(self, stage: Stage, there: list[int]) -> frozenset[int]:
        asked = [shard for shard in there if self._may_be_old(stage, shard)]
        if not asked:
            return frozenset(there)
        fits = [used for used in stage.reads if used.kind == "fit" and self._is_there(used, 0)]
        artifacts = {used.name: artifact_identity(used) for used in fits}
        with ThreadPoolExecutor(READERS) as pool:
            right = list(pool.map(lambda shard: self._is_right(stage, shard, artifacts), asked))
        return frozenset(there) - {shard for shard, is_right in zip(asked, right, strict=True) if not is_right}

    def _may_be_old(self, stage: Stage, shard: int) -> bool:
        part = self._written[stage.folder][part_name(shard)]
        late = stage.index is not None and part.modified < _newest(stage.index, shard)
        return late or bool(self._later(stage, shard))

    def _later(self, stage: Stage, shard: int) -> list[Stage]:
        """The inputs of a part that may have been written after it."""
        part = self._written[stage.folder][part_name(shard)]
        there = [used for used in stage.reads if self._is_there(used, shard)]
        return [used for used in there if _is_after(self._written[used.folder][_file(used, shard)], part)]

    def _is_right(self, stage: Stage, shard: int, artifacts: Mapping[str, str]) -> bool:
        was, later = _recorded(stage.part(shard)), self._later(stage, shard)
        if PHOTOS not in (was or {}) and stage.index is not None and str(shard) in stage.index.changed:
            return False  # of photos whose versions nobody knew, and that have changed since
        if was is None:
            return not any(_says(used, shard) for used in later)
        now = made_of(stage, shard, artifacts, [used for used in later if used.kind == "shard"])
        return all(was.get(name, identity) == identity for name, identity in now.items())


@dataclass(frozen=True, slots=True)
class FitParts:
    """The shards of a stage whose part is there: of those that a fit was made of as they are, and of others."""

    older: list[int]
    newer: list[int]


@dataclass(frozen=True, slots=True)
class FitChanges:
    """Of the parts that a fit was made of: `known` so many, `changed` are others now, `added` came since; `artifacts`
    of other fits that are others now. `parts`: which they are, by the names of the shard stages that it reads."""

    known: int = 0
    changed: int = 0
    added: int = 0
    artifacts: int = 0
    parts: Mapping[str, FitParts] = field(default_factory=dict, compare=False)

    def __add__(self, other: FitChanges) -> FitChanges:
        return FitChanges(
            self.known + other.known,
            self.changed + other.changed,
            self.added + other.added,
            self.artifacts + other.artifacts,
            {**self.parts, **other.parts},
        )

    @property
    def any(self) -> bool:
        return bool(self.changed or self.added or self.artifacts)

    @property
    def stands(self) -> bool:
        """Whether the fit is kept all the same."""
        return not self.artifacts and 2 * self.changed <= self.known


def usable_shards(stage: Stage) -> frozenset[int]:
    """The shards whose part is there and right, as of now."""
    return Look([stage]).usable(stage)


def pending_shards(stage: Stage) -> list[int]:
    """What is left to do, as of now; a fit is one shard, number 0."""
    return Look([stage]).pending(stage)


def is_fitted(stage: Stage) -> bool:
    """Whether the artifact of a fit is there and right, as of now."""
    return bool(Look([stage]).usable(stage))


def made_of(stage: Stage, shard: int, artifacts: Mapping[str, str], parts: Iterable[Stage]) -> dict[str, str]:
    """What a part is made of, by the names of the stages and `photos`: the photos of its shard, `artifacts` as of
    `identities_of_artifacts`, and the same shard of the stages `parts`."""
    version = stage.index.version(shard) if stage.index is not None else None
    photos = {} if version is None else {PHOTOS: version}
    return photos | {used.name: part_identity(used.part(shard)) for used in parts} | dict(artifacts)


def identities_of_artifacts(stage: Stage) -> dict[str, str]:
    """Of the fits that all its parts are made of."""
    return {used.name: artifact_identity(used) for used in stage.reads if used.kind == "fit"}


def artifact_identity(fit: Stage) -> str:
    """What tells the artifact of a finished fit from another. FileNotFoundError: it is not finished."""
    data = storage.read_bytes(storage.join(fit.folder, ARTIFACT))
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def part_identity(part: str) -> str:
    """What tells a part from another one of its name, from its footer alone: the checksum that its writer gave, and
    number, size and bounds of the values, should somebody have replaced it who left the checksum. What it says of the
    settings that it was made with is not of it: they may differ where the rows do not."""
    footer = _footer(part)
    if footer is None:
        return "unreadable"
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    told = [[c.path_in_schema, c.num_values, c.total_compressed_size, _bounds(c)] for c in columns]
    checksum = (footer.metadata or {}).get(f"u2label.{CONTENT}".encode(), b"").decode()
    content = json.dumps([footer.num_rows, checksum, told])
    return hashlib.sha256(content.encode()).hexdigest()[:DIGITS]


def _bounds(column: pq.ColumnChunkMetaData) -> str:
    """Least and largest value, and how many are null."""
    return str(None if column.statistics is None else column.statistics.to_dict())


def _footer(part: str) -> pq.FileMetaData | None:
    """Of a part; None where there is none to be read: those who read the part will say so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_input(part, block_size=0) as stream:
        try:
            return pq.read_metadata(stream)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not (type(error) is OSError and error.errno is None):
                raise  # the store's; Arrow's own have no number
            return None


def begin_fit(stage: Stage) -> bool:
    """Write down what a fit is about to be made of. What a fit or an attempt at one of other inputs has left, such as a
    checkpoint, is removed first, so that nothing of it is gone on from; whether there was any."""
    inputs = _inputs_of_fit(stage)
    left = storage.exists(storage.join(stage.folder, ARTIFACT)) or _recorded_of_fit(stage) not in (None, inputs)
    if left:
        storage.remove(storage.join(stage.folder, ARTIFACT))  # first: without it nothing that is left counts
        storage.remove_folder(stage.folder)
    storage.write_bytes(storage.join(stage.folder, FIT_INPUTS), json.dumps(inputs).encode())
    return left


def _inputs_of_fit(stage: Stage) -> dict[str, Any]:
    parts = {used.name: _identities(used, range(used.shards)) for used in stage.reads if used.kind == "shard"}
    listed: dict[str, Any] = {name: [found[shard] for shard in sorted(found)] for name, found in parts.items()}
    return listed | identities_of_artifacts(stage)


def _listing(stage: Stage) -> dict[str, Written]:
    """What is in a stage's folder of parts that are whole, or of the artifact. A local part that was cut short is not:
    an object is put whole or not at all, a file may have lost its end with the power."""
    if stage.kind == "fit":
        return {name: file for name, file in storage.list_written(stage.folder).items() if name == ARTIFACT}
    cuts = [part_name(shard) for shard in range(PAGE - 1, stage.shards - 1, PAGE)]
    found = storage.list_written(stage.folder, cuts=cuts)
    return {name: file for name, file in found.items() if PART.fullmatch(name) and _is_whole(stage, name, file)}


def _is_whole(stage: Stage, name: str, file: Written) -> bool:
    uri = storage.join(stage.folder, name)
    return file.size > 8 and (storage.is_remote(uri) or storage.read_bytes(uri, file.size - 4, 4) == b"PAR1")


def _newest(index: Index, shard: int) -> float:
    """When a part of these photos must have been written, by the clock of the store, to be of this index for sure."""
    return index.changed_at(shard) + (CLOCKS_S if str(shard) in index.changed else TICK_S)


def _file(used: Stage, shard: int) -> str:
    return ARTIFACT if used.kind == "fit" else part_name(shard)


def _is_after(one: Written, other: Written) -> bool:
    """Whether `one` may have been written after `other`; a time that is not told may be any."""
    return not one.modified or one.modified > other.modified - TICK_S


def _identities(stage: Stage, shards: Iterable[int]) -> dict[int, str]:
    wanted = list(shards)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(wanted, pool.map(lambda shard: part_identity(stage.part(shard)), wanted), strict=True))


def _recorded(part: str) -> dict[str, str] | None:
    """What a part says it was made of; None where it does not say."""
    footer = _footer(part)
    said = None if footer is None else (footer.metadata or {}).get(f"u2label.{MADE_OF}".encode())
    return None if said is None else json.loads(said)


def _recorded_of_fit(stage: Stage) -> dict[str, Any] | None:
    """What a fit was made of; None where it did not write it down."""
    try:
        recorded: dict[str, Any] = json.loads(storage.read_bytes(storage.join(stage.folder, FIT_INPUTS)))
    except FileNotFoundError:
        return None
    return recorded


def _says(used: Stage, shard: int) -> bool:
    """Whether an input is of a time when parts and fits said what they were made of."""
    return _recorded_of_fit(used) is not None if used.kind == "fit" else _recorded(used.part(shard)) is not None
