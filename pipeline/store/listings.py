"""What is there in a store: files and folders, with their bytes, and what tells a file from an earlier or later one.

Other rooms import these from `pipeline.store.storage`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from pipeline.store import local_files, s3, s3_walk
from pipeline.store.places import S3, asking, filesystem, protocol_of, redact, s3_calls
from pipeline.store.retries import PATIENT, Retry


class FileInfo(NamedTuple):
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


def exists(uri: str, *, anonymous: bool = False) -> bool:
    """Whether there is a file, or a folder that holds something."""
    return _info(uri, anonymous, PATIENT) is not None


def file_size(uri: str, *, anonymous: bool = False, retry: Retry = PATIENT) -> int | None:
    """Bytes of a file; None when there is none, or a folder."""
    found = _info(uri, anonymous, retry)
    return int(found["size"]) if found is not None and found["type"] == "file" else None


def file_info(uri: str, *, anonymous: bool = False) -> FileInfo | None:
    """A file as `walk` tells of it, by its name; None when there is none, or a folder."""
    found = _info(uri, anonymous, PATIENT)
    if found is None or found["type"] != "file":
        return None
    name = filesystem(uri, anonymous=anonymous)[1].rsplit("/", 1)[-1]
    return FileInfo(name, int(found["size"]), _version_of(found))


def _info(uri: str, anonymous: bool, retry: Retry) -> dict[str, Any] | None:
    fs, path = filesystem(uri, anonymous=anonymous)
    try:
        found: dict[str, Any] = asking(fs, uri, lambda: fs.info(path), retry)
    except FileNotFoundError:
        return None
    return found


def list_folder(uri: str) -> dict[str, int]:
    """Names and sizes of the files directly in a folder, sorted by name; empty when there is no such folder."""
    return {name: file.size for name, file in list_written(uri).items()}


def list_written(uri: str, *, cuts: Sequence[str] = ()) -> dict[str, Written]:
    """The files directly in a folder by name, sorted; empty when there is no such folder. A bucket lists the pieces
    between the names `cuts` side by side."""
    fs, path = filesystem(uri)
    try:
        if protocol_of(uri) in S3:
            bucket, prefix = place(fs, path)
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


def list_subfolders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; a link to one is none. Empty when there is no such folder."""
    fs, path = filesystem(uri)
    try:
        entries = asking(fs, uri, lambda: fs.ls(path, detail=True), PATIENT)
    except FileNotFoundError:
        return []
    folders = (e["name"].rstrip("/") for e in entries if e["type"] == "directory" and not e.get("islink"))
    return sorted(name.rsplit("/", 1)[-1] for name in folders)


def glob(uri: str, *, anonymous: bool = False) -> dict[str, int]:
    """Paths, without the scheme, and sizes of the files that match a pattern; in it `*` stays in one folder, and `**`
    goes into those below."""
    fs, path = filesystem(uri, anonymous=anonymous)
    found = asking(fs, uri, lambda: fs.glob(path, detail=True), PATIENT)
    return {name: int(entry["size"]) for name, entry in found.items() if entry["type"] == "file"}


def walk(uri: str, *, anonymous: bool = False) -> Iterator[FileInfo]:
    """Every file under a folder, in the byte order of its relative path. FileNotFoundError when there is no folder.

    Memory: the names of one local folder, some pages of an S3 listing; of other stores the whole listing. A link that
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
        yield FileInfo(name.removeprefix(path.rstrip("/") + "/"), int(found[name]["size"]), _version_of(found[name]))


def _version_of(entry: dict[str, Any]) -> str:
    """As `FileInfo` has it, of an entry of fsspec's, whose stores do not agree on how it is told."""
    told = (entry.get(name) for name in ("ETag", "etag", "mtime", "updated", "last_modified"))
    return str(next(filter(None, told), "")).strip('"')


def _walk_s3(fs: Any, uri: str, path: str) -> Iterator[FileInfo]:
    # s3fs' own `find` holds the whole listing; a page at a time is flat, and S3 sorts keys by their UTF-8 bytes.
    bucket, prefix = place(fs, path)
    for found in s3_walk.walk(s3_calls(fs, uri, PATIENT), bucket, prefix):
        yield FileInfo(found.key.removeprefix(prefix), found.size, found.etag)


def place(fs: Any, path: str) -> tuple[str, str]:
    """The bucket, and what the keys in a folder begin with."""
    bucket, key, _ = fs.split_path(path.rstrip("/"))
    return bucket, f"{key}/" if key else ""
