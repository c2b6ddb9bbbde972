"""The refinement of DatUS2: the same weights however the fit is run, stopped and shared; class maps of any size."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from model.deeplab import build_deeplab
from pipeline.errors import ConfigError
from pipeline.semantics import refine
from pipeline.semantics.datus import fit_datus
from pipeline.semantics.refine import fit_deeplab, load_deeplab
from pipeline.semantics.refine_photos import PhotosOfParts
from pipeline.sources.index import build_index
from pipeline.store import storage
from workers.decode import DecodeLimits
from workers.images import LoadedImage
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA, Status, segments_schema
from workers.semantics.datus import encode_segments
from workers.semantics.refine import DeepLabTrainer, RefineSettings, RefineWorker, batch_rows, load_group

SETTINGS = RefineSettings(classes=3, steps=3, batch_size=4, group_size=2, image_size=32, seed=5)


@dataclass(frozen=True)
class Halves:
    """Photos whose left half is dark and right half bright, of classes 0 and 2; the top row is void."""

    count: int = 6
    killed_at: int = -1  # the photo whose first reading kills its worker
    marker: str = ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.killed_at and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(index)
        classes = np.repeat([[0, 2]], 10, axis=1).repeat(30, axis=0).astype(np.uint8)
        photo = np.clip(classes[..., None] * 80 + rng.normal(40, 10, (30, 20, 3)), 0, 255).astype(np.uint8)
        classes[0] = 255
        return photo, classes


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol, msg=key)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refine") / "unbroken"
    fit_deeplab(Halves(), str(out), SETTINGS, checkpoint_every=2)
    return out


def test_the_artifact_is_whole_and_is_read_again(unbroken: Path) -> None:
    assert sorted(path.name for path in unbroken.iterdir()) == ["artifact.json", "model.safetensors"]
    result = fit_deeplab(Halves(0), str(unbroken), replace(SETTINGS, steps=9))  # complete: nothing is computed
    assert result.settings == SETTINGS and len(result.loss) == 2
    assert abs(result.loss[0] - np.log(3)) < 0.5
    record = json.loads((unbroken / "artifact.json").read_text())
    assert (record["photos"], record["backbone"]) == (6, None)
    model, found = load_deeplab(str(unbroken))
    assert found == SETTINGS and not model.training


def test_a_fit_that_was_stopped_goes_on_to_the_weights_of_an_unbroken_one(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DeepLabTrainer.step

    def interrupted(self: DeepLabTrainer, number: int, *rest: object) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DeepLabTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_deeplab(Halves(), str(tmp_path), SETTINGS, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "progress.json"]
    done: list[int] = []

    def counted(self: DeepLabTrainer, number: int, *rest: object) -> float:
        done.append(number)
        return step(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DeepLabTrainer, "step", counted)
    result = fit_deeplab(Halves(), str(tmp_path), SETTINGS, checkpoint_every=2)
    assert done == [2]
    assert_close(weights(unbroken), weights(tmp_path), 0)
    assert result.loss == refine._read_artifact(str(unbroken)).loss


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_write_artifact", lambda *_: None)
    short = replace(SETTINGS, steps=1)
    with pytest.raises(FileNotFoundError):
        fit_deeplab(Halves(), str(tmp_path), short)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of a fit with other settings or photos; delete it"):
        fit_deeplab(Halves(), str(tmp_path), replace(short, seed=6))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_workers_of_which_one_is_killed_give_the_weights_of_one_process(unbroken: Path, tmp_path: Path) -> None:
    late = batch_rows(SETTINGS.seed, 0, 2 * SETTINGS.batch_size, 6)[5]  # the first batch is read without it
    photos = Halves(killed_at=int(late), marker=str(tmp_path / "killed"))
    out = tmp_path / "shared"
    result = fit_deeplab(photos, str(out), SETTINGS, num_workers=2, cpus_per_worker=1, checkpoint_every=1)
    assert Path(photos.marker).exists()
    assert_close(weights(unbroken), weights(out), 1e-4)
    assert len(result.loss) == 3


@pytest.mark.usefixtures("ray_session")
def test_workers_that_cannot_start_are_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 workers cannot share 2 groups"):
        fit_deeplab(Halves(), str(tmp_path), SETTINGS, num_workers=3)
    with pytest.raises(ConfigError, match="2 workers of a training of 60 CPU need 120, the Ray cluster has 4"):
        fit_deeplab(Halves(), str(tmp_path), SETTINGS, num_workers=2, cpus_per_worker=60)


def test_no_photos_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo has a class map"):
        fit_deeplab(Halves(0), str(tmp_path), SETTINGS)
    with pytest.raises(ValueError, match="batch_size 5 is not a multiple of group_size 2"):
        replace(SETTINGS, batch_size=5)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        replace(SETTINGS, group_size=1)
    with pytest.raises(ValueError, match=r"semantics\.classes must be at most 255"):
        replace(SETTINGS, classes=256)


def test_groups_shared_by_two_sum_to_the_step_of_one() -> None:
    groups = {number: load_group(Halves(), SETTINGS, 0, number) for number in range(2)}
    whole, *sharers = (DeepLabTrainer(SETTINGS, device="cpu") for _ in range(3))
    loss = whole.step(0, groups)
    flats: list[torch.Tensor] = []
    for number, sharer in enumerate(sharers):
        sharer.step(0, {number: groups[number]}, lambda flat: flats.append(flat.clone()))
    again = DeepLabTrainer(SETTINGS, device="cpu")
    assert again.step(0, {}, lambda flat: flat.copy_(sum(flats))) == pytest.approx(loss, abs=1e-5)  # type: ignore[arg-type]
    assert_close(whole.model.state_dict(), again.model.state_dict(), 1e-5)


def test_void_alone_adds_no_gradient() -> None:
    photos, classes = load_group(Halves(), SETTINGS, 0, 0)
    trainer = DeepLabTrainer(replace(SETTINGS, weight_decay=0), device="cpu")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    assert trainer.step(0, {0: (photos, np.full_like(classes, 255))}) == 0
    assert_close(before, dict(trainer.model.named_parameters()), 0)


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 12))
def test_every_photo_is_dealt_once_before_any_twice(seed: int, size: int, length: int) -> None:
    dealt = np.concatenate([batch_rows(seed, step, size, length) for step in range(2 * length)])
    for epoch in np.split(dealt, range(length, len(dealt), length)):
        assert len(set(epoch)) == len(epoch)
    np.testing.assert_array_equal(dealt[size : 2 * size], batch_rows(seed, 1, size, length))


def test_a_mirrored_photo_keeps_its_classes_under_it() -> None:
    loaded = [load_group(Halves(), SETTINGS, step, 0) for step in range(4)]
    bright_left = 0
    for photos, classes in loaded:
        assert photos.shape == (2, 32, 32, 3) and classes.shape == (2, 32, 32)
        assert set(np.unique(classes)) == {0, 2, 255}
        for photo, found in zip(photos, classes, strict=True):
            np.testing.assert_array_equal(photo[4:, [4, 28]].mean(axis=(0, 2)) > 120, found[16, [4, 28]] == 2)
            bright_left += int(found[16, 4] == 2)
    assert 0 < bright_left < 8


def test_a_class_map_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has class 2, semantics\.classes is 2"):
        load_group(Halves(), replace(SETTINGS, classes=2), 0, 0)


def test_the_network_replaces_every_map_at_the_original_size(unbroken: Path) -> None:
    model, found = load_deeplab(str(unbroken))
    images = [
        LoadedImage("a.jpg", Halves()[0][0]),
        LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes"),
        LoadedImage("b.jpg", np.zeros((9, 50, 3), np.uint8)),
    ]
    tables = [
        RefineWorker(model, image_size=found.image_size, device="cpu", batch_size=size).process(images, Phases())
        for size in (1, 3)
    ]
    assert tables[0].schema == SEMANTICS_SCHEMA
    assert tables[0]["image_id"].to_pylist() == ["a.jpg", "bad.jpg", "b.jpg"]
    assert tables[0]["status"].to_pylist() == ["ok", "empty", "ok"]
    assert tables[0]["labels"][1].as_py() is None and tables[0]["error"][1].as_py() == "no bytes"
    for table in tables:
        maps = [np.asarray(Image.open(io.BytesIO(table["labels"][row].as_py()))) for row in (0, 2)]
        assert [found_map.shape for found_map in maps] == [(30, 20), (9, 50)]
        assert max(int(found_map.max()) for found_map in maps) < 3


def test_the_resnet_of_a_checkpoint_is_loaded_and_another_file_is_refused(tmp_path: Path) -> None:
    given = build_deeplab(3, seed=9)
    resnet = {f"module.backbone.{key}": value for key, value in given.backbone.state_dict().items()}
    torch.save({"teacher": resnet | {"module.head.mlp.weight": torch.zeros(2)}}, tmp_path / "dino.pth")
    loaded = build_deeplab(3, seed=0, backbone=tmp_path / "dino.pth")
    assert_close(dict(given.backbone.state_dict()), dict(loaded.backbone.state_dict()), 0)
    assert not torch.equal(given.classifier[4].weight, loaded.classifier[4].weight)
    resnet.pop("module.backbone.conv1.weight")
    torch.save(resnet, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"missing keys \['conv1.weight'\] \(1\)"):
        build_deeplab(3, backbone=tmp_path / "broken.pth")
    with pytest.raises(FileNotFoundError, match="no ResNet-50 checkpoint"):
        build_deeplab(3, backbone=tmp_path / "absent.pth")


def test_photos_of_parts_pairs_each_readable_photo_with_its_map(tmp_path: Path) -> None:
    for i in range(5):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((10, 10 + i, 3), 40 * i, np.uint8)).save(path)
    index = build_index(str(tmp_path / "index"), str(tmp_path / "photos"), shard_size=2)
    parts = []
    for shard in range(index.shards):
        rows = [semantics_row(record.image_id) for record in index.records(shard)]
        parts.append(str(tmp_path / f"part-{shard:05d}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows, SEMANTICS_SCHEMA), parts[-1])
    photos = PhotosOfParts(index, parts, limits=DecodeLimits())
    assert len(photos) == 4 and photos[0][0].shape == (10, 10, 3)
    for pair, i in zip(pickle.loads(pickle.dumps(photos)), (0, 1, 2, 4), strict=False):
        assert pair[0].shape == (10, 10 + i, 3) and (pair[0] == 40 * i).all()
        assert pair[1].shape == (10, 10 + i) and (pair[1] == i).all()


def semantics_row(image_id: str) -> dict[str, object]:
    number = int(image_id[0])
    if number == 3:
        return {"image_id": image_id, "status": "undecodable", "error": "broken", "labels": None}
    stream = io.BytesIO()
    Image.fromarray(np.full((10, 10 + number), number, np.uint8)).save(stream, "PNG")
    return {"image_id": image_id, "status": "ok", "error": None, "labels": stream.getvalue()}


def segments_part(path: Path, embeddings: np.ndarray) -> str:
    row = {"image_id": path.stem, "height": 8, "width": 8, "status": "ok", "error": None}
    row |= {"segments": encode_segments(np.zeros((2, 2), np.int32)), "embedding": list(embeddings.astype(np.float16))}
    pq.write_table(pa.Table.from_pylist([row], segments_schema(embeddings.shape[1])), path)
    return str(path)


def test_fewer_different_segments_than_classes_are_refused_by_the_key_of_the_config(tmp_path: Path) -> None:
    alike = [segments_part(tmp_path / f"{i}.parquet", np.eye(2, 8).repeat(4, 0)) for i in range(2)]
    with pytest.raises(
        ValueError, match=r"semantics\.classes is 3, but the 2 segments parts hold 2 different segments"
    ):
        fit_datus(alike, str(tmp_path / "out"), classes=3, seed=0, num_actors=1, cpus_per_actor=1, device="cpu")
    assert not storage.exists(str(tmp_path / "out"))


@pytest.mark.usefixtures("ray_session")
def test_the_classes_are_the_clusters_of_the_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = np.eye(3, 8)[rng.integers(0, 3, 60)] + rng.normal(0, 0.05, (60, 8))
    parts = [segments_part(tmp_path / f"{i}.parquet", rows) for i, rows in enumerate(np.split(groups, 3))]
    out = str(tmp_path / "out")
    result = fit_datus(parts, out, classes=3, seed=0, num_actors=2, cpus_per_actor=0.5, device="cpu")
    assert sorted(result.centroids.argmax(1)) == [0, 1, 2] and result.sizes.sum() == 60
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    again = fit_datus([], out, classes=3, seed=0, num_actors=1, cpus_per_actor=1, device="cpu")
    np.testing.assert_array_equal(again.centroids, result.centroids)
