"""The images of a source: a folder tree, tar shards (WebDataset) or Parquet files with a column of image bytes.

The source is local or `s3://`, and is listed in the byte order of its paths, a tar in the order of its members, from
its headers alone. Nothing is left out in silence: `Ignored` counts what is not an image.

An `image_id` is the path inside the source: of a tar member `<tar>/<member>` (a name that comes again in the same tar
gets `~2`, `~3`, ...), of a Parquet row `<file>#<row>`. Bytes that are not UTF-8 are percent-encoded in it, and so are
the percent signs of any name that could be mistaken for such a one; all other names stay as they are.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Literal, NamedTuple, TypeVar

from pipeline.sources.fetch import parquet_rows
from pipeline.store import storage
from workers.formats import IMAGE_EXTENSIONS
from workers.records import ImageRecord

Format = Literal["folder", "tar", "parquet"]
T = TypeVar("T")
R = TypeVar("R")

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gz bz2 xz zst lz4
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
DETECT_FILES = 10_000  # files that `detect_format` looks at
REMOTE_FILES = 16  # tars or Parquet files listed at the same time: each header waits for the network
HEADER_BLOCK = 64 << 10  # bytes read from a remote tar at a time: small against a photo, large against a header
PADDING_BLOCK = 1 << 20  # bytes read at a time behind the end marker of a tar; writers pad with a few KiB
EXTENSIONS_COUNTED = 100
AMBIGUOUS = re.compile("[\udc80-\udcff]|%25|%[89A-F][0-9A-F]")


class File(NamedTuple):
    """A file of the source: its path inside it, where it is, its size in bytes."""

    path: str
    uri: str
    size: int
    anonymous: bool


@dataclass
class Ignored:
    """What a scan did not take: files by extension, hidden files, and tar members that hold no bytes of their own."""

    extensions: dict[str, int] = field(default_factory=dict)
    hidden: int = 0
    special: int = 0  # links, devices and sparse files inside tars

    def count(self, path: str) -> None:
        self._count(image_id(_extension(path)) or "(none)", 1)

    def add(self, other: Ignored) -> None:
        for extension, times in other.extensions.items():
            self._count(extension, times)
        self.hidden += other.hidden
        self.special += other.special

    def _count(self, extension: str, times: int) -> None:
        if extension not in self.extensions and len(self.extensions) >= EXTENSIONS_COUNTED:
            extension = "(other)"
        self.extensions[extension] = self.extensions.get(extension, 0) + times

    def __str__(self) -> str:
        parts = [f"{count} {extension}" for extension, count in sorted(self.extensions.items())]
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        if self.special:
            parts.append(f"{self.special} links or devices")
        return ", ".join(parts) or "nothing"


def detect_format(uri: str, *, anonymous: bool = False) -> Format:
    """The format of a source from the names of its first 10 000 files; of a single file from its name.

    ValueError when they speak for more than one format, or when there is no such place.
    """
    kinds: Counter[Format] = Counter()
    for file in islice(_files(uri, Ignored(), anonymous), DETECT_FILES):
        if kind := _kind(file.path):
            kinds[kind] += 1
    if len(kinds) > 1:
        found = ", ".join(f"{count} for {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(
            f"source.format: {storage.redact(uri)} holds files of several formats ({found}); "
            "set it to folder, tar or parquet"
        )
    return next(iter(kinds)) if kinds else "folder"


def scan(
    uri: str,
    format: str = "auto",
    *,
    image_column: str = "image",
    ignored: Ignored | None = None,
    threads: int = REMOTE_FILES,
    anonymous: bool = False,
) -> Iterator[ImageRecord]:
    """The images of a source in order, streaming; `ignored` counts what is not taken.

    `threads`: remote tars and Parquet files listed at a time, each held whole in memory; with 1, and in a local source,
    records come one by one. ValueError names `source.uri` when there is no such place, no access or no image, and the
    file when a tar is compressed, truncated or corrupt or a Parquet file lacks `image_column`. `anonymous`: without
    credentials, from a public bucket.
    """
    ignored = Ignored() if ignored is None else ignored
    threads = threads if storage.is_remote(uri) else 1
    kind = detect_format(uri, anonymous=anonymous) if format == "auto" else format
    files = _files(uri, ignored, anonymous)
    if kind == "folder":
        records = _scan_folder(files, ignored)
    elif kind == "tar":
        records = _scan_tars(files, ignored, threads)
    elif kind == "parquet":
        records = _scan_parquet(files, image_column, ignored, threads)
    else:
        raise ValueError(f"source.format: '{format}' is not one of auto, folder, tar, parquet")
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise ValueError(
            f"source.uri: no image in {storage.redact(uri)} (format {kind}); found {ignored}. "
            f"Images end in {' '.join(sorted(IMAGE_EXTENSIONS))}; check source.uri and source.format"
        )


def _scan_folder(files: Iterable[File], ignored: Ignored) -> Iterator[ImageRecord]:
    for file in files:
        if _extension(file.path) in IMAGE_EXTENSIONS:
            yield ImageRecord(image_id(file.path), file.uri, 0, file.size)
        else:
            ignored.count(file.path)


def _scan_tars(files: Iterable[File], ignored: Ignored, threads: int) -> Iterator[ImageRecord]:
    def read(tar: File) -> tuple[list[ImageRecord], Ignored]:
        left = Ignored()
        return list(_tar_records(tar, left)), left

    tars = _of_kind("tar", files, ignored)
    if threads == 1:
        for tar in tars:
            yield from _tar_records(tar, ignored)
        return
    for records, left in _map_ahead(read, tars, threads):
        ignored.add(left)
        yield from records


def _scan_parquet(files: Iterable[File], column: str, ignored: Ignored, threads: int) -> Iterator[ImageRecord]:
    def read(file: File) -> tuple[File, int]:
        with naming_the_source(file.uri):
            return file, parquet_rows(file.uri, column, anonymous=file.anonymous)

    for file, rows in _map_ahead(read, _of_kind("parquet", files, ignored), threads):
        name = image_id(file.path)
        for row in range(rows):
            yield ImageRecord(f"{name}#{row}", file.uri, row, -1)


def _map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map` in order, with `threads` calls on their way."""
    calls: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                calls.append(pool.submit(function, item))
                if len(calls) >= threads:
                    yield calls.popleft().result()
            while calls:
                yield calls.popleft().result()
        finally:
            for call in calls:
                call.cancel()


def _of_kind(kind: Format, files: Iterable[File], ignored: Ignored) -> Iterator[File]:
    for file in files:
        if _kind(file.path) == kind:
            yield file
        else:
            ignored.count(file.path)


def _tar_records(tar: File, ignored: Ignored) -> Iterator[ImageRecord]:
    seen: Counter[str] = Counter()
    for member in _tar_members(tar):
        name = member.name.removeprefix("./")
        if _hidden(name):
            ignored.hidden += 1
        elif member.isdir():
            continue
        elif not member.isreg() or member.issparse():
            ignored.special += 1
        elif _extension(name) not in IMAGE_EXTENSIONS:
            ignored.count(name)
        else:
            seen[name] += 1
            again = f"~{seen[name]}" if seen[name] > 1 else ""
            yield ImageRecord(image_id(f"{tar.path}/{name}") + again, tar.uri, member.offset_data, member.size)


def _tar_members(file: File) -> Iterator[tarfile.TarInfo]:
    """The members of a tar from its headers alone. ValueError names a tar that is compressed, truncated or corrupt."""
    uri, size, name = file.uri, file.size, storage.redact(file.uri)
    reached = 0
    with naming_the_source(uri), storage.open_input(uri, block_size=HEADER_BLOCK, anonymous=file.anonymous) as stream:
        if uri.lower().endswith(COMPRESSED_TARS) or stream.read(6).startswith(COMPRESSED_MAGIC):
            raise ValueError(
                f"source.uri: {name} is compressed, so that its members cannot be read by offset; decompress it"
            )
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    end = member.offset_data + (member.size if member.isreg() else 0)
                    if not member.offset < member.offset_data <= end <= size:
                        raise tarfile.ReadError(f"member '{image_id(member.name)}' does not end inside the file")
                    reached = end
                    yield member
                _check_end(stream, tar.offset)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ValueError(
                f"source.uri: {name} is truncated or corrupt behind byte {reached} of {size}: {error}. "
                "Copy it again, or take it out of the source"
            ) from error


def _check_end(stream: IO[bytes], offset: int) -> None:
    # tarfile takes a broken header for the end of the archive, and reads nothing behind the end.
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no tar header where one must be")
    offset += len(block)
    while padding := stream.read(PADDING_BLOCK):
        if data := padding.lstrip(b"\0"):
            raise tarfile.ReadError(
                f"there is data behind the end marker, at byte {offset + len(padding) - len(data)}; if tars were "
                "concatenated by cat, join them by `tar --concatenate` or give them one by one"
            )
        offset += len(padding)


def _files(uri: str, ignored: Ignored, anonymous: bool) -> Iterator[File]:
    """Every file that is not hidden; a uri of one tar, Parquet or image file is a source of one."""
    with naming_the_source(uri):
        root = uri.rstrip("/") if storage.is_remote(uri) else storage.filesystem(uri)[1]
        size = storage.file_size(uri, anonymous=anonymous) if _kind(root) else None
        if size is None:
            found: Iterable[storage.FileInfo] = storage.walk(uri, anonymous=anonymous)
        else:
            root, _, name = root.rpartition("/")
            found = [storage.FileInfo(name, size)]
        for file in found:
            if _hidden(file.path):
                ignored.hidden += 1
                continue
            path = storage.join(root, file.path) if root else file.path
            place = path if storage.is_remote(uri) else storage.local_uri(path)
            yield File(file.path, place, file.size, anonymous)


@contextmanager
def naming_the_source(uri: str) -> Iterator[None]:
    """Turns what the store raises into a ValueError that names `source.uri`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"source.uri: there is no {storage.redact(uri)}") from error
    except storage.store_errors(uri) as error:
        reason = storage.redact(str(error)) or type(error).__name__
        remedy = "; check the credentials and AWS_ENDPOINT_URL" if storage.is_remote(uri) else ""
        if storage.lacks_credentials(error):
            remedy = (
                "; give AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket set "
                "source.anonymous: true"
            )
        raise ValueError(f"source.uri: cannot read {storage.redact(uri)}: {reason}{remedy}") from error


def image_id(path: str) -> str:
    """The path as a string of valid UTF-8 that no other path maps to (see the top of this file)."""
    if not AMBIGUOUS.search(path):
        return path
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", path.replace("%", "%25"))


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in path.split("/"))


def _kind(path: str) -> Format | None:
    if path.lower().endswith((".tar", *COMPRESSED_TARS)):
        return "tar"
    extension = _extension(path)
    if extension == ".parquet":
        return "parquet"
    return "folder" if extension in IMAGE_EXTENSIONS else None
