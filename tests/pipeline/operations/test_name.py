"""Names are checked, stored with the run, and used by every command that takes `--names`."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.command.cli import app
from pipeline.errors import ConfigError
from pipeline.evaluate.panoptic import open_labels
from pipeline.operations.name import SHOWN, name_classes
from pipeline.sources.coco import CocoInstances, CocoPanoptic
from pipeline.stages.named import names_of, names_of_checkpoint
from pipeline.stages.parts import PanopticParts, find_parts
from pipeline.stages.run import open_run
from pipeline.stages.table import define_stages, resolve_stages
from pipeline.train.photos import Labels, PhotosOfLabels
from tests.pipeline.report.named_runs import make_named_run, run_config, write_names
from workers.renaming import NOISE

RUNNER = CliRunner()
K, STUFF = 6, 2
NAMES: dict[int, dict[str, Any]] = {
    1: {"name": "cat"},
    2: {"merge": 1},
    3: {"noise": True},
    4: {"name": "grass", "stuff": True},
    7: {"merge": 4},
}
NEW = {1: ("cat", True), 2: ("thing 5", True), 3: ("thing 6", True), 4: ("grass", False), 5: ("stuff 2", False)}
BECOMES = np.array([0, 1, 1, NOISE, 4, 2, 3, 4, 5])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photos and the run of six classes of things and two of stuff, and a file of names."""
    root = tmp_path_factory.mktemp("name")
    table = make_named_run(root, k=K, stuff=STUFF, photos=8, shard_size=3)
    write_names(root / "names.yaml", table, K, STUFF, NAMES)
    return root


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def named(folder: Path) -> Path:
    """A copy whose names are stored; its run folder."""
    name_classes(str(folder / "run"), str(folder / "names.yaml"))
    return folder / "run"


def invoke(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def class_maps(labels: PanopticParts | CocoPanoptic) -> dict[str, np.ndarray]:
    """(h, w) categories of each image, 0 where there is none."""
    maps = {}
    for name in labels.names:
        image = labels.read(name)
        maps[name] = np.zeros(image.ids.shape, np.int64)
        for segment in image.segments:
            maps[name][image.ids == segment.id] = segment.category
    return maps


def test_the_command_stores_the_names_and_shows_them(folder: Path) -> None:
    said = invoke("name", folder / "run", "--from", folder / "names.yaml")
    assert "cat" in said and "3 things, 2 stuff; 2 with a name, 2 merged into others, 1 are noise" in said
    assert invoke("name", folder / "run") == said
    found = json.loads(invoke("name", folder / "run", "--json"))
    assert found["categories"][0] == {"id": 1, "name": "cat", "isthing": 1, "of": [1, 2], "said": True}
    assert found["file"] == str(folder / "run" / "names.yaml") and not found["replaced"]


def test_other_names_take_the_place_of_those_that_are_stored(named: Path, folder: Path) -> None:
    assert not name_classes(str(named), str(folder / "names.yaml")).replaced
    table = open_run(str(named)).stages
    write_names(folder / "names.yaml", table, K, STUFF, {1: {"name": "[red]dog"}})
    assert "in place of other names" in invoke("name", named, "--from", folder / "names.yaml")
    assert "[red]dog" in invoke("name", named)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    table = make_named_run(tmp_path, k=50, stuff=0, photos=1)
    write_names(tmp_path / "names.yaml", table, 50, 0, {n: {"name": f"class {n}"} for n in range(2, 51)})
    said = invoke("name", tmp_path / "run", "--from", tmp_path / "names.yaml")
    assert "thing 1" not in said, "of which nothing was said"
    assert f"class {SHOWN + 1}" in said and f"class {SHOWN + 2}" not in said and "and 9 more" in said
    write_names(tmp_path / "names.yaml", table, 50, 0, {})
    assert "made of" not in invoke("name", tmp_path / "run", "--from", tmp_path / "names.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fits": {"things": "f00"}}, "its names are of another fit: fits.things is f00"),
        ({"fits": {"stuff": None}}, "its names are of another fit: fits.stuff is None"),
        ({"classes": {"things": 9}}, "classes is 9 things and 2 stuff, and the run has 6 and 2"),
    ],
)
def test_names_of_another_run_are_refused(folder: Path, changed: dict[str, dict[str, Any]], message: str) -> None:
    file = folder / "names.yaml"
    document = yaml.safe_load(file.read_text())
    for section, values in changed.items():
        document[section] |= values
    file.write_text(yaml.safe_dump(document))
    said = refused("name", folder / "run", "--from", file)
    assert message in said and "u2label report" in said
    assert not (folder / "run" / "names.yaml").exists()


def test_names_of_classes_that_were_made_again_are_refused(named: Path) -> None:
    """A fit that `--refit` makes again has its old fingerprint, and other classes."""
    (artifact,) = (named / "clusters").glob("*/artifact.json")
    record = artifact.read_text()
    artifact.write_text(json.dumps(json.loads(record) | {"inertia": [8.0]}))
    assert "its names are of another fit: fits.things is" in refused("name", named)
    assert "its names are of another fit" in refused("export", "coco", named, "--output", named / "out", "--names")
    artifact.write_text(record)
    assert "cat" in invoke("name", named)


def test_a_run_without_clusters_has_nothing_to_name(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "clusters")
    with pytest.raises(ConfigError, match="has no clusters yet; go on with u2label run"):
        name_classes(str(folder / "run"), str(folder / "names.yaml"))


def test_names_that_were_never_given_cannot_be_used(folder: Path) -> None:
    truth = folder / "truth.json"
    truth.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    run = folder / "run"
    for command in (
        ("export", "coco", run, "--output", folder / "out"),
        ("evaluate", "panoptic", run, truth),
        ("evaluate", "masks", run, truth),
        ("name", run),
    ):
        names = () if command[0] == "name" else ("--names",)
        assert "has no names; write the page of clusters with u2label report" in refused(*command, *names)


def test_an_export_has_the_named_classes_pixel_by_pixel(named: Path, folder: Path) -> None:
    invoke("export", "coco", named, "--output", folder / "out", "--names")
    labels = CocoPanoptic(str(folder / "out" / "panoptic_train.json"))
    assert {number: (c.name, c.is_thing) for number, c in labels.categories.items()} == NEW
    before, after = class_maps(PanopticParts(find_parts(str(named)))), class_maps(labels)
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert set(np.unique(old)) >= {1, 2, 3, 4, 5, 6}
        assert (after[name] == BECOMES[old]).all()
    instances = CocoInstances(str(folder / "out" / "instances_train.json"))
    assert {one.category for name in instances.names for one in instances.read(name)} == {1, 2, 3}
    assert sum(len(instances.read(name)) for name in instances.names) == 8 * 12 * 4 // 6


def test_named_labels_are_scored_as_their_classes(named: Path, folder: Path) -> None:
    invoke("export", "coco", named, "--output", folder / "out", "--names")
    truth = folder / "out" / "panoptic_train.json"
    with_names = json.loads(invoke("evaluate", "panoptic", named, truth, "--names", "--mode", "identity", "--json"))
    assert with_names["all_images"]["PQ"] == 1
    without = json.loads(invoke("evaluate", "panoptic", named, truth, "--json"))
    assert without["clusters"] == {"things": K, "stuff": STUFF} and without["all_images"]["PQ"] < 0.9
    assert "no run in" in refused("evaluate", "panoptic", truth, truth, "--names", "--output", folder)
    with pytest.raises(ConfigError, match="is no run; give the run, or write the JSON with names"):
        open_labels(str(truth), names=names_of(open_run(str(named))))


@pytest.mark.parametrize("stage", ["instances", "panoptic"])
def test_named_masks_are_in_fewer_clusters_and_noise_is_left_out(named: Path, folder: Path, stage: str) -> None:
    invoke("export", "coco", named, "--output", folder / "out", "--names", "--no-whole-masks")
    truth = folder / "out" / "instances_train.json"
    found, without = (
        json.loads(invoke("evaluate", "masks", named, truth, "--stage", stage, "--json", *names))
        for names in (["--names"], [])
    )
    assert (found["masks"], without["masks"]) == (8 * 12 * 4 // 6, 8 * 12)
    assert (found["clusters"]["of"], without["clusters"]["of"]) == (3, K)
    assert found["clusters"]["nmi"] == pytest.approx(1) and without["clusters"]["nmi"] < 0.95


def test_a_model_is_trained_on_the_named_classes(named: Path, folder: Path) -> None:
    run = open_run(str(named))
    names = names_of(run)
    labels = Labels(run.stages["panoptic"].parts(), run.things.parts(), "x")
    counts = {"num_things": K, "num_stuff": STUFF, "limits": run.limits}
    plain = PhotosOfLabels(run.index, labels, **counts)  # type: ignore[arg-type]
    photos = PhotosOfLabels(run.index, labels, **counts, renaming=names.renaming)  # type: ignore[arg-type]
    assert (photos.num_things, photos.num_stuff) == (3, 2) and photos.identity != plain.identity
    sample, old = photos.sample(0), plain.sample(0)
    kept = [BECOMES[c + 1] - 1 for c in old.classes.tolist() if c + 1 not in (3, 4)]  # neither noise nor grass
    assert sample.classes.tolist() == kept
    assert len(sample.masks) == len(kept) and sample.masks.any(axis=(1, 2)).all()
    things, void = old.semantic == 0, old.semantic == 255
    assert set(np.unique(sample.semantic)) <= {0, 1, 2, 255}
    assert (sample.semantic[~things] == old.semantic[~things]).all() and void.any()
    assert (sample.semantic[things] == 1).sum() > 0 < (sample.semantic[things] == 255).sum()  # grass, and noise


def test_the_training_is_another_one_for_other_names(named: Path, folder: Path) -> None:
    def fingerprints(**train: Any) -> dict[str, str]:
        config = run_config(folder, k=K, stuff=STUFF, shard_size=3, train={"steps": 5, **train})
        return {name: one.fingerprint for name, one in resolve_stages(config, open_run(str(named)).index).items()}

    plain, first = fingerprints(), fingerprints(names=True)
    table = open_run(str(named)).stages
    write_names(folder / "names.yaml", table, K, STUFF, {1: {"name": "dog"}})
    name_classes(str(named), str(folder / "names.yaml"))
    second = fingerprints(names=True)
    assert len({plain["train"], first["train"], second["train"]}) == 3
    for other in (first, second):
        assert {name: one for name, one in other.items() if name != "train"}.items() <= plain.items()
    (named / "names.yaml").unlink()
    with pytest.raises(ConfigError, match=r"train\.names: the run in .* has no names yet; give them with"):
        fingerprints(names=True)
    assert fingerprints() == plain


def test_the_stage_gives_the_training_the_names(named: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train import fit

    given: dict[str, Any] = {}

    class Result:
        loss = 1.0

    def record(photos: PhotosOfLabels, *_: object, config: dict[str, Any], **__: object) -> Result:
        given.update(config, things=photos.num_things, stuff=photos.num_stuff)
        return Result()

    monkeypatch.setattr(fit, "fit_panoptic", record)
    monkeypatch.setattr("pipeline.stages.train.fit_threads", lambda workers: nullcontext(1))
    config = run_config(folder, k=K, stuff=STUFF, shard_size=3, train={"steps": 5, "names": True})
    found = open_run(str(named))
    run = replace(found, config=config, definitions=define_stages(config))
    run.stages["train"] = resolve_stages(config, found.index)["train"]
    run.definitions["train"].fit(run, run.stages["train"])  # type: ignore[attr-defined]
    assert (given["things"], given["stuff"]) == (3, 2)
    assert {c["id"]: (c["name"], bool(c["isthing"])) for c in given["categories"]} == NEW


def test_the_command_trains_with_names(named: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(config: Any, **_: object) -> None:
        asked.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("pipeline.operations.run.run", stop)
    (folder / "run.yaml").write_text(run_config(folder, k=K, stuff=STUFF, train={"steps": 5}).to_yaml())
    assert "far enough" in refused("train", folder / "run.yaml", "--names")
    assert "far enough" in refused("train", folder / "run.yaml")
    assert [config.train.names for config in asked] == [True, False]
    rounds = ["--set", "self_training.rounds=1"]
    assert "leave out train.names" in refused("train", folder / "run.yaml", "--names", *rounds)


def test_a_checkpoint_goes_by_the_names_of_the_run_that_it_lies_in(named: Path, tmp_path: Path) -> None:
    assert names_of_checkpoint(f"{named}/train/0123456789ab").listed == names_of(open_run(str(named))).listed
    assert names_of_checkpoint(f"{named}/train_1/0123456789ab/").classes.things == K
    for elsewhere in (str(tmp_path / "model.pth"), f"{named}/clusters/0123456789ab", "model.pth"):
        with pytest.raises(ConfigError, match="is not in the folder of a run"):
            names_of_checkpoint(elsewhere)
    with pytest.raises(ConfigError, match="no run in"):
        names_of_checkpoint(str(tmp_path / "train" / "0123456789ab"))


def test_a_run_of_before_the_key_is_found_by_its_config_without_weights(folder: Path) -> None:
    latest = json.loads((folder / "run" / "latest.json").read_text())
    del latest["config"]["train"]["names"]
    latest["config"]["backbone"] |= {"name": "dino_vitb8", "weights": "/nowhere/vit.pth"}
    (folder / "run" / "latest.json").write_text(json.dumps(latest))
    sections = latest["config"]
    (folder / "same.yaml").write_text(json.dumps({**sections, "run": {"uri": str(folder / "run")}}))
    assert open_run(str(folder / "same.yaml")).stages == open_run(str(folder / "run")).stages


@pytest.mark.parametrize("kind", ["coco", "yolo", "hf", "webdataset", "labelstudio", "cityscapes"])
def test_every_format_has_the_names(named: Path, folder: Path, kind: str) -> None:
    found = json.loads(invoke("export", kind, named, "--output", folder / "out", "--names", "--json"))
    assert found["categories"] == {"things": 3, "stuff": 2}
    files = [file for file in (folder / "out").rglob("*") if file.is_file() and file.suffix not in (".png", ".jpg")]
    content = b"".join(file.read_bytes() for file in files)
    names = {b"cat", b"thing 5"} | (set() if kind == "yolo" else {b"grass", b"stuff 2"})
    assert all(name in content for name in names)
    assert not any(name in content for name in (b"thing 1", b"thing 3", b"stuff 1"))
