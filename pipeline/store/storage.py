"""Every read and write of a file or object, local or remote (`s3://` and whatever else fsspec knows).

Writes are atomic: a local file is written beside its target and renamed, an object appears whole when its upload ends.
Remote stores are asked again as `pipeline.store.retries` says. What a URI is, and what of it may be shown, is told by
`pipeline.store.places`, and what is there by `pipeline.store.listings`; all that other rooms need of both can be
imported from here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.store import local_files, s3
from pipeline.store.listings import (
    FileInfo,
    Written,
    exists,
    file_info,
    file_size,
    glob,
    list_folder,
    list_subfolders,
    list_written,
    place,
    walk,
)
from pipeline.store.local_files import TEMPORARY
from pipeline.store.places import (
    NO_CREDENTIALS_IN_URLS,
    S3,
    asking,
    failures_as,
    filesystem,
    is_remote,
    join,
    lacks_credentials,
    local_uri,
    protocol_of,
    redact,
    s3_calls,
    store_errors,
)
from pipeline.store.retries import BRIEF, PATIENT, Retry

__all__ = [
    "NO_CREDENTIALS_IN_URLS",
    "S3",
    "TEMPORARY",
    "FileInfo",
    "Written",
    "create_bytes",
    "exists",
    "failures_as",
    "file_info",
    "file_size",
    "filesystem",
    "glob",
    "is_remote",
    "join",
    "lacks_credentials",
    "list_folder",
    "list_subfolders",
    "list_written",
    "local_copy",
    "local_uri",
    "open_input",
    "open_output",
    "read_bytes",
    "redact",
    "remove",
    "remove_folder",
    "remove_litter",
    "sha256",
    "store_errors",
    "take_away",
    "version",
    "walk",
    "write_bytes",
]


def read_bytes(
    uri: str, offset: int = 0, length: int | None = None, *, anonymous: bool = False, retry: Retry = PATIENT
) -> bytes:
    """The bytes of a file, or `length` bytes from `offset`. FileNotFoundError and OSError as the store gives them."""
    if length == 0:  # a byte range cannot be empty
        return b""
    fs, path = filesystem(uri, anonymous=anonymous)
    end = None if length is None else offset + length
    data: bytes = asking(fs, uri, lambda: fs.cat_file(path, start=offset or None, end=end), retry)
    if length is not None and len(data) != length:
        raise OSError(f"{redact(uri)}: asked for {length} bytes at {offset}, got {len(data)}")
    return data


def open_input(uri: str, *, block_size: int, anonymous: bool = False) -> IO[bytes]:
    """A seekable file to read. From a remote one, what is asked for and up to `block_size` bytes after it come in one
    request, and nothing is fetched of what is sought over."""
    fs, path = filesystem(uri, anonymous=anonymous)
    if isinstance(fs, LocalFileSystem):
        return Path(path).open("rb")
    stream: Any = asking(fs, uri, lambda: fs.open(path, "rb", block_size=block_size, cache_type="readahead"), PATIENT)
    if isinstance(stream, AbstractBufferedFile):
        fetch = stream.cache.fetcher
        stream.cache.fetcher = lambda start, end: asking(fs, uri, lambda: fetch(start, end), PATIENT)
    opened: IO[bytes] = stream
    return opened


def version(uri: str) -> str:
    """What tells the object that is there now from an earlier or later one. FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    return str(asking(fs, uri, lambda: fs.ukey(path), PATIENT))


def sha256(uri: str) -> str:
    """The checksum of a file, in hexadecimal."""
    with open_input(uri, block_size=1 << 24) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # fsspec's files do too


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The file itself where it is local, else a copy that is removed after the block."""
    if not is_remote(uri):
        yield Path(filesystem(uri)[1])
        return
    with tempfile.NamedTemporaryFile(suffix=Path(uri).suffix) as copy:
        copy.write(read_bytes(uri))
        copy.flush()
        yield Path(copy.name)


def write_bytes(uri: str, data: bytes, *, retry: Retry = PATIENT, part_bytes: int = s3.PART_BYTES) -> None:
    """Write a whole file atomically, replacing what is there; to S3 above `part_bytes` in parts."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with local_files.replacing(Path(path)) as stream:
            stream.write(data)
    elif protocol_of(uri) in S3:
        _upload(fs, uri, lambda start, length: data[start : start + length], len(data), retry, part_bytes)
    else:
        asking(fs, uri, lambda: fs.pipe_file(path, data), retry)


@contextlib.contextmanager
def open_output(uri: str, *, part_bytes: int = s3.PART_BYTES) -> Iterator[IO[bytes]]:
    """A file to write piece by piece; it appears whole when the block ends, and not at all when the block raises."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with local_files.replacing(Path(path)) as stream:
            yield stream
        return
    with tempfile.NamedTemporaryFile() as copy:
        yield copy
        copy.flush()
        if protocol_of(uri) in S3:
            size = os.stat(copy.name).st_size  # noqa: PTH116
            _upload(fs, uri, lambda start, length: os.pread(copy.fileno(), length, start), size, PATIENT, part_bytes)
        else:
            asking(fs, uri, lambda: fs.put_file(copy.name, path), PATIENT)


def _upload(fs: Any, uri: str, read: Callable[[int, int], bytes], size: int, retry: Retry, part_bytes: int) -> None:
    bucket, key, _ = fs.split_path(uri)
    s3.upload(s3_calls(fs, uri, retry), s3_calls(fs, uri, BRIEF), bucket, key, read, size, part_bytes)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only if none is there (exclusive create, conditional put). False when another one is there.

    In a remote store, one with this very content counts as ours: our first request may have arrived and its answer not.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        if protocol_of(uri) in S3:
            bucket, key, _ = fs.split_path(uri)
            created = s3.create(s3_calls(fs, uri, PATIENT), bucket, key, data)
        else:
            asking(fs, uri, lambda: fs.pipe_file(path, data, mode="create"), PATIENT)
            created = True
    except FileExistsError:
        created = False
    return created or (is_remote(uri) and _holds(uri, data))


def _holds(uri: str, data: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(uri) == data
    return False


def take_away(uri: str) -> bytes | None:
    """Remove a file and return what it held; None when another process was faster. Atomic on local disks."""
    fs, path = filesystem(uri)
    try:
        if not isinstance(fs, LocalFileSystem):
            data = read_bytes(uri)
            remove(uri)
            return data
        return local_files.take_away(Path(path))
    except FileNotFoundError:
        return None


def remove(uri: str, *, retry: Retry = PATIENT) -> None:
    """Delete a file; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        asking(fs, uri, lambda: fs.rm_file(path), retry)


def remove_folder(uri: str) -> None:
    """Delete a folder and all it holds, in a bucket a thousand objects a request; nothing happens without one."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(fs, LocalFileSystem):
            shutil.rmtree(path)
        elif protocol_of(uri) in S3:
            s3.remove_all(s3_calls(fs, uri, PATIENT), *place(fs, path))
        else:
            asking(fs, uri, lambda: fs.rm(path, recursive=True), PATIENT)


def remove_litter(uri: str) -> None:
    """Remove what writers that were killed have left directly in a folder: temporary files, and on S3 the parts of
    uploads. Nobody may be writing there."""
    for name in list_folder(uri):
        if name.startswith(TEMPORARY):
            remove(join(uri, name))
    if protocol_of(uri) in S3:
        fs, path = filesystem(uri)
        s3.abort_uploads(s3_calls(fs, uri, PATIENT), *place(fs, path))
