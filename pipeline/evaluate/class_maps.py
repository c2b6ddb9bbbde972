"""The class maps of a run, one image after the other: what an evaluation or a picture of them reads.

Memory is that of the encoded maps of one part and one decoded map, whatever the size of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.engine.shards import read_columns
from pipeline.errors import ConfigError
from pipeline.store import storage
from workers.masks import decode_panoptic_png, open_png

if TYPE_CHECKING:
    from pipeline.engine.stage import Stage
    from pipeline.stages.base import Run

VOID = 255  # in a semantics part
NO_CATEGORY = -1  # void of maps made from panoptic parts, which may have more than 255 categories
ROWS = 16  # of a part that are Python objects at a time
Prediction = tuple[str, NDArray[np.integer] | None]  # image_id and (h, w) clusters; None when the image has none


@dataclass(frozen=True, slots=True)
class Predictions:
    """Class maps of a run as a stream, with the number of clusters, the first one's name and the value of void."""

    stage: str
    maps: Iterator[Prediction]
    clusters: int
    first: int
    void: int
    parts: int
    parts_done: int


def predictions(run: Run) -> Predictions:
    """The class maps of a run. ConfigError when neither its semantics nor its panoptic stage has a part."""
    stuff = run.config.num_stuff
    if done := sorted(run.done.get("semantics", ())):
        stage = run.stages["semantics"]
        return Predictions(stage.name, semantic_maps(stage, done), stuff, 0, VOID, stage.shards, len(done))
    if done := sorted(run.done.get("panoptic", ())):
        stage, clusters = run.stages["panoptic"], run.config.clusters.k + stuff
        return Predictions(stage.name, panoptic_maps(stage, done), clusters, 1, NO_CATEGORY, stage.shards, len(done))
    raise ConfigError(
        f"no class maps in {storage.redact(run.uri)}: neither a part of the stage semantics nor of panoptic is done; "
        "go on with u2label run"
    )


def semantic_maps(stage: Stage, shards: Iterable[int]) -> Iterator[Prediction]:
    """The maps of semantics parts, (h, w) uint8, 255 = void. Memory: the PNGs of one part and one map."""
    for shard in shards:
        table = read_columns(stage.part(shard), ["image_id", "labels"])
        for row in _rows(table):
            yield row["image_id"], None if row["labels"] is None else _decode_map(row["labels"])


def panoptic_maps(stage: Stage, shards: Iterable[int]) -> Iterator[Prediction]:
    """The categories of panoptic parts less one, (h, w) int32, -1 = void. Memory: the PNGs of one part and one map."""
    for shard in shards:
        table = read_columns(stage.part(shard), ["image_id", "panoptic", "segments"])
        for row in _rows(table):
            yield row["image_id"], None if row["panoptic"] is None else _categories(row)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=ROWS):
        yield from batch.to_pylist()


def _decode_map(data: bytes) -> NDArray[np.uint8]:
    with open_png(data) as image:
        return np.asarray(image, np.uint8)


def _categories(row: Mapping[str, Any]) -> NDArray[np.int32]:
    ids = decode_panoptic_png(row["panoptic"])
    lookup = np.full(int(ids.max(initial=0)) + 1, NO_CATEGORY, np.int32)
    for segment in row["segments"]:
        lookup[segment["id"]] = segment["category"] - 1
    return lookup[ids]
