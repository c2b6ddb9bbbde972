"""Fingerprints: what changes them, what does not, and what counts as a finished part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.engine.done import usable_shards
from pipeline.engine.stage import Stage, index_folder
from pipeline.sources.index import Index, build_index
from pipeline.stages.table import resolve_stages


def config(**sections: dict[str, object]) -> Config:
    base: dict[str, dict[str, object]] = {
        "source": {"uri": "/photos"},
        "run": {"uri": "/run"},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
    }
    return Config.model_validate(base | sections)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(10):
        (photos / f"{i}.jpg").write_bytes(b"photo")
    return build_index(str(tmp_path / "index"), str(photos), shard_size=4)


def fingerprints(settings: Config, index: Index) -> tuple[str, str, str]:
    table = resolve_stages(settings, index)
    return table["instances"].fingerprint, table["clusters"].fingerprint, table["panoptic"].fingerprint


def test_the_index_depends_on_the_source_alone() -> None:
    assert index_folder(config()) == "/run/index/3590c07bac39"  # pinned: a run of an earlier version keeps its index
    assert index_folder(config(maskcut={"tau": 0.3})) == index_folder(config())
    public = {"uri": "/photos", "anonymous": True}
    assert index_folder(config(source=public)) != index_folder(config())


def test_a_change_reaches_its_stage_and_all_below(index: Index) -> None:
    base = fingerprints(config(), index)
    assert fingerprints(config(), index) == base
    for change, first_changed in (
        ({"maskcut": {"tau": 0.2}}, 0),
        ({"backbone": {"name": "patch-dct", "weights": "random:1"}}, 0),
        ({"decode": {"min_side": 9}}, 0),
        ({"crf": {"iterations": 5}}, 0),
        ({"clusters": {"k": 7}}, 1),
        ({"clusters": {"seed": 7}}, 1),
        ({"panoptic": {"max_cover": 0.5}}, 2),
    ):
        changed = [a != b for a, b in zip(fingerprints(config(**change), index), base, strict=True)]
        assert changed == [i >= first_changed for i in range(3)], change


def stego_fingerprints(index: Index, seed: int = 0, **semantics: object) -> tuple[str, str, str]:
    small = {"method": "stego", "batch_size": 2, "neighbours": 1}
    table = resolve_stages(config(semantics=small | semantics, seed=seed), index)
    return table["features"].fingerprint, table["semantics_fit"].fingerprint, table["semantics"].fingerprint


def test_the_column_of_photos_counts_in_parquet_alone(index: Index) -> None:
    def instances(column: str, format: str) -> str:
        return resolve_stages(config(), replace(index, format=format, image_column=column))["instances"].fingerprint

    assert instances("left", "parquet") != instances("right", "parquet")
    assert instances("left", "folder") == instances("image", "folder") == instances("image", "parquet")


def test_the_sample_decides_the_features_and_nothing_else_of_the_fit_does(index: Index) -> None:
    whole = stego_fingerprints(index)
    for change in ({"max_images": 4}, {"max_images": 5}, {"crops": "five"}):
        assert all(a != b for a, b in zip(stego_fingerprints(index, **change), whole, strict=True)), change
    assert stego_fingerprints(index, max_images=4) != stego_fingerprints(index, max_images=5)
    assert stego_fingerprints(index, 1, max_images=4)[0] != stego_fingerprints(index, 0, max_images=4)[0]
    for same in ({"max_images": None}, {"max_images": 10}, {"steps": 9}, {"preset": "potsdam"}):
        assert stego_fingerprints(index, **same)[0] == whole[0], same  # ten photos: all of them
    assert stego_fingerprints(index, 1)[0] == whole[0]  # without a sample the seed decides nothing


def test_a_preset_is_what_its_numbers_are(index: Index) -> None:
    base = stego_fingerprints(index, preset="cocostuff27_vits")
    spelt = {"weights": {"intra": 0.67, "inter": 0.25, "negative": 0.63}, "shifts": {"negative": 0.66}}
    assert stego_fingerprints(index, preset="potsdam", **spelt) == base
    other = stego_fingerprints(index, preset="cocostuff27_vits", shifts={"inter": 0.1})
    assert [a == b for a, b in zip(other, base, strict=True)] == [True, False, False]


def test_how_the_work_is_done_changes_nothing(index: Index) -> None:
    base = fingerprints(config(), index)
    assert fingerprints(config(workers={"size": 7, "batch_size": 4, "cpus": 2}, run={"uri": "/else"}), index) == base
    assert fingerprints(config(clusters={"seed": 0}), index) == base  # the default, said aloud


def test_weights_file_enters_by_its_content(tmp_path: Path, index: Index) -> None:
    (tmp_path / "a.pth").write_bytes(b"one")
    (tmp_path / "b.pth").write_bytes(b"one")
    names = {"a": str(tmp_path / "a.pth"), "b": str(tmp_path / "b.pth")}
    prints = {k: fingerprints(config(backbone={"name": "dino_vits8", "weights": v}), index) for k, v in names.items()}
    assert prints["a"] == prints["b"]
    (tmp_path / "b.pth").write_bytes(b"two")
    assert fingerprints(config(backbone={"name": "dino_vits8", "weights": names["b"]}), index) != prints["a"]


def test_a_training_behind_a_transformer_depends_on_its_weights(index: Index) -> None:
    def fingerprint(seed: int, **train: object) -> str:
        backbone = {"name": "patch-dct", "weights": f"random:{seed}"}
        labels = {"labels": __file__, "label_images": "/photos", "steps": 5}  # so that no label of the run is read
        settings = config(backbone=backbone, train={**labels, **train})
        return resolve_stages(settings, index)["train"].fingerprint

    vit = {"network": {"backbone": "vit"}}
    assert fingerprint(0) == fingerprint(1)
    assert len({fingerprint(0), fingerprint(0, **vit), fingerprint(1, **vit)}) == 3
    assert fingerprint(0, **vit, flip=0) == fingerprint(0, **vit, flip=0, cache=True)
    assert fingerprint(0, **vit) != fingerprint(0, **vit, cache=True)  # what is kept is mirrored as tokens
    assert fingerprint(0) == fingerprint(0, network={"backbone": "resnet50", "patch_stride": 16})


def test_index_folder_depends_on_the_source_alone() -> None:
    assert index_folder(config()) == index_folder(config(maskcut={"tau": 0.3}))
    assert index_folder(config()) != index_folder(config(source={"uri": "/photos", "shard_size": 5}))


def test_only_whole_parts_are_done(tmp_path: Path) -> None:
    stage = Stage("instances", "shard", "f", str(tmp_path), 4)
    assert usable_shards(stage) == set()
    Path(stage.part(0)).write_bytes(b"PAR1....PAR1")
    Path(stage.part(1)).write_bytes(b"PAR1....PA")
    Path(stage.part(2)).write_bytes(b"")
    (tmp_path / ".tmp-part-00003.parquet-x").write_bytes(b"PAR1....PAR1")
    assert usable_shards(stage) == {0}
