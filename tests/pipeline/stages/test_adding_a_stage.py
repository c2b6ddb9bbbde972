"""The page on adding a stage is true: one new file with its program, and the commands know the stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.operations.demo.scenes import write_scenes
from tests.conftest import RAY_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A copy of the program with the stage of the page in it."""
    for package in ("model", "workers", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package)  # with its bytecode, which is quicker than to compile it
    page = (ROOT / "docs" / "adding-a-stage.md").read_text()
    name = re.search(r"`pipeline/stages/(\w+\.py)`", page)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert name
    (tmp_path / "pipeline" / "stages" / name[1]).write_text(code)
    return tmp_path


def u2label(program: Path, *arguments: str) -> Any:
    environment = {**os.environ, **RAY_ENVIRONMENT, "PYTHONPATH": str(program)}
    command = [sys.executable, "-m", "pipeline", *arguments, "--json"]
    done = subprocess.run(command, cwd=program, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_stage_is_one_new_file(program: Path, tmp_path: Path) -> None:
    write_scenes(str(tmp_path / "scenes"), 5, seed=1, size=(64, 64))
    (tmp_path / "scenes" / "images" / "bad.jpg").write_bytes(b"no photo")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"source: {{uri: {tmp_path}/scenes/images, shard_size: 3}}\nrun: {{uri: {tmp_path}/run}}\n"
        "backbone: {name: patch-dct, weights: 'random:0'}\nworkers: {size: 1}\n"
    )
    status = u2label(program, "run", str(config), "--stages", "brightness")
    (stage,) = (stage for stage in status["stages"] if stage["stage"] == "brightness")
    assert (stage["done"], stage["shards"], stage["rows"]) == (2, 2, {"ok": 5, "undecodable": 1})
    rows = [row for part in sorted(Path(stage["folder"]).iterdir()) for row in pq.read_table(part).to_pylist()]
    assert [row["brightness"] is None for row in rows] == [True] + [False] * 5
    assert all(0 < row["brightness"] < 255 for row in rows[1:])
    steps = {step["stage"]: step["pending"] for step in u2label(program, "plan", str(config))["steps"]}
    assert (steps["brightness"], steps["instances"]) == (0, 2)
    changed = ["--set", "decode.min_side=9"]
    stale = [entry["path"] for entry in u2label(program, "clean", str(config), *changed)["stale"]]
    assert f"brightness/{stage['fingerprint']}" in stale
