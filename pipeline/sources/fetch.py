"""The encoded bytes of one image: a whole file, a byte range of a tar, or a row of a Parquet column; and its pixels.

A `Fetcher` belongs to one actor and is called from its fetch threads. What `scan` needs to know about the inside of a
Parquet file (`parquet_rows`) is here too, so that indexing and reading agree on which column is meant.
"""

from __future__ import annotations

import posixpath
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.tars import read_sparse
from pipeline.store import storage
from pipeline.store.retries import BRIEF, PATIENT, status_and_code
from workers.decode import DecodeError, DecodeLimits, decode_image
from workers.images import LoadedImage
from workers.records import GONE, SPARSE_MEMBER, ImageRecord, Status

FILES_OPEN = 2  # a shard may end in one Parquet file and go on in the next
READ_AHEAD = 4 << 20  # bytes fetched at a time from a Parquet column, and held
BATCH_ROWS = 8  # rows decoded at a time from a Parquet column
BATCHES_HELD = 10  # the window of decoded rows: more than a fetch pool runs ahead (workers.prefetch <= 64)
# S3 error codes that speak of one object; every other refusal is about the store, the network or the credentials.
OBJECT_ERRORS = frozenset({"AccessDenied", "403", "InvalidObjectState", "InvalidRange", "416"})


WEB = ("http://", "https://")
UNREACHED = "no answer"  # in the error of a photo whose web server gave none


class UnreadableRow(OSError):
    """A row of a Parquet source that is there, in a page that cannot be decoded."""


class RangeRefused(PermissionError):
    """A photo inside a tar of which others were just read: whatever the store says, it is not missing."""


class Fetcher:
    """Reads the bytes of records. Safe to call from many threads; memory: a window of rows of two Parquet files."""

    def __init__(self, image_column: str = "image", *, anonymous: bool = False) -> None:
        """`image_column`: the column of a Parquet source; other sources ignore it. `anonymous`: without credentials,
        from a public bucket. `Index.fetcher` knows both."""
        self._image_column = image_column
        self._anonymous = anonymous
        self._lock = threading.Lock()
        self._files: OrderedDict[str, ParquetRows] = OrderedDict()
        self._read: set[str] = set()  # tars

    def fetch(self, record: ImageRecord) -> bytes:
        """The encoded image; empty for an empty file or a null. `fetch_status` judges what the store raises."""
        if record.version == GONE:
            raise FileNotFoundError("the source does not have it any more; --prune drops its row")
        if record.length == SPARSE_MEMBER:
            return read_sparse(record.uri, record.offset, anonymous=self._anonymous)
        if record.length < 0:
            return self._parquet_file(record.uri).read(record.offset)
        if record.offset == 0:  # a tar's members lie behind a header, so this is a file of its own
            return read_whole(record.uri, anonymous=self._anonymous)
        data = storage.read_bytes(record.uri, record.offset, record.length, anonymous=self._anonymous)
        self._read.add(record.uri)
        return data

    def has_read(self, record: ImageRecord) -> bool:
        """Whether another photo of the same tar was read."""
        return record.version != GONE and record.uri in self._read

    def fetch_head(self, record: ImageRecord, length: int) -> bytes:
        """The first `length` bytes, or all there are, of an image whose length is known (of no Parquet source)."""
        length = min(length, record.length)
        return storage.read_bytes(record.uri, record.offset, length, anonymous=self._anonymous)

    def _parquet_file(self, uri: str) -> ParquetRows:
        with self._lock:
            if uri not in self._files:
                self._files[uri] = ParquetRows(uri, self._image_column, anonymous=self._anonymous)
            self._files.move_to_end(uri)
            while len(self._files) > FILES_OPEN:
                self._files.popitem(last=False)  # closed once no thread reads it any more
            return self._files[uri]

    @staticmethod
    def fetch_status(record: ImageRecord, error: Exception) -> tuple[Status, str]:
        """The status and error text of the row of an image that could not be fetched.

        Raises `error` itself when it is not about this one image (no network, expired credentials, a full file table):
        the shard must fail and be run again, for rows written during an outage would stand for good.
        """
        status, code = status_and_code(error)
        if record.uri.startswith(WEB):  # of many servers one that is down says nothing of the others
            away = "" if status or isinstance(error, FileNotFoundError) else f"{UNREACHED}: "
            return Status.MISSING, storage.redact(f"{record.uri}: {away}{type(error).__name__}: {error}")
        gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | UnreadableRow)
        forbidden = isinstance(error, PermissionError) and not code
        short = type(error) is OSError and error.errno is None  # storage.read_bytes
        if gone or forbidden or short or code in OBJECT_ERRORS:
            return Status.MISSING, storage.redact(f"{record.uri}: {type(error).__name__}: {error}")
        raise error


def load_photo(fetcher: Fetcher, record: ImageRecord, limits: DecodeLimits) -> LoadedImage:
    """The pixels, or the status and error of its row. Raises what the store raises when this one photo is not at
    fault."""
    try:
        return LoadedImage(record.image_id, decode_image(fetcher.fetch(record), limits))
    except DecodeError as error:
        status, message = error.status, str(error)
    except storage.store_errors(record.uri) as error:
        status, message = fetcher.fetch_status(record, error)
        if fetcher.has_read(record):
            raise RangeRefused(f"{message}; other photos of this file were just read, so that it is there") from error
    return LoadedImage(record.image_id, None, status, message)


def read_whole(uri: str, *, anonymous: bool) -> bytes:
    """The bytes of a file. A server of the web is not waited for as long as one's own store."""
    return storage.read_bytes(uri, anonymous=anonymous, retry=BRIEF if uri.startswith(WEB) else PATIENT)


class ParquetRows:
    """The values of one image column of a file by row number.

    Rows are decoded in order and a window of the latest is kept, so that a pool that asks for them about in order reads
    every row group once, and a huge row group does not have to fit in memory.
    """

    def __init__(self, uri: str, column: str, *, anonymous: bool = False) -> None:
        """Opens the file. UnreadableRow when it is not the Parquet file any more that was indexed."""
        self._uri, self._anonymous = uri, anonymous
        self._lock = threading.Lock()
        source = storage.open_input(uri, block_size=0, anonymous=anonymous)
        try:
            self._file = pq.ParquetFile(source, buffer_size=READ_AHEAD, pre_buffer=False)
            self._leaves = image_leaves(uri, self._file.schema_arrow, column)
        except ValueError as error:  # ArrowInvalid is one too
            raise UnreadableRow(str(error)) from error
        footer = self._file.metadata
        rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])  # first row of each group, and the end
        self._window: deque[tuple[int, pa.Array]] = deque(maxlen=BATCHES_HELD)  # (first row, values)
        self._unreadable = range(0)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next = self._group_end = 0

    def read(self, row: int) -> bytes:
        """The bytes of a row, or of the file that its path names where it has none; empty for a null. UnreadableRow,
        and what the store raises."""
        value = self._value(row)
        if not isinstance(value, dict):
            return value or b""
        if value["bytes"] is None and value.get("path"):
            return read_beside(self._uri, value["path"], row, anonymous=self._anonymous)
        return value["bytes"] or b""

    def _value(self, row: int) -> Any:
        with self._lock:
            if row in self._unreadable:
                raise UnreadableRow(f"row {row} lies in a page that cannot be decoded")
            if row >= self._starts[-1]:
                raise UnreadableRow(f"row {row} is not there: the file has {self._starts[-1]} rows")
            if not self._is_ahead(row):
                self._window.clear()
                self._enter(self._group_of(row))
            while row >= self._next:
                self._decode_batch()
            start, values = next((start, values) for start, values in reversed(self._window) if start <= row)
            return values[row - start].as_py()

    def _enter(self, group: int) -> None:
        # One group at a time: a reader of several looks ahead, and a broken group would cost the one before it.
        self._next, self._group_end = int(self._starts[group]), int(self._starts[group + 1])
        self._batches = self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._leaves, use_threads=False)

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _is_ahead(self, row: int) -> bool:
        """Whether the row is in the window or comes without decoding a row group for nothing."""
        if row < self._next:
            return bool(self._window) and row >= self._window[0][0]
        near = row - self._next < BATCH_ROWS * BATCHES_HELD
        return near or not np.any((self._starts > self._next) & (self._starts <= row))

    def _decode_batch(self) -> None:
        if self._next == self._group_end:
            self._enter(self._group_of(self._next))
        try:
            values = next(self._batches).column(0)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, StopIteration) as error:
            self._window.clear()
            if isinstance(error, OSError) and not _is_arrows(error):
                self._next = self._group_end = int(self._starts[-1])  # the store failed, not the page: start afresh
                raise
            first, self._unreadable, self._next = self._next, range(self._next, self._group_end), self._group_end
            raise UnreadableRow(f"the page of row {first} cannot be decoded: {str(error).strip()}") from error
        self._window.append((self._next, values))
        self._next += len(values)


def _is_arrows(error: OSError) -> bool:
    """Whether Arrow made this error of bytes it read, and not the store of bytes it could not read."""
    return type(error) is OSError and error.errno is None


def read_beside(parquet: str, path: str, row: int, *, anonymous: bool) -> bytes:
    """The file that a row without bytes names (Hugging Face): a URL, an absolute path, or one below the folder of the
    Parquet file or the folder above. UnreadableRow when none is there."""
    places = [path]
    if not storage.is_remote(path) and not path.startswith("/"):
        whole = parquet if storage.is_remote(parquet) else storage.filesystem(parquet)[1]
        folder = posixpath.dirname(whole)
        places = [storage.join(above, path) for above in (folder, posixpath.dirname(folder)) if ".." not in path]
    for place in places:
        try:
            return read_whole(place if storage.is_remote(place) else storage.local_uri(place), anonymous=anonymous)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
    raise UnreadableRow(
        f"row {row} has no bytes, and there is no {storage.redact(path)!r} beside {storage.redact(parquet)}: put the "
        "files there, or write their bytes into the column"
    )


def image_leaves(uri: str, schema: pa.Schema, column: str) -> list[str]:
    """The dotted names of the Parquet columns that hold the bytes: `column`, or its fields `bytes` and `path` (Hugging
    Face).

    ValueError lists the columns when `column` is not one of them, or its type when that holds no bytes.
    """
    name = storage.redact(uri)
    if column not in schema.names:
        raise ValueError(
            f"source.image_column: {name} has no column '{column}', only {', '.join(schema.names)}; of places of "
            "photos set source.format: manifest, and source.uri_column to their column"
        )
    kind = schema.field(column).type
    leaves = [column]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        has_path = kind.get_field_index("path") >= 0 and pa.types.is_string(kind.field("path").type)
        leaves = [f"{column}.bytes", *([f"{column}.path"] if has_path else [])]
        kind = kind.field("bytes").type
        if has_path and pa.types.is_null(kind):
            return leaves
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        places = f"; of places of photos set source.format: manifest and source.uri_column: {column}"
        raise ValueError(
            f"source.image_column: '{leaves[0]}' of {name} is {kind}; it must hold the bytes of image files"
            f"{places if pa.types.is_string(kind) else ''}"
        )
    return leaves


def parquet_rows(uri: str, column: str, *, anonymous: bool = False) -> int:
    """The number of rows of a Parquet file, from its footer, once `column` is checked. ValueError names the fault."""
    with storage.open_input(uri, block_size=0, anonymous=anonymous) as source:
        try:
            file = pq.ParquetFile(source)
        except pa.ArrowInvalid as error:
            raise ValueError(f"source.uri: {storage.redact(uri)} is not a whole Parquet file: {error}") from error
        image_leaves(uri, file.schema_arrow, column)
        return int(file.metadata.num_rows)
