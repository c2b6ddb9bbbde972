"""The fit of the panoptic model on generated scenes with their truth: artifact, resuming, workers, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from model.checkpoint.files import load_checkpoint
from model.ranks import Ranks
from pipeline.errors import ConfigError
from pipeline.operations.demo.scenes import write_scenes
from pipeline.train import fit, loop
from pipeline.train.batches import Batches
from pipeline.train.coco_photos import CocoPhotos
from pipeline.train.fit import _require_sound, fit_panoptic
from pipeline.train.job import TrainJob, TrainSettings
from tests.tiny_panoptic import NETWORK, stopped_at_step
from workers.decode import DecodeLimits
from workers.training.copy_paste import CopyPaste
from workers.training.samples import Sample
from workers.training.trainer import Optimisation, PanopticTrainer

SETTINGS = TrainSettings(
    Optimisation(steps=4, batch_size=2, warmup_steps=0, rate=0.001),
    NETWORK,
    short_sides=(64, 80),
    precise_statistics=1,
)
LIMITS = DecodeLimits()


class Photos(CocoPhotos):
    """Scenes with their truth; reading one of them kills the process the first time, if `killed_at` names it, or raises
    if `refused_at` does, and leaves a line in `marker`."""

    killed_at: int = -1
    refused_at: int = -1
    marker: Path = Path()

    def sample(self, index: int) -> Sample:
        if index == self.killed_at and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.refused_at:
            with self.marker.open("a") as lines:
                lines.write("refused\n")
            raise ValueError(f"photo {index} does not fit its labels")
        return super().sample(index)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), 6, 0, (96, 128))
    return folder


def photos_of(scenes: Path, **options: Any) -> Photos:
    return Photos(
        str(scenes / "truth.json"), str(scenes / "images"), pngs=str(scenes / "truth"), limits=LIMITS, **options
    )


@pytest.fixture(scope="module")
def unbroken(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "unbroken"
    fit_panoptic(photos_of(scenes), str(out), SETTINGS)
    return out


def assert_same_weights(a: Path, b: Path, atol: float) -> None:
    first, second = load_checkpoint(a).state, load_checkpoint(b).state
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=10 * atol, atol=atol, msg=name)


def test_the_artifact_holds_weights_history_board_and_a_picture(unbroken: Path) -> None:
    record = json.loads((unbroken / "artifact.json").read_text())
    assert (record["num_things"], record["num_stuff"], record["images"]) == (6, 5, 6)
    assert [entry["step"] for entry in record["history"]] == [1, 4]
    assert record["history"][0]["total"] > 0
    checkpoint = load_checkpoint(unbroken)
    assert checkpoint.config["num_things"] == 6
    assert checkpoint.config["model"]["width"] == 8
    assert [path.name for path in (unbroken / "predictions").iterdir()] == ["step-000004.jpg"]
    assert list((unbroken / "tensorboard").iterdir())
    assert not (unbroken / "checkpoint.pt").exists()


def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(
    scenes: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_at_step(3):
        fit_panoptic(photos_of(scenes), str(tmp_path), SETTINGS, checkpoint_every=2)
    advance = PanopticTrainer.advance
    done = []

    def counts(self: PanopticTrainer, batch: Any) -> dict[str, float]:
        done.append(self.step)
        return advance(self, batch)

    monkeypatch.setattr(PanopticTrainer, "advance", counts)
    fit_panoptic(photos_of(scenes), str(tmp_path), SETTINGS, checkpoint_every=2)
    assert done == [2, 3]
    assert_same_weights(unbroken, tmp_path, 0)
    curves = [json.loads((folder / "artifact.json").read_text())["history"] for folder in (unbroken, tmp_path)]
    assert [entry["total"] for entry in curves[0]] == [entry["total"] for entry in curves[1]]


def test_a_finished_fit_is_read_and_not_done_again(
    scenes: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", None)
    assert fit_panoptic(photos_of(scenes), str(unbroken), SETTINGS).record["images"] == 6


@pytest.mark.usefixtures("ray_session")
def test_two_workers_of_which_one_is_killed_give_the_weights_of_one_process(
    scenes: Path, unbroken: Path, tmp_path: Path
) -> None:
    photos = photos_of(scenes)
    photos.killed_at, photos.marker = 3, tmp_path / "killed"
    fit_panoptic(photos, str(tmp_path / "out"), SETTINGS, num_workers=2, checkpoint_every=1)
    assert photos.marker.exists()
    assert_same_weights(unbroken, tmp_path / "out", 2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_a_worker_refuses_is_said_and_not_tried_again(scenes: Path, tmp_path: Path) -> None:
    photos = photos_of(scenes)
    photos.refused_at, photos.marker = 3, tmp_path / "refused"
    with pytest.raises(ValueError, match=r"^photo 3 does not fit its labels$"):
        fit_panoptic(photos, str(tmp_path / "out"), SETTINGS, num_workers=2, checkpoint_every=1)
    assert photos.marker.read_text() == "refused\n"
    assert not list(tmp_path.rglob("refused.txt")), "it would be refused again when it is mended"


def test_a_worker_that_is_started_again_after_the_end_leaves_the_model_as_it_is(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "train", None)
    for file in unbroken.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"of the last step")
    fit._worker(cast(TrainJob, SimpleNamespace(out=str(tmp_path))), {}, Ranks(), torch.device("cpu"))
    assert not (tmp_path / "checkpoint.pt").exists()
    assert_same_weights(unbroken, tmp_path, 0)


def test_copy_paste_from_the_bank_goes_on_as_if_it_had_not_been_stopped(scenes: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, copy_paste=CopyPaste(semantic_aware=0.5), precise_statistics=0)
    fit_panoptic(photos_of(scenes), str(tmp_path / "whole"), settings)
    short = replace(settings, optimisation=replace(settings.optimisation, steps=3))
    photos = photos_of(scenes)
    job = TrainJob(photos, short, str(tmp_path), "x", "cpu", 1, 9, 2)
    through = list(Batches(job, range(2)).between(0, 3))
    resumed = list(Batches(job, range(2)).between(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(through[2].images, resumed[0].images, strict=True))


def test_a_training_whose_loss_has_grown_leaves_no_model(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = PanopticTrainer.advance

    def grows(self: PanopticTrainer, batch: Any) -> dict[str, float]:
        factor = 100.0**self.step
        return {name: factor * value for name, value in advance(self, batch).items()}

    monkeypatch.setattr(PanopticTrainer, "advance", grows)
    for _ in range(2):  # going on from its checkpoint does not make it a model
        with pytest.raises(
            ValueError, match=r"has diverged: its loss is \S+e\+0\d in the last steps.*lower train\.rate"
        ):
            fit_panoptic(photos_of(scenes), str(tmp_path), SETTINGS)
    assert not (tmp_path / "artifact.json").exists()


@pytest.mark.parametrize(("first", "last", "sound"), [(8.0, 80.0, True), (8.0, 81.0, False), (0.01, 25.0, True)])
def test_how_much_a_loss_may_grow(first: float, last: float, sound: bool) -> None:
    history: list[Any] = [{"step": 1, "total": first}, {"step": 9, "total": last}]
    refused = pytest.raises(
        ValueError, match=r"its loss is 81 in the last steps and was 8 in the first; lower train\.rate"
    )
    with contextlib.nullcontext() if sound else refused:
        _require_sound(history)


def test_weights_to_start_from(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    from pipeline.train.job import TrainJob, build_model

    photos = photos_of(scenes, fraction=0.4)
    assert len(photos) == 2
    started = replace(SETTINGS, init=str(unbroken))
    model = build_model(TrainJob(photos, started, str(tmp_path), "x", "cpu", 1, 9, 1))
    state = load_checkpoint(unbroken).state
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    photos.num_things = 9
    with pytest.raises(ValueError, match="6 thing and 5 stuff classes, the model 9 and 5"):
        build_model(TrainJob(photos, started, str(tmp_path), "x", "cpu", 1, 9, 1))
    fresh = build_model(
        TrainJob(photos, replace(started, init_classes="new"), str(tmp_path), "x", "cpu", 1, 9, 1)
    ).state_dict()
    name = "roi_heads.box_head.0.fc1.weight"
    assert torch.equal(fresh[name], state[name])
    assert fresh["roi_heads.box_predictor.0.cls_score.weight"].shape[0] == 10
    assert fresh["roi_heads.mask_head.predictor.weight"].shape[0] == 9


def test_a_checkpoint_of_another_training_is_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    torch.save({"identity": "another", "record": "{}"}, tmp_path / "out" / "checkpoint.pt")
    with pytest.raises(ValueError, match="other settings or photos; delete it"):
        fit_panoptic(photos_of(scenes), str(tmp_path / "out"), SETTINGS)


def test_what_cannot_be_trained_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.batch_size 2 cannot be shared equally by 3 workers"):
        fit_panoptic(photos_of(scenes), str(tmp_path), SETTINGS, num_workers=3)
    photos = photos_of(scenes)
    (scenes / "images" / "scene-00000.jpg").rename(scenes / "away.jpg")
    try:
        with pytest.raises(ConfigError, match=r"scene-00000\.jpg', which has labels"):
            photos.sample(0)
    finally:
        (scenes / "away.jpg").rename(scenes / "images" / "scene-00000.jpg")
