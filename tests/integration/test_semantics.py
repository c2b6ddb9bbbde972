"""Stuff by either method, from the scenes to panoptic parts in which every pixel is a thing, stuff or void."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Config, load_config
from pipeline.export.coco import export_coco
from pipeline.operations.run import run
from pipeline.operations.status import run_status
from tests.integration.conftest import SCENES, SHARDS, TREES, rows
from workers.masks import decode_panoptic_png

STEGO = ["semantics.method=stego", "semantics.classes=4", "semantics.steps=20", "semantics.image_size=160"]
SAMPLE = ["semantics.max_images=16"]
DATUS = ["semantics.method=datus", "semantics.classes=3"]
KMEANS = ["semantics.method=kmeans", "semantics.classes=3", "semantics.image_size=160", "semantics.sample_images=16"]


@pytest.fixture
def with_things(config_file: Path, labelled: Path) -> Path:
    """A config whose run already has its instances and clusters."""
    shutil.copytree(labelled, config_file.parent / "run")
    shutil.rmtree(config_file.parent / "run" / "panoptic")
    return config_file


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("overrides", "first"), [(STEGO, "features"), (DATUS, "segments")], ids=["stego", "datus"])
def test_stuff_from_photos_to_panoptic_parts(with_things: Path, overrides: list[str], first: str) -> None:
    config = load_config(str(with_things), overrides)
    assert run(config).computed == {
        "instances": 0,
        "clusters": 0,
        first: SHARDS,
        "semantics_fit": 1,
        "semantics": SHARDS,
        "panoptic": SHARDS,
    }
    check_labels(config)
    assert set(run(config).computed.values()) == {0}
    Path(run(config).stages["semantics"].part(2)).unlink()
    before = rows(Path(config.run.uri), "panoptic")
    assert run(config).computed["semantics"] == 1
    assert rows(Path(config.run.uri), "panoptic") == before
    *_, fit, _, panoptic = run_status(config).stages
    assert (fit.stage, fit.done, fit.rows) == ("semantics_fit", 1, {}) and (fit.fit_seconds or 0) > 0
    pixels = panoptic.pixels
    assert sum(pixels.values()) == SCENES * 160 * 160
    assert pixels["stuff"] > 0.3 * SCENES * 160 * 160


@pytest.mark.usefixtures("ray_session")
def test_things_of_merge_trees_over_stuff_of_patches(
    config_file: Path, labelled_by_trees: Path, tmp_path: Path
) -> None:
    """All stages of the methods for features that the published ones do not fit; two workers make the same parts."""
    config = load_config(str(config_file), [*TREES, *KMEANS])
    shutil.copytree(labelled_by_trees, config.run.uri)
    shutil.rmtree(Path(config.run.uri) / "panoptic")
    assert run(config).computed == {
        "instances": 0,
        "embedding_fit": 0,
        "things": 0,
        "clusters": 0,
        "patches": SHARDS,
        "conditioning": 1,
        "semantics_fit": 1,
        "semantics": SHARDS,
        "panoptic": SHARDS,
    }
    check_labels(config)
    folder = Path(config.run.uri)
    nested, things, panoptic = (rows(folder, stage) for stage in ("instances", "things", "panoptic"))
    for all_masks, chosen, label in zip(nested, things, panoptic, strict=True):
        assert set(chosen["rle"]) <= set(all_masks["rle"]) and len(chosen["rle"]) < len(all_masks["rle"])
        visible = sum(segment["is_thing"] for segment in label["segments"])
        assert visible + label["hidden_instances"] == len(chosen["rle"])
    assert SCENES < sum(len(row["rle"]) for row in things) < 3 * SCENES  # about two a photo
    assert [row["status"] for row in rows(folder, "patches")].count("ok") == 17
    assert set(run(config).computed.values()) == {0}

    two = load_config(str(config_file), [*TREES, *KMEANS, "workers.size=2", f"run.uri={tmp_path / 'two'}"])
    parts = ("instances", "things", "patches", "semantics", "panoptic")
    shutil.copytree(folder, two.run.uri, ignore=shutil.ignore_patterns(*parts))  # the fits stay
    assert {stage: number for stage, number in run(two).computed.items() if number} == dict.fromkeys(parts, SHARDS)
    for stage in parts:
        assert rows(Path(two.run.uri), stage) == rows(folder, stage)
    exported = export_coco(str(folder), str(folder), output=str(tmp_path / "coco"))
    assert exported.images == SCENES and exported.instances > SCENES


def check_labels(config: Config) -> None:
    folder = Path(config.run.uri)
    maps, panoptic = rows(folder, "semantics"), rows(folder, "panoptic")
    assert [row["image_id"] for row in maps] == [row["image_id"] for row in panoptic]
    assert len(maps) == SCENES
    k, classes = config.clusters.k, config.semantics.classes
    for row, labels in zip(panoptic, maps, strict=True):
        assert row["status"] == labels["status"] == "ok"
        semantic = np.asarray(Image.open(io.BytesIO(labels["labels"])))
        assert semantic.shape == (row["height"], row["width"])
        assert set(np.unique(semantic)) <= {*range(classes), 255}
        ids = decode_panoptic_png(row["panoptic"])
        assert {segment["id"] for segment in row["segments"]} == set(np.unique(ids)) - {0}
        for segment in row["segments"]:
            assert segment["is_thing"] == (segment["category"] <= k)
            if not segment["is_thing"]:
                assert (semantic[ids == segment["id"]] == segment["category"] - k - 1).all()


@pytest.mark.usefixtures("ray_session")
def test_features_of_a_sample_are_the_same_for_any_workers_and_after_a_loss(with_things: Path, tmp_path: Path) -> None:
    config = load_config(str(with_things), [*STEGO, *SAMPLE])
    summary = run(config, stages=["features"])
    found = rows(Path(config.run.uri), "features")
    statuses = [row["status"] for row in found]
    assert (statuses.count("ok"), statuses.count("not_sampled")) == (17, SCENES - 17)
    features = next(stage for stage in run_status(config).stages if stage.stage == "features")
    assert (features.images, features.rows, features.failed) == (17, {"ok": 17, "not_sampled": 7}, [])

    Path(summary.stages["features"].part(3)).unlink()
    assert run(config, stages=["features"]).computed == {"features": 1}
    assert rows(Path(config.run.uri), "features") == found

    two = load_config(str(with_things), [*STEGO, *SAMPLE, "workers.size=2", f"run.uri={tmp_path / 'two'}"])
    run(two, stages=["features"])
    assert rows(Path(two.run.uri), "features") == found


@pytest.mark.usefixtures("ray_session")
def test_methods_do_not_share_fingerprints_and_share_things(with_things: Path) -> None:
    from pipeline.engine.stage import index_folder
    from pipeline.sources.index import open_index
    from pipeline.stages.table import resolve_stages

    base = load_config(str(with_things))
    index = open_index(index_folder(base))
    tables = [resolve_stages(load_config(str(with_things), over), index) for over in ([], STEGO, DATUS)]
    assert len({table["instances"].fingerprint for table in tables}) == 1
    assert len({table["panoptic"].fingerprint for table in tables}) == 3
    changed = resolve_stages(load_config(str(with_things), [*STEGO, "semantics.crf=false"]), index)
    assert changed["semantics_fit"] == tables[1]["semantics_fit"]
    assert changed["semantics"].fingerprint != tables[1]["semantics"].fingerprint
    assert changed["panoptic"].fingerprint != tables[1]["panoptic"].fingerprint
