"""What the refinement learns from: the photos of a source beside the class maps in the parts of the semantics stage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.engine.shards import read_columns
from pipeline.sources.index import Index
from workers.decode import DecodeLimits, decode_image
from workers.masks import open_png
from workers.records import Status

PARTS_HELD = 8  # class maps of parts that a process keeps
READ_THREADS = 8


class PhotosOfParts:
    """The photos of a source that have a class map, as `workers.semantics.refine.LabelledPhotos`. Picklable, safe in
    threads.

    Holds the shard and row of each photo (8 bytes a photo) and, in each process, the class maps of the 8 latest parts.
    """

    def __init__(self, index: Index, parts: Sequence[str], *, limits: DecodeLimits) -> None:
        """`parts`: URIs of the semantics parts of all shards of the index, in order; their `status` is read here."""
        self._index = index
        self._parts = list(parts)
        self._limits = limits
        with ThreadPoolExecutor(READ_THREADS) as pool:
            rows = list(pool.map(_readable_rows, self._parts))
        shards = np.repeat(np.arange(len(rows), dtype=np.int32), [len(found) for found in rows])
        self._places = np.stack([shards, np.concatenate([np.zeros(0, np.int32), *rows])], axis=1)
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # open files and locks stay behind

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 RGB and (H, W) uint8. OSError or DecodeError when the photo has gone or changed since."""
        if self._reader is None:
            self._reader = _Reader(self._index)
        shard, row = (int(number) for number in self._places[index])
        with open_png(self._reader.maps(self._parts[shard])[row]) as labels:
            classes = np.asarray(labels)
        return decode_image(self._reader.fetcher.fetch(self._reader.records(shard)[row]), self._limits), classes


class _Reader:
    """What one process has open."""

    def __init__(self, index: Index) -> None:
        self.fetcher = index.fetcher()
        self.records = functools.lru_cache(maxsize=PARTS_HELD)(index.records)
        self.maps = functools.lru_cache(maxsize=PARTS_HELD)(_class_maps)


def _class_maps(part: str) -> list[bytes]:
    maps: list[bytes] = _column(part, "labels")
    return maps


def _readable_rows(part: str) -> np.ndarray:
    return np.flatnonzero([status == Status.OK for status in _column(part, "status")]).astype(np.int32)


def _column(part: str, name: str) -> list[Any]:
    values: list[Any] = read_columns(part, [name])[name].to_pylist()
    return values
