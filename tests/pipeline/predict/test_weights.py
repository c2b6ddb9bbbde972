"""Checkpoint folders and detectron2 files, on disk and in a bucket -> the model; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint.detectron2 import write_detectron2
from model.checkpoint.files import Checkpoint, save_checkpoint, to_files
from model.panoptic.network import PanopticCascadeRCNN
from pipeline.errors import ConfigError
from pipeline.predict import load_predictor
from pipeline.predict.weights import load_weights, sides_of
from pipeline.store import storage
from tests.tiny_panoptic import KEYWORDS, STUFF, THINGS, scene, tiny_model

CONFIG = {"num_things": THINGS, "num_stuff": STUFF, "model": KEYWORDS, "short": 96, "max_side": 160}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    save_checkpoint(folder, tiny_model().state_dict(), CONFIG)
    return folder


def test_the_three_lines_of_the_readme(checkpoint: Path) -> None:
    predictor = load_predictor(str(checkpoint))
    prediction = predictor(scene(60, 80))
    ids, segments = prediction.panoptic()
    assert ids.shape == (60, 80) == tuple(prediction.semantic.shape)
    assert set(ids.unique().tolist()) - {0} == {segment.id for segment in segments}
    assert {segment.is_thing for segment in segments} == {True, False}
    assert (predictor.num_things, predictor.num_stuff) == (THINGS, STUFF)


def test_the_config_of_the_checkpoint_makes_the_model(checkpoint: Path) -> None:
    weights = load_weights(str(checkpoint))
    assert weights.model.roi_heads.detections_per_image == KEYWORDS["detections_per_image"]
    assert sides_of(weights, None, None) == (96, 160), "what it was trained for"
    assert sides_of(weights, 200, 300) == (200, 300)
    assert sides_of(replace(weights, short=None, max_side=None), None, None) == (800, 1333), "as published"
    assert not weights.model.training


def test_a_score_decides_which_instances_are_combined(checkpoint: Path) -> None:
    photo = scene(60, 80)
    counts = []
    for score in (0.0, 0.7, 1.0):
        segments = load_predictor(str(checkpoint), score=score)(photo).panoptic().segments
        assert all(segment.score is None or segment.score >= score for segment in segments)
        counts.append(sum(segment.is_thing for segment in segments))
    assert counts[0] > counts[1] > counts[2] == 0


def test_names_come_from_the_checkpoint(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "duck", "isthing": 1}]
    save_checkpoint(tmp_path / "named", tiny_model().state_dict(), CONFIG | {"categories": categories})
    assert load_predictor(str(tmp_path / "named")).names == {1: "duck"}


def test_a_checkpoint_in_a_bucket(s3_bucket: str, checkpoint: Path) -> None:
    uri = storage.join(s3_bucket, "model")
    for name, data in to_files(Checkpoint(tiny_model().state_dict(), CONFIG)).items():
        storage.write_bytes(storage.join(uri, name), data)
    remote, local = load_weights(uri), load_weights(str(checkpoint))
    assert remote.digest == local.digest
    assert all(torch.equal(a, b) for a, b in zip(remote.model.parameters(), local.model.parameters(), strict=True))


def test_a_detectron2_file_needs_no_config(tmp_path: Path) -> None:
    """K and S are those of the file, the architecture is the published one."""
    write_detectron2(PanopticCascadeRCNN(2, 1).state_dict(), tmp_path / "model_final.pth")
    predictor = load_predictor(str(tmp_path / "model_final.pth"), short=64)
    assert (predictor.num_things, predictor.num_stuff) == (2, 1)
    assert predictor(scene(40, 50)).semantic.shape == (40, 50)


def refused(uri: str, **arguments: float) -> str:
    with pytest.raises(ConfigError) as error:
        load_predictor(uri, **arguments)  # type: ignore[arg-type]
    return str(error.value)


def test_weights_that_are_not_there_or_do_not_fit_are_refused(tmp_path: Path, s3_bucket: str) -> None:
    for uri in (str(tmp_path / "nowhere"), str(tmp_path / "no.pth"), storage.join(s3_bucket, "nowhere")):
        message = refused(uri)
        assert message.startswith(f"--weights: there is no {uri}") and "give the folder of a checkpoint" in message
    write_detectron2({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    assert "no weights of a panoptic cascade R-CNN" in refused(str(tmp_path / "backbone.pth"))
    write_detectron2(tiny_model().state_dict(), tmp_path / "tiny.pth")
    remote = storage.join(s3_bucket, "tiny.pth")
    storage.write_bytes(remote, (tmp_path / "tiny.pth").read_bytes())
    for uri in (str(tmp_path / "tiny.pth"), remote):
        assert f"{uri} does not fit the model" in refused(uri), "such a file is of full size, as published"
    (tmp_path / "text.pkl").write_bytes(b"not a pickle")
    assert "text.pkl" in refused(str(tmp_path / "text.pkl"))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    unknown = CONFIG | {"model": KEYWORDS | {"colour": 1}}
    save_checkpoint(tmp_path / "unknown", tiny_model().state_dict(), unknown)
    assert "unexpected keyword argument 'colour'" in refused(str(tmp_path / "unknown"))
    save_checkpoint(tmp_path / "wider", tiny_model().state_dict(), CONFIG | {"model": KEYWORDS | {"width": 16}})
    assert "of another shape" in refused(str(tmp_path / "wider"))


def test_numbers_out_of_range_are_refused(checkpoint: Path) -> None:
    assert "--score: 1.5 must be in [0, 1]" in refused(str(checkpoint), score=1.5)
    assert "short -1" in refused(str(checkpoint), short=-1)


def test_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    for device in ("cuda:77", "abacus"):
        with pytest.raises(ConfigError, match=f"--device: cannot use '{device}'"):
            load_predictor(str(checkpoint), device)


@pytest.mark.parametrize("photo", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_photo_is_refused(checkpoint: Path, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a photo is \(height, width, 3\) uint8 RGB, got"):
        load_predictor(str(checkpoint))(photo)
