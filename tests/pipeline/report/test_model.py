"""The section "Model" of the report: a training and predictions made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from tests.pipeline.report.tiny_runs import config_of, make_run, report_of, scene, squeezed, table_of

TRAIN = {"steps": 40, "batch_size": 2}
ENTRY = {"loss_rpn_cls": 0.5, "loss_rpn_loc": 0.25, "loss_mask": 0.7, "loss_sem_seg": 1.0, "rate": 0.01}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "photos").mkdir()
    for number in range(4):
        (root / "photos" / f"{number}.jpg").write_bytes(scene(number))
    (root / "photos" / "broken.jpg").write_bytes(b"not a photo")
    sections: dict[str, Any] = {"train": TRAIN, "predictions": {"enabled": True}}
    make_run(config_of(root / "photos", root / "run", **sections, self_training={"rounds": 1}))
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def write_training(stage: Stage, **changes: Any) -> None:
    history = [{"step": s, "total": 4 / s, "images_per_s": 2.5, "loss_cls_stage0": 1 / s, **ENTRY} for s in (1, 20, 40)]
    Path(stage.folder).mkdir(parents=True)
    record = {"settings": {}, "images": 4, "history": history, **changes}
    (Path(stage.folder) / "artifact.json").write_text(json.dumps(record))


def write_predictions(run: Path, name: str = "predictions") -> None:
    """The run's labels as what the model sees."""
    table = table_of(run)
    shutil.copytree(table["panoptic"].folder, table[name].folder)


def test_a_run_that_trains_says_what_is_not_there_yet(run: Path) -> None:
    text = squeezed(report_of(run).text)
    assert "Not complete: train, predictions, labels_1, train_1, predictions_1." in text
    assert "The stage train is not done yet" in text
    assert "Labels and predictions" not in text


def test_a_training_shows_its_losses_by_head(run: Path) -> None:
    write_training(table_of(run)["train"])
    page = report_of(run)
    text = squeezed(page.text)
    assert "40 steps on 4 photos; the loss ended at 0.1, at 2.5 images/s" in text
    assert "Loss by head" in text
    assert "RPN, step 1: 0.75" in text and "boxes, step 20: 0.05" in text and "semantic, step 40: 1" in text
    assert "Not complete: predictions, labels_1, train_1, predictions_1." in text


def test_a_training_with_a_teacher_shows_what_it_added(run: Path) -> None:
    stage = table_of(run)["train"]
    write_training(stage)
    assert "Taught" not in report_of(run).text
    file = Path(stage.folder) / "artifact.json"
    record = json.loads(file.read_text())
    record["history"] = [entry | {"taught": entry["step"] / 10} for entry in record["history"]]
    file.write_text(json.dumps(record))
    assert "Taught" in (text := squeezed(report_of(run).text)) and "step 40: 4" in text


def test_predictions_stand_beside_the_labels(run: Path) -> None:
    write_training(table_of(run)["train"])
    before = len(report_of(run).values("img", "src"))
    write_predictions(run)
    page = report_of(run)
    assert len(page.values("img", "src")) == before + 4 * 3  # photo, labels, prediction; not of the broken one
    assert sum("with what the model sees" in text for text in page.values("img", "alt")) == 4
    assert "4 images, evenly spaced over those above" in squeezed(page.text)
    assert "trained on these very labels" in squeezed(page.text)


def test_rounds_of_self_training_are_fits_and_the_last_predictions_are_shown(run: Path) -> None:
    table = table_of(run)
    assert {name: stage.kind for name, stage in table.items() if name.endswith("_1")} == {
        "labels_1": "shard",
        "train_1": "fit",
        "predictions_1": "shard",
    }
    write_training(table["train"])
    write_training(table["train_1"])
    write_predictions(run, "predictions")
    assert "Labels and predictions 4 images" in squeezed(report_of(run).text)
    write_predictions(run, "predictions_1")
    text = squeezed(report_of(run).text)
    assert "Round 1 of self-training 40 steps" in text
    assert "Labels and predictions after round 1 4 images" in text


def test_an_artifact_without_its_history_is_refused_by_name(run: Path) -> None:
    stage = table_of(run)["train"]
    write_training(stage)
    record = Path(stage.folder) / "artifact.json"
    record.write_text(json.dumps({"settings": {}, "images": 4}))
    with pytest.raises(ConfigError, match=r"artifact\.json has no history"):
        report_of(run)
