"""The index of a source: its images in a fixed order, cut into shards, written down once.

`<folder>/index-00000.parquet` and on hold up to 1000 row groups each; row group j of file i is shard 1000 i + j.
`manifest.json` is written last: without it there is no index. Listing is in `pipeline.sources.scan`, reading in
`pipeline.sources.fetch`; all that other modules need of them can be imported from here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.choice import ALL, Choice
from pipeline.sources.fetch import Fetcher
from pipeline.sources.left_out import Ignored
from pipeline.sources.scan import EVERYTHING, detect_format, image_id, naming_the_source, scan
from pipeline.sources.survey import survey
from pipeline.store import storage
from pipeline.store.retries import BRIEF
from workers.records import INDEX_SCHEMA, SCHEMA_VERSION, ImageRecord

__all__ = [
    "Fetcher",
    "Ignored",
    "Index",
    "build_index",
    "check_source",
    "detect_format",
    "image_id",
    "open_index",
    "scan",
    "write_index",
]

MANIFEST = "manifest.json"
SHARDS_PER_FILE = 1000
FILES_OPEN = 4
NO_KEYS = pa.schema([])
CHECKED_IMAGES = 10  # a source whose first images are all unreadable is refused


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
    """A finished index. `digest` is the SHA-256 of its records in order, whatever the shard size."""

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
    _files: _OpenFiles = field(default_factory=_OpenFiles, compare=False, repr=False)

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

    def key_table(self, shard: int) -> pa.Table:
        """The key columns of one shard's images, in order, as a manifest gave them; without columns for other
        sources."""
        return self._table(shard).select(list(self.keys))

    def _table(self, shard: int) -> pa.Table:
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of an index of {self.shards}")
        file, row_group = divmod(shard, SHARDS_PER_FILE)
        return self._files.read(_file_uri(self.folder, file), row_group)

    def records(self, shard: int) -> list[ImageRecord]:
        """The images of one shard, in order. IndexError when there is no such shard."""
        table = self._table(shard)
        columns = (table.column(name).to_pylist() for name in ("image_id", "uri", "offset", "length"))
        return [ImageRecord(*values) for values in zip(*columns, strict=True)]


def build_index(
    folder: str,
    uri: str,
    format: str = "auto",
    *,
    shard_size: int = 1000,
    image_column: str = "image",
    anonymous: bool = False,
    choice: Choice = ALL,
) -> Index:
    """List the source at `uri` and write its index into `folder`, in place of an earlier one. Errors as of `scan`."""
    found = survey(uri, format, image_column, choice, anonymous=anonymous)
    kind, ignored = found.format, Ignored()
    records = scan(
        uri,
        kind,
        image_column=image_column,
        ignored=ignored,
        anonymous=anonymous,
        choice=found.choice,
        maps=found.maps,
    )
    storage.remove(storage.join(folder, MANIFEST))
    shards, images, digest = write_index(choice.sample(records, ignored), folder, shard_size, found.keys)
    manifest = {
        "shards": shards,
        "images": images,
        "shard_size": shard_size,
        "format": kind,
        "image_column": image_column,
        "anonymous": anonymous,
        "digest": digest,
        "source": storage.redact(uri),
        "ignored": ignored.as_json(),
        **({"keys": found.keys.names} if len(found.keys) else {}),
        "schema_version": SCHEMA_VERSION,
    }
    storage.write_bytes(storage.join(folder, MANIFEST), json.dumps(manifest, indent=2).encode())
    return open_index(folder)


def open_index(folder: str) -> Index:
    """The index in a folder. FileNotFoundError when there is none, or one that was never finished."""
    manifest: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
    version = manifest.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"{folder} has an index of schema version {version}, not {SCHEMA_VERSION}; delete the folder")
    ignored = Ignored(**manifest.pop("ignored"))
    return Index(folder=folder, ignored=ignored, **manifest)


def write_index(
    records: Iterable[ImageRecord], folder: str, shard_size: int, keys: pa.Schema = NO_KEYS
) -> tuple[int, int, str]:
    """Write the index files of a stream of records -> (shards, images, digest). Memory: one shard. `keys`: the columns
    of the records' keys, which enter the digest where there are any."""
    if shard_size < 1:
        raise ValueError(f"source.shard_size: {shard_size} must be at least 1")
    digest = hashlib.sha256()
    encode = json.JSONEncoder(separators=(",", ":"), default=str).encode
    shards = images = 0
    with ExitStack() as last_file:
        for shard in _batches(records, shard_size):
            file, row_group = divmod(shards, SHARDS_PER_FILE)
            if row_group == 0:
                last_file.close()
                writer = _open_writer(last_file, _file_uri(folder, file), keys)
            writer.write_table(_shard_table(shard, shards, keys))
            lines = (encode([r.image_id, r.uri, r.offset, r.length, *r.keys]) + "\n" for r in shard)
            digest.update("".join(lines).encode())
            shards += 1
            images += len(shard)
    return shards, images, digest.hexdigest()


def check_source(
    uri: str,
    format: str = "auto",
    *,
    image_column: str = "image",
    anonymous: bool = False,
    choice: Choice = EVERYTHING,
) -> ImageRecord:
    """Read one image before any work starts, and return its record. ValueError names `source.uri` and the reason."""
    with naming_the_source(uri):
        storage.file_size(uri, anonymous=anonymous, retry=BRIEF)  # a mistyped endpoint is not waited for
    fetcher = Fetcher(image_column, anonymous=anonymous)
    failure: Exception | None = None
    choice = replace(choice, label_maps=True)  # whether a picture is one is seen by reading many
    records = scan(uri, format, image_column=image_column, threads=1, anonymous=anonymous, choice=choice)
    for record in islice(records, CHECKED_IMAGES):
        try:
            fetcher.fetch(record)
        except storage.store_errors(record.uri) as error:
            failure = failure or error
        else:
            return record
    reason = storage.redact(str(failure))
    raise ValueError(f"source.uri: the first images of {storage.redact(uri)} cannot be read: {reason}") from failure


def _batches(records: Iterable[ImageRecord], size: int) -> Iterator[list[ImageRecord]]:
    remaining = iter(records)
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
        *([record.keys[place] for record in records] for place in range(len(keys))),
    ]
    return pa.table(columns, schema=_schema(keys))


def _file_uri(folder: str, file: int) -> str:
    return storage.join(folder, f"index-{file:05d}.parquet")
