"""Kill what can be killed in the middle of a run: the rows end up as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import SHARDS, rows

Start = Callable[..., subprocess.Popen[str]]
DEADLINE_S = 120


def wait_for_parts(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(list(run.glob("instances/*/part-*.parquet"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no part in time"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray processes of the run that hold an actor of the instances stage."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "InstanceShards" in " ".join(child.cmdline())]


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, output
    return output


@pytest.fixture
def undisturbed(config_file: Path, tmp_path: Path, start_u2label: Start) -> Path:
    run = tmp_path / "undisturbed"
    finish(start_u2label("run", str(config_file), "--set", f"run.uri={run}", "--set", "workers.size=1"), 0)
    return run


def assert_same_rows(run: Path, undisturbed: Path) -> None:
    for stage in ("instances", "panoptic"):
        assert rows(run, stage) == rows(undisturbed, stage)
    assert not list(run.rglob(".tmp-*"))


def test_killed_worker_killed_driver_and_ctrl_c(
    config_file: Path, tmp_path: Path, undisturbed: Path, start_u2label: Start
) -> None:
    """One run folder survives, one after the other: SIGKILL of the driver, Ctrl-C, SIGKILL of a worker."""
    run = tmp_path / "run"
    killed = start_u2label("run", str(config_file), "--set", "workers.size=1")
    wait_for_parts(run, 1, killed)
    family = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=DEADLINE_S)
    assert (run / "lease.json").exists()  # nobody gave it back; the next run sees that its holder is dead

    interrupted = start_u2label("run", str(config_file), "--set", "workers.size=1")
    done = len(list(run.glob("instances/*/part-*.parquet")))
    wait_for_parts(run, done + 1, interrupted)
    os.kill(interrupted.pid, signal.SIGINT)
    assert "run the same command again" in finish(interrupted, 130)
    assert not (run / "lease.json").exists()

    survivor = start_u2label("run", str(config_file), "--set", "workers.size=1")
    done = len(list(run.glob("instances/*/part-*.parquet")))
    wait_for_parts(run, min(done + 1, SHARDS), survivor)
    for worker in workers_of(survivor):
        worker.kill()
    finish(survivor, 0)
    assert_same_rows(run, undisturbed)
    psutil.wait_procs(family, timeout=30)


def test_two_runs_cannot_share_a_folder(config_file: Path, tmp_path: Path, start_u2label: Start) -> None:
    first = start_u2label("run", str(config_file))
    wait_for_parts(tmp_path / "run", 1, first)
    second = start_u2label("run", str(config_file))
    assert f"in use by process {first.pid}" in finish(second, 2)
    finish(first, 0)
