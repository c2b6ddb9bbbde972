"""A run folder of version 0.1, made before stages were objects, is found done to the last shard.

`old_run.tar.xz` holds six photos and a run over them with STEGO, a model and a round of self-training, and another with
DatUS2 and its refinement. Features and weights are cut to what a stage counts as done by.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray

from pipeline.config import Config
from pipeline.operations.clean import clean
from pipeline.operations.run import run
from pipeline.operations.status import run_status
from pipeline.stages.latest import read_latest, write_latest
from pipeline.stages.run import find_run, open_run

NETWORK = {"depths": [1, 1, 1, 1], "width": 4, "channels": 8, "box_dim": 8, "mask_channels": 8, "semantic_channels": 32}
NETWORK |= {"rpn_pre_nms": [20, 10], "rpn_post_nms": [20, 10], "roi_sampled": 8}
COMMON: dict[str, Any] = {
    "source": {"uri": "s3://old-runs/photos", "shard_size": 3},
    "backbone": {"name": "patch-dct", "weights": "random:0"},
    "maskcut": {"image_size": 64, "tau": 0.3},
    "crf": {"min_iou": 0},
    "embedding": {"crop_size": 32},
    "clusters": {"k": 2},
}
STEGO = {"method": "stego", "classes": 3, "neighbours": 1, "batch_size": 2, "steps": 2, "max_images": 2}
TRAIN = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "precise_statistics": 0, "short_sides": [64], "max_side": 64}
WITH_STEGO = {
    "semantics": {**STEGO, "image_size": 64, "crf": False, "flip": False},
    "train": {**TRAIN, "checkpoint_every": 100, "picture_every": 100, "network": NETWORK},
    "predictions": {"enabled": True, "short": 64, "max_side": 64},
    "self_training": {"rounds": 1, "steps": 2},
}
REFINED = {"refine": "deeplabv3", "refine_steps": 1, "refine_batch_size": 4, "refine_image_size": 64}
WITH_DATUS = {"semantics": {"method": "datus", "classes": 3, **REFINED}}


@pytest.fixture
def old_run(tmp_path: Path, s3_bucket: str) -> Path:
    """The run folder; its photos are where they were, in the bucket `old-runs`."""
    with tarfile.open(Path(__file__).with_name("old_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    store = fsspec.filesystem("s3")
    store.mkdirs("old-runs", exist_ok=True)
    for photo in (tmp_path / "photos").iterdir():
        store.pipe_file(f"old-runs/photos/{photo.name}", photo.read_bytes())
    return tmp_path / "run"


def config_of(folder: Path, sections: dict[str, Any]) -> Config:
    return Config.model_validate({"run": {"uri": str(folder)}, **COMMON, **sections})


@pytest.mark.parametrize(("sections", "stages"), [(WITH_STEGO, 11), (WITH_DATUS, 8)])
def test_nothing_is_left_to_do(
    sections: dict[str, Any], stages: int, old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("there is work to do"))
    config = config_of(old_run, sections)
    before = {file for file in old_run.rglob("*") if file.is_file()}
    assert set(run(config).computed.values()) == {0}
    status = run_status(config)
    assert len(status.stages) == stages
    assert all(stage.done == stage.shards for stage in status.stages)
    assert {file for file in old_run.rglob("*") if file.is_file()} == before


def test_both_configs_together_name_every_folder(old_run: Path) -> None:
    assert clean(config_of(old_run, WITH_STEGO), [config_of(old_run, WITH_DATUS)]).stale == []


def test_the_last_run_opens_by_its_folder(old_run: Path) -> None:
    opened = open_run(str(old_run))
    stuff = ["segments", "semantics_fit", "semantics_draft", "refine_fit", "semantics"]
    assert list(opened.stages) == ["instances", "clusters", *stuff, "panoptic"]
    assert opened.fitted and all(shards == {0, 1} for shards in opened.done.values())


def test_a_run_goes_on_with_the_score_that_it_was_begun_with(old_run: Path) -> None:
    config = config_of(old_run, WITH_STEGO)
    begun = find_run(config)
    assert begun is not None and begun.config.maskcut.score == "crf_iou"
    write_latest(begun.config, {name: stage.fingerprint for name, stage in begun.stages.items()}, begun.teacher or "")
    latest = read_latest(str(old_run))
    assert latest is not None and latest.same_labels(config)

    kept = shutil.move(begun.stages["instances"].folder, old_run.parent / "kept")
    anew = find_run(config)
    assert anew is not None and anew.config.maskcut.score == "objectness"
    assert anew.stages["instances"].fingerprint != begun.stages["instances"].fingerprint
    asked = find_run(config_of(old_run, {**WITH_STEGO, "maskcut": {**COMMON["maskcut"], "score": "crf_iou"}}))
    assert asked is not None and asked.stages["instances"] == begun.stages["instances"]
    Path(anew.stages["instances"].folder).mkdir(parents=True)
    shutil.move(kept, begun.stages["instances"].folder)
    tried = find_run(config)  # the old score was tried beside it
    assert tried is not None and tried.config.maskcut.score == "objectness"
