"""What the report counts in class maps and segments, and of how much of a large run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.stage import Stage
from pipeline.report import maps
from pipeline.sources.index import Index
from pipeline.sources.scan import Ignored
from workers.records import SEMANTICS_SCHEMA, segments_schema
from workers.semantics.datus import encode_segments


def stage_at(folder: Path, shards: int) -> Stage:
    folder.mkdir(parents=True)
    return Stage(folder.name, "shard", "f" * 12, str(folder), shards)


def index_of(images: int, shard_size: int) -> Index:
    return Index("", -(-images // shard_size), images, shard_size, "folder", "image", "", "", Ignored())


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def write_maps(stage: Stage, shard: int, classes: list[np.ndarray | None]) -> None:
    rows = [
        {
            "image_id": str(i),
            "status": "missing" if found is None else "ok",
            "labels": None if found is None else png(found),
        }
        for i, found in enumerate(classes)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SEMANTICS_SCHEMA), stage.part(shard))


def write_segments(stage: Stage, shard: int, found: list[np.ndarray | None]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "image_id": str(i),
            "status": "ok",
            "segments": None if each is None else encode_segments(each),
            "embedding": [],
        }
        for i, each in enumerate(found)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=segments_schema(3)), stage.part(shard))


def test_pixels_of_each_class_are_counted_over_images_of_any_size(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "semantics", 2)
    write_maps(stage, 0, [np.array([[0, 0, 2], [255, 2, 2]]), None])
    write_maps(stage, 1, [np.full((10, 7), 2)])
    counts = maps.count_classes(stage, index_of(3, 2), {0, 1})
    assert {value: n for value, n in enumerate(counts.pixels.tolist()) if n} == {0: 2, 2: 73, 255: 1}
    assert (counts.images, counts.parts_read, counts.parts) == (2, 2, 2)


def test_of_a_large_run_some_images_of_some_parts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "SAMPLED_PARTS", 2)
    monkeypatch.setattr(maps, "SAMPLED_IMAGES", 4)
    stage = stage_at(tmp_path / "semantics", 6)
    for shard in (1, 4):  # no other part is read: none is there
        write_maps(stage, shard, [np.full((1, 1), row) for row in range(10)])
    counts = maps.count_classes(stage, index_of(60, 10), set(range(6)))
    assert {value: n for value, n in enumerate(counts.pixels.tolist()) if n} == {2: 2, 7: 2}
    assert (counts.images, counts.parts_read, counts.parts) == (4, 2, 6)


def test_segments_and_noise_are_counted(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "segments", 1)
    write_segments(stage, 0, [np.array([[0, 1], [1, -1]]), None, np.full((2, 2), -1), np.arange(300).reshape(30, 10)])
    assert maps.count_segments(stage, index_of(4, 4), {0}) == maps.SegmentCounts(
        images=3, segments=302, noise=5, patches=308
    )
