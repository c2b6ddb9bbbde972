"""Makes the sources that the tests of scan, fetch and sources read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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


def png(values: np.ndarray, palette: bool = False) -> bytes:
    """(H, W) or (H, W, 3) -> a PNG of its mode, or of a palette."""
    image = Image.fromarray(values)
    if palette:
        image.putpalette([value for entry in range(256) for value in (entry, 255 - entry, entry // 2)])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def photo(seed: int = 0, channels: int = 3) -> np.ndarray:
    """Noise on a slope: no two pixels alike, as on photos. (32, 48, 3) or (32, 48) uint8."""
    noise = np.random.default_rng(seed).integers(0, 120, (32, 48, channels))
    slope = np.arange(48).reshape(1, 48, 1) * 2
    values: np.ndarray = (noise + slope).astype(np.uint8)
    return values if channels == 3 else values[..., 0]


def label_map(classes: int = 4) -> np.ndarray:
    """(32, 48) uint8 stripes."""
    return np.repeat(np.arange(48) * classes // 48, 32).reshape(48, 32).T.astype(np.uint8)


def sparse_tar(name: str, pieces: dict[int, bytes], size: int, others: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """A tar with a sparse member of `size` bytes that are zeros but for the pieces at their offsets, as GNU tar and
    bsdtar write it (PAX 1.0), and others behind it."""
    table = f"{len(pieces)}\n" + "".join(f"{offset}\n{len(data)}\n" for offset, data in pieces.items())
    data = table.encode().ljust(512, b"\0") + b"".join(pieces.values())
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(f"GNUSparseFile.0/{name}")
        member.size = len(data)
        member.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": name,
            "GNU.sparse.realsize": str(size),
        }
        archive.addfile(member, io.BytesIO(data))
        for other, content in others:
            info = tarfile.TarInfo(other)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()
