"""The photos to look at: of files, folders, globs, tars and Parquet files, on disk or in a bucket.

A photo's image_id is its path below the folder that all inputs share: of one folder the path inside it, of
`photos/*.jpg` the file's name. It is made as in `pipeline.sources.scan`, and hidden files are left out as there. A glob
stands for files; in it `*` stays in one folder, and `**` goes into those below.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError, StageFailed
from pipeline.sources.fetch import Fetcher, load_photo
from pipeline.sources.scan import detect_format, image_id, scan
from pipeline.store import storage
from workers.decode import DecodeLimits
from workers.formats import IMAGE_EXTENSIONS
from workers.images import LoadedImage
from workers.records import ImageRecord

MAGIC = re.compile(r"[*?\[]")
CONTAINERS = (".tar", ".parquet")
REMEDY = "give photos, folders, globs such as 'photos/*.jpg', tars or Parquet files, on disk or s3://"


@dataclass(frozen=True, slots=True)
class _Input:
    """`path` on its store, absolute; `base` is the folder that the image_ids of this input are relative to."""

    given: str
    scheme: str  # such as "s3://"; "" on disk
    path: str
    base: str
    anonymous: bool
    is_glob: bool = False
    is_file: bool = False

    def uri(self, path: str) -> str:
        return self.scheme + path if self.scheme else storage.local_uri(path)


def find_photos(
    inputs: Sequence[str], *, output: str, image_column: str = "image", anonymous: bool = False
) -> Iterator[ImageRecord]:
    """The photos of all inputs in their order, each once, streaming; what lies in the folder `output` is left out.

    `image_column` is that of Parquet files; `anonymous` asks a public bucket without credentials. ConfigError: there is
    no input, one is not there, or they are on different stores (all checked at once); and, where it comes up, one holds
    no photo or cannot be read.
    """
    if not inputs:
        raise ConfigError(f"--input: none was given; {REMEDY}")
    parsed = [_parse(given, anonymous) for given in inputs]
    if len({one.scheme for one in parsed}) > 1:
        raise ConfigError("--input: the inputs are on different stores; predict those of each by themselves")
    return _photos(parsed, _parse_output(output), image_column)


def read_photo(fetcher: Fetcher, record: ImageRecord, limits: DecodeLimits) -> LoadedImage:
    """The pixels, or why there are none. StageFailed when the store fails, and not this one photo."""
    try:
        return load_photo(fetcher, record, limits)
    except storage.store_errors(record.uri) as error:
        raise StageFailed(
            f"predict: cannot read {storage.redact(record.uri)}: {storage.redact(str(error))}; run the same again "
            "when the store answers"
        ) from error


def _photos(inputs: Sequence[_Input], output: str, image_column: str) -> Iterator[ImageRecord]:
    shared = posixpath.commonpath([one.base for one in inputs])
    seen: set[str] = set()
    for one in inputs:
        folder = "" if one.base == shared else image_id(posixpath.relpath(one.base, shared))
        empty = True
        for record in _records(one, image_column):
            empty = False
            name = posixpath.join(folder, record.image_id)
            if name not in seen and not record.uri.startswith(output):
                seen.add(name)
                yield replace(record, image_id=name)
        if empty:
            raise ConfigError(f"--input: no photo matches {storage.redact(one.given)!r}; {REMEDY}")


def _parse(given: str, anonymous: bool) -> _Input:
    shown = storage.redact(given)
    errors: tuple[type[Exception], ...] = (ValueError, *storage.store_errors(given))
    try:
        path = storage.filesystem(given)[1]
        scheme = given[: given.index("://") + 3] if storage.is_remote(given) else ""
        there = storage.exists(scheme + path, anonymous=anonymous)
        is_file = there and storage.file_size(scheme + path, anonymous=anonymous) is not None
    except errors as error:
        raise ConfigError(f"--input: cannot read {shown!r}: {storage.redact(str(error))}") from error
    path = path if scheme else os.path.abspath(path)  # noqa: PTH100 (pathlib keeps `..`)
    if there:
        base = posixpath.dirname(path) if is_file else path.rstrip("/") or "/"
        return _Input(given, scheme, path, base, anonymous, is_file=is_file)
    if not MAGIC.search(path):
        raise ConfigError(f"--input: there is no {shown!r}; {REMEDY}")
    fixed = itertools.takewhile(lambda part: not MAGIC.search(part), path.split("/"))
    return _Input(given, scheme, path, "/".join(fixed) or ("" if scheme else "/"), anonymous, is_glob=True)


def _parse_output(output: str) -> str:
    """What the URIs of photos in the output folder begin with."""
    return (output.rstrip("/") if storage.is_remote(output) else storage.local_uri(output)) + "/"


def _records(one: _Input, image_column: str) -> Iterator[ImageRecord]:
    """The photos of an input, named relative to its base."""
    try:
        if one.is_glob:
            yield from _glob(one, image_column)
        elif one.is_file and not one.path.lower().endswith(CONTAINERS):
            size = storage.file_size(one.scheme + one.path, anonymous=one.anonymous) or 0
            yield ImageRecord(image_id(posixpath.basename(one.path)), one.uri(one.path), 0, size)
        else:
            yield from _scan(one, one.path, image_column)
    except storage.store_errors(one.given) as error:
        reason = storage.redact(str(error))
        raise ConfigError(f"--input: cannot read {storage.redact(one.given)!r}: {reason}") from error


def _glob(one: _Input, image_column: str) -> Iterator[ImageRecord]:
    found = storage.glob(one.scheme + one.path, anonymous=one.anonymous)
    for path in sorted(found, key=os.fsencode):
        name = posixpath.relpath(path, one.base)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden:
            continue
        if path.lower().endswith(CONTAINERS):
            folder = posixpath.dirname(name)
            for record in _scan(one, path, image_column):
                yield replace(record, image_id=posixpath.join(image_id(folder), record.image_id))
        elif posixpath.splitext(path)[1].lower() in IMAGE_EXTENSIONS:
            yield ImageRecord(image_id(name), one.uri(path), 0, found[path])


def _scan(one: _Input, path: str, image_column: str) -> Iterator[ImageRecord]:
    uri = one.uri(path)
    try:
        kind = detect_format(uri, anonymous=one.anonymous)
    except ValueError as error:
        raise ConfigError(
            f"--input: {storage.redact(uri)} cannot be listed, or holds photos beside tars or Parquet files ({error}); "
            "of such a folder give globs"
        ) from error
    try:
        yield from scan(uri, kind, image_column=image_column, anonymous=one.anonymous)
    except ValueError as error:
        raise ConfigError(str(error).replace("source.uri", "--input")) from error
