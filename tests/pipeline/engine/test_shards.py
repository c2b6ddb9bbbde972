"""The shard actors without Ray: bad inputs become rows, accidents become failed receipts."""

from __future__ import annotations

import functools
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.engine.shards import ahead
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.operations.stage_jobs import job_of
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index import build_index
from pipeline.stages.instances import Instances, InstanceShards
from pipeline.stages.run import resolve_run
from pipeline.store import storage
from workers.records import ImageRecord, Status


def instance_shards(source: Path, run: Path, on_missing: str = "auto", **sections: dict[str, object]) -> InstanceShards:
    base: dict[str, dict[str, object]] = {
        "source": {"uri": str(source), "shard_size": 30, "on_missing": on_missing},
        "run": {"uri": str(run)},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
        "maskcut": {"image_size": 160, "max_masks": 2, "tau": 0.4},
        "embedding": {"crop_size": 32},
    }
    config = Config.model_validate(base | sections)
    index = build_index(index_folder(config), config.source.uri, shard_size=config.source.shard_size)
    run = resolve_run(config, index)
    return InstanceShards(job_of(Instances(), run.stages["instances"], run))


def test_a_shard_becomes_a_part_and_a_receipt(tmp_path: Path) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run")
    receipt = actor.run(0)
    assert (receipt.ok, receipt.rows, receipt.shard, receipt.error) == (True, {"ok": 3}, 0, None)
    assert {"wait_for_input", "backbone", "maskcut", "crf", "embedding", "write"} <= set(receipt.seconds)
    part = Path(actor.job.stage.part(0))
    assert receipt.bytes == part.stat().st_size
    assert receipt.instances == sum(len(row) for row in pq.read_table(part)["rle"].to_pylist())
    first = part.read_bytes()
    assert actor.run(0).ok
    assert part.read_bytes() == first  # doing it twice writes the same bytes


def test_bad_images_are_rows_of_a_whole_shard(tmp_path: Path) -> None:
    write_scenes(str(tmp_path), 2, seed=1, size=(96, 96))
    images = tmp_path / "images"
    good = (images / "scene-00000.jpg").read_bytes()
    for name, data in {"empty.jpg": b"", "text.jpg": b"hello", "half.jpg": good[: len(good) // 2]}.items():
        (images / name).write_bytes(data)
    actor = instance_shards(images, tmp_path / "run", decode={"max_pixels": 96 * 96})
    (images / "scene-00001.jpg").unlink()  # listed, then gone
    receipt = actor.run(0)
    assert receipt.ok
    rows = pq.read_table(actor.job.stage.part(0)).to_pylist()
    assert {row["image_id"]: row["status"] for row in rows} == {
        "empty.jpg": "empty",
        "half.jpg": "undecodable",
        "scene-00000.jpg": "ok",
        "scene-00001.jpg": "missing",
        "text.jpg": "undecodable",
    }
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in rows)


def test_reference_bad_inputs_all_become_rows(shared_dir: Path, tmp_path: Path) -> None:
    actor = instance_shards(shared_dir / "data" / "bad-inputs", tmp_path / "run", workers={"prefetch": 2})
    receipt = actor.run(0)
    assert receipt.ok, receipt.error
    assert sum(receipt.rows.values()) == 25
    statuses = {row["image_id"]: row["status"] for row in pq.read_table(actor.job.stage.part(0)).to_pylist()}
    assert statuses["bomb_header.png"] == statuses["bomb_real.png"] == "too_large"
    assert statuses["empty.jpg"] == "empty"
    assert statuses["text.jpg"] == statuses["truncated_half.jpg"] == "undecodable"
    assert statuses["constant.png"] == "no_masks"
    assert statuses["exif_rotated.jpg"] in {"ok", "no_masks"}


def test_an_exception_is_a_failed_receipt_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(str(tmp_path), 1, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(actor.worker, "_rows", fail)
    receipt = actor.run(0)
    assert not receipt.ok
    assert "ZeroDivisionError on scene-00000.jpg: planted" in (receipt.error or "")
    assert not Path(actor.job.stage.part(0)).exists()


def test_ahead_keeps_the_order_and_its_bound() -> None:
    under_way, most, lock = 0, 0, threading.Lock()
    taken: list[int] = []

    def slow(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        threading.Event().wait(0.002)
        with lock:
            under_way -= 1
        return item * item

    def source() -> object:
        for i in range(20):
            taken.append(i)
            yield i

    results = ahead(slow, source(), depth=3)  # type: ignore[arg-type]
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [i * i for i in range(1, 20)]
    assert most <= 3


def test_ahead_passes_an_error_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 // item, [1, 0, 2], depth=2))


def test_a_source_that_goes_away_in_the_middle_of_a_shard_fails_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run", workers={"prefetch": 1})
    fetch = Fetcher.fetch

    def lose_after_the_first(self: Fetcher, record: ImageRecord) -> bytes:
        if record.image_id == "scene-00000.jpg":
            return fetch(self, record)
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        return fetch(self, record)

    monkeypatch.setattr(Fetcher, "fetch", lose_after_the_first)
    receipt = actor.run(0)
    assert receipt.error is not None and f"nothing is at {tmp_path / 'images'}" in receipt.error


def test_a_source_that_may_be_read_and_not_listed_has_missing_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run")
    (tmp_path / "images/scene-00001.jpg").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "walk", refuse)
    assert actor.run(0).rows[Status.MISSING] == 1


@pytest.mark.parametrize("left", [(), ("another.jpg",)], ids=["unmounted", "only these are gone"])
def test_photos_of_a_source_that_is_away_are_a_failed_shard_and_not_rows(tmp_path: Path, left: tuple[str, ...]) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run")
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()  # what is left of a mount
    for name in left:
        (tmp_path / "images" / name).write_bytes(b"photo")
    receipt = actor.run(0)
    if left:
        assert receipt.rows == {Status.MISSING: 3}
    else:
        assert receipt.error is not None and f"nothing is at {tmp_path / 'images'}, as seen from" in receipt.error
        assert not Path(actor.job.stage.part(0)).exists()


def test_a_source_that_refuses_every_photo_is_a_failed_shard_and_not_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run")
    fetch = Fetcher.fetch

    def refuse(self: Fetcher, record: ImageRecord, *, but: str = "") -> bytes:
        if record.image_id == but:
            return fetch(self, record)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Fetcher, "fetch", refuse)
    receipt = actor.run(0)
    assert not receipt.ok
    assert receipt.error is not None and "all 3 photos were refused" in receipt.error
    assert not Path(actor.job.stage.part(0)).exists()
    monkeypatch.setattr(Fetcher, "fetch", functools.partialmethod(refuse, but="scene-00001.jpg"))
    receipt = actor.run(0)
    assert receipt.error is not None and "2 of the 3 photos of this shard were refused" in receipt.error
    assert not Path(actor.job.stage.part(0)).exists()
    rows = instance_shards(tmp_path / "images", tmp_path / "run", on_missing="row")
    assert rows.run(0).rows[Status.MISSING] == 2


def test_a_photo_that_is_gone_fails_its_shard_where_the_user_wants_it(tmp_path: Path) -> None:
    write_scenes(str(tmp_path), 3, seed=1, size=(96, 96))
    actor = instance_shards(tmp_path / "images", tmp_path / "run", on_missing="fail")
    (tmp_path / "images/scene-00001.jpg").unlink()
    receipt = actor.run(0)
    assert receipt.error is not None and "1 of the 3 photos of this shard was not there" in receipt.error
    assert "--extend" in receipt.error and "source.on_missing=row" in receipt.error
