"""A listing that is made once and read as often as it is wanted: what the store told lies on a disk of this machine.

Of a large bucket most of that is work for a processor, 26 µs a key to read the store's answers. So other processes list
it, each many pieces between two folders: `python -m pipeline.store.held FILE`, where the file says what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Self, cast

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.store import child, s3_walk
from pipeline.store.listings import FileInfo, place, walk
from pipeline.store.places import S3, filesystem, protocol_of, s3_calls
from pipeline.store.retries import PATIENT
from pipeline.store.s3 import Ask

LARGE = 100_000  # keys that are listed here, in the time that processes take to start
MOST = 8  # processes
PIECES = 64  # a process: some are larger than others
THREADS = 16  # of a process: pieces that are listed at the same time
ROWS = 1000  # that are written and read at a time
SCHEMA = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("version", pa.string())])
OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
FAILED = 2  # exit status of a process that tells why


class Walk(Protocol):
    """The files of a place, as `storage.walk` lists them."""

    def __call__(self, uri: str, *, anonymous: bool = False) -> Iterator[FileInfo]: ...


class Piece(NamedTuple):
    """The keys of a bucket behind `after`, up to `until` and with it, and the file that they go to."""

    after: str
    until: str | None
    path: str


class Held:
    """Lists one place, when it is first asked to, and tells the same each time. Errors as of `storage.walk`.

    Disk, in the temporary folder while the block lasts: some 60 bytes a file. Memory: 1000 files, and as many
    for each piece under way.
    """

    def __init__(self, processes: int | None = None) -> None:
        """`processes` that a large bucket is listed by; None: one a core, up to eight."""
        self._processes = min(MOST, os.cpu_count() or 1) if processes is None else processes
        self._folder = tempfile.TemporaryDirectory(prefix="u2label-listing-")
        self._of: tuple[str, bool] | None = None
        self._pieces: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def walk(self, uri: str, *, anonymous: bool = False) -> Iterator[FileInfo]:
        """As `storage.walk`, of the place that was first asked for."""
        if self._of is None:
            self._pieces = list(self._list(uri, anonymous))
            self._of = uri, anonymous
        if self._of != (uri, anonymous):
            raise ValueError(f"a listing of {self._of[0]} is held, not of {uri}")
        for piece in self._pieces:
            yield from _read(piece)

    def _list(self, uri: str, anonymous: bool) -> Iterator[Path]:
        files = walk(uri, anonymous=anonymous)
        is_bucket = protocol_of(uri) in S3
        count, last = _write(first := self._path(0), islice(files, LARGE) if is_bucket else files)
        yield first
        if not is_bucket or count < LARGE:
            return
        files.close()  # type: ignore[attr-defined]
        pieces = [
            Piece(*ends, str(self._path(number))) for number, ends in enumerate(self._cut(uri, anonymous, last), 1)
        ]
        _list_apart(uri, anonymous, pieces, self._processes)
        yield from (Path(piece.path) for piece in pieces)

    def _cut(self, uri: str, anonymous: bool, last: str) -> Iterator[tuple[str, str | None]]:
        """The ends of the pieces of what is behind the path `last`."""
        ask, bucket, prefix = _bucket(uri, anonymous)
        after = prefix + last
        folders = s3_walk.folders_behind(ask, bucket, prefix, after)
        count = min(len(folders), PIECES * self._processes)
        cuts = [folders[(i + 1) * len(folders) // count - 1] for i in range(count)]
        return zip([after, *cuts], [*cuts, None], strict=True)

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number:05d}.arrow"


def _bucket(uri: str, anonymous: bool) -> tuple[Ask, str, str]:
    """How a place in S3 is asked, its bucket, and what its keys begin with."""
    fs, path = filesystem(uri, anonymous=anonymous)
    return s3_calls(fs, uri, PATIENT), *place(fs, path)


def _list_pieces(uri: str, anonymous: bool, pieces: Sequence[Piece]) -> None:
    """List the pieces side by side, each into its file: none waits for another, as the disk has room."""
    ask, bucket, prefix = _bucket(uri, anonymous)

    def one(piece: Piece) -> None:
        # One that turns out to be large, such as that behind the last folder that is known, is cut again.
        keys = s3_walk.walk(ask, bucket, prefix, after=piece.after, until=piece.until, head=LARGE)
        _write(Path(piece.path), (FileInfo(found.key.removeprefix(prefix), found.size, found.etag) for found in keys))

    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(one, piece) for piece in pieces]
        try:
            for call in calls:
                call.result()
        finally:
            for call in calls:
                call.cancel()


def _write(path: Path, files: Iterable[FileInfo]) -> tuple[int, str]:
    """How many files were written, and the path of the last. ConfigError: the disk does not take them."""
    count, last = 0, ""
    remaining = iter(files)
    with ExitStack() as closing:
        with _on_disk(path):
            stream = pa.OSFile(str(path), "wb")
            closing.callback(_close, stream, path)
            writer = pa.ipc.new_file(stream, SCHEMA, options=OPTIONS)
            closing.callback(_close, writer, path)
        while some := list(islice(remaining, ROWS)):
            paths, sizes, versions = zip(*some, strict=True)
            encoded = [name.encode(errors="surrogateescape") for name in paths]
            with _on_disk(path):
                writer.write_batch(pa.record_batch([encoded, sizes, versions], schema=SCHEMA))
            count, last = count + len(some), paths[-1]
    return count, last


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """The disk's errors by their name: the store's look the same."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the listing of the source cannot be kept in {path.parent}: {error}; make room, or set TMPDIR to a folder "
            "on another disk"
        ) from error


def _close(file: Any, path: Path) -> None:
    with _on_disk(path):
        file.close()


def _read(path: Path) -> Iterator[FileInfo]:
    with pa.OSFile(str(path)) as stream:
        batches = pa.ipc.open_file(stream)
        for number in range(batches.num_record_batches):
            paths, sizes, versions = (column.to_pylist() for column in batches.get_batch(number).columns)
            names = [name.decode(errors="surrogateescape") for name in paths]
            yield from map(FileInfo, names, sizes, versions)


def _list_apart(uri: str, anonymous: bool, pieces: Sequence[Piece], processes: int) -> None:
    """Have the pieces listed by so many processes. Raises what the first raised that could not."""
    if processes == 1 or len(pieces) == 1:
        _list_pieces(uri, anonymous, pieces)
        return
    shares = [pieces[number::processes] for number in range(min(processes, len(pieces)))]
    with ExitStack() as ending:
        children = []
        for share in shares:
            task = Path(share[0].path).with_suffix(".json")
            task.write_text(json.dumps([uri, anonymous, share]))
            process = child.start(__name__, str(task), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            ending.enter_context(process)
            ending.callback(process.kill)
            children.append(process)
        for process, share in zip(children, shares, strict=True):
            trace = cast(IO[str], process.stderr).read()
            if process.wait() == FAILED:
                raise pickle.loads(_error_file(share[0]).read_bytes())
            if process.returncode:
                raise RuntimeError(f"a process that listed {uri} ended with {process.returncode}: {trace[-2000:]}")


def _error_file(piece: Piece) -> Path:
    return Path(piece.path).with_suffix(".error")


def _main(task: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    uri, anonymous, share = json.loads(task.read_text())
    pieces = [Piece(*piece) for piece in share]
    try:
        _list_pieces(uri, anonymous, pieces)
    except Exception as error:
        _error_file(pieces[0]).write_bytes(_pickled(error))
        raise SystemExit(FAILED) from None


def _end_with_parent() -> None:
    """When the pipe to it ends, which nothing is written to."""
    os.read(0, 1)
    os._exit(1)


def _pickled(error: Exception) -> bytes:
    with contextlib.suppress(Exception):
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    return pickle.dumps(OSError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
