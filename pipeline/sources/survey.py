"""What a listing has to know of the whole source before its first photo: which folders are ours, and which pictures are
label maps of photos."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.sources.choice import Choice
from pipeline.sources.fetch import Fetcher
from pipeline.sources.label_maps import find_label_maps, reader
from pipeline.sources.left_out import Ignored
from pipeline.sources.manifest import open_manifest
from pipeline.sources.own_folders import folders_made_by
from pipeline.sources.scan import detect_format, list_files, naming_the_source, scan
from pipeline.store import storage
from pipeline.store.held import Walk
from workers.records import ImageRecord

NO_KEYS = pa.schema([])


@dataclass(frozen=True)
class Survey:
    """`format` of the source; `choice` with all folders in it that are ours; `maps`: digests of the image_ids of a
    folder that are label maps; `keys`: the columns of a manifest's keys."""

    format: str
    choice: Choice
    maps: Container[int] = frozenset()
    keys: pa.Schema = NO_KEYS


def survey(
    uri: str, format: str, image_column: str, choice: Choice, *, anonymous: bool, walk: Walk = storage.walk
) -> Survey:
    """Look through a source, by its listing, which is read up to four times, and a look at PNGs that share a name with
    another picture. Errors as of `scan`."""
    columns = {"image_column": image_column, "uri_column": choice.uri_column}
    kind = format
    if kind == "auto":
        kind = detect_format(uri, anonymous=anonymous, own=choice.own, walk=walk, **columns)
    if kind == "manifest":
        with naming_the_source(uri):
            return Survey(kind, choice, keys=open_manifest(uri, choice.uri_column, anonymous=anonymous).keys)
    own, has_pngs = set(choice.own), False
    for file in list_files(uri, Ignored(), anonymous, walk):
        own.update(folders_made_by(file.path))
        has_pngs = has_pngs or file.path.lower().endswith(".png")
    choice = replace(choice, own=tuple(sorted(own)))
    if kind != "folder" or choice.label_maps or not has_pngs:
        return Survey(kind, choice)

    def records() -> Iterable[ImageRecord]:
        return scan(uri, kind, anonymous=anonymous, choice=choice, walk=walk)

    with naming_the_source(uri):
        return Survey(kind, choice, find_label_maps(records, reader(Fetcher(anonymous=anonymous))))
