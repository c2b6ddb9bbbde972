"""The index of a source: its images in a fixed order, cut into shards, written down once.

How it lies on disk is in `pipeline.sources.index_files`, listing in `pipeline.sources.scan`, reading in
`pipeline.sources.fetch`, extending in `pipeline.sources.extend`; all that other modules need of the first three can be
imported from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import pyarrow as pa

from pipeline.sources.choice import ALL, Choice
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index_files import (
    MANIFEST,
    NO_KEYS,
    Index,
    WrittenIndex,
    batches,
    open_index,
    write_manifest,
    write_shards,
)
from pipeline.sources.left_out import Ignored
from pipeline.sources.scan import EVERYTHING, detect_format, image_id, naming_the_source, scan
from pipeline.sources.survey import survey
from pipeline.store import storage
from pipeline.store.held import Held
from pipeline.store.retries import BRIEF
from workers.records import ImageRecord

__all__ = [
    "Fetcher",
    "Ignored",
    "Index",
    "build_index",
    "check_source",
    "detect_format",
    "image_id",
    "open_index",
    "scan",
    "write_index",
]

CHECKED_IMAGES = 10  # a source whose first images are all unreadable is refused


def build_index(
    folder: str,
    uri: str,
    format: str = "auto",
    *,
    shard_size: int = 1000,
    image_column: str = "image",
    anonymous: bool = False,
    choice: Choice = ALL,
) -> Index:
    """List the source at `uri`, once, and write its index into `folder`, in place of an earlier one. Errors as of
    `scan`."""
    with Held() as held:
        found = survey(uri, format, image_column, choice, anonymous=anonymous, walk=held.walk)
        kind, ignored = found.format, Ignored()
        records = scan(
            uri,
            kind,
            image_column=image_column,
            ignored=ignored,
            anonymous=anonymous,
            choice=found.choice,
            maps=found.maps,
            walk=held.walk,
        )
        before = _index_before(folder)
        storage.remove(storage.join(folder, MANIFEST))
        written = write_index(choice.sample(records, ignored), folder, shard_size, found.keys)
    index = Index(
        folder=folder,
        shards=written.shards,
        images=written.images,
        shard_size=shard_size,
        format=kind,
        image_column=image_column,
        anonymous=anonymous,
        digest=written.digest,
        source=storage.redact(uri),
        ignored=ignored,
        keys=found.keys.names,
        sizes=written.uneven(shard_size),
        **written.times(before),
    )
    write_manifest(index)
    return open_index(folder)


def _index_before(folder: str) -> Index | None:
    """The index that is about to be replaced."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return open_index(folder)
    return None


def write_index(
    records: Iterable[ImageRecord], folder: str, shard_size: int, keys: pa.Schema = NO_KEYS
) -> WrittenIndex:
    """Write the index files of a stream of records. Memory: one shard. `keys`: the columns of the records' keys, which
    enter the digest where there are any."""
    if shard_size < 1:
        raise ValueError(f"source.shard_size: {shard_size} must be at least 1")
    return write_shards(batches(records, shard_size), folder, keys=keys)


def check_source(
    uri: str,
    format: str = "auto",
    *,
    image_column: str = "image",
    anonymous: bool = False,
    choice: Choice = EVERYTHING,
) -> ImageRecord:
    """Read one image before any work starts, and return its record. ValueError names `source.uri` and the reason."""
    with naming_the_source(uri):
        storage.file_size(uri, anonymous=anonymous, retry=BRIEF)  # a mistyped endpoint is not waited for
    fetcher = Fetcher(image_column, anonymous=anonymous)
    failure: Exception | None = None
    choice = replace(choice, label_maps=True)  # whether a picture is one is seen by reading many
    records = scan(uri, format, image_column=image_column, threads=1, anonymous=anonymous, choice=choice)
    for record in islice(records, CHECKED_IMAGES):
        try:
            fetcher.fetch(record)
        except storage.store_errors(record.uri) as error:
            failure = failure or error
        else:
            return record
    reason = storage.redact(str(failure))
    raise ValueError(f"source.uri: the first images of {storage.redact(uri)} cannot be read: {reason}") from failure
