"""The images of a source: a folder tree, tar shards (WebDataset), Parquet files with a column of image bytes, or the
places that a manifest lists (`pipeline.sources.manifest`).

The source is local or `s3://`, and is listed in the byte order of its paths, a tar in the order of its members, from
its headers alone. Nothing is left out in silence: `Ignored` counts what is not taken.

An `image_id` is the path inside the source: of a tar member `<tar>/<member>` (a name that comes again in the same tar
gets `~2`, `~3`, ...), of a Parquet row `<file>#<row>`. Bytes that are not UTF-8 are percent-encoded in it, and so are
the percent signs of any name that could be mistaken for such a one; all other names stay as they are.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple, cast

from pipeline.sources import label_maps, manifest
from pipeline.sources.ahead import map_ahead
from pipeline.sources.choice import Choice
from pipeline.sources.fetch import Fetcher, parquet_rows
from pipeline.sources.left_out import Ignored
from pipeline.sources.names import image_id
from pipeline.sources.own_folders import holder_of, own_folders
from pipeline.sources.tars import COMPRESSED_TARS, tar_members
from pipeline.store import storage
from pipeline.store.held import Walk
from workers.formats import IMAGE_EXTENSIONS
from workers.records import PARQUET_ROW, SPARSE_MEMBER, ImageRecord

Format = Literal["folder", "tar", "parquet", "manifest"]

DETECT_FILES = 10_000  # files that `detect_format` looks at
REMOTE_FILES = 16  # tars or Parquet files listed at the same time: each header waits for the network
EVERYTHING = Choice(label_maps=True)


class File(NamedTuple):
    """A file of the source: its path inside it, where it is, its size in bytes, and what changes with them."""

    path: str
    uri: str
    size: int
    anonymous: bool
    version: str

    @property
    def identity(self) -> str:
        """Of the whole file, for the images inside it."""
        return f"{self.size:x}-{self.version}"


@dataclass
class Listing:
    """What of a source is listed, and how: `choice` of the photos, `maps` (digests of image_ids, of a folder) that are
    label maps, and what is not taken, counted in `ignored`; `walk` lists its files."""

    choice: Choice
    maps: Container[int]
    ignored: Ignored
    anonymous: bool
    walk: Walk

    def takes(self, record: ImageRecord) -> bool:
        """Whether the photo of a folder or tar is meant; counts it when it is not."""
        if not self.choice.takes(record.image_id):
            self.ignored.not_chosen += 1
        elif self.maps and label_maps.digest(record.image_id) in self.maps:
            self.ignored.label_maps += 1
        else:
            return True
        return False


def detect_format(
    uri: str,
    *,
    image_column: str = "image",
    uri_column: str = "uri",
    anonymous: bool = False,
    own: Sequence[str] = (),
    walk: Walk = storage.walk,
) -> Format:
    """The format of a source from the names of its first 10 000 files, without those in `own` folders and in others
    that a run or an export made; of a single file from its name, and of a Parquet file from its columns.

    ValueError when they speak for more than one format, or when there is no such place.
    """
    columns = {"image_column": image_column, "uri_column": uri_column}
    with naming_the_source(uri):
        single = uri.lower().endswith(manifest.ENDINGS) and storage.file_size(uri, anonymous=anonymous) is not None
        if single and manifest.is_manifest(uri, anonymous=anonymous, **columns):
            return "manifest"

    def first() -> Iterator[str]:
        return (file.path for file in islice(list_files(uri, Ignored(), anonymous, walk), DETECT_FILES))

    kinds = _kinds(first(), own)
    if len(kinds) > 1:
        kinds = _kinds(first(), (*own, *own_folders(first())))
    if len(kinds) > 1:
        found = ", ".join(f"{count} for {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(
            f"source.format: {storage.redact(uri)} holds files of several formats ({found}); "
            "set it to folder, tar or parquet"
        )
    return next(iter(kinds)) if kinds else "folder"


def _kinds(paths: Iterable[str], own: Sequence[str]) -> Counter[Format]:
    return Counter(kind for path in paths if (kind := _kind(path)) and holder_of(path, own) is None)


def scan(
    uri: str,
    format: str = "auto",
    *,
    image_column: str = "image",
    ignored: Ignored | None = None,
    threads: int = REMOTE_FILES,
    anonymous: bool = False,
    choice: Choice = EVERYTHING,
    maps: Container[int] = frozenset(),
    only: Container[str] | None = None,
    walk: Walk = storage.walk,
) -> Iterator[ImageRecord]:
    """The images of a source in order, streaming; `ignored` counts what is not taken, by `choice` or as one of the
    label `maps` of a folder. Those of a tar are found here, when the choice leaves them out. `only`: of the files at
    these places, which may be none. `walk` lists the files, from a listing that is held where it was made before.

    `threads`: remote tars and Parquet files listed at a time, each held whole in memory; with 1, and in a local source,
    records come one by one. ValueError names `source.uri` when there is no such place, no access or no image, and the
    file when a tar is compressed, truncated or corrupt or a Parquet file lacks `image_column`. `anonymous`: without
    credentials, from a public bucket.
    """
    ignored = Ignored() if ignored is None else ignored
    listing = Listing(choice, maps, ignored, anonymous, walk)
    threads = threads if storage.is_remote(uri) else 1
    columns = {"image_column": image_column, "uri_column": choice.uri_column}
    kind = format
    if kind == "auto":
        kind = detect_format(uri, anonymous=anonymous, own=choice.own, walk=walk, **columns)
    # Of some files alone, what lies beside tars and Parquet files was counted when the source was first listed.
    beside = listing if only is None else replace(listing, ignored=Ignored())
    if kind == "folder":
        found = _scan_folder(_of_the_user(uri, listing), listing)
        records: Iterator[ImageRecord] = (r for r in found if only is None or r.uri in only)
    elif kind in ("tar", "parquet"):
        whole = _of_kind(cast(Format, kind), _of_the_user(uri, beside), beside)
        files = (file for file in whole if only is None or file.uri in only)
        tars = kind == "tar"
        records = _scan_tars(files, listing, threads) if tars else _scan_parquet(files, image_column, listing, threads)
    elif kind == "manifest":
        records = (record for record in _scan_manifest(uri, listing) if only is None or record.uri in only)
    else:
        raise ValueError(f"source.format: '{format}' is not one of auto, folder, tar, parquet, manifest")
    empty = True
    for record in records:
        empty = False
        yield record
    if empty and only is None:
        raise ValueError(
            f"source.uri: no image in {storage.redact(uri)} (format {kind}); found {ignored}. "
            f"Images end in {' '.join(sorted(IMAGE_EXTENSIONS))}; check source.uri and source.format"
            f"{', source.include and source.exclude' if choice.include or choice.exclude else ''}"
        )


def scan_files(uri: str, kind: Format, choice: Choice, *, anonymous: bool, walk: Walk = storage.walk) -> Iterator[File]:
    """The files of a source that hold what `choice` means, from its listing alone; of a manifest its photos, as files
    of no known size. Errors as of `scan`."""
    listing = Listing(choice, frozenset(), Ignored(), anonymous, walk)
    if kind == "manifest":
        yield from (File(r.image_id, r.uri, 0, anonymous, "") for r in _scan_manifest(uri, listing))
    elif kind == "folder":
        files = _of_the_user(uri, listing)
        images = (file for file in files if _extension(file.path) in IMAGE_EXTENSIONS)
        yield from (file for file in images if choice.takes(image_id(file.path)))
    else:
        yield from _of_kind(kind, _of_the_user(uri, listing), listing)


def _scan_folder(files: Iterable[File], listing: Listing) -> Iterator[ImageRecord]:
    for file in files:
        if _extension(file.path) not in IMAGE_EXTENSIONS:
            listing.ignored.count(image_id(file.path))
        elif listing.takes(record := ImageRecord(image_id(file.path), file.uri, 0, file.size, version=file.version)):
            yield record


def _scan_tars(files: Iterable[File], listing: Listing, threads: int) -> Iterator[ImageRecord]:
    def read(tar: File) -> tuple[list[ImageRecord], Ignored]:
        one = replace(listing, ignored=Ignored())
        return list(_tar_records(tar, one)), one.ignored

    if threads == 1:
        for tar in files:
            yield from _tar_records(tar, listing)
        return
    for records, left in map_ahead(read, files, threads):
        listing.ignored.add(left)
        yield from records


def _scan_parquet(files: Iterable[File], column: str, listing: Listing, threads: int) -> Iterator[ImageRecord]:
    def read(file: File) -> tuple[File, int]:
        with naming_the_source(file.uri):
            return file, parquet_rows(file.uri, column, anonymous=file.anonymous)

    for file, rows in map_ahead(read, files, threads):
        name = image_id(file.path)
        for row in range(rows):
            yield ImageRecord(f"{name}#{row}", file.uri, row, PARQUET_ROW, version=file.identity)


def _scan_manifest(uri: str, listing: Listing) -> Iterator[ImageRecord]:
    with naming_the_source(uri):
        opened = manifest.open_manifest(uri, listing.choice.uri_column, anonymous=listing.anonymous)
        yield from filter(listing.takes, opened.records())


def _of_kind(kind: Format, files: Iterable[File], listing: Listing) -> Iterator[File]:
    """The tars or Parquet files that are meant; in a Parquet file all rows are, or none."""
    meant = listing.choice.takes if kind == "parquet" else lambda path: not listing.choice.excludes(path)
    for file in files:
        if _kind(file.path) != kind:
            listing.ignored.count(image_id(file.path))
        elif meant(image_id(file.path)):
            yield file
        else:
            listing.ignored.not_chosen += 1


def _of_the_user(uri: str, listing: Listing) -> Iterator[File]:
    """All files but those in folders that a run or an export made."""
    for file in list_files(uri, listing.ignored, listing.anonymous, listing.walk):
        holder = holder_of(file.path, listing.choice.own)
        if holder is None:
            yield file
        elif _kind(file.path):
            listing.ignored.count_own(image_id(holder))


def _tar_records(tar: File, listing: Listing) -> Iterator[ImageRecord]:
    """The photos of a tar in order, one by one where label maps are photos too, else held at once."""
    records = filter(listing.takes, _tar_images(tar, listing.ignored))
    if listing.choice.label_maps:
        yield from records
        return
    held = list(records)
    maps = label_maps.find_label_maps(lambda: held, label_maps.reader(Fetcher(anonymous=tar.anonymous)))
    yield from filter(replace(listing, maps=maps).takes, held)


def _tar_images(tar: File, ignored: Ignored) -> Iterator[ImageRecord]:
    seen: Counter[str] = Counter()
    for member in _members(tar):
        name = member.name.removeprefix("./")
        if _hidden(name):
            ignored.hidden += 1
        elif member.isdir():
            continue
        elif not member.isreg():
            ignored.special += 1
        elif _extension(name) not in IMAGE_EXTENSIONS:
            ignored.count(image_id(name))
        else:
            seen[name] += 1
            again = f"~{seen[name]}" if seen[name] > 1 else ""
            place = (member.offset, SPARSE_MEMBER) if member.issparse() else (member.offset_data, member.size)
            name = image_id(f"{tar.path}/{name}") + again
            yield ImageRecord(name, tar.uri, *place, version=tar.identity)


def _members(tar: File) -> Iterator[tarfile.TarInfo]:
    with naming_the_source(tar.uri):
        yield from tar_members(tar.uri, tar.size, anonymous=tar.anonymous)


def list_files(uri: str, ignored: Ignored, anonymous: bool, walk: Walk = storage.walk) -> Iterator[File]:
    """Every file that is not hidden; a uri of one tar, Parquet or image file is a source of one."""
    with naming_the_source(uri):
        root = uri.rstrip("/") if storage.is_remote(uri) else storage.filesystem(uri)[1]
        single = storage.file_info(uri, anonymous=anonymous) if _kind(root) else None
        if single is not None:
            root = root.rpartition("/")[0]
        found = [single] if single is not None else walk(uri, anonymous=anonymous)
        remote, above = storage.is_remote(uri), storage.join(root, "") if root else ""
        for file in found:
            if _hidden(file.path):
                ignored.hidden += 1
                continue
            path = above + file.path
            yield File(file.path, path if remote else storage.local_uri(path), file.size, anonymous, file.version)


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


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    if not path.startswith(".") and "/." not in path:  # nearly all
        return False
    return any(part.startswith(".") and part not in {".", ".."} for part in path.split("/"))


def _kind(path: str) -> Format | None:
    if path.lower().endswith((".tar", *COMPRESSED_TARS)):
        return "tar"
    extension = _extension(path)
    if extension == ".parquet":
        return "parquet"
    return "folder" if extension in IMAGE_EXTENSIONS else None
