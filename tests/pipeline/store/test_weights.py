"""Weights of a backbone in a store: fetched once a machine, and anew when they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.store import storage
from pipeline.store.weights import local_weights
from tests.fault_proxy import ACCESS_DENIED, FaultProxy, Rule


@pytest.fixture(autouse=True)
def _torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_an_object_is_fetched_once_until_it_changes(proxy: FaultProxy, s3_bucket: str) -> None:
    uri = f"{s3_bucket}/dino.pth"
    storage.write_bytes(uri, b"first")
    path = Path(local_weights(uri))
    assert (path.read_bytes(), path.name[13:]) == (b"first", "dino.pth")
    assert local_weights(uri) == str(path)
    assert proxy.count("GET", "dino.pth") == 1
    storage.write_bytes(uri, b"second")
    assert Path(local_weights(uri)).read_bytes() == b"second"
    storage.write_bytes(uri, b"third")
    assert not Path(local_weights(uri, download=False)).exists()


def test_what_is_local_stays_as_it_is() -> None:
    assert [local_weights(given) for given in ("official", "random:3", "/a/b.pth")] == [
        "official",
        "random:3",
        "/a/b.pth",
    ]


def test_what_cannot_be_read_is_named(proxy: FaultProxy, s3_bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"backbone\.weights: there is no {s3_bucket}/none\.pth"):
        local_weights(f"{s3_bucket}/none.pth")
    proxy.plan([Rule(ACCESS_DENIED, times=None)])
    with pytest.raises(ConfigError, match=r"backbone\.weights: cannot read s3://.*(Forbidden|AccessDenied)"):
        local_weights(f"{s3_bucket}/none.pth")
