"""The index of a source as it lies on disk: records in shards, and a manifest.

`<folder>/index-00000.parquet` and on hold up to 1000 row groups each; row group j of file i is shard 1000 i + j.
`manifest.json` is written last: without it there is no index. An index that is extended gets files of a new generation
(`index-00000-1.parquet`), so that it is one or the other at any time.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import islice, repeat
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.fetch import Fetcher
from pipeline.sources.left_out import Ignored
from pipeline.store import storage
from workers.records import INDEX_SCHEMA, SCHEMA_VERSION, ImageRecord

T = TypeVar("T")

MANIFEST = "manifest.json"
SHARDS_PER_FILE = 1000
FILES_OPEN = 4
NO_KEYS = pa.schema([])
VERSION_DIGITS = 16  # of a shard's version
ENCODER = json.JSONEncoder(separators=(",", ":"), default=str)


class _OpenFiles:
    """The index files this process has open, the latest few. A copy of it in another process starts with none."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()

    def read(self, uri: str, row_group: int) -> pa.Table:
        with self._lock:
            if uri not in self._files:
                self._files[uri] = pq.ParquetFile(storage.open_input(uri, block_size=0), pre_buffer=True)
            self._files.move_to_end(uri)
            while len(self._files) > FILES_OPEN:
                self._files.popitem(last=False)[1].close(force=True)
            return self._files[uri].read_row_group(row_group, use_threads=False)


@dataclass(frozen=True)
class Index:
    """A finished index. `digest` is the SHA-256 of its records in order, whatever the shard size, as the source was
    first listed; the photos that an extension added are in it by nothing, so that all that was done stays done."""

    folder: str
    shards: int
    images: int
    shard_size: int
    format: str
    image_column: str
    digest: str
    source: str  # without credentials
    ignored: Ignored
    anonymous: bool = False  # the source is read without credentials
    keys: Sequence[str] = ()  # the key columns of a manifest
    generation: int = 0  # how often it was extended
    listed: int = 0  # images of the first listing; 0: all
    sizes: dict[str, int] = field(default_factory=dict)  # images of the shards that have not `shard_size`
    versions: str = ""  # of the shards, one after the other; empty in an index that does not know them
    made: float = 0.0  # when the versions came to be, in seconds since 1970; of some shards, later:
    changed: dict[str, float] = field(default_factory=dict)
    _files: _OpenFiles = field(default_factory=_OpenFiles, compare=False, repr=False)

    @property
    def first_images(self) -> int:
        """Images of the first listing, which samples are drawn from."""
        return self.listed or self.images

    def size(self, shard: int) -> int:
        """Images of a shard."""
        last = self.images - (self.shards - 1) * self.shard_size
        usual = last if shard == self.shards - 1 and not self.sizes else self.shard_size
        return self.sizes.get(str(shard), usual)

    def version(self, shard: int) -> str | None:
        """What tells the photos of a shard from those that it had or will have; None where that is not known."""
        return self.versions[shard * VERSION_DIGITS : (shard + 1) * VERSION_DIGITS] or None

    def changed_at(self, shard: int) -> float:
        """When the shard got its version, in seconds since 1970 by the clock of the driver."""
        return self.changed.get(str(shard), self.made)

    def fetcher(self) -> Fetcher:
        """A reader of the images of this index, for one process."""
        return Fetcher(self.image_column, anonymous=self.anonymous)

    def source_answers(self) -> bool:
        """Whether there is anything at the source, whatever has become of single images. One that may be read and not
        be listed is taken to be there."""
        try:
            if next(storage.walk(self.source, anonymous=self.anonymous), None) is not None:
                return True
        except PermissionError:
            return True
        except FileNotFoundError:
            pass
        return storage.file_size(self.source, anonymous=self.anonymous) is not None  # one tar or Parquet file

    def records(self, shard: int) -> list[ImageRecord]:
        """The images of one shard, in order. IndexError when there is no such shard."""
        table = self._table(shard)
        columns = [table.column(name).to_pylist() for name in ("image_id", "uri", "offset", "length")]
        known = "version" in table.column_names
        columns.append(table.column("version").to_pylist() if known else [""] * table.num_rows)
        return [
            ImageRecord(image_id, uri, offset, length, version=version)
            for image_id, uri, offset, length, version in zip(*columns, strict=True)
        ]

    def records_with_keys(self, shard: int) -> list[ImageRecord]:
        """As `records`, with the values of a manifest's key columns."""
        rows = self.key_table(shard).to_pylist()
        return [
            replace(record, keys=tuple(row.values()))
            for record, row in zip(self.records(shard), rows or repeat({}), strict=False)
        ]

    def key_table(self, shard: int) -> pa.Table:
        """The key columns of one shard's images, in order, as a manifest gave them; without columns for other
        sources."""
        return self._table(shard).select(list(self.keys))

    def _table(self, shard: int) -> pa.Table:
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of an index of {self.shards}")
        file, row_group = divmod(shard, SHARDS_PER_FILE)
        return self._files.read(_file_uri(self.folder, file, self.generation), row_group)


def open_index(folder: str) -> Index:
    """The index in a folder. FileNotFoundError when there is none, or one that was never finished."""
    manifest: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
    version = manifest.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"{folder} has an index of schema version {version}, not {SCHEMA_VERSION}; delete the folder")
    ignored = Ignored(**manifest.pop("ignored"))
    return Index(folder=folder, ignored=ignored, **manifest)


def write_manifest(index: Index) -> None:
    """Make the index of its folder this one, whose files are there."""
    manifest = {entry.name: getattr(index, entry.name) for entry in fields(Index) if entry.init} | {
        "ignored": index.ignored.as_json(),
        "schema_version": SCHEMA_VERSION,
    }
    del manifest["folder"], manifest["_files"]
    storage.write_bytes(storage.join(index.folder, MANIFEST), json.dumps(manifest, indent=2).encode())


def remove_other_generations(index: Index) -> None:
    """Delete the files of indexes that this one has taken the place of, also of those that were never finished."""
    own = {_file_uri(index.folder, file, index.generation) for file in range(-(-index.shards // SHARDS_PER_FILE))}
    for name in storage.list_folder(index.folder):
        place = storage.join(index.folder, name)
        if name.startswith("index-") and place not in own:
            storage.remove(place)


class WrittenIndex(NamedTuple):
    """What `write_index` wrote: `digest` of all records, `versions` and `sizes` of the shards."""

    shards: int
    images: int
    digest: str
    versions: str
    sizes: list[int]

    def uneven(self, shard_size: int) -> dict[str, int]:
        """The sizes that are not the usual one, by shard."""
        return {str(shard): size for shard, size in enumerate(self.sizes) if size != shard_size}

    def times(self, before: Index | None, touched: Collection[int] = ()) -> dict[str, Any]:
        """Versions, and since when: a shard that is as it was in the index `before` keeps its time. Where that did not
        know versions, `touched` are the shards that are others."""
        now = time.time()
        if before is None:
            return {"versions": self.versions, "made": now}
        if not before.versions:
            return {"versions": self.versions, "made": before.made, "changed": {str(shard): now for shard in touched}}
        pieces = (self.versions[at : at + VERSION_DIGITS] for at in range(0, len(self.versions), VERSION_DIGITS))
        anew = {str(shard): now for shard, version in enumerate(pieces) if before.version(shard) != version}
        return {"versions": self.versions, "made": before.made, "changed": before.changed | anew}


def write_shards(
    cut: Iterable[list[ImageRecord]], folder: str, generation: int = 0, keys: pa.Schema = NO_KEYS
) -> WrittenIndex:
    """Write the index files of shards that are cut already; `keys`: the columns of the records' keys, which enter the
    digest where there are any."""
    digest, versions, sizes = hashlib.sha256(), list[str](), list[int]()
    with ExitStack() as last_file:
        for shard in cut:
            file, row_group = divmod(len(sizes), SHARDS_PER_FILE)
            if row_group == 0:
                last_file.close()
                writer = _open_writer(last_file, _file_uri(folder, file, generation), keys)
            writer.write_table(_shard_table(shard, len(sizes), keys))
            lines = [_line(record) for record in shard]
            digest.update("".join(lines).encode())
            version = hashlib.sha256("".join([*lines, *(f"{r.version}\n" for r in shard)]).encode())
            versions.append(version.hexdigest()[:VERSION_DIGITS])
            sizes.append(len(shard))
    return WrittenIndex(len(sizes), sum(sizes), digest.hexdigest(), "".join(versions), sizes)


def _line(record: ImageRecord) -> str:
    """A JSON list: place and keys of a photo. Put together here, as an encoder takes three times as long."""
    keys = "".join([f",{ENCODER.encode(key)}" for key in record.keys])
    image_id, uri = encode_basestring_ascii(record.image_id), encode_basestring_ascii(record.uri)
    return f"[{image_id},{uri},{record.offset},{record.length}{keys}]\n"


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` of them at a time, the last time maybe fewer."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _open_writer(files: ExitStack, uri: str, keys: pa.Schema) -> pq.ParquetWriter:
    stream = files.enter_context(storage.open_output(uri))
    return files.enter_context(pq.ParquetWriter(stream, _schema(keys), compression="zstd"))


def _schema(keys: pa.Schema) -> pa.Schema:
    return pa.schema([*INDEX_SCHEMA, *keys])


def _shard_table(records: list[ImageRecord], shard: int, keys: pa.Schema) -> pa.Table:
    columns = [
        [record.image_id for record in records],
        [record.uri for record in records],
        [record.offset for record in records],
        [record.length for record in records],
        [shard] * len(records),
        [record.version for record in records],
        *([record.keys[place] for record in records] for place in range(len(keys))),
    ]
    return pa.table(columns, schema=_schema(keys))


def _file_uri(folder: str, file: int, generation: int) -> str:
    return storage.join(folder, f"index-{file:05d}{f'-{generation}' if generation else ''}.parquet")
