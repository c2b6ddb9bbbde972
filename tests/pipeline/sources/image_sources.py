"""Makes the sources that the tests of scan, fetch and sources read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.fetch import Fetcher
from pipeline.sources.scan import scan
from pipeline.store import storage


def put(folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def parquet(columns: dict[str, object], rows_per_group: int = 100) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=rows_per_group)
    return stream.getvalue()


def contents(uri: str, **options: str) -> dict[str, bytes]:
    """image_id -> bytes of every image of a source; that no id comes twice is checked on the way."""
    fetcher = Fetcher(options.get("image_column", "image"))
    found = [(record.image_id, fetcher.fetch(record)) for record in scan(uri, **options)]
    assert len(dict(found)) == len(found)
    return dict(found)


SHARD = tar([("a.jpg", b"a" * 600), ("b.jpg", b"b" * 600)], tarfile.USTAR_FORMAT)  # headers at 0 and 1536
