"""Kill what can be killed in the middle of a run: the rows end up as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.config import load_config
from pipeline.operations.run import run as run_stages
from tests.integration.conftest import DEADLINE_S, SHARDS, Start, finish, rows, write_config

STEGO = {
    "method": "stego",
    "classes": 4,
    "crops": "five",
    "max_images": 8,
    "batch_size": 2,
    "steps": 130,  # a checkpoint after 100
    "image_size": 160,
}
PHOTOS = 12  # of the scenes, a shard each, where a driver is killed in stage after stage
DATUS = {"method": "datus", "classes": 3, "fill_holes": "nearest"}


def parts(run: Path, stage: str) -> dict[Path, int]:
    """The parts of a stage, and when they were written."""
    return {part: part.stat().st_mtime_ns for part in run.glob(f"{stage}/*/part-*.parquet")}


def fitted(run: Path) -> bytes:
    """The weights or centroids that the semantic fit left."""
    (file,) = (file for name in ("head.safetensors", "centroids.npy") for file in run.glob(f"semantics_fit/*/{name}"))
    return file.read_bytes()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.005)


def wait_for_parts(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: len(parts(run, "instances")) >= count, process)


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL, until all of its workers have ended too; those of a run in this process stay until Ray takes them."""
    driver = psutil.Process(process.pid)
    family, started = driver.children(recursive=True), driver.create_time()
    workers = [worker for worker in workers_now() if worker.create_time() >= started]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive  # workers end with their driver
    for child in family:  # agents of a Ray of its own outlive it
        if child.is_running():
            child.kill()


def workers_now() -> list[psutil.Process]:
    """Ray processes below this one that hold an actor of a shard stage."""

    def is_worker(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return "Shards" in " ".join(process.cmdline())
        return False

    return [child for child in psutil.Process().children(recursive=True) if is_worker(child)]


def assert_same_rows(run: Path, undisturbed: Path, stages: tuple[str, ...] = ("instances", "panoptic")) -> None:
    for stage in stages:
        assert rows(run, stage) == rows(undisturbed, stage)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.slow
def test_killed_worker_killed_driver_ctrl_c_and_a_second_run(
    config_file: Path, tmp_path: Path, labelled: Path, start_u2label: Start, ray_address: str
) -> None:
    """One run folder survives, one after the other: SIGKILL of a driver with a Ray of its own, Ctrl-C of one that
    joined another, SIGKILL of a worker, and a second run of the same folder."""
    run, on_cluster = tmp_path / "run", ("run", str(config_file), "--address", ray_address)
    killed = start_u2label("run", str(config_file))
    wait_for_parts(run, 1, killed)
    assert workers_now()
    kill_driver(killed)
    assert (run / "lease.json").exists()  # nobody gave it back; the next run sees that its holder is dead

    interrupted = start_u2label(*on_cluster)
    done = len(list(run.glob("instances/*/part-*.parquet")))
    wait_for_parts(run, done + 1, interrupted)
    os.kill(interrupted.pid, signal.SIGINT)
    assert "run the same command again" in finish(interrupted, 130)
    assert not (run / "lease.json").exists()

    survivor = start_u2label(*on_cluster)
    done = len(list(run.glob("instances/*/part-*.parquet")))
    wait_for_parts(run, min(done + 1, SHARDS), survivor)
    workers = workers_now()
    assert workers
    for worker in workers:
        worker.kill()
    second = start_u2label(*on_cluster)
    assert f"in use by process {survivor.pid}" in finish(second, 2)
    finish(survivor, 0)
    assert_same_rows(run, labelled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("semantics", "killed_in"), [(STEGO, ("features", "semantics_fit", "semantics")), (DATUS, ("segments",))]
)
def test_a_driver_killed_in_each_stage_of_stuff(
    semantics: dict[str, object],
    killed_in: tuple[str, ...],
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_u2label: Start,
    ray_address: str,
) -> None:
    """SIGKILL in a stage of the photos, in the fit, in the class maps: what is done stays, the rest comes out alike."""
    scratch, run, undisturbed = (tmp_path / name for name in ("scratch", "run", "undisturbed"))
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    first = killed_in[0]
    stages = (first, "semantics_fit", "semantics")
    photos = tmp_path / "photos"
    photos.mkdir()
    for scene in sorted(scenes.iterdir())[:PHOTOS]:
        shutil.copy(scene, photos)
    config = write_config(photos, tmp_path, shard_size=1, semantics=semantics)
    command = ("run", str(config), "--stages", ",".join(stages), "--address", ray_address)

    def ready(stage: str) -> bool:
        return bool(parts(run, stage)) if stage != "semantics_fit" else any(run.glob(f"{stage}/*/checkpoint.*"))

    done: dict[Path, int] = {}
    for stage in killed_in:
        process = start_u2label(*command)
        wait_until(lambda stage=stage: ready(stage), process)  # type: ignore[misc]
        kill_driver(process)
        assert done.items() <= parts(run, "*").items()
        done = parts(run, "*")
        assert len(parts(run, stage)) < PHOTOS
    finish(start_u2label(*command), 0)
    assert done.items() <= parts(run, "*").items()
    assert not [path for path in scratch.iterdir() if "stego" in path.name]

    alone = load_config(str(config), [f"run.uri={undisturbed}"])
    assert run_stages(alone, stages=stages).computed == {first: PHOTOS, "semantics_fit": 1, "semantics": PHOTOS}
    assert_same_rows(run, undisturbed, (first, "semantics"))
    assert fitted(run) == fitted(undisturbed)
