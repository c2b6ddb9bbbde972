"""Features are computed for a sample alone: every photo has its row, and one outside the sample is never fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.engine.shards import StageJob
from pipeline.engine.stage import Stage, index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.semantics.sample import sampled_rows
from pipeline.semantics.stego_features import survey_features
from pipeline.sources.index import build_index
from pipeline.stages.stego import FeatureShards
from pipeline.stages.table import resolve_stages
from workers.records import ImageRecord, Status

PHOTOS, SHARD_SIZE, MAX_IMAGES = 30, 8, 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), PHOTOS, seed=3, size=(64, 64))
    return folder / "images"


def feature_shards(
    photos: Path, run: Path, max_images: int | None, shard_size: int = SHARD_SIZE, **workers: int
) -> FeatureShards:
    config = Config.model_validate(
        {
            "source": {"uri": str(photos), "shard_size": shard_size},
            "run": {"uri": str(run)},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "semantics": {"method": "stego", "max_images": max_images, "batch_size": 4, "neighbours": 2},
            "workers": workers,
        }
    )
    index = build_index(index_folder(config), config.source.uri, shard_size=shard_size)
    table = resolve_stages(config, index)
    return FeatureShards(StageJob(table["features"], config, index_folder(config), table, {}))


def rows_of(stage: Stage) -> list[dict[str, Any]]:
    return [row for part in stage.parts() for row in pq.read_table(part).to_pylist()]


def count_fetches(actor: FeatureShards, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []
    fetch = actor._fetcher.fetch

    def counted(record: ImageRecord) -> bytes:
        fetched.append(record.image_id)
        return fetch(record)

    monkeypatch.setattr(actor._fetcher, "fetch", counted)
    return fetched


def test_a_photo_outside_the_sample_is_a_row_that_was_never_fetched(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = feature_shards(photos, tmp_path, MAX_IMAGES)
    fetched = count_fetches(actor, monkeypatch)
    receipts = [actor.run(shard) for shard in range(4)]
    chosen = sampled_rows(0, PHOTOS, images=PHOTOS, wanted=11, seed=0)  # a twentieth more than the fit takes
    names = [f"scene-{number:05d}.jpg" for number in range(PHOTOS)]
    assert sorted(fetched) == [names[number] for number in chosen]
    rows = rows_of(actor.job.stage)
    assert [row["image_id"] for row in rows] == names
    assert [number for number, row in enumerate(rows) if row["status"] == "ok"] == chosen
    for number, row in enumerate(rows):
        if number not in chosen:
            assert (row["status"], row["error"], row["shape"], row["features"]) == ("not_sampled", None, None, None)
        else:
            assert row["shape"] == [1, 384, 28, 28] and len(row["features"]) == 2 * 384 * 28 * 28
    assert sum(receipt.images for receipt in receipts) == 11  # what the rates are made of
    assert sum(sum(receipt.rows.values()) for receipt in receipts) == PHOTOS
    assert survey_features(actor.job.stage.parts(), max_images=MAX_IMAGES, seed=0).images == MAX_IMAGES


def test_sampled_rows_are_those_of_all_features_whatever_the_batch(photos: Path, tmp_path: Path) -> None:
    whole = feature_shards(photos, tmp_path, None)
    some = feature_shards(photos, tmp_path, MAX_IMAGES)
    batched = feature_shards(photos, tmp_path / "other", MAX_IMAGES, batch_size=3, prefetch=1)
    assert len({actor.job.stage.folder for actor in (whole, some, batched)}) == 3
    for actor in (whole, some, batched):
        for shard in range(4):
            assert actor.run(shard).ok
    everything, sample = rows_of(whole.job.stage), rows_of(some.job.stage)
    assert [ours for ours in sample if ours["status"] == "ok"] == [
        theirs for theirs, ours in zip(everything, sample, strict=True) if ours["status"] == "ok"
    ]
    assert rows_of(batched.job.stage) == sample


def test_an_unreadable_photo_of_the_sample_says_so_and_the_others_do_not_matter(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    chosen = sampled_rows(0, PHOTOS, images=PHOTOS, wanted=11, seed=0)
    for number, photo in enumerate(sorted(photos.iterdir())):
        bad = number not in chosen or number == chosen[0]
        (folder / photo.name).write_bytes(b"no photo" if bad else photo.read_bytes())
    actor = feature_shards(folder, tmp_path / "run", MAX_IMAGES)
    statuses = dict.fromkeys(Status, 0)
    for shard in range(4):
        for status, count in actor.run(shard).rows.items():
            statuses[Status(status)] += count
    assert statuses[Status.UNDECODABLE] == 1
    assert (statuses[Status.OK], statuses[Status.NOT_SAMPLED]) == (10, PHOTOS - 11)
    assert survey_features(actor.job.stage.parts(), max_images=MAX_IMAGES, seed=0).images == MAX_IMAGES


def test_a_shard_without_a_sampled_photo_is_a_part_all_the_same(photos: Path, tmp_path: Path) -> None:
    actor = feature_shards(photos, tmp_path, 4, shard_size=2)
    receipts = [actor.run(shard) for shard in range(15)]
    assert all(receipt.ok for receipt in receipts)
    assert {"not_sampled": 2} in [receipt.rows for receipt in receipts]
    assert sum(receipt.images for receipt in receipts) == 5
    features = survey_features(actor.job.stage.parts(), max_images=4, seed=0)
    assert features.images == 4 and set(features.parts) < set(actor.job.stage.parts())
