"""Every read and write of a file or object, local or remote (`s3://` and whatever else fsspec knows).

A URI is a local path, taken as it is, a percent-encoded `file://` URI (the form of a path that is not valid UTF-8), or
`scheme://...`. Writes are atomic: a local file is written beside its target and renamed, an object appears whole when
its upload ends. Filesystems are made in the process that uses them and are never pickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"  # prefix of a file that is being written; never a part
S3 = frozenset({"s3", "s3a"})
S3_OPTIONS = {
    "use_listings_cache": False,
    "max_concurrency": 1,  # otherwise reading an object costs a HEAD beside the GET
    "config_kwargs": {"max_pool_connections": 64},  # botocore's 10 would hold back a fetch pool
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file under a folder: `path` is relative to it with forward slashes, `size` in bytes."""

    path: str
    size: int


def is_remote(uri: str) -> bool:
    return _protocol(uri) != "file"


def _protocol(uri: str) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return scheme[1].lower() if scheme else "file"


def local_uri(path: str) -> str:
    """The absolute path, or its percent-encoded `file://` URI when the name is not valid UTF-8."""
    path = os.path.abspath(path)  # noqa: PTH100 (pathlib keeps `..`)
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(path))
    return path


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(text: str) -> str:
    """`text` without credentials inside URLs (`scheme://user:secret@host`, signed query strings)."""
    text = re.sub(r"(\w+://)(?:[^/@:\s]+:[^@\s]*|[^/@\s]+)@", r"\1***@", text)
    return re.sub(r"(?i)((?:X-Amz-[A-Z-]+|AWSAccessKeyId|Signature)=)[^&\s]+", r"\1***", text)


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int) -> Any:
    # Retry, endpoint, region and credentials come from the standard AWS variables and profiles.
    return fsspec.filesystem(protocol, **(S3_OPTIONS if protocol in S3 else {}))


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it. ValueError names the scheme when its package is missing."""
    protocol = _protocol(uri)
    try:
        fs = _filesystem(protocol, os.getpid())
    except (ImportError, ValueError) as error:
        raise ValueError(f"{redact(uri)}: cannot open '{protocol}://': {error}") from error
    if protocol == "file" and "://" in uri[:7]:
        return fs, os.fsdecode(urllib.parse.unquote_to_bytes(uri[7:]))
    return fs, fs._strip_protocol(uri)


def store_errors(uri: str) -> tuple[type[Exception], ...]:
    """What a read or listing of `uri` raises when the store is at fault or refuses (S3 has more than OSError)."""
    if _protocol(uri) not in S3:
        return (OSError,)
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    return (OSError, BotoCoreError)


def read_bytes(uri: str, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file, or `length` bytes from `offset`. FileNotFoundError and OSError as the store gives them."""
    if length == 0:  # a byte range cannot be empty
        return b""
    fs, path = filesystem(uri)
    end = None if length is None else offset + length
    data: bytes = fs.cat_file(path, start=offset or None, end=end)
    if length is not None and len(data) != length:
        raise OSError(f"{redact(uri)}: asked for {length} bytes at {offset}, got {len(data)}")
    return data


def open_input(uri: str, *, block_size: int) -> IO[bytes]:
    """A seekable file to read. From a remote one, what is asked for and up to `block_size` bytes after it come in one
    request, and nothing is fetched of what is sought over."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Path(path).open("rb")
    stream: IO[bytes] = fs.open(path, "rb", block_size=block_size, cache_type="readahead")
    return stream


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


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically, replacing what is there."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with _replacing(Path(path)) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[IO[bytes]]:
    """A file to write piece by piece; it appears whole when the block ends, and not at all when the block raises."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with _replacing(Path(path)) as stream:
            yield stream
        return
    with tempfile.NamedTemporaryFile() as copy:
        yield copy
        copy.flush()
        fs.put_file(copy.name, path)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only if none is there (exclusive create, conditional put). False when one is there."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def take_away(uri: str) -> bytes | None:
    """Remove a file and return what it held; None when another process was faster. Atomic on local disks."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        data = read_bytes(uri)
        remove(uri)
        return data
    aside = Path(path).with_name(f"{TEMPORARY}{Path(path).name}-{uuid.uuid4().hex}")
    try:
        Path(path).rename(aside)
    except FileNotFoundError:
        return None
    data = aside.read_bytes()
    aside.unlink()
    return data


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def file_size(uri: str) -> int | None:
    """Bytes of a file; None when there is none, or a folder."""
    fs, path = filesystem(uri)
    try:
        found = fs.info(path)
    except FileNotFoundError:
        return None
    return int(found["size"]) if found["type"] == "file" else None


def remove(uri: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def list_folder(uri: str) -> dict[str, int]:
    """Names and sizes of the files directly in a folder, sorted by name; empty when there is no such folder."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    files = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
    return dict(sorted(files.items()))


def list_subfolders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; a link to one is none. Empty when there is no such folder."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(
        e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory" and not e.get("islink")
    )


def remove_folder(uri: str) -> None:
    """Delete a folder and all it holds, in a bucket a thousand objects a request; nothing happens without one."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(fs, LocalFileSystem):
            shutil.rmtree(path)
        else:
            fs.rm(path, recursive=True)


def walk(uri: str) -> Iterator[FileInfo]:
    """Every file under a folder, in the byte order of its relative path. FileNotFoundError when there is no folder.

    Memory: the names of one local folder, one page of an S3 listing; of other stores the whole listing. A link that
    leads nowhere is listed with size 0. A name that is not valid UTF-8 has surrogate escapes (PEP 383).
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no folder {redact(uri)}")
        yield from _walk_local(Path(path), "", frozenset())
        return
    root = path.rstrip("/") + "/"
    empty = True
    for name, size in _list_s3(fs, path) if _protocol(uri) in S3 else _list_remote(fs, path):
        empty = False
        yield FileInfo(name.removeprefix(root), size)
    if empty and not fs.exists(path):
        raise FileNotFoundError(f"no folder {redact(uri)}")


def _list_remote(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    found = fs.find(path, detail=True)
    for name in sorted(found, key=str.encode):
        yield name, int(found[name]["size"])


def _list_s3(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    # s3fs' own `find` holds the whole listing; a page at a time is flat, and S3 sorts keys by their UTF-8 bytes.
    bucket, key, _ = fs.split_path(path.rstrip("/"))
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    last = b""
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            if entry["Key"].encode() <= last:
                raise OSError(f"s3://{bucket} does not list its keys in byte order (a directory bucket?)")
            last = entry["Key"].encode()
            if not entry["Key"].endswith("/"):  # the marker that consoles leave for an empty folder
                yield f"{bucket}/{entry['Key']}", int(entry["Size"])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _walk_local(root: Path, prefix: str, parents: frozenset[str]) -> Iterator[FileInfo]:
    here = os.path.realpath(root / prefix)
    if here in parents:  # a link to a folder above itself
        return
    with os.scandir(root / prefix) as scan:
        # A folder sorts as its name and a slash, so that the order is that of whole keys in a bucket.
        names = sorted(os.fsencode(entry.name) + b"/" * _is_folder(entry) for entry in scan)
    for name in map(os.fsdecode, names):
        if name.endswith("/"):
            yield from _walk_local(root, prefix + name, parents | {here})
        elif (size := _regular_size(root / prefix / name)) is not None:
            yield FileInfo(prefix + name, size)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _regular_size(path: Path) -> int | None:
    """Bytes of a regular file, 0 of a link that leads nowhere, None of a pipe, socket or device."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None
