"""`run` from a folder of scenes to panoptic parts: complete, repeatable, resumable."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.command.cli import app
from pipeline.config import Config, load_config
from pipeline.errors import ConfigError, StageFailed
from pipeline.operations.run import run
from pipeline.operations.status import run_status
from tests.integration.conftest import SCENES, SHARDS, rows
from workers.masks import decode_panoptic_png, decode_rle

pytestmark = pytest.mark.usefixtures("ray_session")


def test_run_leaves_complete_parts_and_a_second_run_does_nothing(finished: Config) -> None:
    folder = Path(finished.run.uri)
    instances, panoptic = rows(folder, "instances"), rows(folder, "panoptic")
    names = [f"scene-{i:05d}.jpg" for i in range(SCENES)]
    assert [row["image_id"] for row in instances] == names
    assert [row["image_id"] for row in panoptic] == names
    assert sum(len(row["rle"]) for row in instances) > SCENES
    for row in instances:
        lengths = {len(row[key]) for key in ("rle", "bbox", "area", "score", "embedding")}
        assert lengths == {len(row["rle"])}
        for counts, area, embedding in zip(row["rle"], row["area"], row["embedding"], strict=True):
            assert decode_rle(counts, row["height"], row["width"]).sum() == area
            assert np.linalg.norm(np.float32(embedding)) == pytest.approx(1, abs=1e-3)
    for row in panoptic:
        ids = decode_panoptic_png(row["panoptic"])
        areas = {int(i): int((ids == i).sum()) for i in np.unique(ids) if i}
        assert {segment["id"]: segment["area"] for segment in row["segments"]} == areas
        assert all(1 <= segment["category"] <= 4 and segment["is_thing"] for segment in row["segments"])
    assert run(finished).computed == {"instances": 0, "clusters": 0, "panoptic": 0}
    assert [stage.done for stage in run_status(finished).stages] == [SHARDS, 1, SHARDS]
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["clusters", "index", "instances", "latest.json", "panoptic", "receipts"]


def test_other_tools_read_the_parts(finished: Config) -> None:
    table = run(finished).stages
    for name in ("instances", "panoptic"):
        pattern = f"{table[name].folder}/part-*.parquet"
        assert duckdb.sql(f"select count(*), count(distinct image_id) from '{pattern}'").fetchall() == [(24, 24)]
        assert len(pd.read_parquet(table[name].folder)) == 24
        assert pl.read_parquet(pattern).height == 24
    pattern = f"{table['instances'].folder}/part-*.parquet"
    (duck,) = duckdb.sql(f"select sum(len(rle)), sum(list_sum(area)), max(embedding[1][1]) from '{pattern}'").fetchall()
    panda = pd.read_parquet(table["instances"].folder)
    assert duck[0] == panda["rle"].map(len).sum()
    assert duck[1] == panda["area"].map(sum).sum()
    metadata = pq.read_metadata(table["panoptic"].part(0)).metadata
    assert metadata[b"u2label.fingerprint"].decode() == table["panoptic"].fingerprint
    assert b'"tau":0.4' in metadata[b"u2label.config"]
    assert metadata[b"u2label.categories"].count(b'"isthing": 1') == 4


def test_a_deleted_part_is_the_only_one_computed_again(finished: Config) -> None:
    stage = run(finished).stages["instances"]
    before = {part: Path(part).stat().st_mtime_ns for part in stage.parts()}
    content = pq.read_table(stage.part(3))
    Path(stage.part(3)).unlink()
    assert run(finished).computed == {"instances": 1, "clusters": 0, "panoptic": 0}
    changed = [part for part in stage.parts() if Path(part).stat().st_mtime_ns != before[part]]
    assert changed == [stage.part(3)]
    assert pq.read_table(stage.part(3)).equals(content)


def test_a_part_that_was_cut_short_is_computed_again(finished: Config) -> None:
    stage = run(finished).stages["panoptic"]
    part = Path(stage.part(2))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert run(finished).computed == {"instances": 0, "clusters": 0, "panoptic": 1}
    assert pq.read_table(part).num_rows == 3


def test_changing_tau_makes_new_parts_and_leaves_the_old_ones(finished: Config, config_file: Path) -> None:
    first = run(finished).stages
    before = {part: Path(part).stat().st_mtime_ns for part in first["instances"].parts()}
    again = run(load_config(str(config_file), ["maskcut.tau=0.3"]))
    assert again.computed == {"instances": SHARDS, "clusters": 1, "panoptic": SHARDS}
    assert again.stages["instances"].folder != first["instances"].folder
    assert {part: Path(part).stat().st_mtime_ns for part in before} == before
    only_k = run(load_config(str(config_file), ["clusters.k=3"]))
    assert only_k.computed == {"instances": 0, "clusters": 1, "panoptic": SHARDS}


def test_the_rows_do_not_depend_on_the_number_of_workers(config_file: Path, labelled: Path) -> None:
    config = load_config(str(config_file), ["workers.size=2", "workers.prefetch=1"])
    assert run(config).computed == {"instances": SHARDS, "clusters": 1, "panoptic": SHARDS}
    for stage in ("instances", "panoptic"):
        assert rows(Path(config.run.uri), stage) == rows(labelled, stage)


def test_too_many_clusters_for_the_masks_is_said_and_the_parts_are_kept(finished: Config, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"clusters\.k 5000 is above the 48 masks that 24 photos can have"):
        run(load_config(str(config_file), ["clusters.k=5000"]))  # seen before any work
    config = load_config(str(config_file), ["clusters.k=48"])
    with pytest.raises(StageFailed, match=r"clusters\.k is 48, but the 8 instances parts hold \d\d masks"):
        run(config)
    assert [stage.done for stage in run_status(config).stages] == [8, 0, 0]


def test_a_shard_that_fails_leaves_the_others_and_its_traceback(finished: Config) -> None:
    table = run(finished).stages
    for part in table["panoptic"].parts():
        Path(part).unlink()
    Path(table["instances"].part(5)).write_bytes(Path(table["instances"].part(4)).read_bytes())  # the wrong images
    with pytest.raises(StageFailed, match="panoptic: 1 of 8 shards are not done") as caught:
        run(finished)
    (failure,) = caught.value.failures
    assert failure.shard == 5
    assert "hold different images" in (failure.error or "")
    assert run_status(finished).stages[2].failed == [5]
    with pytest.raises(StageFailed, match="stopped early"):
        run(finished, max_failed_fraction=0.0)


def test_litter_of_a_killed_writer_is_removed(finished: Config) -> None:
    stage = run(finished).stages["panoptic"]
    litter = [Path(finished.run.uri) / ".tmp-latest.json-1", Path(stage.folder) / ".tmp-part-00000.parquet-1"]
    for path in litter:
        path.write_bytes(b"half")
    Path(stage.part(0)).unlink()
    run(finished)
    assert not any(path.exists() for path in litter)


def test_a_source_without_a_mask_ends_with_void_labels(tmp_path: Path, config_file: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(2):
        Image.new("RGB", (60, 40), (i, 90, 120)).save(flat / f"{i}.png")
    refused = load_config(str(config_file), [f"source.uri={flat}"])
    for _ in range(2):  # also when nothing is left to do
        with pytest.raises(StageFailed, match=r"instances: 2 of 2 readable photos have no mask\. Of the graphs"):
            run(refused)
    assert run_status(refused).stages[0].done == 1
    config = load_config(str(config_file), [f"source.uri={flat}", "run.max_empty=1"])
    assert run(config).computed == {"instances": 0, "clusters": 1, "panoptic": 1}
    labels = rows(Path(config.run.uri), "panoptic")
    assert [(row["status"], row["segments"]) for row in labels] == [("no_masks", [])] * 2
    assert not any(decode_panoptic_png(row["panoptic"]).any() for row in labels)


def test_a_stage_without_its_inputs_is_refused(config_file: Path) -> None:
    with pytest.raises(StageFailed, match="panoptic needs the stage instances"):
        run(load_config(str(config_file)), stages=["panoptic"])
    with pytest.raises(ConfigError, match="--stages: panoptics is unknown"):
        run(load_config(str(config_file)), stages=["panoptics"])


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(config_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"workers.size x workers.cpus asks for 40 CPUs in actors of 1, the cluster has 4"
    ):
        run(load_config(str(config_file), ["workers.size=40"]))
    with pytest.raises(
        ConfigError, match=r"workers.size x workers.gpus asks for 1 GPUs in actors of 1, the cluster has 0"
    ):
        run(load_config(str(config_file), ["workers.gpus=1"]))


def test_a_run_answers_in_one_json_document(finished: Config) -> None:
    path = Path(finished.run.uri).parent / "config.yaml"
    result = CliRunner().invoke(app, ["run", str(path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == asdict(run_status(finished))
    assert "instances" in result.stderr
