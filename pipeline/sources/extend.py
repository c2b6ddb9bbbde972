"""A source that lives: how its listing differs from its index, and an index that takes the difference in.

What the listing tells of each file (path, size, version) is held against what the index noted of it. Nothing is read of
the files but, when the index is extended, the headers of tars and Parquet files that are new or others.

Shards stay what they are: new photos come in new ones, behind those that are there, so that no part is done again for
their sake. A photo that is another now changes the version of its shard; one that is gone stays as a row without a
picture, or is dropped (`prune`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.sources.index import (
    Index,
    WrittenIndex,
    batches,
    open_index,
    remove_generation,
    write_manifest,
    write_shards,
)
from pipeline.sources.scan import File, Ignored, list_files, scan
from workers.records import GONE, ImageRecord

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


def difference(index: Index, uri: str) -> Difference:
    """Between the listing of the source at `uri` and its index. Errors as of `scan`. Memory: 17 bytes a file."""
    known = _Known(index)
    new = changed = 0
    for files in batches(list_files(uri, index.format, anonymous=index.anonymous), BATCH):
        is_new, is_changed = known.compare(files)
        new, changed = new + int(is_new.sum()), changed + int(is_changed.sum())
    unit = {"folder": "photos", "tar": "tars", "parquet": "Parquet files"}[index.format]
    return Difference(new, changed, known.unseen(), unit)


def extend_index(index: Index, uri: str, *, prune: bool = False) -> Index:
    """The index with what the listing of `uri` has more, and without or with a mark at what it has no more. The index
    of the folder is the old one until the new one is whole. Errors as of `scan`.

    Memory: the records of the files that are others now, and 17 bytes a file.
    """
    known, ignored = _Known(index), Ignored()
    fresh: set[str] = set()
    others: set[str] = set()
    for files in batches(list_files(uri, index.format, anonymous=index.anonymous), BATCH):
        is_new, is_changed = known.compare(files)
        fresh |= {file.uri for file, wanted in zip(files, is_new, strict=True) if wanted}
        others |= {file.uri for file, wanted in zip(files, is_changed, strict=True) if wanted}

    def records_of(wanted: set[str], left_out: Ignored) -> Iterator[ImageRecord]:
        return scan(
            uri,
            index.format,
            image_column=index.image_column,
            ignored=left_out,
            anonymous=index.anonymous,
            only=lambda file: file.uri in wanted,
        )

    replaced = {record.image_id: record for record in records_of(others, Ignored())} if others else {}
    old = (_renewed(index.records(shard), known, others, replaced, prune) for shard in range(index.shards))
    # Of `replaced`, what the old shards do not take: photos that a tar has in addition.
    added = itertools.chain(replaced.values(), records_of(fresh, ignored))
    shards = itertools.chain(old, batches(added, index.shard_size))
    generation = index.generation + 1
    written = write_shards(shards, index.folder, generation)
    extended = _extended(index, written, ignored, generation)
    write_manifest(extended)
    remove_generation(index)
    return open_index(index.folder)


def _extended(index: Index, written: WrittenIndex, ignored: Ignored, generation: int) -> Index:
    return replace(
        index,
        shards=written.shards,
        images=written.images,
        listed=index.first_images,
        ignored=ignored,
        generation=generation,
        sizes=written.uneven(index.shard_size),
        **written.times(index),
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
        elif record.version == GONE or known.is_unseen(record.uri):
            here = replace(record, version=GONE)
        if here.version != GONE or not prune:
            found.append(here)
    return found


class _Known:
    """The files of an index, by 64 bits of their place and of what it noted of them."""

    def __init__(self, index: Index) -> None:
        noted = dict[int, int]() if index.format != "folder" else None
        places, states = [], []
        for record in index.all_records():
            place, state = _bits(record.uri), _state_of(record, index)
            if noted is None:
                places.append(place)
                states.append(state)
            else:
                noted[place] = state
        if noted is not None:
            places, states = list(noted), list(noted.values())
        order = np.argsort(np.array(places, np.int64), kind="stable")
        self._places = np.array(places, np.int64)[order]
        self._states = np.array(states, np.int64)[order]
        self._gone = self._states == _bits(GONE)
        self._seen = np.zeros(len(order), bool)
        self._sizes_alone, self._folder = not index.versions, index.format == "folder"

    def compare(self, files: Iterable[File]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool each: not in the index; in it, and another now. The files count as seen."""
        places = np.array([_bits(file.uri) for file in files], np.int64)
        states = np.array([_state(file, sizes_alone=self._sizes_alone) for file in files], np.int64)
        at = np.searchsorted(self._places, places)
        there = np.zeros(len(places), bool)
        inside = at < len(self._places)
        there[inside] = self._places[at[inside]] == places[inside]
        self._seen[at[there]] = True
        changed = np.zeros(len(places), bool)
        changed[there] = self._states[at[there]] != states[there]
        return ~there, changed & (self._folder or not self._sizes_alone)

    def unseen(self) -> int:
        """How many files, of which the index does not know that they are gone, were in no listing."""
        return int((~self._seen & ~self._gone).sum())

    def is_unseen(self, uri: str) -> bool:
        """Whether a file of the index was in no listing."""
        return not self._seen[np.searchsorted(self._places, np.int64(_bits(uri)))]


def _state(file: File, *, sizes_alone: bool) -> int:
    return _bits(f"{file.size:x}-{'' if sizes_alone else file.version}")


def _state_of(record: ImageRecord, index: Index) -> int:
    """As `_state`, of what the index noted of the file that a photo lies in."""
    if record.version == GONE:
        return _bits(GONE)
    return _bits(f"{record.length:x}-{record.version}" if index.format == "folder" else record.version)


def _bits(text: str) -> int:
    return hash(text)  # of this process alone, as all that is compared
