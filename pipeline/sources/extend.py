"""A source that lives: how its listing differs from its index, and an index that takes the difference in.

What the listing tells of each file (path, size, version) is held against what the index noted of it. Nothing is read of
the files but, when the index is extended, the headers of tars and Parquet files that are new or others.

Shards stay what they are: new photos come in new ones, behind those that are there, so that no part is done again for
their sake. A photo that is another now changes the version of its shard; one that is gone stays as a row without a
picture, or is dropped (`prune`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np

from pipeline.sources.choice import Choice
from pipeline.sources.index_files import (
    Index,
    WrittenIndex,
    batches,
    open_index,
    remove_other_generations,
    write_manifest,
    write_shards,
)
from pipeline.sources.left_out import Ignored
from pipeline.sources.own_folders import own_folders
from pipeline.sources.scan import File, Format, list_files, scan, scan_files
from pipeline.sources.survey import survey
from pipeline.store import storage
from pipeline.store.held import Held, Walk
from workers.records import GONE, ImageRecord

WHOLE_FILES = frozenset({"folder", "manifest"})  # formats in which a photo is a file
BATCH = 10_000  # files that are compared at a time


@dataclass(frozen=True, slots=True)
class Difference:
    """What a listing has that the index has not: `new` files, others under an old name, and those that are `gone`. In a
    source of pictures a file is a photo; else it is a tar or a Parquet file."""

    new: int = 0
    changed: int = 0
    gone: int = 0
    unit: str = "photos"

    @property
    def any(self) -> bool:
        return bool(self.new or self.changed or self.gone)

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "gone": self.gone}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) + f" {self.unit}"


def difference(index: Index, uri: str, choice: Choice) -> Difference:
    """Between the listing of the source at `uri` and its index. Errors as of `scan`. Memory: some 100 bytes a photo of
    the index.

    With a limit there is none: photos that are not of the sample are not new. Of pictures that may be label maps, which
    only a look at them tells, none counts as new where the index has left out such.
    """
    unit = {"folder": "photos", "tar": "tars", "parquet": "Parquet files", "manifest": "photos"}[index.format]
    if choice.limit is not None:
        return Difference(unit=unit)
    known = _Known(index)
    maps = index.ignored.label_maps > 0
    new = changed = 0
    with Held(processes=1) as held:  # others have the cores: this goes on beside the work
        for files, is_new, is_changed in _compared(index, known, uri, choice, held.walk):
            named = np.array([not (maps and file.path.lower().endswith(".png")) for file in files], bool)
            new, changed = new + int((is_new & named).sum()), changed + int(is_changed.sum())
    return Difference(new, changed, known.unseen(), unit)


def extend_index(index: Index, uri: str, choice: Choice, *, prune: bool = False) -> Index:
    """The index with what the listing of `uri` has more, and without or with a mark at what it has no more. The index
    of the folder is the old one until the new one is whole. Errors as of `scan`; ValueError: a source that is a sample,
    a manifest with other keys or with a name of the index for another place.

    Memory: the records of the files that are others now, the places of those that are new, and some 100
    bytes a photo of the index.
    """
    if choice.limit is not None:
        raise ValueError("source.limit: a sample is not extended; leave out the limit, or run with --reindex")
    with Held() as held:
        return _taken_in(index, uri, choice, prune, held.walk)


def _taken_in(index: Index, uri: str, choice: Choice, prune: bool, walk: Walk) -> Index:
    anonymous, ignored = index.anonymous, Ignored()
    found = survey(uri, index.format, index.image_column, choice, anonymous=anonymous, walk=walk)
    if list(found.keys.names) != list(index.keys):
        raise ValueError(
            f"source.uri: the manifest has the key columns {', '.join(found.keys.names) or '(none)'} now, and had "
            f"{', '.join(index.keys) or '(none)'}; run with --reindex"
        )
    known = _Known(index)
    fresh, others, versions = set[str](), set[str](), dict[str, str]()
    for files, is_new, is_changed in _compared(index, known, uri, found.choice, walk):
        fresh |= {file.uri for file, wanted in zip(files, is_new, strict=True) if wanted}
        others |= {file.uri for file, wanted in zip(files, is_changed, strict=True) if wanted}
        if not index.versions:  # it did not note any
            whole = index.format in WHOLE_FILES
            versions |= {file.uri: file.version if whole else file.identity for file in files}

    def records_of(wanted: set[str], left_out: Ignored) -> Iterator[ImageRecord]:
        return scan(
            uri,
            index.format,
            image_column=index.image_column,
            ignored=left_out,
            anonymous=anonymous,
            choice=found.choice,
            maps=found.maps,
            only=wanted,
            walk=walk,
        )

    replaced = {record.image_id: record for record in records_of(others, Ignored())} if others else {}
    touched, names = set[int](), set[int]()  # by hashes, those of a manifest's photos, which are not their places

    def old() -> Iterator[list[ImageRecord]]:
        for shard in range(index.shards):
            records = index.records_with_keys(shard)
            renewed = _renewed(records, known, others, replaced, prune)
            if len(renewed) != len(records) or any(a is not b for a, b in zip(renewed, records, strict=True)):
                touched.add(shard)
            if index.format == "manifest":
                names.update(hash(record.image_id) for record in renewed)
            yield [replace(r, version=versions.get(r.uri, "")) if not r.version else r for r in renewed]

    # Of `replaced`, what the old shards do not take: photos that a tar has in addition.
    added = itertools.chain(replaced.values(), _of_new_names(records_of(fresh, ignored), names))
    shards = itertools.chain(old(), batches(added, index.shard_size))
    generation = index.generation + 1
    written = write_shards(shards, index.folder, generation, found.keys)
    extended = _extended(index, written, _left_out(index, ignored), generation, touched)
    write_manifest(extended)
    remove_other_generations(extended)
    return open_index(index.folder)


def _of_new_names(records: Iterable[ImageRecord], names: Collection[int]) -> Iterator[ImageRecord]:
    """The records. ValueError: the hash of an image_id is among `names`."""
    for record in records:
        if hash(record.image_id) in names:
            raise ValueError(
                f"source.uri: the index has a photo {record.image_id!r} at another place than the manifest now, "
                f"{storage.redact(record.uri)}; if it is gone from there run with --prune, else give the photo another "
                "image_id, or run with --reindex"
            )
        yield record


def _compared(
    index: Index, known: _Known, uri: str, choice: Choice, walk: Walk
) -> Iterator[tuple[list[File], np.ndarray, np.ndarray]]:
    """The files of the listing, some at a time, with what `_Known.compare` says of them."""
    files = list_files(uri, Ignored(), index.anonymous, walk) if index.format != "manifest" else ()
    choice = replace(choice, own=tuple(sorted({*choice.own, *own_folders(file.path for file in files)})))
    files = scan_files(uri, cast(Format, index.format), choice, anonymous=index.anonymous, walk=walk)
    for some in batches(files, BATCH):
        yield some, *known.compare(some)


def _left_out(index: Index, now: Ignored) -> Ignored:
    """What the source holds beside its photos: of whole files as of `now`, of what lies in tars and Parquet files what
    the index has counted and what new files have in addition."""
    if index.format in WHOLE_FILES:
        return now
    found = replace(index.ignored, extensions=dict(index.ignored.extensions))
    found.add(now)
    return found


def _extended(
    index: Index, written: WrittenIndex, ignored: Ignored, generation: int, touched: Collection[int]
) -> Index:
    return replace(
        index,
        shards=written.shards,
        images=written.images,
        listed=index.first_images,
        ignored=ignored,
        generation=generation,
        sizes=written.uneven(index.shard_size),
        **written.times(index, touched),
    )


def _renewed(
    records: Iterable[ImageRecord], known: _Known, others: set[str], replaced: dict[str, ImageRecord], prune: bool
) -> list[ImageRecord]:
    """The photos of a shard as they are now. Takes those that it has out of `replaced`."""
    found = []
    for record in records:
        here = record
        if record.uri in others:
            gone = replace(record, version=GONE)
            here = replaced.pop(record.image_id, gone)
        elif record.version != GONE and known.is_unseen(record.uri):
            here = replace(record, version=GONE)
        if here.version != GONE or not prune:
            found.append(here)
    return found


class _Known:
    """The files of an index, by 64 bits of their place and of what it noted of them."""

    def __init__(self, index: Index) -> None:
        self._whole = index.format in WHOLE_FILES
        shards = (index.records(shard) for shard in range(index.shards))
        noted = [np.array([_Noted.of(r, self._whole) for r in records], np.int64).reshape(-1, 4) for records in shards]
        found = np.concatenate([np.zeros((0, 4), np.int64), *noted])
        # A tar or Parquet file is noted for each of its photos: once is enough.
        found = found[np.unique(found[:, 0], return_index=True)[1]]
        self._places, self._states, unversioned, gone = found.T
        self._unversioned, self._gone = unversioned.astype(bool), gone.astype(bool)
        self._seen = np.zeros(len(found), bool)

    def compare(self, files: Sequence[File]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool each: not in the index; in it, and another now. The files count as seen."""
        places = np.array([hash(file.uri) for file in files], np.int64)
        at = np.minimum(np.searchsorted(self._places, places), max(0, len(self._places) - 1))
        there = self._places[at] == places if len(self._places) else np.zeros(len(places), bool)
        self._seen[at[there]] = True
        changed = np.zeros(len(places), bool)
        changed[there] = [self._is_other(a, file) for a, file, known in zip(at, files, there, strict=True) if known]
        return ~there, changed

    def _is_other(self, at: int, file: File) -> bool:
        if self._gone[at]:
            return True
        if not self._unversioned[at]:
            return bool(self._states[at] != hash(file.identity))
        return self._whole and bool(self._states[at] != hash(f"{file.size:x}-"))  # all that was noted is a size

    def unseen(self) -> int:
        """How many files, of which the index does not know that they are gone, were in no listing."""
        return int((~self._seen & ~self._gone).sum())

    def is_unseen(self, uri: str) -> bool:
        """Whether a file of the index was in no listing."""
        return not self._seen[np.searchsorted(self._places, hash(uri))]


class _Noted(NamedTuple):
    """What an index noted of a file, by hashes that this process alone understands."""

    place: int
    state: int
    unversioned: bool
    gone: bool

    @classmethod
    def of(cls, record: ImageRecord, whole: bool) -> _Noted:
        """`whole`: a photo is a file, and else lies in one, whose identity it has."""
        state = f"{record.length:x}-{record.version}" if whole else record.version
        return cls(hash(record.uri), hash(state), not record.version, record.version == GONE)
