"""Own photos in the demo: what is refused before work, with which features, and what a few photos can bear."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError
from pipeline.operations.demo import photos as demo_photos
from pipeline.operations.demo.photos import Found, prepare, settings_for
from pipeline.operations.weights.files import BackboneFiles
from tests.conftest import SHARED

ROOT = Path(__file__).parents[4]
PHOTOS, WITHOUT = ROOT / "configs" / "photos.yaml", ROOT / "configs" / "demo.yaml"
PACKAGED = SHARED / "data" / "weights" / "dinov2_vits14_fp16.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), (90, 120, 60)).save(tmp_path / "photos" / "field.jpg")
    return tmp_path / "photos"


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_photos, "files_of", lambda name: BackboneFiles(name, []))


def test_without_weights_the_photos_get_the_features_of_the_scenes(
    folder: Path, tmp_path: Path, empty_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    own = prepare(folder, tmp_path / "run", config=PHOTOS, fallback=WITHOUT, weights=None)
    config = own.config()
    assert (own.features, config.backbone.name, config.train.steps) == ("patch-dct", "patch-dct", 0)
    assert (config.source.uri, config.run.uri) == (str(folder), str(tmp_path / "run"))
    printed = capsys.readouterr()
    assert "official, which downloads 88 MB" in printed.out + printed.err


def test_a_folder_without_a_readable_photo_is_refused(tmp_path: Path, empty_cache: None) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "run", config=PHOTOS, fallback=WITHOUT, weights=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(ConfigError, match=r"none of the first images .* a\.jpg"):
        prepare(tmp_path / "broken", tmp_path / "run", config=PHOTOS, fallback=WITHOUT, weights=None)


def test_weights_that_cannot_be_had_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    wanted = str(tmp_path / "no.safetensors")
    with pytest.raises(ConfigError, match=r"no\.safetensors"):
        prepare(folder, tmp_path / "run", config=PHOTOS, fallback=WITHOUT, weights=wanted)
    assert not (tmp_path / "run").exists()


def test_features_out_of_a_package_are_never_called_the_official_ones(folder: Path, tmp_path: Path) -> None:
    if not PACKAGED.is_file():
        pytest.skip("no weights beside the checkout")
    own = prepare(folder, tmp_path / "run", config=PHOTOS, fallback=WITHOUT, weights=str(PACKAGED))
    assert own.config().backbone.name == "dinov2_vits14"
    assert "official" not in own.features and "dinov2_vits14" in own.features.lower().replace(" ", "_")


def config_of(**semantics: object) -> Config:
    return load_config(str(PHOTOS), [f"semantics.{key}={value}" for key, value in semantics.items()])


@pytest.mark.parametrize(
    ("photos", "things", "k", "classes"),
    [(1, 0, 1, 4), (1, 3, 1, 4), (5, 18, 4, 20), (40, 400, 80, 54), (1000, 3000, 80, 54), (0, 0, 1, 1)],
)
def test_a_few_photos_get_as_many_classes_as_they_can_give(photos: int, things: int, k: int, classes: int) -> None:
    assert settings_for(config_of(), Found(photos, things)) == [f"clusters.k={k}", f"semantics.classes={classes}"]


def test_stego_has_too_little_to_learn_from_of_a_few_photos() -> None:
    config = config_of(method="stego")
    assert "semantics.method=kmeans" in settings_for(config, Found(7, 20))
    assert "semantics.method=kmeans" not in settings_for(config, Found(500, 900))
