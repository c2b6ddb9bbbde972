"""What the report reads of a run, and of how much of a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.stage import Stage
from pipeline.operations.status import StageStatus
from pipeline.report import rows
from pipeline.sources.index import Index
from pipeline.sources.scan import Ignored
from workers.records import PANOPTIC_SCHEMA, instances_schema

EMBEDDINGS = np.eye(3, dtype=np.float16)


def stage_at(folder: Path, name: str, shards: int) -> Stage:
    folder.mkdir(parents=True)
    return Stage(name, "shard", "f" * 12, str(folder), shards)


def instance_row(image_id: str, areas: list[int], status: str = "ok", error: str | None = None) -> dict[str, Any]:
    size = 10 if status == "ok" else None
    return {
        "image_id": image_id,
        "height": size,
        "width": size,
        "status": status,
        "error": error,
        "rle": ["0"] * len(areas),
        "bbox": [[0.0] * 4] * len(areas),
        "area": areas,
        "score": [1.0] * len(areas),
        "embedding": [EMBEDDINGS[i % 3] for i in range(len(areas))],
    }


def write_instances(stage: Stage, shard: int, images: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(images, schema=instances_schema(3)), stage.part(shard))


def write_panoptic(stage: Stage, shard: int, categories: list[list[int]]) -> None:
    images = [
        {
            "image_id": f"{shard}/{row}",
            "uri": "",
            "status": "ok",
            "segments": [
                {"id": i + 1, "category": c, "is_thing": True, "area": 1, "bbox": [0.0] * 4}
                for i, c in enumerate(found)
            ],
            "hidden_instances": 0,
        }
        for row, found in enumerate(categories)
    ]
    pq.write_table(pa.Table.from_pylist(images, schema=PANOPTIC_SCHEMA), stage.part(shard))


def status_of(rows_by_status: dict[str, int], instances: int) -> StageStatus:
    return StageStatus("instances", "shard", "f", "", 1, 1, rows_by_status, instances, {}, [], {}, None, None)


def index_of(images: int, shard_size: int) -> Index:
    shards = -(-images // shard_size)
    return Index("", shards, images, shard_size, "folder", "image", "", "", Ignored())


@given(st.integers(0, 300), st.integers(1, 400))
def test_positions_are_different_rise_and_are_evenly_spaced(count: int, wanted: int) -> None:
    positions = rows.spread(count, wanted)
    assert len(positions) == min(count, wanted)
    assert all(0 <= p < count for p in positions)
    gaps = np.diff(positions)
    assert gaps.size == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_counts_say_what_became_of_every_image(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "instances", "instances", 2)
    write_instances(stage, 0, [instance_row("a", [50, 5]), instance_row("b", [100])])
    write_instances(stage, 1, [instance_row("c", [], "missing", "no such file"), instance_row("d", [7, 7])])
    counts = rows.count_rows(stage, {0, 1}, status_of({}, 0))
    assert counts.rows == {"ok": 3, "missing": 1}
    assert counts.instances == 5
    assert counts.per_image == [0, 1, 2]
    assert {i: n for i, n in enumerate(counts.shares) if n} == {1: 3, 10: 1, 19: 1}
    assert counts.problems == [rows.Problem("c", "missing", "no such file")]
    assert (counts.problem_total, counts.readable, counts.from_receipts) == (1, 3, False)


def test_only_some_problems_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "instances", "instances", 2)
    for shard in range(2):
        write_instances(stage, shard, [instance_row(f"{shard}/{i}", [], "empty") for i in range(40)])
    counts = rows.count_rows(stage, {0, 1}, status_of({}, 0))
    assert len(counts.problems) == rows.PROBLEMS_LISTED == 50
    assert counts.problem_total == 80
    assert counts.problems[-1].image_id == "1/9"


def test_a_run_of_many_parts_is_counted_by_its_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "READ_ALL", 4)
    monkeypatch.setattr(rows, "SAMPLED_PARTS", 2)
    stage = stage_at(tmp_path / "instances", "instances", 6)
    for shard in (1, 4):  # no other part is read: none is there
        write_instances(stage, shard, [instance_row("a", [1])])
    counts = rows.count_rows(stage, set(range(6)), status_of({"ok": 600}, 1000))
    assert counts.from_receipts
    assert (counts.rows, counts.instances, counts.parts_read) == ({"ok": 600}, 1000, 2)
    assert counts.per_image == [0, 2]


def test_sampled_images_are_spread_over_the_shards() -> None:
    places = rows.sample_images(index_of(25, 10), {0, 1, 2}, 5)
    assert places == [(0, 2), (0, 7), (1, 2), (1, 7), (2, 2)]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 80), st.data())
def test_sampled_images_are_there(images: int, shard_size: int, wanted: int, data: st.DataObject) -> None:
    index = index_of(images, shard_size)
    done = data.draw(st.sets(st.integers(0, index.shards - 1), min_size=1))
    sizes = {shard: min(shard_size, images - shard * shard_size) for shard in done}
    places = rows.sample_images(index, done, wanted)
    assert len(set(places)) == len(places) == min(wanted, sum(sizes.values()))
    assert places == sorted(places)
    assert all(row < sizes[shard] for shard, row in places)


def test_members_come_from_all_over_the_parts(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "panoptic", "panoptic", 8)
    for shard in range(8):
        write_panoptic(stage, shard, [[2, 1]] * 20)
    found = rows.find_members(stage, set(range(8)), [1, 3], 4)
    assert [member.shard for member in found.by_category[1]] == [1, 3, 5, 7]
    assert all(member.segment == 2 for member in found.by_category[1])
    assert found.by_category[3] == []
    assert (found.parts_read, found.parts) == (8, 8)


def test_the_search_for_members_ends_when_there_are_plenty(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "panoptic", "panoptic", 16)
    for shard in range(16):
        write_panoptic(stage, shard, [[1]] * 10)
    found = rows.find_members(stage, set(range(16)), [1], 2)
    assert found.parts_read == 2
    shards = [member.shard for member in found.by_category[1]]
    assert shards[0] < 8 <= shards[1]


def test_the_search_for_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SAMPLED_PARTS", 3)
    stage = stage_at(tmp_path / "panoptic", "panoptic", 9)
    for shard in (1, 4, 7):
        write_panoptic(stage, shard, [[5], []])
    found = rows.find_members(stage, set(range(9)), [5], 12)
    assert found.by_category[5] == [rows.Member(1, 0, 1), rows.Member(4, 0, 1), rows.Member(7, 0, 1)]
    assert (found.parts_read, found.parts) == (3, 9)


def test_similarity_is_the_mean_cosine_to_the_nearest_centroid(tmp_path: Path) -> None:
    stage = stage_at(tmp_path / "instances", "instances", 2)
    write_instances(stage, 0, [instance_row("a", [1, 1]), instance_row("b", [1])])
    write_instances(stage, 1, [instance_row("c", [], "empty")])
    centroids = np.array([[0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], np.float32)
    similarities = rows.mean_similarities(stage, {0, 1}, centroids)
    assert similarities[0] == pytest.approx((0.8 + 0.6 + 0.8) / 3, abs=1e-3)
    assert np.isnan(similarities[1])
