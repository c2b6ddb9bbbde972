"""A small source of generated scenes and ways to run and read it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from filelock import FileLock

from pipeline.config import Config, load_config
from pipeline.operations.demo.scenes import write_scenes
from pipeline.operations.run import run

SCENES, SHARD_SIZE, SHARDS = 24, 3, 8
DEADLINE_S = 120
TREES = [
    "instances.method=merge_tree",
    "merge_tree.image_size=160",
    "merge_tree.raster_side=160",
    "things.components=16",
]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes that all processes of a test session share, and `labelled` with them."""
    folder = shared_folder(tmp_path_factory) / "scenes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            write_scenes(str(folder), SCENES, seed=7, size=(160, 160))
    return folder / "images"


@pytest.fixture(scope="session")
def labelled(scenes: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the scenes; tests that change a run copy it."""
    return _finished_once(scenes, shared_folder(tmp_path_factory) / "labelled", [])


@pytest.fixture(scope="session")
def labelled_by_trees(scenes: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with things of merge trees."""
    return _finished_once(scenes, shared_folder(tmp_path_factory) / "labelled-by-trees", TREES)


def _finished_once(scenes: Path, folder: Path, overrides: list[str]) -> Path:
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(load_config(str(write_config(scenes, folder)), overrides))
    return folder / "run"


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that the processes of pytest-xdist have in common."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    return tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent


@pytest.fixture
def config_file(scenes: Path, tmp_path: Path) -> Path:
    """A configuration that labels the scenes in a few seconds into `tmp_path / "run"`."""
    return write_config(scenes, tmp_path)


@pytest.fixture
def finished(config_file: Path, labelled: Path) -> Config:
    """The configuration of a run of its own that is already finished."""
    shutil.copytree(labelled, config_file.parent / "run")
    return load_config(str(config_file))


def write_config(scenes: Path, folder: Path, *, shard_size: int = SHARD_SIZE, **sections: dict[str, Any]) -> Path:
    config = {
        "source": {"uri": str(scenes), "shard_size": shard_size},
        "run": {"uri": str(folder / "run")},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
        "maskcut": {"image_size": 160, "tau": 0.4, "max_masks": 2},
        "embedding": {"crop_size": 64},
        "clusters": {"k": 4},
        "workers": {"size": 1, "cpus": 1, "memory_gb": 0.6},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def ray_address(ray_session: None) -> str:
    """Where drivers of their own join the Ray of this test session, which costs half the time of starting another."""
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def start_u2label(tmp_path: Path) -> Start:
    """Start the command in a process group of its own, as a user's shell does."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_usage_threshold": "0.98",
    }
    environment.pop("RAY_ADDRESS", None)

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline", *arguments]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return start


def read_stage(run: Path, stage: str) -> pa.Table:
    """All parts of the one fingerprint of a stage, in order."""
    (folder,) = (run / stage).iterdir()
    return pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))])


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    return read_stage(run, stage).to_pylist()


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, output
    return output
