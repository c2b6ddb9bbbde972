"""From photos in a bucket to labels read by DuckDB, through jobs of a Ray head: each step as a user takes it."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.operations.status import run_status
from pipeline.store import storage
from tests.conftest import KEYS
from tests.integration.conftest import DEADLINE_S, SHARDS, rows
from tests.integration.ray_head import MARK, Head, ray_head

PANOPTIC_IMAGES = re.compile(r'ray_u2label_images_total\{.*stage="panoptic",status="ok"')
OPERATIONS = Path(__file__).resolve().parents[2] / "docs/operations.md"
TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def head(s3_endpoint: str) -> Iterator[Head]:
    """A head whose nodes reach the bucket by variables of their own: none of them comes from the one who submits."""
    with ray_head({**KEYS, "AWS_ENDPOINT_URL": s3_endpoint}) as started:
        yield started


def u2label(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"} | variables
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """What the command printed to stdout and stderr."""
    out, err = process.communicate(timeout=2 * DEADLINE_S)
    assert process.returncode == code, out + err
    return out, err


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_driver(head: Head) -> None:
    """SIGKILL to the `u2label run` of a job on this head."""
    mark = psutil.Process(head.process.pid).environ()[MARK]
    for process in psutil.process_iter(["cmdline"]):
        if "submitted.yaml" in (process.info["cmdline"] or []) and process.environ().get(MARK) == mark:
            process.kill()


def parts_of(stage: str) -> list[str]:
    return [name for folder in storage.list_subfolders(stage) for name in storage.list_folder(f"{stage}/{folder}")]


def wait_for_rest(config: list[str]) -> None:
    """Until the job that nobody follows any more has done all."""
    loaded = load_config(config[0], config[2::2])
    deadline = time.monotonic() + DEADLINE_S
    while any(stage.done < stage.shards for stage in run_status(loaded).stages):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def stages_of(status: str) -> dict[str, Any]:
    return {stage["stage"]: stage for stage in json.loads(status)["stages"]}


def documented_query(run: str) -> list[tuple[str, int]]:
    """What the Python of docs/operations.md finds in a run folder."""
    (block,) = re.findall(r"```python\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    *imports, query = ast.parse(textwrap.dedent(block).replace("s3://bucket/u2label", run)).body
    assert isinstance(query, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), OPERATIONS, "exec"), names)
    found: list[tuple[str, int]] = eval(compile(ast.Expression(query.value), OPERATIONS, "eval"), names).fetchall()
    return found


@pytest.mark.slow
def test_bucket_submit_watch_kill_submit_again_and_read(
    head: Head, s3_bucket: str, scenes: Path, config_file: Path, labelled: Path
) -> None:
    for photo in sorted(scenes.iterdir()):
        storage.write_bytes(f"{s3_bucket}/photos/{photo.name}", photo.read_bytes())
    config = [str(config_file), "--set", f"source.uri={s3_bucket}/photos", "--set", f"run.uri={s3_bucket}/run"]
    submit = ["submit", *config, "--address", head.address]

    planned = json.loads(finish(u2label("plan", *config, "--json"), 0)[0])
    assert planned["images"] is None  # there is no index yet
    killed = u2label(*submit, "--wait", "--json")
    instances = f"{s3_bucket}/run/instances"
    wait_until(lambda: bool(parts_of(instances)), killed)
    kill_driver(head)
    out, _ = finish(killed, 137)  # as a shell tells of SIGKILL
    assert (json.loads(out)["status"], json.loads(out)["exit_code"]) == ("FAILED", 137)
    done = stages_of(finish(u2label("status", *config, "--json"), 0)[0])["instances"]["done"]
    assert 1 <= done < SHARDS

    followed = u2label(*submit, "--follow")
    wait_until(lambda: len(parts_of(instances)) > done, followed)
    followed.send_signal(signal.SIGINT)
    out, err = finish(followed, 130)
    assert f"{SHARDS - done} of {SHARDS} shards to do" in out  # the job's log
    assert "tracked by git" in err or "no git checkout" in err
    assert "goes on\nfollow it by: ray job logs --follow --address" in err
    wait_for_rest(config)
    assert "shards to do" not in finish(u2label(*submit, "--follow"), 0)[0]
    status = stages_of(finish(u2label("status", *config, "--json"), 0)[0])
    assert [stage["done"] for stage in status.values()] == [SHARDS, 1, SHARDS]
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=10).read().decode()
    (line,) = [
        line for line in metrics.splitlines() if PANOPTIC_IMAGES.match(line) and f'run="{s3_bucket}/run"' in line
    ]
    assert float(line.rsplit(" ", 1)[1]) == status["panoptic"]["rows"]["ok"]

    stale = json.loads(finish(u2label("clean", *config, "--set", "clusters.k=3", "--json"), 0)[0])["stale"]
    assert {entry["path"].split("/")[0] for entry in stale} == {"clusters", "panoptic", "receipts"}
    assert json.loads(finish(u2label("clean", *config, "--yes", "--json"), 0)[0])["stale"] == []
    finish(u2label("report", f"{s3_bucket}/run", "--output", str(config_file.with_name("report.html"))), 0)
    assert "scene-00000.jpg" in config_file.with_name("report.html").read_text()
    found = documented_query(f"{s3_bucket}/run")
    assert sorted(found) == [(row["image_id"], len(row["segments"])) for row in rows(labelled, "panoptic")]
    for stage in ("instances", "panoptic"):
        fs, folder = storage.filesystem(status[stage]["folder"])
        tables = [pq.read_table(part, filesystem=fs) for part in sorted(fs.glob(f"{folder}/part-*.parquet"))]
        produced = [row for table in tables for row in table.to_pylist()]
        for row in (*produced, *(expected := rows(labelled, stage))):
            row.pop("uri", None)
        assert produced == expected


def test_a_head_with_a_token_and_a_config_that_its_cluster_cannot_hold(config_file: Path, tmp_path: Path) -> None:
    command = ["submit", str(config_file), "--set", "workers.size=99", "--wait"]
    with ray_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as head:
        command += ["--address", head.address]
        _, err = finish(u2label(*command, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64), 2)
        assert "wants its token" in err
        tokens = tmp_path / "token"
        tokens.write_text(TOKEN)
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tokens)}
        _, err = finish(u2label(*command, "--follow", "--json", **variables), 2)  # the exit code of the job
        assert "workers.size x workers.cpus asks for 99 CPUs" in err
        assert TOKEN not in err
