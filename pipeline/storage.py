"""Every read and write of a file or object, local or remote (`s3://` and whatever else fsspec knows).

A URI is a local path or `scheme://...`. Writes are atomic: a local file is written beside its target and renamed, an
object is put in one request. Filesystems are made in the process that uses them and are never pickled.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"  # prefix of a file that is being written; never a part


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file under a folder: `path` is relative to it with forward slashes, `size` in bytes."""

    path: str
    size: int


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(text: str) -> str:
    """`text` without credentials inside URLs (`scheme://user:secret@host`, signed query strings)."""
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(?i)((?:X-Amz-[A-Z-]+|AWSAccessKeyId|Signature)=)[^&\s]+", r"\1***", text)


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int) -> Any:
    # Retry, endpoint, region and credentials come from the standard AWS variables and profiles.
    return fsspec.filesystem(protocol, **({"use_listings_cache": False} if protocol in {"s3", "s3a"} else {}))


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it. ValueError names the scheme when its package is missing."""
    protocol = uri.split("://", 1)[0] if is_remote(uri) else "file"
    try:
        fs = _filesystem(protocol, os.getpid())
    except (ImportError, ValueError) as error:
        raise ValueError(f"{redact(uri)}: cannot open '{protocol}://': {error}") from error
    return fs, fs._strip_protocol(uri)


def read_bytes(uri: str, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file, or `length` bytes from `offset`. FileNotFoundError and OSError as the store gives them."""
    fs, path = filesystem(uri)
    end = None if length is None else offset + length
    data: bytes = fs.cat_file(path, start=offset or None, end=end)
    if length is not None and len(data) != length:
        raise OSError(f"{redact(uri)}: asked for {length} bytes at {offset}, got {len(data)}")
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically, replacing what is there."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
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


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


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


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")


def walk(uri: str) -> Iterator[FileInfo]:
    """Every file under a folder, in the byte order of its relative path. FileNotFoundError when there is no folder."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(uri)
        yield from _walk_local(root, "", frozenset())
        return
    root_path = path.rstrip("/") + "/"
    found = fs.find(path, detail=True)
    if not found and not fs.exists(path):
        raise FileNotFoundError(uri)
    for name in sorted(found, key=str.encode):
        yield FileInfo(name.removeprefix(root_path), int(found[name]["size"]))


def _walk_local(root: Path, prefix: str, parents: frozenset[str]) -> Iterator[FileInfo]:
    here = os.path.realpath(root / prefix)
    if here in parents:  # a link to a folder above itself
        return
    with os.scandir(root / prefix) as scan:
        # A folder sorts as its name and a slash, so that the order is that of whole keys in a bucket.
        entries = sorted(
            ((e.name + "/" if e.is_dir() else e.name, e) for e in scan), key=lambda entry: os.fsencode(entry[0])
        )
    for name, entry in entries:
        if name.endswith("/"):
            yield from _walk_local(root, prefix + name, parents | {here})
        elif entry.is_file():
            yield FileInfo(prefix + name, entry.stat().st_size)
