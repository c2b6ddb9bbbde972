"""A disk that fills up while parts are written: what was written is whole, and the rest comes when there is room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, load_config
from pipeline.errors import StageFailed
from pipeline.operations.run import run
from pipeline.stages.clusters import Clusters
from tests.integration.conftest import SHARDS, rows, write_config

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB at `tmp_path / "run"`; skipped where this process may not mount one."""
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_shards_and_a_run_with_room_does_them(
    small_disk: Path, scenes: Path, tmp_path: Path, labelled: Path
) -> None:
    config = load_config(str(write_config(scenes, tmp_path)))
    with pytest.raises(StageFailed, match=r"instances: \d of 8 shards are not done") as caught:
        run(config)
    assert all("No space left on device" in (receipt.error or "") for receipt in caught.value.failures)
    done = len(list(small_disk.glob("instances/*/part-*.parquet")))
    assert 0 < done == SHARDS - len(caught.value.failures)
    assert not list(small_disk.rglob(".tmp-*"))
    assert not (small_disk / "lease.json").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert run(config).computed == {"instances": SHARDS - done, "clusters": 1, "panoptic": SHARDS}
    for stage in ("instances", "panoptic"):
        assert rows(small_disk, stage) == rows(labelled, stage)


def test_a_fit_that_cannot_write_its_artifact_says_so(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact,) = Path(finished.run.uri).glob("clusters/*/artifact.json")
    artifact.unlink()

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(artifact))

    monkeypatch.setattr(Clusters, "fit", full)
    with pytest.raises(StageFailed, match=r"clusters: .*No space left on device: '.*artifact.json'"):
        run(finished)
