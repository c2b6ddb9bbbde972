"""From labels to a trained model, its predictions and a round of self-training, each a stage that resumes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.checkpoint.files import load_checkpoint
from pipeline.config import Config, load_config
from pipeline.errors import ConfigError, StageFailed
from pipeline.evaluate.score import evaluate_run
from pipeline.export.coco import export_coco
from pipeline.operations.run import run
from pipeline.predict.run import predict_photos
from pipeline.predict.weights import load_predictor
from pipeline.stages.parts import find_parts
from pipeline.train.job import TrainSettings
from pipeline.train.photos import TrainingPhotos
from tests.integration.conftest import SCENES, SHARDS, TREES, Start, finish, read_stage, rows
from tests.tiny_panoptic import NETWORK
from workers.training.teacher import TeacherParams

TRAIN = [
    "train.steps=6",
    "train.batch_size=4",
    "train.rate=0.005",
    "train.warmup_steps=0",
    "train.short_sides=[96]",
    "train.precise_statistics=2",
    "train.checkpoint_every=2",
    "predictions.enabled=true",
    "predictions.short=96",
    f"train.network={json.dumps(NETWORK)}",
]
NESTED = [*TREES, "train.nested=0.1", "train.nested_most=5", "train.soft=true"]
VIT = [
    *("train.cache=true", "train.network.backbone=vit", "train.network.patch_stride=8"),
    *("train.optimiser=adamw", "train.schedule=cosine", "train.network.class_agnostic=true"),
    *("train.ema=0.9", "train.teacher.threshold=0.05"),
]
ROUND = ["self_training.rounds=1", "self_training.steps=3", "self_training.thresholds=[0.05]"]


@pytest.fixture
def labelled_config(config_file: Path, labelled: Path) -> Path:
    shutil.copytree(labelled, config_file.parent / "run")
    return config_file


@pytest.mark.usefixtures("ray_session")
def test_labels_model_predictions_and_a_round_of_self_training(labelled_config: Path, tmp_path: Path) -> None:
    config = load_config(str(labelled_config), [*TRAIN, *ROUND])
    summary = run(config)
    stages = ["train", "predictions", "labels_1", "train_1", "predictions_1"]
    assert [summary.computed[name] for name in stages] == [1, SHARDS, SHARDS, 1, SHARDS]
    assert set(run(config).computed.values()) == {0}
    folder = Path(config.run.uri)
    for name in ("predictions", "labels_1", "predictions_1"):
        assert [row["image_id"] for row in rows(folder, name)] == [row["image_id"] for row in rows(folder, "panoptic")]
        assert b"u2label.categories" in read_stage(folder, name).schema.metadata
    first, second = (json.loads(Path(summary.stages[name].folder, "artifact.json").read_text()) for name in stages[::3])
    assert first["images"] == second["images"] == SCENES
    assert second["settings"]["init"] == summary.stages["train"].folder
    check_scores(config, tmp_path)
    check_predictions(config, summary.stages["train"].folder, tmp_path)


@pytest.mark.usefixtures("ray_session")
def test_nested_masks_a_model_behind_the_frozen_backbone_and_a_round(
    config_file: Path, labelled_by_trees: Path
) -> None:
    config = load_config(str(config_file), [*TRAIN, *NESTED, *VIT, *ROUND])
    shutil.copytree(labelled_by_trees, config.run.uri)
    summary = run(config)
    assert summary.computed["targets"] == SHARDS
    assert set(run(config).computed.values()) == {0}
    folder = Path(config.run.uri)
    kept = sorted((folder / "tokens").rglob("*.npy"))
    assert 0 < len(kept) <= SCENES  # once a photo, for both rounds; predictions add none
    for chosen, learnt in zip(rows(folder, "things"), rows(folder, "targets"), strict=True):
        assert len(learnt["rle"]) == len(learnt["category"]) <= 5
        assert set(learnt["category"]) <= {1, 2, 3, 4}
        assert all(score >= 0.1 for score in learnt["score"])
        assert set(chosen["rle"][:1]) <= set(learnt["rle"])  # the surest is in both
    first, second = (load_checkpoint(summary.stages[name].folder) for name in ("train", "train_1"))
    assert first.config["frozen"] == second.config["frozen"]
    assert first.config["frozen"]["identity"] == "random:0"
    assert any(not values.equal(second.state[name]) for name, values in first.state.items())
    assert len(rows(folder, "predictions_1")) == SCENES
    for name in ("train", "train_1"):
        record = json.loads(Path(summary.stages[name].folder, "artifact.json").read_text())
        assert record["settings"]["optimisation"]["teacher"] == asdict(TeacherParams(threshold=0.05))
        assert record["history"][-1]["taught"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_soft_round_wants_predictions_as_surely_as_they_were(
    labelled_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[TrainingPhotos] = []
    mixing: list[float] = []

    def keep(photos: TrainingPhotos, _: str, settings: TrainSettings, **__: object) -> None:
        learnt.append(photos)
        mixing.append(settings.mixing)
        raise ValueError("enough is known")

    overrides = [*TRAIN, *ROUND]
    run(load_config(str(labelled_config), overrides))
    monkeypatch.setattr("pipeline.train.fit.fit_panoptic", keep)
    for change in ("self_training.soft=true", "self_training.mixing=0.5"):
        with pytest.raises(StageFailed, match="enough is known"):
            run(load_config(str(labelled_config), [*overrides, change]))
    assert mixing == [1.0, 0.5]
    soft, plain = ([photos.sample(i) for i in range(len(photos))] for photos in learnt)
    assert [sample.scores for sample in plain] == [None] * SCENES
    labels = rows(labelled_config.parent / "run", "labels_1")
    assert any(score is not None and score < 1 for row in labels for score in row["score"])
    for sample, row in zip(soft, labels, strict=True):
        assert sample.scores is not None
        np.testing.assert_allclose(sample.scores, [1 if score is None else score for score in row["score"]])
        np.testing.assert_array_equal(sample.classes, np.array(row["category"]) - 1)


def check_scores(config: Config, tmp_path: Path) -> None:
    """The labels against themselves, from parts and from their COCO export, are perfect and the same."""
    parts = find_parts(config.run.uri)
    own = evaluate_run(parts, parts, output=str(tmp_path / "own"), mode="identity")
    exported = export_coco(config.run.uri, config.run.uri, output=str(tmp_path / "coco"))
    (panoptic,) = (tmp_path / "coco").rglob("panoptic_*.json")
    assert exported.images == SCENES
    again = evaluate_run(str(panoptic), parts, output=str(tmp_path / "again"), mode="identity")
    assert own["all_images"] == again["all_images"]
    seen = evaluate_run(find_parts(config.run.uri, "predictions"), parts, output=str(tmp_path / "seen"))
    assert seen["images"] == SCENES


def check_predictions(config: Config, weights: str, tmp_path: Path) -> None:
    photo = next(Path(config.source.uri).iterdir())
    summary = predict_photos(weights, str(photo), str(tmp_path / "out"), short=96)
    assert (summary.photos, summary.failed) == (1, [])
    ids, segments = load_predictor(weights, short=96)(np.asarray(Image.open(photo))).panoptic()
    assert ids.shape == (160, 160)
    assert sorted({*ids.unique().tolist()} - {0}) == [segment.id for segment in segments]


@pytest.mark.slow
def test_a_driver_killed_while_it_trains_goes_on_from_its_checkpoint(
    labelled_config: Path, start_u2label: Start, tmp_path: Path, ray_address: str
) -> None:
    from tests.integration.test_interruptions import kill_driver, wait_until

    overrides = [part for text in [*TRAIN, "predictions.enabled=false"] for part in ("--set", text)]
    command = ("train", str(labelled_config), *overrides, "--address", ray_address)
    killed = start_u2label(*command)
    wait_until(lambda: any((tmp_path / "run").glob("train/*/checkpoint.pt")), killed)
    kill_driver(killed)
    finish(start_u2label(*command), 0)
    alone = load_config(str(labelled_config), [*TRAIN, "predictions.enabled=false", f"run.uri={tmp_path / 'alone'}"])
    shutil.copytree(tmp_path / "run", tmp_path / "alone", ignore=shutil.ignore_patterns("train"))
    weights = [Path(run(alone).stages["train"].folder, "model.safetensors")]
    weights += (tmp_path / "run").glob("train/*/model.safetensors")
    first, second = (path.read_bytes() for path in weights)
    assert first == second


@pytest.mark.usefixtures("ray_session")
def test_labels_that_do_not_fit_are_refused_with_the_reason(labelled_config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_workers 2 .*train\.batch_size 3"):
        load_config(str(labelled_config), [*TRAIN, "train.batch_size=3", "workers.train_workers=2"])
    missing = load_config(str(labelled_config), [*TRAIN, f"train.init={tmp_path / 'nothing'}"])
    with pytest.raises(ConfigError, match=r"train\.init.*nothing"):
        run(missing, stages=("train",))
