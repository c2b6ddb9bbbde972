"""A manifest as a source: a table of photos, Parquet, CSV, TSV or JSON lines, with a column of their places.

A place is a URL (`s3://`, `https://`, ...), an absolute path, or a path relative to the manifest's folder. All other
columns are keys, which go into the index and into every part of the run beside the photo's other columns; one that is
named as a column of the parts is called `key_NAME` there. Keys of CSV are strings, those of JSON lines have a type
where all rows have the same and are JSON text otherwise, those of Parquet keep theirs.

The `image_id` is that of the column `image_id` where there is one, else the place without scheme, query and what leads
out of a folder; a place that comes again gets `~2`, `~3`, ...
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.label_maps import digest
from pipeline.store import storage
from workers.records import PART_COLUMNS, ImageRecord

TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
ENDINGS = (*TEXT_ENDINGS, ".parquet")
BLOCK = 4 << 20  # bytes read at a time from a remote manifest
TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
Row = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """An opened manifest. `keys`: the key columns as the parts have them; `columns`: as the manifest names them."""

    uri: str
    column: str
    keys: pa.Schema
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]

    def records(self) -> Iterator[ImageRecord]:
        """The photos in order, streaming. ValueError names a row without a place, or an image_id that comes twice.
        Memory: the digests of the image_ids."""
        seen: Counter[int] = Counter()
        for number, row in enumerate(self.rows(), start=1):
            place = self._place(row, number)
            given = row.get("image_id")
            named = given is not None and given != ""
            name = str(given) if named else _name_of(str(row[self.column]))
            seen[digest(name)] += 1
            if (times := seen[digest(name)]) > 1:
                if named:
                    raise ValueError(f"source.uri: {self._shown(number)}: the image_id {name!r} comes twice")
                name = f"{name}~{times}"
            yield ImageRecord(name, place, 0, 0, self._keys(row))

    def _keys(self, row: Row) -> tuple[Any, ...]:
        values = zip((row.get(column) for column in self.columns), self.keys.types, strict=True)
        return tuple(_as_text(value) if pa.types.is_string(kind) else value for value, kind in values)

    def _place(self, row: Row, number: int) -> str:
        place = row.get(self.column)
        if not isinstance(place, str) or not place.strip():
            raise ValueError(f"source.uri: {self._shown(number)} has no place of a photo in '{self.column}': {place!r}")
        if "://***@" in storage.redact(place):
            raise ValueError(f"source.uri: {self._shown(number)}: {storage.redact(place)} holds a user and a password")
        return _resolve(place.strip(), self.uri)

    def _shown(self, number: int) -> str:
        return f"row {number} of {storage.redact(self.uri)}"


def open_manifest(uri: str, column: str = "uri", *, anonymous: bool = False) -> Manifest:
    """The manifest at `uri`. ValueError names what is wrong with it: no such column, not the format of its ending."""
    rows = _rows_of(uri, anonymous)
    with _naming(uri):
        schema = _schema_of(uri, anonymous)
    if column not in schema.names:
        names = ", ".join(schema.names) or "none"
        raise ValueError(
            f"source.uri_column: the manifest {storage.redact(uri)} has no column '{column}'; its columns: {names}"
        )
    fields = [field for field in schema if field.name not in {column, "image_id"}]
    keys = pa.schema([field.with_name(key_name(field.name)).with_nullable(True) for field in fields])
    if twice := sorted(name for name, times in Counter(keys.names).items() if times > 1):
        raise ValueError(
            f"source.uri: two columns of the manifest {storage.redact(uri)} would both be the key {twice[0]!r} of the "
            "parts: rename one"
        )
    return Manifest(uri, column, keys, tuple(field.name for field in fields), rows)


def is_manifest(uri: str, *, image_column: str = "image", uri_column: str = "uri", anonymous: bool = False) -> bool:
    """Whether a file is a manifest by its ending; a Parquet file when it has places of photos and no photos."""
    if uri.lower().endswith(TEXT_ENDINGS):
        return True
    if not uri.lower().endswith(".parquet"):
        return False
    try:
        names = _parquet_schema(uri, anonymous).names
    except ValueError:  # it is not whole: the scan says so
        return False
    return uri_column in names and image_column not in names


def key_name(column: str) -> str:
    """What a key column is called in the parts."""
    return f"key_{column}" if column in PART_COLUMNS else column


def _rows_of(uri: str, anonymous: bool) -> Callable[[], Iterator[Row]]:
    found = READERS.get(_ending(uri))
    if found is None:
        raise ValueError(
            f"source.uri: a manifest is one file whose name ends in {', '.join(READERS)}, not {storage.redact(uri)}"
        )

    def rows() -> Iterator[Row]:
        with _naming(uri):
            yield from found(uri, anonymous)

    return rows


def _schema_of(uri: str, anonymous: bool) -> pa.Schema:
    if _ending(uri) == ".parquet":
        return _parquet_schema(uri, anonymous)
    if _ending(uri) in {".csv", ".tsv"}:
        with _csv(uri, anonymous) as reader:
            return pa.schema([pa.field(name, pa.string()) for name in reader.fieldnames or ()])
    types: dict[str, set[type]] = {}
    for row in _json_rows(uri, anonymous):
        for name, value in row.items():
            types.setdefault(name, set()).update(_type_of(value))
    return pa.schema([pa.field(name, _common(found)) for name, found in types.items()])


def _type_of(value: Any) -> tuple[type, ...]:
    """Nothing of a null; text of a number that 64 bits cannot hold."""
    if value is None:
        return ()
    return (str,) if isinstance(value, int) and abs(value) >= 1 << 63 else (type(value),)


def _common(types: set[type]) -> pa.DataType:
    if types == {int, float}:
        return pa.float64()
    return TYPES.get(next(iter(types)), pa.string()) if len(types) == 1 else pa.string()


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ending(uri: str) -> str:
    return posixpath.splitext(uri)[1].lower()


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # Arrow's and those of decoding too
        raise ValueError(f"source.uri: the manifest {storage.redact(uri)}: {error}") from error


def _parquet_schema(uri: str, anonymous: bool) -> pa.Schema:
    with storage.open_input(uri, block_size=0, anonymous=anonymous) as stream, pq.ParquetFile(stream) as file:
        return file.schema_arrow.remove_metadata()


def _parquet_rows(uri: str, anonymous: bool) -> Iterator[Row]:
    with storage.open_input(uri, block_size=BLOCK, anonymous=anonymous) as stream, pq.ParquetFile(stream) as file:
        for batch in file.iter_batches(1000, use_threads=False):
            yield from batch.to_pylist()


def _json_rows(uri: str, anonymous: bool) -> Iterator[Row]:
    for number, line in enumerate(_lines(uri, anonymous), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must hold an object, got {line[:60]!r}")
        yield row


def _csv_rows(uri: str, anonymous: bool) -> Iterator[Row]:
    with _csv(uri, anonymous) as reader:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many fields as the header: {list(row.values())}")
            yield row


@contextlib.contextmanager
def _csv(uri: str, anonymous: bool) -> Iterator[csv.DictReader[str]]:
    reader = csv.DictReader(_lines(uri, anonymous), delimiter="\t" if _ending(uri) == ".tsv" else ",", strict=True)
    try:
        yield reader
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _lines(uri: str, anonymous: bool) -> Iterator[str]:
    with storage.open_input(uri, block_size=BLOCK, anonymous=anonymous) as stream:
        yield from io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _resolve(place: str, manifest: str) -> str:
    if storage.is_remote(place) or place.startswith("file://"):
        return place
    if storage.is_remote(manifest) and not place.startswith("/"):
        return storage.join(manifest.rpartition("/")[0], place)
    folder = "/" if storage.is_remote(manifest) else posixpath.dirname(storage.filesystem(manifest)[1])
    return storage.local_uri(posixpath.join(folder, place))


def _name_of(place: str) -> str:
    """A path below a folder."""
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", place)
    if re.match("https?://", place, re.IGNORECASE):
        path = re.split("[?#]", path, maxsplit=1)[0]
    return "/".join(part for part in path.split("/") if part not in {"", ".", ".."}) or "photo"


READERS = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
