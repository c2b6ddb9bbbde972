"""Clusters of a source without a single mask: an artifact that the labels can be made with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.done import begin_fit
from pipeline.operations.run import _pending
from pipeline.operations.source import open_source
from pipeline.sources.index import Ignored, Index
from pipeline.stages.clusters import Clusters
from pipeline.stages.run import open_run, resolve_run
from pipeline.stages.table import resolve_stages
from pipeline.stages.things import EmbeddingFit
from tests.pipeline.report.tiny_runs import config_of, make_run, plan_run, report_of, run_stage, scene, squeezed


@pytest.mark.parametrize(
    ("method", "width", "key"), [("maskcut", 384, "maskcut.tau"), ("merge_tree", 5, "things.min_score")]
)
def test_without_a_mask_there_are_void_labels(tmp_path: Path, method: str, width: int, key: str) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), (90, 90, 120)).save(tmp_path / "photos" / "flat.png")
    things = {"components": 5, "min_score": 1.0}
    config = config_of(tmp_path / "photos", tmp_path / "run", instances={"method": method}, things=things)
    table = plan_run(config)
    run = open_run(str(tmp_path / "run"), need=None)
    run_stage(table["instances"], config, table)
    if method == "merge_tree":
        EmbeddingFit().fit(run, table["embedding_fit"])
        run_stage(table["things"], config, table)
    said = Clusters().fit(run, table["clusters"])
    assert said.startswith("no image has a mask") and key in said
    assert np.load(f"{table['clusters'].folder}/centroids.npy").shape == (config.clusters.k, width)
    run_stage(table["panoptic"], config, table)
    (label,) = pq.read_table(table["panoptic"].part(0)).to_pylist()
    assert (label["status"], label["segments"]) == ("no_masks", [])


def test_a_fit_of_no_mask_is_made_again_when_masks_come(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), (90, 90, 120)).save(tmp_path / "photos" / "flat.png")
    config = config_of(tmp_path / "photos", tmp_path / "run")
    table = make_run(config, ("instances",))
    begin_fit(table["clusters"])
    Clusters().fit(open_run(str(tmp_path / "run"), need=None), table["clusters"])
    (tmp_path / "photos" / "scene.jpg").write_bytes(scene(1))
    grown = resolve_run(config, open_source(config, extend=True)[0])
    assert _pending(Clusters(), grown.stages["clusters"], grown, refit=False) == []
    run_stage(grown.stages["instances"], config, grown.stages)
    assert _pending(Clusters(), grown.stages["clusters"], grown, refit=False) == [0]


def test_copies_that_weigh_as_one_are_another_fit(tmp_path: Path) -> None:
    index = Index("/run/index/x", 3, 1000, 400, "folder", "image", "d" * 64, "/photos", Ignored())
    said = {"left out": {}, "none": {"dedup": "none"}, "0.95": {"dedup": 0.95}}
    configs = {name: config_of(tmp_path, tmp_path, clusters={"k": 3, **keys}) for name, keys in said.items()}
    fingerprints = {name: resolve_stages(config, index)["clusters"].fingerprint for name, config in configs.items()}
    assert fingerprints["left out"] == fingerprints["none"] != fingerprints["0.95"]


def test_copies_count_as_one_in_a_run(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        for copy in range(1 if number else 4):
            (tmp_path / "photos" / f"{number}-{copy}.jpg").write_bytes(scene(number))
    config = config_of(tmp_path / "photos", tmp_path / "run", clusters={"k": 2, "dedup": 0.999})
    table = make_run(config, ("instances",))
    said = Clusters().fit(open_run(str(tmp_path / "run"), need=None), table["clusters"])
    record = json.loads(Path(table["clusters"].folder, "artifact.json").read_text())
    masks = sum(record["sizes"])
    assert said.endswith(f"with copies as one, {masks} masks count as {record['different']}")
    assert masks - record["different"] == 3 * (masks // 7)  # each photo has as many, and one is there four times
    text = squeezed(report_of(tmp_path / "run").text)
    assert f"{4 * (masks // 7)} of {masks} masks have copies" in text and "4 of 7 photos hold one" in text
    assert "The clusters count a group as one mask" in text
