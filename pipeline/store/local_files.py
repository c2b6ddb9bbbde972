"""What `pipeline.store` needs of local disks beyond `open`: files that are replaced whole, taken away by one
process alone, and listed in the byte order of whole paths. No other room imports this module.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"  # prefix of a file that is being written; never a part


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `target` when the block ends, and goes when the block raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
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


def take_away(path: Path) -> bytes:
    """Remove a file and return what it held. FileNotFoundError when another process was faster."""
    aside = _beside(path)
    path.rename(aside)
    data = aside.read_bytes()
    aside.unlink()
    return data


def _beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")  # not by its name, which may be as long as names can be


def walk(root: Path) -> Iterator[tuple[str, int, str]]:
    """The path below `root`, the bytes and the version of every file, in the byte order of the paths."""
    return _walk(root, "", frozenset())


def version_of(found: os.stat_result) -> str:
    """What tells a file from an earlier or later one of its name: when it was last written, in nanoseconds."""
    return f"{found.st_mtime_ns:x}"


def _walk(root: Path, prefix: str, parents: frozenset[str]) -> Iterator[tuple[str, int, str]]:
    here = os.path.realpath(root / prefix)
    if here in parents:  # a link to a folder above itself
        return
    with os.scandir(root / prefix) as scan:
        # A folder sorts as its name and a slash, so that the order is that of whole keys in a bucket.
        names = sorted(os.fsencode(entry.name) + b"/" * _is_folder(entry) for entry in scan)
    for name in map(os.fsdecode, names):
        if name.endswith("/"):
            yield from _walk(root, prefix + name, parents | {here})
        elif (found := _regular(root / prefix / name)) is not None:
            yield prefix + name, *found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _regular(path: Path) -> tuple[int, str] | None:
    """Bytes and version of a regular file, 0 of a link that leads nowhere, None of a pipe, socket or device."""
    try:
        found = path.stat()
    except OSError:
        return 0, ""
    return (found.st_size, version_of(found)) if stat.S_ISREG(found.st_mode) else None
