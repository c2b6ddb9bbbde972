"""Every read and write of a file or object, local or remote (`s3://` and whatever else fsspec knows).

Writes are atomic: a local file is written beside its target and renamed, an object appears whole when its upload ends.
Remote stores are asked again as `pipeline.store.retries` says. What a URI is, and what of it may be shown, is told by
`pipeline.store.places`; all that other rooms need of it can be imported from here.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.store import local_files, s3
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
    "written_at",
]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file under a folder: `path` is relative to it with forward slashes, `size` in bytes. `version` changes with its
    bytes, as far as the store tells for nothing (an ETag, a modification time); empty where it tells nothing."""

    path: str
    size: int
    version: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """A file directly in a folder: its bytes, and when it was last written (seconds since 1970; 0: not told)."""

    size: int
    modified: float


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


def version(uri: str, *, anonymous: bool = False) -> str:
    """What tells the object that is there now from an earlier or later one. FileNotFoundError when there is none."""
    fs, path = filesystem(uri, anonymous=anonymous)
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


def exists(uri: str, *, anonymous: bool = False) -> bool:
    """Whether there is a file, or a folder that holds something."""
    return _info(uri, anonymous, PATIENT) is not None


def file_size(uri: str, *, anonymous: bool = False, retry: Retry = PATIENT) -> int | None:
    """Bytes of a file; None when there is none, or a folder."""
    found = _info(uri, anonymous, retry)
    return int(found["size"]) if found is not None and found["type"] == "file" else None


def _info(uri: str, anonymous: bool, retry: Retry) -> dict[str, Any] | None:
    fs, path = filesystem(uri, anonymous=anonymous)
    try:
        found: dict[str, Any] = asking(fs, uri, lambda: fs.info(path), retry)
    except FileNotFoundError:
        return None
    return found


def remove(uri: str, *, retry: Retry = PATIENT) -> None:
    """Delete a file; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        asking(fs, uri, lambda: fs.rm_file(path), retry)


def list_folder(uri: str) -> dict[str, int]:
    """Names and sizes of the files directly in a folder, sorted by name; empty when there is no such folder."""
    return {name: file.size for name, file in list_written(uri).items()}


def list_written(uri: str, *, cuts: Sequence[str] = ()) -> dict[str, Written]:
    """The files directly in a folder by name, sorted; empty when there is no such folder. A bucket lists the pieces
    between the names `cuts` side by side."""
    fs, path = filesystem(uri)
    try:
        if protocol_of(uri) in S3:
            bucket, prefix = _place(fs, path)
            found = s3.list_in_pieces(s3_calls(fs, uri, PATIENT), bucket, prefix, [prefix + cut for cut in cuts])
            files = {one.key.removeprefix(prefix): Written(one.size, one.modified) for one in found}
        else:
            entries = asking(fs, uri, lambda: fs.ls(path, detail=True), PATIENT)
            files = {e["name"].rsplit("/", 1)[-1]: _written(e) for e in entries if e["type"] == "file"}
    except FileNotFoundError:
        return {}
    return dict(sorted(files.items()))


def _written(entry: dict[str, Any]) -> Written:
    """Of an entry of fsspec's, whose stores do not agree on how a time is told."""
    modified = next((entry[name] for name in ("mtime", "LastModified", "modified", "created") if name in entry), 0)
    return Written(int(entry["size"]), modified.timestamp() if isinstance(modified, datetime) else float(modified or 0))


def written_at(uri: str) -> float | None:
    """When a file was last written (seconds since 1970; 0: not told); None when there is none."""
    found = _info(uri, False, PATIENT)
    return None if found is None or found["type"] != "file" else _written(found).modified


def list_subfolders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; a link to one is none. Empty when there is no such folder."""
    fs, path = filesystem(uri)
    try:
        entries = asking(fs, uri, lambda: fs.ls(path, detail=True), PATIENT)
    except FileNotFoundError:
        return []
    folders = (e["name"].rstrip("/") for e in entries if e["type"] == "directory" and not e.get("islink"))
    return sorted(name.rsplit("/", 1)[-1] for name in folders)


def remove_folder(uri: str) -> None:
    """Delete a folder and all it holds, in a bucket a thousand objects a request; nothing happens without one."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(fs, LocalFileSystem):
            shutil.rmtree(path)
        elif protocol_of(uri) in S3:
            s3.remove_all(s3_calls(fs, uri, PATIENT), *_place(fs, path))
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
        s3.abort_uploads(s3_calls(fs, uri, PATIENT), *_place(fs, path))


def glob(uri: str, *, anonymous: bool = False) -> dict[str, int]:
    """Paths, without the scheme, and sizes of the files that match a pattern; in it `*` stays in one folder, and `**`
    goes into those below."""
    fs, path = filesystem(uri, anonymous=anonymous)
    found = asking(fs, uri, lambda: fs.glob(path, detail=True), PATIENT)
    return {name: int(entry["size"]) for name, entry in found.items() if entry["type"] == "file"}


def walk(uri: str, *, anonymous: bool = False) -> Iterator[FileInfo]:
    """Every file under a folder, in the byte order of its relative path. FileNotFoundError when there is no folder.

    Memory: the names of one local folder, one page of an S3 listing; of other stores the whole listing. A link that
    leads nowhere is listed with size 0. A name that is not valid UTF-8 has surrogate escapes (PEP 383).
    """
    fs, path = filesystem(uri, anonymous=anonymous)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no folder {redact(uri)}")
        yield from itertools.starmap(FileInfo, local_files.walk(Path(path)))
        return
    empty = True
    for file in _walk_s3(fs, uri, path) if protocol_of(uri) in S3 else _walk_remote(fs, uri, path):
        empty = False
        yield file
    if empty and not exists(uri, anonymous=anonymous):
        raise FileNotFoundError(f"no folder {redact(uri)}")


def _walk_remote(fs: Any, uri: str, path: str) -> Iterator[FileInfo]:
    found = asking(fs, uri, lambda: fs.find(path, detail=True), PATIENT)
    for name in sorted(found, key=str.encode):
        entry = found[name]
        version = str(entry.get("ETag") or entry.get("etag") or entry.get("mtime") or entry.get("updated") or "")
        yield FileInfo(name.removeprefix(path.rstrip("/") + "/"), int(entry["size"]), version.strip('"'))


def _walk_s3(fs: Any, uri: str, path: str) -> Iterator[FileInfo]:
    # s3fs' own `find` holds the whole listing; a page at a time is flat, and S3 sorts keys by their UTF-8 bytes.
    bucket, prefix = _place(fs, path)
    for found in s3.list_keys(s3_calls(fs, uri, PATIENT), bucket, prefix, below=True):
        yield FileInfo(found.key.removeprefix(prefix), found.size, found.etag)


def _place(fs: Any, path: str) -> tuple[str, str]:
    """The bucket, and what the keys in a folder begin with."""
    bucket, key, _ = fs.split_path(path.rstrip("/"))
    return bucket, f"{key}/" if key else ""
