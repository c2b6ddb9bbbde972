"""Mistakes that are found before any work, each with the key, the value and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.operations.demo.scenes import write_scenes
from pipeline.operations.preflight import check_all, check_run_folder


def config(images: Path, run_folder: Path, /, **sections: dict[str, object]) -> Config:
    base: dict[str, dict[str, object]] = {
        "source": {"uri": str(images)},
        "run": {"uri": str(run_folder)},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
    }
    return Config.model_validate(base | sections)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_scenes(str(tmp_path), 1, seed=0, size=(64, 64))
    return tmp_path / "images"


def test_a_good_configuration_passes_and_leaves_nothing_behind(images: Path, tmp_path: Path) -> None:
    check_all(config(images, tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"backbone": {"name": "dino_vits8", "weights": "/nowhere.pth"}}, r"backbone.weights: no file '/nowhere.pth'"),
        ({"backbone": {"name": "dino_vits8", "weights": "random:0", "sha256": "0" * 64}}, r"backbone.sha256"),
        (
            {"maskcut": {"image_size": 16}, "backbone": {"name": "dino_vits16", "weights": "random:0"}},
            r"image_size: 16 px",
        ),
        ({"source": {"uri": "/nowhere/photos"}}, r"source.uri.*/nowhere/photos"),
    ],
)
def test_mistakes_are_refused(
    images: Path, tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_all(config(images, tmp_path / "run", **sections))


def test_weights_are_looked_at_by_a_process_that_finds_the_packages_wherever_it_stands(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "vit.pth"
    page.write_text("<!DOCTYPE html><html>sign in</html>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ConfigError, match=r"^backbone.weights: .*vit.pth"):
        check_all(config(images, tmp_path / "run", backbone={"name": "dino_vits8", "weights": str(page)}))


def test_a_check_of_weights_that_dies_says_so(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "vit.pth"
    weights.write_bytes(b"never read")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"^backbone.weights: .* looked at .*vit.pth ended with 1"):
        check_all(config(images, tmp_path / "run", backbone={"name": "dino_vits8", "weights": str(weights)}))


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"source.uri"):
        check_all(config(tmp_path / "empty", tmp_path / "run"))


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run.uri: cannot write to .*file/run.*choose a folder"):
        check_run_folder(str(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"run.uri: cannot write"):
        check_run_folder(str(tmp_path / "run"))


def test_a_bucket_that_is_missing_is_refused(images: Path, s3_bucket: str) -> None:
    with pytest.raises(ConfigError, match=r"run.uri: cannot write to s3://no-such-bucket/run"):
        check_run_folder("s3://no-such-bucket/run")
    with pytest.raises(ConfigError, match=r"source.uri.*no-such-bucket"):
        check_all(config(images, images.parent / "run", source={"uri": "s3://no-such-bucket/photos"}))
