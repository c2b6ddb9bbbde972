"""Kill what can be killed in the middle of a run: the rows end up as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.integration.conftest import DEADLINE_S, SHARDS, Start, finish, rows


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


def assert_same_rows(run: Path, undisturbed: Path) -> None:
    for stage in ("instances", "panoptic"):
        assert rows(run, stage) == rows(undisturbed, stage)
    assert not list(run.rglob(".tmp-*"))


def test_killed_worker_killed_driver_and_ctrl_c(
    config_file: Path, tmp_path: Path, labelled: Path, start_u2label: Start
) -> None:
    """One run folder survives, one after the other: SIGKILL of the driver, Ctrl-C, SIGKILL of a worker."""
    run = tmp_path / "run"
    killed = start_u2label("run", str(config_file), "--set", "workers.size=1")
    wait_for_parts(run, 1, killed)
    workers, family = workers_of(killed), psutil.Process(killed.pid).children(recursive=True)
    assert workers
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive  # workers end with their driver
    for process in family:  # Ray's agents outlive it
        if process.is_running():
            process.kill()
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
    workers = workers_of(survivor)
    assert workers
    for worker in workers:
        worker.kill()
    finish(survivor, 0)
    assert_same_rows(run, labelled)


def test_two_runs_cannot_share_a_folder(config_file: Path, tmp_path: Path, start_u2label: Start) -> None:
    first = start_u2label("run", str(config_file))
    wait_for_parts(tmp_path / "run", 1, first)
    second = start_u2label("run", str(config_file))
    assert f"in use by process {first.pid}" in finish(second, 2)
    finish(first, 0)
