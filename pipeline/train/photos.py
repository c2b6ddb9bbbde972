"""What the panoptic model is trained on: photos of a source beside panoptic parts, or COCO panoptic files.

Both are picklable, safe in threads, and read their photos where they are asked for. They hold some bytes an image; of
labels a process keeps the parts it looked at last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.shards import read_columns
from pipeline.engine.stage import digest
from pipeline.errors import ConfigError
from pipeline.sources.index import Index
from pipeline.store import storage
from pipeline.train.order import MIXED_PARTS
from workers.decode import DecodeError, DecodeLimits, decode_image
from workers.records import READABLE
from workers.renaming import Renaming, rename_row
from workers.training.samples import Sample, from_panoptic_row

READ_THREADS = 8
PARTS_HELD = 2 * MIXED_PARTS  # a batch may lie where one group of mixed parts ends and the next begins
PANOPTIC_COLUMNS = ["image_id", "status", "error", "height", "width", "panoptic", "segments"]
INSTANCE_COLUMNS = ["image_id", "status", "error", "height", "width", "rle", "bbox", "area", "score"]


class TrainingPhotos(Protocol):
    """N labelled photos. `parts` (N,) int64 ascending says which are stored together, `wide` (N,) bool which are wider
    than high."""

    num_things: int
    num_stuff: int
    parts: NDArray[np.int64]
    wide: NDArray[np.bool_]
    identity: str  # of photos and labels

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True, slots=True)
class Labels:
    """Where labels lie: the panoptic parts of all shards, in order, and the instances parts they were merged from, or
    none: then only the visible part of a mask is known. `identity` is that of their content, such as a fingerprint.
    `nested`: the instances have categories, and all of them are learnt, if `soft` as surely as their scores say."""

    panoptic: Sequence[str]
    instances: Sequence[str] = ()
    identity: str = ""
    nested: bool = False
    soft: bool = False


class PhotosOfLabels:
    """The readable photos of a source, with the labels of panoptic parts."""

    def __init__(
        self,
        index: Index,
        labels: Labels,
        *,
        num_things: int,
        num_stuff: int,
        limits: DecodeLimits,
        fraction: float = 1,
        renaming: Renaming | None = None,
    ) -> None:
        """`fraction` of the photos, at least one, chosen at random but always the same; with a `renaming` the classes
        are its new ones. ConfigError: there is no photo, none has a segment, or the renaming leaves no things."""
        self.num_things, self.num_stuff = num_things, num_stuff
        self.identity = f"{index.digest} {labels.identity} {len(labels.instances)} {fraction:g}"
        self._renaming = renaming
        if renaming is not None:
            self.num_things, self.num_stuff = renaming.num_things, renaming.num_stuff
            self.identity += f" {digest(renaming.category_of)}"
            if not self.num_things:
                raise ConfigError("the names leave no things, and the panoptic model needs some; name one as a thing")
        self._index, self._labels, self._limits = index, labels, limits
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = list(pool.map(_readable_rows, labels.panoptic))
        self.parts = np.repeat(np.arange(len(found)), [len(rows) for rows, _ in found])
        self._rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found)])
        self.wide = np.concatenate([np.zeros(0, bool), *(wide for _, wide in found)])
        if len(self.parts) == 0:
            raise ConfigError(
                f"no image of the {len(labels.panoptic)} panoptic parts has labels to train on; "
                "look at their status and error with `u2label status`"
            )
        if not any(map(_has_segments, labels.panoptic)):
            raise ConfigError(
                f"none of the {len(self.parts)} photos to train on has a segment, so there is nothing to learn; look "
                "at the labels with `u2label report`, and lower maskcut.tau, crf.min_iou or things.min_score to get one"
            )
        kept = chosen_fraction(len(self.parts), fraction)
        self.parts, self._rows, self.wide = self.parts[kept], self._rows[kept], self.wide[kept]
        self._reader: _Reader | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lock": None}  # open files and locks stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.parts)

    def sample(self, index: int) -> Sample:
        """Image and labels. ConfigError when the photo has gone or changed since; ValueError for labels that do not
        fit (see `from_panoptic_row`)."""
        with self._lock:
            if self._reader is None:
                self._reader = _Reader(self._index, self._labels)
            part, row = int(self.parts[index]), int(self._rows[index])
            record, labels, instances = self._reader.row(part, row)
        if self._renaming is not None:
            labels = rename_row(labels, self._renaming)
        try:
            image = decode_image(self._reader.fetcher.fetch(record), self._limits)
        except (OSError, DecodeError) as error:
            raise ConfigError(
                f"{record.image_id} has labels, but its image cannot be read any more: {storage.redact(str(error))}; "
                "bring it back, or run again with --reindex"
            ) from error
        found = from_panoptic_row(
            labels,
            image,
            num_things=self.num_things,
            num_stuff=self.num_stuff,
            instances=instances,
            nested=self._labels.nested,
        )
        return found if self._labels.soft else replace(found, scores=None)


def chosen_fraction(count: int, fraction: float) -> NDArray[np.int64]:
    """Ascending indices of a `fraction` of `count`, at least one; a smaller fraction is part of a larger."""
    return np.sort(np.random.default_rng(0).permutation(count)[: max(1, round(fraction * count))])


class _Reader:
    """What one process has open. Not safe in threads by itself."""

    def __init__(self, index: Index, labels: Labels) -> None:
        self.fetcher = index.fetcher()
        self._index, self._labels = index, labels
        self._held: OrderedDict[int, tuple[Any, Any, Any]] = OrderedDict()

    def row(self, part: int, row: int) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
        """Index record, panoptic row and instances row of an image."""
        if part not in self._held:
            columns = [*INSTANCE_COLUMNS, "category"] if self._labels.nested else INSTANCE_COLUMNS
            instances = read_columns(self._labels.instances[part], columns) if self._labels.instances else None
            panoptic = read_columns(self._labels.panoptic[part], PANOPTIC_COLUMNS)
            self._held[part] = (self._index.records(part), panoptic, instances)
            if len(self._held) > PARTS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(part)
        records, panoptic, instances = self._held[part]
        return records[row], _row(panoptic, row), None if instances is None else _row(instances, row)


def _readable_rows(part: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    table = read_columns(part, ["status", "height", "width"])
    rows = np.flatnonzero([status in READABLE for status in table["status"].to_pylist()])
    wide = table["width"].to_numpy()[rows] > table["height"].to_numpy()[rows]
    return rows, wide


def _has_segments(part: str) -> bool:
    return len(read_columns(part, ["segments"])["segments"].combine_chunks().flatten()) > 0


def _row(table: Any, row: int) -> dict[str, Any]:
    values: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    return values
