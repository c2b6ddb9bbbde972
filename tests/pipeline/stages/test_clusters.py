"""Clusters of a source without a single mask: an artifact that the labels can be made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.stages.clusters import Clusters
from pipeline.stages.run import open_run
from pipeline.stages.things import EmbeddingFit
from tests.pipeline.report.tiny_runs import config_of, plan_run, run_stage


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
