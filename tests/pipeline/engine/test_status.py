"""What a stage has done is told by its parts; receipts that were lost or are of earlier parts change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.workers import WorkersConfig
from pipeline.engine.done import Look
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import Stage
from pipeline.engine.status import StageStatus, receipts_of_parts, stage_status
from pipeline.errors import ConfigError
from tests.pipeline.label_files import categories, random_run, unreadable_row, write_part

PRINT = "f" * 12


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Stage]:
    """Seven photos, of which one cannot be read, in three parts of two stages, without a receipt."""
    stages = {name: Stage(name, "shard", PRINT, str(tmp_path / name), 3) for name in ("panoptic", "instances")}
    random_run(tmp_path, 6)
    return stages


def log(tmp_path: Path, shard: int, size: int, **content: Any) -> None:
    receipts = ReceiptLog(str(tmp_path), "instances", PRINT)
    receipts.append(Receipt("instances", PRINT, shard, ok=True, wall_s=2.0, bytes=size, **content))
    receipts.flush()


def status_of(folder: Path, stage: Stage) -> StageStatus:
    return stage_status(str(folder), stage, Look([stage]).sizes(stage), WorkersConfig())


def test_parts_without_receipts_are_counted(run: dict[str, Stage], tmp_path: Path) -> None:
    found = {name: status_of(tmp_path, stage) for name, stage in run.items()}
    for status in found.values():
        assert (status.done, status.shards, status.rows) == (3, 3, {"ok": 6, "undecodable": 1})
        assert (status.images_per_worker_second, status.bytes_per_image, status.seconds) == (None, None, {})
    assert (found["instances"].instances, found["panoptic"].instances) == (13, 0)
    assert found["instances"].pixels == {}
    pixels = found["panoptic"].pixels
    assert set(pixels) == {"thing", "stuff", "void"} and all(count > 0 for count in pixels.values())
    assert [receipt.rows for receipt in receipts_of_parts(str(tmp_path), run["panoptic"])][1:] == [{"ok": 3}, {"ok": 1}]


def test_pixels_of_photos_that_were_read_are_things_stuff_or_void(tmp_path: Path) -> None:
    stage = Stage("panoptic", "shard", PRINT, str(tmp_path / "panoptic"), 1)
    shown = {"category": 1, "bbox": [0.0] * 4, "score": None}
    segments = [
        shown | {"id": 1, "is_thing": True, "area": 30},
        shown | {"id": 2, "is_thing": False, "area": 50},
        shown | {"id": 3, "is_thing": True, "area": 5},
    ]
    label = unreadable_row("a.jpg") | {"status": "ok", "height": 10, "width": 10, "segments": segments}
    too_large = unreadable_row("b.jpg") | {"status": "too_large", "height": 9000, "width": 9000}
    write_part(Path(stage.part(0)), [label, too_large], categories(1, 1))
    assert status_of(tmp_path, stage).pixels == {"stuff": 50, "thing": 35, "void": 15}


def test_receipts_give_the_rates_and_a_part_that_has_changed_since_is_counted_again(
    run: dict[str, Stage], tmp_path: Path
) -> None:
    stage = run["instances"]
    size = Path(stage.part(1)).stat().st_size
    log(tmp_path, 1, size, rows={"ok": 3}, instances=7)
    status = status_of(tmp_path, stage)
    assert (status.rows, status.images_per_worker_second) == ({"ok": 6, "undecodable": 1}, 1.5)
    assert status.bytes_per_image == pytest.approx(size / 3)
    log(tmp_path, 0, size=1, rows={"missing": 3})  # of the part that was there before
    assert status_of(tmp_path, stage).rows == {"ok": 6, "undecodable": 1}
    log(tmp_path, 7, size=1, rows={"ok": 100})  # of a shard that is not there
    assert status_of(tmp_path, stage).rows == {"ok": 6, "undecodable": 1}


def test_a_part_that_cannot_be_read_is_named(run: dict[str, Stage], tmp_path: Path) -> None:
    Path(run["panoptic"].part(2)).write_bytes(b"PAR1 something else PAR1")
    with pytest.raises(ConfigError, match=r"panoptic/part-00002\.parquet cannot be read: .*; delete it, and run"):
        status_of(tmp_path, run["panoptic"])
