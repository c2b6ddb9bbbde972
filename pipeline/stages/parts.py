"""Panoptic parts, found and read as labels: of a run, of a folder, or given one by one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.metrics.instances import Instance
from pipeline.engine.shards import read_columns
from pipeline.engine.stage import PART
from pipeline.errors import ConfigError
from pipeline.sources.coco import Categories, PanopticImage, PanopticSegment, check_image, decode_ids, read_categories
from pipeline.stages.base import Run
from pipeline.stages.run import open_run
from pipeline.store import storage
from workers.records import PART_COLUMNS, READABLE

Inputs = str | Sequence[str]  # a run (folder or config file), a folder of parts, or the parts themselves
LABEL_COLUMNS = ["image_id", "height", "width", "status", "panoptic", "segments"]
DETECTION_COLUMNS = ["rle", "bbox", "area", "score", "category"]  # of the model's predictions


class PanopticParts:
    """The labelled images of panoptic parts. A row that could not be read has no label, and no name here.

    Images are read quickly in the order of `names`, because one part is held at a time; the names are all held.
    ConfigError: there is no part, one cannot be read or lists no categories, their lists differ, or an image comes
    twice.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = list(parts)
        self.categories = common_categories(self._parts)
        self.shown = storage.redact(self._parts[0].rsplit("/", 1)[0])
        self._columns = label_columns(self._parts[0])
        self._place: dict[str, tuple[int, int]] = {}
        for number, part in enumerate(self._parts):
            rows = read_part_columns(part, ["image_id", "status"])
            for row, (name, status) in enumerate(zip(*(rows[c].to_pylist() for c in rows.column_names), strict=True)):
                if status in READABLE and self._place.setdefault(name, (number, row)) != (number, row):
                    raise ConfigError(f"{storage.redact(part)}: the image {name!r} is in {self.shown} twice")
        self._part = functools.lru_cache(maxsize=1)(self._load)

    @property
    def names(self) -> Sequence[str]:
        return list(self._place)

    def read(self, name: str) -> PanopticImage:
        """The label of an image. ConfigError when map, segments and categories do not fit."""
        number, row = self._place[name]
        entry = self._part(number).slice(row, 1).to_pylist()[0]
        return image_of_row(entry, storage.redact(self._parts[number]), self.categories)

    def _load(self, number: int) -> pa.Table:
        return read_part_columns(self._parts[number], self._columns)


def find_parts(inputs: Inputs, stage: str = "panoptic") -> list[str]:
    """The finished parts of a stage of a run (its folder or config file), those in a folder, or those that are given.
    Of `things` they are those of the masks that the run's labels were merged from.

    ConfigError when there is none.
    """
    given = _given_parts(inputs, stage)
    if given is not None:
        return given
    return parts_of_run(open_run(str(inputs), need=None if stage == "things" else stage), stage)


def find_run_and_parts(inputs: Inputs) -> tuple[Run | None, list[str]]:
    """The parts as `find_parts` has them, and the run that they are of; None when they were given without one."""
    given = _given_parts(inputs, "panoptic")
    if given is not None:
        return None, given
    run = open_run(str(inputs), need="panoptic")
    return run, parts_of_run(run, "panoptic")


def parts_of_run(run: Run, stage: str) -> list[str]:
    """The finished parts of a stage; `things` is whichever has the masks that the labels were merged from."""
    name = run.things.name if stage == "things" else stage
    return [run.stages[name].part(shard) for shard in sorted(run.done[name])]


def _given_parts(inputs: Inputs, stage: str) -> list[str] | None:
    """The parts in a folder, or those that are given; None when `inputs` is a run."""
    if not isinstance(inputs, str):
        if not inputs:
            raise ConfigError(f"no {stage} part was given; give a run, a folder of parts, or the parts")
        return list(inputs)
    if inputs.lower().endswith(".parquet"):
        return [inputs]
    try:
        listed = [name for name in storage.list_folder(inputs) if PART.fullmatch(name)]
    except NotADirectoryError:
        listed = []
    except storage.store_errors(inputs) as error:
        raise ConfigError(f"cannot list {storage.redact(inputs)!r}: {storage.redact(str(error))}") from error
    return [storage.join(inputs, name) for name in sorted(listed, key=shard_of)] or None


def shard_of(part: str) -> int:
    """The number of a part by its name."""
    found = PART.fullmatch(part.rsplit("/", 1)[-1])
    assert found
    return int(found[1])


def common_categories(parts: Sequence[str]) -> Categories:
    """The category list that all parts (at least one) carry in their metadata. ConfigError: none, or different ones."""
    lists: dict[bytes, str] = {}
    for part in parts:
        listed = (_schema(part).metadata or {}).get(b"u2label.categories")
        if listed is None:
            raise ConfigError(f"{storage.redact(part)} has no list of categories in its metadata: not a panoptic part")
        lists.setdefault(listed, part)
    if len(lists) > 1:
        first, second = (storage.redact(part) for part in list(lists.values())[:2])
        raise ConfigError(f"{first} and {second} have different categories; give the parts of one stage")
    entries, part = next(iter(lists.items()))
    categories = read_categories(json.loads(entries), storage.redact(part))
    if not categories:
        raise ConfigError(f"{storage.redact(part)}: the list of categories is empty")
    return categories


def label_columns(part: str) -> list[str]:
    """What `image_of_row` reads of a part, its detections too where it has them. ConfigError when it cannot be read."""
    return LABEL_COLUMNS + (DETECTION_COLUMNS if set(DETECTION_COLUMNS) <= set(_schema(part).names) else [])


def key_columns(part: str) -> list[str]:
    """The key columns of a manifest, as they are in a part: all that are not the part's own."""
    return [name for name in _schema(part).names if name not in PART_COLUMNS]


def keys_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a row as JSON can hold them: numbers, text and nulls as they are, all else as text."""
    plain = (str, int, float, bool, type(None))
    keys = {name: value for name, value in row.items() if name not in PART_COLUMNS}
    return {name: value if isinstance(value, plain) else str(value) for name, value in keys.items()}


def image_of_row(row: Mapping[str, Any], where: str, categories: Categories) -> PanopticImage:
    """The label of a readable row of a panoptic part. ConfigError when map, segments and categories do not fit."""
    where = f"{where}, image {row['image_id']!r}"
    segments = tuple(
        PanopticSegment(segment["id"], segment["category"], score=segment["score"]) for segment in row["segments"]
    )
    found = _detections(row) if "category" in row else None
    image = PanopticImage(row["image_id"], where, decode_ids(row["panoptic"], where), segments, found)
    check_image(image, categories)
    return image


def _detections(row: Mapping[str, Any]) -> tuple[Instance, ...]:
    size = [row["height"], row["width"]]
    return tuple(
        Instance(category, {"size": size, "counts": rle}, (x0, y0, x1 - x0, y1 - y0), float(area), False, score)
        for category, rle, (x0, y0, x1, y1), area, score in zip(
            *(row[name] for name in ("category", "rle", "bbox", "area", "score")), strict=True
        )
    )


def read_part_columns(part: str, columns: list[str]) -> pa.Table:
    """Some columns of a part. ConfigError names the part when it cannot be read or lacks one."""
    try:
        return read_columns(part, columns).select(columns)
    except (*storage.store_errors(part), pa.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"cannot read {storage.redact(part)!r} as a part: {storage.redact(str(error))}") from error


def _schema(part: str) -> pa.Schema:
    """Columns and metadata of a part."""
    try:
        with storage.open_input(part, block_size=0) as stream, pq.ParquetFile(stream) as file:
            return file.schema_arrow
    except (*storage.store_errors(part), pa.ArrowInvalid) as error:
        raise ConfigError(f"cannot read {storage.redact(part)!r} as a part: {storage.redact(str(error))}") from error
